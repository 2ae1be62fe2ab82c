"""Hyper-parameters that each data source starts from.

They were chosen on a split of the training examples, never on test examples: see
`benchmarks/choose_r8.py` and `benchmarks/choose_images.py`. `choice_cost` says what that choice
would cost if it were private. Where a source has no official test split, the choice looked at the
training examples of seed 0; with another seed, some of those are held out.
"""

import dataclasses
import pathlib

from dpfa_jax.core import ArgumentError


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a run uses where the user says nothing.

    Attributes:
      model: architecture, as `build_model` names it.
      features, num_heads, hidden_features, num_layers: of the encoder.
      patch_size: side of an image's patches; unused for text.
      max_length: tokens read of each text; unused for images.
      clip: L2 norm to which each example's gradient is clipped.
      batch: expected number of examples in a step.
      steps: number of steps.
      learning_rate: peak rate of Adam; it decays to 0 along half a cosine.
      first_moment, second_moment: decay rates of Adam's moments.
      average_decay: decay of the running average of the iterates, which is the model that is kept
        (free post-processing); 0 keeps the last iterate.
      configurations_tried: how many settings the choice compared; None where the values were
        carried over from another source without looking at this one's examples.
    """

    model: str = "transformer"
    features: int = 64
    num_heads: int = 4
    hidden_features: int = 64
    num_layers: int = 1
    patch_size: int = 4
    max_length: int = 64
    clip: float = 1.0
    batch: int = 512
    steps: int = 120
    learning_rate: float = 2e-2
    first_moment: float = 0.5
    second_moment: float = 0.999
    average_decay: float = 0.0
    configurations_tried: int | None = None


_TEXT = Defaults()
# A few thousand images carry logistic regression better than a transformer at epsilon 3.
_IMAGE = dataclasses.replace(_TEXT, model="linear", steps=200, configurations_tried=14)

DEFAULTS = {
    "r8": dataclasses.replace(_TEXT, configurations_tried=130),
    "movies": _TEXT,
    "mnist": dataclasses.replace(_IMAGE, batch=512, patch_size=7, learning_rate=1e-2),
    "digits": dataclasses.replace(_IMAGE, batch=256, patch_size=4, learning_rate=3e-2),
    "csv": _TEXT,
}


def defaults_for(source: str) -> Defaults:
    """Defaults of a source as `load_data` names it; a user's file has those of "csv".

    Errors: ArgumentError for an unknown source.
    """
    name = "csv" if pathlib.PurePath(source).suffix.lower() in (".csv", ".jsonl") else source
    if name not in DEFAULTS:
        raise ArgumentError(
            "data",
            source,
            "not a known source",
            "Pass r8, movies, mnist, digits, FILE.csv or FILE.jsonl.",
        )
    return DEFAULTS[name]
