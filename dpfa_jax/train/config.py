"""Settings of one training run, from the command line, a JSON or a TOML file."""

import dataclasses
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.core.texts import is_unicode
from dpfa_jax.release import AdaptiveClipping
from dpfa_jax.train.data.tokens import LONGEST
from dpfa_jax.train.models import MODELS

# Where a run lives and how it is entered; not part of what it computes.
PLACE = ("out", "resume", "config")
CLIPPING = ("flat", "per-layer")
_ADAPTIVE = ("quantile", "learning_rate", "budget_share")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Train a classifier under differential privacy and write a report, a ledger and the model.

    Attributes:
      data: r8, mnist, digits, movies (whose archive you fetch first: the error says how), or the
        path of a .csv or .jsonl file.
      text_column: column of a file that holds the text.
      label_column: column of a file that holds the class.
      class_names: public names of a file's classes; read from the file, and so made public, where
        not given.
      model: architecture; the data source's own where not given.
      epsilon: privacy budget. Smaller is more private; 3 is a common upper end.
      delta: chance that the promise of epsilon fails; below 1 / number of examples.
      clip: L2 norm to which each example's gradient is clipped; the first one where it adapts.
      clipping: flat clips an example's whole gradient to `clip`; per-layer clips the part of each
        parameter, all together to `clip`.
      adaptive_clipping: let clip norms follow a quantile of the gradients' norms, estimated
        privately within the same epsilon.
      clip_quantile: share of the examples that adaptive clipping leaves unclipped; 0.5 where not
        given.
      clip_learning_rate: how fast adaptive clip norms move; 0.2 where not given.
      clip_budget_share: share of the budget that their estimate takes; 0.01 where not given.
      noise_bands: steps over which the noise is correlated, so that it partly cancels (banded
        matrix factorisation); 1 is independent noise.
      batch: expected number of examples in a step (Poisson sampling).
      steps: number of steps; the noise is calibrated to them.
      learning_rate: peak learning rate of the optimizer.
      max_length: tokens read of each text; at most 65536.
      micro_batch: examples whose gradients are held in memory at once.
      checkpoint_every: steps between two checkpoints, which is also how many are charged at once.
      evaluate_every: steps between two looks at the held-out examples.
      seed: of the initial weights and the data split. Never of the noise.
      out: folder of the run; runs/<data>-<time> where not given.
      resume: go on with the run in --out after an interruption.
      config: JSON or TOML file with any of these settings; flags override it.
      nonprivate_twin: train a second model without privacy, to compare; its figures are not
        private.
      insecure_test_noise: noise and batches from --seed. Protects nobody; for tests only.
    """

    data: str = "r8"
    text_column: str | None = None
    label_column: str | None = None
    class_names: tuple[str, ...] | None = None
    model: str | None = None
    epsilon: float = 3.0
    delta: float = 1e-5
    clip: float | None = None
    clipping: Literal["flat", "per-layer"] = "flat"
    adaptive_clipping: bool = False
    clip_quantile: float | None = None
    clip_learning_rate: float | None = None
    clip_budget_share: float | None = None
    noise_bands: int = 1
    batch: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    max_length: int | None = None
    micro_batch: int | None = None
    checkpoint_every: int | None = None
    evaluate_every: int | None = None
    seed: int = 0
    out: Path | None = None
    resume: bool = False
    config: Path | None = None
    nonprivate_twin: bool = False
    insecure_test_noise: bool = False

    def check(self) -> None:
        """Refuses numbers that no run could use. Errors: ArgumentError."""
        self._check_texts()
        if self.model is not None:
            checks.choice("model", self.model, MODELS)
        checks.positive("epsilon", self.epsilon)
        checks.delta("delta", self.delta)
        checks.count("seed", self.seed, minimum=0)
        for name in ("clip", "learning_rate"):
            if getattr(self, name) is not None:
                checks.positive(name, getattr(self, name))
        for name in ("batch", "steps", "micro_batch", "checkpoint_every", "evaluate_every"):
            if getattr(self, name) is not None:
                checks.count(name, getattr(self, name))
        checks.choice("clipping", self.clipping, CLIPPING)
        checks.count("noise_bands", self.noise_bands)
        self._check_adaptive()
        if self.max_length is not None:
            checks.count("max_length", self.max_length, minimum=2, maximum=LONGEST)
        if self.resume and self.out is None:
            raise ArgumentError(
                "resume", True, "no run to go on with", "Pass --out with the folder of the run."
            )

    def adaptive(self) -> AdaptiveClipping | None:
        """How clip norms adapt; None where they are fixed. Errors: ArgumentError."""
        if not self.adaptive_clipping:
            return None
        asked = {name: getattr(self, f"clip_{name}") for name in _ADAPTIVE}
        try:
            return AdaptiveClipping(**{k: v for k, v in asked.items() if v is not None})
        except ArgumentError as error:
            name = f"clip_{error.parameter}"
            raise ArgumentError(name, error.value, error.problem, error.advice) from error

    def _check_texts(self) -> None:
        """Ledger and report hold these in UTF-8: refused here rather than after the training."""
        names = ("data", "text_column", "label_column", "model", "out")
        texts = [(name, getattr(self, name)) for name in names]
        texts += [("class_names", name) for name in self.class_names or ()]
        for name, text in texts:
            if text is not None and not is_unicode(str(text)):
                raise ArgumentError(name, str(text), "not UTF-8", "Rename it.")

    def _check_adaptive(self) -> None:
        self.adaptive()
        for name in (f"clip_{part}" for part in _ADAPTIVE):
            if not self.adaptive_clipping and getattr(self, name) is not None:
                raise ArgumentError(
                    name,
                    getattr(self, name),
                    "clip norms are fixed, so it would change nothing",
                    "Pass --adaptive-clipping too, or leave it out.",
                )
        if self.adaptive_clipping and self.noise_bands > 1:
            raise ArgumentError(
                "noise_bands",
                self.noise_bands,
                "the noise of past steps has the scale of their clip norms, and these adapt; "
                "no accountant here covers both together",
                "Pass --adaptive-clipping or --noise-bands, not both.",
            )

    def settings(self) -> dict[str, Any]:
        """What the run computes, as JSON values; its place on the disk is left out."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in PLACE}


