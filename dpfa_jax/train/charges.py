"""Steps are charged before they run, a block at a time, and never run unpaid."""

from collections.abc import Iterator

import jax
import numpy as np
from jaxtyping import Array, Key

from dpfa_jax.accounting import LedgerFile
from dpfa_jax.attention import charge
from dpfa_jax.dpsgd import DPSGDPlan
from dpfa_jax.noise import insecure_test_key

# One kill wastes at most about this share of the budget: the block at hand and the one whose
# checkpoint was still on its way to the disk.
_BLOCKS = 50


def default_block(steps: int) -> int:
    """Steps charged at once, and between two checkpoints: a fiftieth of the run."""
    return max(1, steps // _BLOCKS)


def charged_steps(ledger_file: LedgerFile) -> int:
    """Steps that the ledger has paid for, run or lost."""
    return sum(entry.count for entry in ledger_file.ledger.entries)


def steps_left(plan: DPSGDPlan, ledger_file: LedgerFile) -> int:
    """Steps of the plan that are not paid for yet.

    With correlated noise the last charge is rounded up to a whole cycle, beyond the plan's end.
    """
    return max(0, plan.steps - charged_steps(ledger_file))


def charge_block(
    ledger_file: LedgerFile, plan: DPSGDPlan, steps: int, *, insecure_seed: int | None, first: int
) -> Key[Array, " steps"]:
    """Charges `steps` steps durably, then gives their noise keys, fresh from the OS.

    Where `insecure_seed` is a number (the release says so too), keys come from it and from the
    index of the step, `first` on, and are the same in every run.

    Errors: BudgetExceededError, LedgerError or OSError; then no key was made.
    """
    if insecure_seed is None:
        return charge(ledger_file, plan.release, count=steps)[1]
    ledger_file.charge(plan.release, count=steps)
    seed_key = insecure_test_key(insecure_seed)
    return jax.vmap(lambda step: jax.random.fold_in(seed_key, step))(
        np.arange(first, first + steps, dtype=np.uint32)
    )


def index_batches(
    plan: DPSGDPlan, steps: int, *, insecure_seed: int | None, first: int, charged: int
) -> Iterator[np.ndarray]:
    """Poisson batches for `steps` steps, `first` on; from OS entropy unless a seed is given.

    `charged` steps were paid for before them: where batches are cyclic, that number tells whose
    turn it is, so that lost steps count as taken.
    """
    if insecure_seed is None:
        yield from plan.index_batches(np.random.default_rng(), steps, first_step=charged)
        return
    # A resumed run draws what the run that was cut off would have drawn.
    rng = np.random.default_rng([insecure_seed, 1])
    every = plan.index_batches(rng, first + steps, first_step=0)
    for step, indices in enumerate(every):
        if step >= first:
            yield indices
