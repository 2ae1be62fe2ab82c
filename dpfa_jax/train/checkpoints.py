"""Training state on the disk, bound to the ledger that paid for it."""

import dataclasses
import logging
import threading
import traceback
from pathlib import Path
from typing import Any

import jax

from dpfa_jax.train.errors import RunError

_LOG = logging.getLogger("absl")  # where Orbax logs
_KEPT = 2  # the newest, and one more should the machine fail while it is written
_LONGEST = 400  # characters of a foreign message


@dataclasses.dataclass(frozen=True)
class CheckpointNote:
    """What a checkpoint says of itself.

    Attributes:
      step: steps that shaped the state.
      ledger_head: hash of the ledger's last entry when the state was made; every step in the
        state was charged at or before it.
      seconds: time spent in steps so far.
      history: what the held-out examples showed so far, one dict a look.
    """

    step: int
    ledger_head: str
    seconds: float
    history: list[dict[str, float]]


class Checkpoints:
    """Checkpoints of one run, by Orbax: atomic, written while the next steps run."""

    def __init__(self, folder: Path):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._folder = folder.absolute()
        self._hook = threading.excepthook
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, cleanup_tmp_directories=True)
        try:
            self._manager = ocp.CheckpointManager(self._folder, options=options)
        except OSError as error:
            raise _unwritable(folder, error) from error
        # Orbax logs, with tracebacks, what `save` and `wait` raise anyway.
        self._log_level = _LOG.level
        _LOG.setLevel(logging.CRITICAL)
        threading.excepthook = self._in_thread

    def save(self, state: Any, note: CheckpointNote) -> None:
        """Starts writing; returns before it is on the disk. Errors: RunError.

        An error of the disk may show at the next `save` or at `wait`.
        """
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(state),
            note=self._ocp.args.JsonSave(dataclasses.asdict(note)),
        )
        try:
            self._manager.save(note.step, args=args, force=True)
        except Exception as error:  # Orbax passes on whatever its threads and its storage raised
            raise _unwritable(self._folder, error) from error

    def wait(self) -> None:
        """Returns when all that was saved is on the disk. Errors: RunError."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # whatever Orbax passes on
            raise _unwritable(self._folder, error) from error

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def latest(self, template: Any) -> tuple[Any, CheckpointNote] | None:
        """The newest state and its note, or None where there is none.

        `template` has the structure, shapes and dtypes of the state. Errors: RunError where a
        checkpoint cannot be read.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), template)
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardRestore(shapes), note=self._ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=args)
            note = CheckpointNote(**restored["note"])
        except Exception as error:  # whatever Orbax passes on
            raise RunError(
                self._folder / str(step),
                f"cannot be read ({_first_line(error)})",
                "Delete this folder to go on from the checkpoint before it; "
                "what was charged stays charged.",
            ) from error
        # Restored arrays may come back committed to a device; the host's copy is free of that.
        return jax.tree.map(jax.numpy.asarray, jax.device_get(restored["state"])), note

    def close(self) -> None:
        """Lets go of threads. Does not raise for checkpoints that failed; `wait` does."""
        try:
            self._manager.close()
        except Exception:  # reported by `wait` already, or the run failed before
            pass
        finally:
            _LOG.setLevel(self._log_level)
            if threading.excepthook == self._in_thread:
                threading.excepthook = self._hook

    def _in_thread(self, error: threading.ExceptHookArgs) -> None:
        """Keeps Orbax's threads from printing what `save` and `wait` raise anyway."""
        frames = traceback.walk_tb(error.exc_traceback)
        if not any("orbax" in frame.f_code.co_filename for frame, _ in frames):
            self._hook(error)


def _unwritable(place: Path, error: Exception) -> RunError:
    return RunError(
        place,
        f"a checkpoint cannot be written ({_first_line(error)})",
        "Make room on the disk, then resume (dpfa train --resume); earlier checkpoints are whole.",
    )


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    line = line.partition(" [tensorstore_spec")[0]
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."
