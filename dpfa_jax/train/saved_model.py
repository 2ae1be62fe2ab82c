"""A trained model on the disk, and its answers to new inputs."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from dpfa_jax.train import atomic
from dpfa_jax.train.data import ClassificationData, text_encoder, token_embeddings
from dpfa_jax.train.errors import RunError
from dpfa_jax.train.models import Classifier, Params, build_model

FORMAT = 1
_TOKENIZER = "all-MiniLM-L6-v2"
_PARAMETERS, _DESCRIPTION = "parameters.npz", "model.json"


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model that answers.

    Attributes:
      class_names: in the order of the columns of `probabilities`.
      kind: "text" or "image".
      probabilities: raw texts or images -> (B, classes) float32.
      description: what `save_model` wrote beside the parameters.
    """

    class_names: tuple[str, ...]
    kind: str
    probabilities: Callable[[Sequence[Any]], Float[np.ndarray, "B C"]]
    description: dict[str, Any]


def save_model(
    folder: Path,
    classifier: Classifier,
    sizes: dict[str, int],
    params: Params,
    data: ClassificationData,
    promise: dict[str, Any],
) -> None:
    """Writes parameters and what is needed to use them; public tables are named, not copied.

    `sizes` are the classifier's, as `build_model` takes them; `promise` says under which epsilon
    and delta the parameters were trained. Errors: RunError.
    """
    description = {
        "format": FORMAT,
        "model": classifier.name,
        "sizes": sizes,
        "kind": data.kind,
        "tokenizer": _TOKENIZER if data.kind == "text" else None,
        "input_shape": list(data.train_inputs.shape[1:]),
        "class_names": list(data.class_names),
        "promise": promise,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{_PARAMETERS}.part"
        with part.open("wb") as stream:
            arrays: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in params.items()}
            np.savez(stream, **arrays)
        part.replace(folder / _PARAMETERS)
        atomic.write_json(folder / _DESCRIPTION, description)
    except OSError as error:
        raise RunError(folder, f"cannot be written ({error.strerror})", "Make room.") from error


def load_model(run: Path) -> SavedModel:
    """The model of a run folder, or of its `model` folder. Errors: RunError, DataError."""
    folder = run if (run / _DESCRIPTION).exists() else run / "model"
    try:
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        with np.load(folder / _PARAMETERS, allow_pickle=False) as stored:
            params = {name: jax.numpy.asarray(stored[name]) for name in stored.files}
        names = tuple(description["class_names"])
        shape = tuple(description["input_shape"])
        kind, name, sizes = description["kind"], description["model"], description["sizes"]
    except FileNotFoundError:
        raise RunError(
            run, "holds no trained model", "Pass --model with the folder of a finished run."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(folder, f"cannot be read ({error})", "Train again.") from error
    if description.get("format") != FORMAT or kind not in ("text", "image"):
        raise RunError(folder, "of a format that this version does not know", "Update the library.")
    data = _shell(kind, shape, names)
    classifier = build_model(name, data, **sizes)
    expected = jax.eval_shape(lambda: classifier.init(0))
    for path, leaf in expected.items():
        if path not in params or params[path].shape != leaf.shape:
            raise RunError(folder, f"parameter {path!r} is missing or misshapen", "Train again.")
    logits = jax.jit(lambda inputs: jax.nn.softmax(classifier.logits(params, inputs)))

    def probabilities(raw: Sequence[Any]) -> np.ndarray:
        return np.asarray(logits(data.encode(raw)))

    return SavedModel(names, kind, probabilities, description)


def _shell(kind: str, shape: tuple[int, ...], class_names: tuple[str, ...]) -> ClassificationData:
    """Data without examples: all that a model is built from."""
    text = kind == "text"
    inputs = np.zeros((0, *shape), np.int32 if text else np.float32)
    labels = np.zeros((0,), np.int32)
    return ClassificationData(
        name="saved model",
        train_inputs=inputs,
        train_labels=labels,
        test_inputs=inputs,
        test_labels=labels,
        class_names=class_names,
        kind=kind,
        token_embeddings=token_embeddings() if text else None,
        encode=text_encoder(shape[0]) if text else lambda raw: np.asarray(raw, np.float32),
        notes=(),
    )
