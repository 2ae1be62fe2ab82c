"""Checkpoints for a training loop of one's own: a state that a ledger has paid for, and no key."""

import os
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from dpfa_jax.accounting import LedgerFile
from dpfa_jax.core import LedgerError
from dpfa_jax.dpsgd import DPSGDPlan, DPState, restarted
from dpfa_jax.train.checkpoints import CheckpointNote, Checkpoints


class Resumed(NamedTuple):
    """What a loop goes on from.

    Attributes:
      state: the newest that was saved; the first one where none was.
      charged: steps of the plan that the ledger has paid for, those that were lost among them.
        Batches go on from `first_step=charged`.
      lost: charged steps that did not shape `state`. They stay charged: what they drew may have
        been seen. (With correlated noise the last charge is rounded up to a cycle.)
      left: steps that may still be charged.
    """

    state: DPState
    charged: int
    lost: int
    left: int


class StateCheckpoints:
    """States of `make_dp_step` on the disk, bound to the ledger file that paid for them.

    Noise keys are not saved. `charge` draws new ones, so a step that is taken again after a crash
    never has the key of the one that was lost, and is paid for again. Nor is past noise saved
    (`noise_bands` > 1), which is secret: it starts afresh. One process at a time, and one ledger
    file a model: charges of two models with one release cannot be told apart. A loop::

        with LedgerFile.open(path) as ledger, StateCheckpoints(folder, plan) as checkpoints:
            begun = checkpoints.restore(dp.init(params), ledger)
            state, rng = begun.state, np.random.default_rng()
            batches = plan.index_batches(rng, begun.left, first_step=begun.charged)
            for block in itertools.batched(batches, 10 * noise_bands):
                ledger, noise_keys = charge(ledger, plan.release, count=len(block))
                for indices, noise_key in zip(block, noise_keys, strict=True):
                    batch, is_real = take_batch(examples, indices)
                    state = dp.step(state, batch, is_real, noise_key)
                checkpoints.save(state, ledger)

    A crash loses what is charged and not saved, at most two blocks, and no more is ever charged
    than the plan's epsilon is of. With correlated noise a block is whole cycles of `noise_bands`
    steps: every charge is rounded up to cycles, so that b single steps would be paid for as b
    cycles, and the plan's steps be used up after a b-th of them.

    Args:
      folder: of the checkpoints, the newest two; made where it is missing.
      plan: what the states were trained under.

    Errors: RunError where the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], plan: DPSGDPlan):
        self._plan = plan
        self._checkpoints = Checkpoints(Path(folder))
        self._newest = -1

    def restore(self, first: DPState, ledger_file: LedgerFile) -> Resumed:
        """The newest state, or `first` where none was saved.

        Args:
          first: what `init` gives for the same parameters: structure, shapes and dtypes.
          ledger_file: the one that was charged.

        Errors: LedgerError where the ledger does not hold the charges that the state was saved
        with (it was rolled back, or is another's); RunError for a checkpoint that cannot be read.
        """
        found = self._checkpoints.latest(_released(first))
        state = restarted(first)
        if found is not None:
            saved, note = found
            ledger_file.require_head(note.ledger_head)
            state = saved._replace(
                step=np.asarray(saved.step, np.int32), noise_memory=state.noise_memory
            )
            self._newest = int(state.step)
        charged = self._charged(state, ledger_file)
        left = max(0, self._plan.steps - charged)
        return Resumed(state, charged, charged - int(state.step), left)

    def save(self, state: DPState, ledger_file: LedgerFile) -> None:
        """Starts writing `state`, once; returns before it is on the disk.

        Errors: LedgerError for a state with more steps than the ledger has paid for, or fewer than
        the newest saved; RunError where it cannot be written, which may show at the next call or on
        leaving `with`.
        """
        self._charged(state, ledger_file)
        if int(state.step) == self._newest:
            return
        if int(state.step) < self._newest:
            raise LedgerError(
                f"state.step = {int(state.step)}: a state with {self._newest} steps is saved here "
                "already. Go on from what restore gives, or save into another folder."
            )
        self._newest = int(state.step)
        note = CheckpointNote(int(state.step), ledger_file.head, 0.0, [])
        self._checkpoints.save(_released(state), note)

    def close(self) -> None:
        """Waits until all is on the disk. Errors: RunError."""
        try:
            self._checkpoints.wait()
        finally:
            self._checkpoints.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _charged(self, state: DPState, ledger_file: LedgerFile) -> int:
        charged = ledger_file.ledger.count_of(self._plan.release)
        if charged < int(state.step):
            raise LedgerError(
                f"path = {ledger_file.path!r}: {charged} steps of this plan are charged, but the "
                f"state has {int(state.step)}. Pass the ledger that paid for them, and the plan."
            )
        return charged


def _released(state: DPState) -> DPState:
    return state._replace(noise_memory=())
