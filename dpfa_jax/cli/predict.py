"""`dpfa predict`: answers of a trained model. The inputs it is asked about are not protected."""

import dataclasses
import json
from pathlib import Path

import tyro

from dpfa_jax.cli.entry import DONE
from dpfa_jax.core import ArgumentError
from dpfa_jax.core.texts import is_unicode


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """Classify texts with the model of a finished run.

    The privacy of training covers the training examples. It does not cover the texts you ask about.

    Attributes:
      texts: what to classify; quote each.
      model: folder of the run.
      file: one text a line, instead of (or besides) texts on the command line; blank lines are
        left out.
      json: print one JSON object a line, with the probability of every class.
    """

    texts: tyro.conf.Positional[tuple[str, ...]] = ()
    model: Path = dataclasses.field(kw_only=True)
    file: Path | None = None
    json: bool = False


def run(arguments: list[str]) -> int:
    """Prints one line a text: class, probability, text."""
    config = tyro.cli(PredictConfig, prog="dpfa predict", args=arguments)
    texts = list(config.texts)
    if config.file is not None:
        texts += _lines(config.file)
    if not texts:
        raise ArgumentError("texts", (), "nothing to classify", "Pass texts, or --file FILE.")
    for text in texts:
        if not text.strip():
            raise ArgumentError(
                "texts", text, "holds nothing to classify", "Pass texts with at least one word."
            )
        if not is_unicode(text):
            raise ArgumentError("texts", text, "not UTF-8", "Pass it in UTF-8, or by --file.")
    from dpfa_jax.train.saved_model import load_model  # heavy: only once the arguments make sense

    model = load_model(config.model)
    if model.kind != "text":
        raise ArgumentError(
            "model",
            str(config.model),
            "reads images, not texts",
            "Use dpfa_jax.train.load_model(folder).probabilities(images) from Python.",
        )
    for text, row in zip(texts, model.probabilities(texts), strict=True):
        best = int(row.argmax())
        if config.json:
            shares = dict(zip(model.class_names, map(float, row), strict=True))
            answer = {"text": text, "class": model.class_names[best], "probabilities": shares}
            print(json.dumps(answer, ensure_ascii=False))
        else:
            shown = text if len(text) <= 60 else text[:59] + "…"
            print(f"{model.class_names[best]:<12} {100 * row[best]:5.1f} %  {shown}")
    return DONE


def _lines(file: Path) -> list[str]:
    """Its lines that are not blank. Errors: ArgumentError where it is not UTF-8; OSError."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ArgumentError("file", str(file), "not UTF-8", "Save it as UTF-8.") from None
    return [line for line in lines if line.strip()]
