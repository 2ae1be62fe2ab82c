"""That a run goes on with the examples it was started with."""

import hashlib
import json
from pathlib import Path

import numpy as np

from dpfa_jax.train import atomic
from dpfa_jax.train.data import ClassificationData
from dpfa_jax.train.errors import RunError

# Beside the training state, and nowhere else. The hash of private examples is private too: whoever
# has it can test guesses of them. It is in no report, no ledger and no saved model.
_FILE = "private-data.sha256"


def require_same_data(checkpoints: Path, data: ClassificationData, *, step: int) -> None:
    """Notes the training examples of a run at its start; afterwards refuses all others.

    Args:
      checkpoints: folder of the training state.
      data: what the run is about to go on with.
      step: updates that shaped the state so far; after the first, a missing note is refused too.

    Errors: RunError.
    """
    file, now = checkpoints / _FILE, _digest(data)
    try:
        before = file.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        if step:
            raise RunError(
                file,
                "is missing, so nobody knows whether the training examples are the same",
                "Restore it from a copy, or start a new run with another --out.",
            ) from None
        _write(file, now)
        return
    except (OSError, ValueError) as error:
        raise RunError(file, f"cannot be read ({error})", "Restore it from a copy.") from error
    if before != now:
        raise RunError(
            checkpoints.parent,
            f"was started with other training examples than {data.name!r} holds now",
            "Restore the data as they were, or start a new run with another --out.",
        )


def _write(file: Path, digest: str) -> None:
    try:
        atomic.write_bytes(file, f"{digest}\n".encode())
    except OSError as error:
        raise RunError(file, f"cannot be written ({error.strerror})", "Make room.") from error


def _digest(data: ClassificationData) -> str:
    """SHA-256 over class names, inputs and labels of the training examples."""
    digest = hashlib.sha256(json.dumps(list(data.class_names)).encode())
    for array in (data.train_inputs, data.train_labels):
        # Type and shape first: no two pairs of arrays then give the same stream of bytes.
        digest.update(json.dumps([array.dtype.str, array.shape]).encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