def from_settings(settings: dict[str, Any], source: object) -> TrainConfig:
    """A config from JSON or TOML values; `-` and `_` in names are the same.

    Errors: ArgumentError for a name that is no setting or a value of the wrong type.
    """
    types_of = typing.get_type_hints(TrainConfig)
    values = {}
    for written, value in settings.items():
        name = written.replace("-", "_")
        if name not in types_of or name in ("resume", "config"):
            known = ", ".join(known for known in types_of if known not in ("resume", "config"))
            raise ArgumentError(
                written, value, f"not a setting (in {source})", f"The settings are: {known}."
            )
        values[name] = _converted(name, value, types_of[name])
    return TrainConfig(**values)


def read_config(path: Path) -> TrainConfig:
    """A config from a .json or .toml file; what it leaves out keeps its default.

    Errors: ArgumentError where the file is missing, malformed, or names an unknown setting.
    """
    if path.suffix not in (".json", ".toml"):
        raise ArgumentError("config", str(path), "neither .json nor .toml", "Rename the file.")
    try:
        text = path.read_text(encoding="utf-8")
        settings = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ArgumentError("config", str(path), error.strerror or "unreadable", "") from error
    except ValueError as error:
        raise ArgumentError("config", str(path), f"malformed ({error})", "Mend it.") from error
    except RecursionError:
        raise ArgumentError("config", str(path), "nested too deeply", "Mend it.") from None
    if not isinstance(settings, dict):
        raise ArgumentError("config", str(path), "not a table of settings", 'Write {"epsilon": 3}.')
    return from_settings(settings, path)


def _converted(name: str, value: Any, annotation: Any) -> Any:
    if isinstance(annotation, types.UnionType):
        if value is None:
            return None
        (annotation,) = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    if typing.get_origin(annotation) is Literal:
        annotation = str  # `check` knows the options
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return checks.real(name, value)
    if annotation is Path and isinstance(value, str):
        return Path(value)
    if annotation == tuple[str, ...] and isinstance(value, list):
        texts = tuple(part for part in value if isinstance(part, str))
        if len(texts) == len(value):
            return texts
    if type(value) is not annotation:
        raise ArgumentError(
            name,
            value,
            f"not of type {getattr(annotation, '__name__', annotation)}",
            "Correct it in the config file.",
        )
    return value
