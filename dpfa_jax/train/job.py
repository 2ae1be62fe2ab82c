"""All that is decided before the first step of a run, and refused before anything is written."""

import dataclasses
from typing import Any

import jax
import optax

from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.dpsgd import DPSGDPlan
from dpfa_jax.dpsgd.plan import DEFAULT_MICRO_BATCH_SIZE
from dpfa_jax.train.charges import default_block
from dpfa_jax.train.config import TrainConfig
from dpfa_jax.train.data import ClassificationData, load_data
from dpfa_jax.train.defaults import Defaults, defaults_for
from dpfa_jax.train.feasible import require_signal
from dpfa_jax.train.models import Classifier, Params, build_model
from dpfa_jax.train.optimizer import build_optimizer

_LOOKS = 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a run with nothing left open.

    Attributes:
      chosen: defaults of the data source, overridden by what was asked for.
      micro_batch: examples whose gradients are held in memory at once.
      checkpoint_every: steps between two checkpoints, charged at once.
      evaluate_every: steps between two looks at the held-out examples.
    """

    chosen: Defaults
    micro_batch: int
    checkpoint_every: int
    evaluate_every: int


@dataclasses.dataclass(frozen=True)
class Job:
    """One run, ready to start.

    Attributes:
      config: as asked for.
      settings: as resolved.
      data: examples.
      classifier: the model as functions.
      params: its first parameters.
      optimizer: receives the noised gradient.
      plan: sampling, clipping, noise and release.
    """

    config: TrainConfig
    settings: Settings
    data: ClassificationData
    classifier: Classifier
    params: Params
    optimizer: optax.GradientTransformation
    plan: DPSGDPlan

    @property
    def insecure_seed(self) -> int | None:
        """The seed of noise and batches in an insecure test run; None in a real one."""
        return self.config.seed if self.config.insecure_test_noise else None

    def resolved(self) -> dict[str, Any]:
        """What a resumed run must find unchanged, as JSON values."""
        settings = dataclasses.asdict(self.settings)
        strategy = self.plan.release.noise_strategy
        if len(strategy) > 1:
            settings["noise_strategy"] = list(strategy)
        return {
            **settings.pop("chosen"),
            **settings,
            "examples": len(self.data.train_labels),
            "classes": list(self.data.class_names),
            "parameters": self.plan.release.num_parameters,
            "noise_multiplier": self.plan.release.noise_multiplier,
        }


def prepare(config: TrainConfig) -> Job:
    """Loads the data, builds the model and plans the privacy of a run; writes nothing.

    Errors: ArgumentError, DataError, BudgetExceededError: for settings that do not fit the data,
    and for a budget that the data cannot carry.
    """
    config.check()
    defaults = defaults_for(config.data)
    data = load_data(
        config.data,
        max_length=_first(config.max_length, defaults.max_length),
        text_column=_first(config.text_column, "text"),
        label_column=_first(config.label_column, "label"),
        class_names=config.class_names,
        seed=config.seed,
    )
    checks.delta("delta", config.delta, units=len(data.train_labels))
    settings = _resolve(config, defaults, len(data.train_labels))
    chosen = settings.chosen
    classifier = build_model(chosen.model, data, **architecture(chosen))
    params = classifier.init(config.seed)
    plan = DPSGDPlan.calibrated(
        epsilon=config.epsilon,
        delta=config.delta,
        dataset_size=len(data.train_labels),
        expected_batch_size=chosen.batch,
        steps=chosen.steps,
        l2_clip_norm=chosen.clip,
        params=params,
        clipping="per_layer" if config.clipping == "per-layer" else "flat",
        adaptive_clipping=config.adaptive(),
        noise_bands=config.noise_bands,
        micro_batch_size=settings.micro_batch,
        insecure_test_noise=config.insecure_test_noise,
    )
    require_signal(plan.release, plan.steps, config.epsilon)
    optimizer = build_optimizer(chosen, chosen.steps)
    return Job(config, settings, data, classifier, params, optimizer, plan)


def architecture(chosen: Defaults) -> dict[str, int]:
    """The sizes that `build_model` takes."""
    names = ("features", "num_heads", "hidden_features", "num_layers", "patch_size")
    return {name: getattr(chosen, name) for name in names}


def _resolve(config: TrainConfig, defaults: Defaults, examples: int) -> Settings:
    # Sampling amplifies little beyond a quarter of the examples. A step draws from one of as many
    # groups of them as there are bands.
    bands = config.noise_bands
    group = examples // bands
    open_batch = min(defaults.batch, max(1, min(examples // 4, group)))
    asked = {
        name: getattr(config, name)
        for name in ("model", "clip", "steps", "learning_rate", "max_length")
        if getattr(config, name) is not None
    }
    chosen = dataclasses.replace(defaults, batch=_first(config.batch, open_batch), **asked)
    if chosen.batch > examples:
        raise ArgumentError(
            "batch",
            chosen.batch,
            f"more than the {examples} training examples",
            "Pass a smaller --batch.",
        )
    if chosen.batch > group:
        raise ArgumentError(
            "noise_bands",
            bands,
            f"a step draws from one of {bands} groups of {group} examples, fewer than "
            f"batch = {chosen.batch}",
            "Pass fewer --noise-bands or a smaller --batch.",
        )
    if bands > chosen.steps:
        raise ArgumentError(
            "noise_bands", bands, f"more than steps = {chosen.steps}", "Pass fewer --noise-bands."
        )
    # Whole cycles of cyclic batches are charged at a time: parts of one would cost as much.
    block = bands * -(-default_block(chosen.steps) // bands)
    if config.checkpoint_every is not None and config.checkpoint_every % bands:
        raise ArgumentError(
            "checkpoint_every",
            config.checkpoint_every,
            f"no multiple of noise_bands = {bands}, and steps are charged by whole cycles of these",
            "Pass a multiple.",
        )
    return Settings(
        chosen,
        micro_batch=_first(config.micro_batch, _micro_batch()),
        checkpoint_every=_first(config.checkpoint_every, block),
        evaluate_every=_first(config.evaluate_every, max(1, chosen.steps // _LOOKS)),
    )


def _micro_batch() -> int:
    # On a CPU, gradients of a few examples at a time stay in its cache: half the time of 64.
    return 16 if jax.default_backend() == "cpu" else DEFAULT_MICRO_BATCH_SIZE


def _first[T](asked: T | None, default: T) -> T:
    return default if asked is None else asked
