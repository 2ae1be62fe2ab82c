"""The ledger of a run: made with what the run promises, and compared with it ever after."""

import json
from typing import Any

from dpfa_jax.accounting import Budget, LedgerFile
from dpfa_jax.core import LedgerError
from dpfa_jax.train.job import Job
from dpfa_jax.train.options import privacy_options
from dpfa_jax.train.run_folder import RunFolder

_LOCK_SECONDS = 2.0


def create_run_ledger(folder: RunFolder, job: Job) -> str:
    """A new ledger in the folder, and its head. Errors: LedgerError."""
    with LedgerFile.create(
        folder.ledger,
        budget=_budget(job),
        metadata=_metadata(job),
        insecure_test_noise=job.config.insecure_test_noise,
    ) as file:
        return file.head


def open_run_ledger(folder: RunFolder, job: Job) -> LedgerFile:
    """The ledger that the run in `folder` began with and has reported, whole so far.

    Errors: LedgerError where it promises something else, belongs to another run, or has lost
      charges that a report counts; RunError where settings or report do not name its head.
    """
    file = LedgerFile.open(folder.ledger, lock_timeout_seconds=_LOCK_SECONDS)
    try:
        for name, found, due in (
            ("budget", file.budget, _budget(job)),
            ("metadata", file.metadata, _metadata(job)),
            ("insecure_test_noise", file.insecure_test_noise, job.config.insecure_test_noise),
        ):
            if found != due:
                raise LedgerError(
                    f"path = {file.path!r}: {name} = {found!r}, but the run has {due!r}: it is "
                    "another run's ledger. Restore this run's own from a copy."
                )
        heads = folder.ledger_heads()
        file.refresh()  # a run that ended while this one opened the file has reported more
        for head in heads:
            file.require_head(head)
    except BaseException:
        file.close()
        raise
    return file


def _budget(job: Job) -> Budget:
    return Budget(job.config.epsilon, job.config.delta)


def _metadata(job: Job) -> dict[str, Any]:
    metadata = {"purpose": "dpfa train", "data": job.data.name, **privacy_options(job.plan)}
    return json.loads(json.dumps(metadata))  # as it comes back from the file
