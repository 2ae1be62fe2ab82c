"""One frozen plan: Poisson sampling, clipping, noise, steps and the release, never apart."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Literal, Self

import jax
import numpy as np
from jaxtyping import PyTree

from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.dpsgd import batches
from dpfa_jax.dpsgd.correlated_noise import banded_strategy
from dpfa_jax.dpsgd.parameters import Groups, per_layer_groups
from dpfa_jax.release import AdaptiveClipping, GaussianRecord, TrainingRelease

DEFAULT_MICRO_BATCH_SIZE = 64


@dataclasses.dataclass(frozen=True)
class DPSGDPlan:
    """How a model is trained privately, and what that releases.

    Attributes:
      release: one step's promise: clip norms, noise, Poisson sampling, number of parameters.
      steps: how many steps the plan may take; `make_dp_step` refuses one more.
      delta: the delta at which `epsilon` is stated, below 1/n.
      micro_batch_size: examples that go forward and backward at a time; divides the capacity.
      groups: clip groups, one for each of `release.l2_clip_norms`, each a tuple of path prefixes
        ("encoder/0", "embedding"); "/i" after a parameter's path is slice i of its leading axis.
        Every parameter must be in exactly one. None: one flat group.
      per_example_bytes: the most memory for per-example gradients held at a time; a speed setting
        only. None: as `late_sum` chooses, without holding more than what they are made from.

    Errors: ArgumentError for combinations that contradict each other.
    Source: Abadi et al. (2016); truncated Poisson batches: arXiv 2508.15089 (2025).
    """

    release: TrainingRelease
    steps: int
    delta: float
    micro_batch_size: int = DEFAULT_MICRO_BATCH_SIZE
    groups: Groups | None = None
    per_example_bytes: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.release, TrainingRelease):
            raise ArgumentError(
                "release", self.release, "not a TrainingRelease", "Pass a TrainingRelease."
            )
        if self.release.sampling != "poisson":
            raise ArgumentError(
                "release.sampling",
                self.release.sampling,
                "a plan draws Poisson batches, and only these are what it is charged for",
                'Pass sampling="poisson".',
            )
        checks.count("steps", self.steps)
        checks.delta("delta", self.delta, units=self.release.dataset_size)
        checks.count("micro_batch_size", self.micro_batch_size)
        if self.per_example_bytes is not None:
            checks.count("per_example_bytes", self.per_example_bytes)
        if self.capacity % self.micro_batch_size:
            raise ArgumentError(
                "micro_batch_size",
                self.micro_batch_size,
                f"does not divide the capacity {self.capacity}",
                "Pass a divisor, set truncated_batch_size to a multiple, or let "
                "DPSGDPlan.calibrated choose.",
            )
        self._check_groups()

    @classmethod
    def calibrated(
        cls,
        *,
        epsilon: float,
        delta: float,
        dataset_size: int,
        expected_batch_size: int,
        steps: int | None = None,
        epochs: float | None = None,
        l2_clip_norm: float | tuple[float, ...],
        num_parameters: int | None = None,
        params: PyTree | None = None,
        clipping: Literal["flat", "per_layer"] = "flat",
        stacked: tuple[str, ...] = (),
        micro_batch_size: int = DEFAULT_MICRO_BATCH_SIZE,
        truncated_batch_size: int | None = None,
        groups: Groups | None = None,
        per_example_bytes: int | None = None,
        noise_shares: tuple[float, ...] | None = None,
        adaptive_clipping: AdaptiveClipping | None = None,
        noise_bands: int = 1,
        insecure_test_noise: bool = False,
    ) -> Self:
        """The plan with the least noise that keeps `steps` steps within (epsilon, delta).

        The capacity is rounded up to a multiple of the micro-batch, and a micro-batch larger than
        the capacity is cut to it. Takes the time of one noise calibration (seconds).

        Args:
          steps: how many steps; or `epochs` in its place.
          epochs: how often an example takes part on average:
            steps = ceil(epochs * dataset_size / expected_batch_size).
          num_parameters: how many numbers a step releases; counted in `params` where None.
          params: the parameters, or their shapes; needed for per-layer clipping.
          clipping: "flat": an example's whole gradient is clipped to `l2_clip_norm`, or that of
            each of `groups`. "per_layer": each parameter's is clipped, all together to
            `l2_clip_norm` (`per_layer_groups` gives other divisions, to be passed as `groups`).
          stacked: for per-layer clipping: path prefixes of parameters that hold all layers, one a
            slice of their leading axis, as `jax.lax.scan` takes them. Each slice is then clipped on
            its own, inside the loop's backward pass, and nothing of a layer is kept beyond it.
          noise_bands: over how many steps noise is correlated (`banded_strategy`); 1: independent.

        The other arguments are those of the plan and of `TrainingRelease`.

        Errors: ArgumentError as the constructor's, for `steps` and `epochs` together or neither,
        and for a budget that no noise can meet.
        """
        from dpfa_jax import accounting  # pulls in dp_accounting: only where epsilon is asked for

        checks.positive("epsilon", epsilon)
        steps = _steps(steps, epochs, dataset_size, expected_batch_size)
        checks.count("micro_batch_size", micro_batch_size)
        checks.choice("clipping", clipping, ("flat", "per_layer"))
        if num_parameters is None:
            num_parameters = _number_of(params)
        if clipping == "per_layer":
            groups, l2_clip_norm = _per_layer(params, l2_clip_norm, groups, stacked)
        elif stacked:
            raise ArgumentError(
                "stacked",
                stacked,
                "only per-layer clipping has layers",
                'Pass clipping="per_layer".',
            )
        release = TrainingRelease(
            l2_clip_norm=l2_clip_norm,
            noise_multiplier=1.0,
            dataset_size=dataset_size,
            expected_batch_size=expected_batch_size,
            num_parameters=num_parameters,
            truncated_batch_size=truncated_batch_size,
            noise_shares=noise_shares,
            adaptive_clipping=adaptive_clipping,
            noise_strategy=banded_strategy(steps, noise_bands),
            insecure_test_noise=insecure_test_noise,
        )
        capacity = release.batches().truncated_batch_size
        micro_batch_size = min(micro_batch_size, capacity)
        capacity = micro_batch_size * math.ceil(capacity / micro_batch_size)
        release = dataclasses.replace(release, truncated_batch_size=capacity)
        plan = cls(
            release, steps, delta, micro_batch_size, groups, per_example_bytes
        )  # refuses before it computes
        found = accounting.calibrate(release, delta=delta, epsilon=epsilon, count=steps)
        return dataclasses.replace(plan, release=found.release)

    @property
    def capacity(self) -> int:
        """Rows of a padded batch: the truncation that is accounted."""
        return self.release.batches().truncated_batch_size

    @functools.cached_property
    def epsilon(self) -> float:
        """epsilon of all `steps` steps at `delta`, every iterate published."""
        from dpfa_jax import accounting

        return accounting.calibrate(self.release, delta=self.delta, count=self.steps).epsilon

    def record(self) -> GaussianRecord:
        """The frozen record of one step, as charged."""
        return self.release.record()

    def index_batches(
        self, rng: np.random.Generator, steps: int | None = None, *, first_step: int | None = None
    ) -> Iterator[np.ndarray]:
        """Example indices of each batch, shape (capacity,), -1 for padding.

        The only batches that the plan's epsilon holds for: others are not sampled as charged, and
        with correlated noise may bring an example back within `noise_bands` steps.

        Args:
          rng: `np.random.default_rng()`: who is in a batch is secret, so its seed is too.
          steps: how many batches; all of the plan's where None. After a resumption ask for the
            remaining ones with a fresh generator: draws are independent from step to step.
          first_step: number of steps already charged. Due with correlated noise where `steps` is
            given: which group of examples a step draws from goes by its number.

        Errors: ArgumentError for an rng that is no Generator, more steps than planned, or a first
        step that is missing.
        """
        steps = self.steps if steps is None else checks.count("steps", steps, minimum=0)
        if steps > self.steps:
            raise ArgumentError(
                "steps", steps, f"more than the plan's {self.steps}", "Plan for more steps."
            )
        sampling = self.release.batches()
        if first_step is None:
            if sampling.cycle_length > 1 and steps < self.steps:
                raise ArgumentError(
                    "first_step",
                    None,
                    f"these {steps} steps begin somewhere in a cycle of {sampling.cycle_length}",
                    "Pass the number of steps charged before them.",
                )
            first_step = 0
        checks.count("first_step", first_step, minimum=0)
        return batches.poisson_batches(sampling, rng, steps, first_step=first_step)

    def _check_groups(self) -> None:
        norms, groups = self.release.l2_clip_norms, self.groups
        if groups is None:
            if len(norms) > 1:
                raise ArgumentError(
                    "groups",
                    None,
                    f"{len(norms)} clip norms are given, but not whose they are",
                    "Pass one tuple of path prefixes for each clip norm.",
                )
            return
        well_formed = isinstance(groups, tuple) and all(
            isinstance(prefixes, tuple)
            and prefixes
            and all(isinstance(prefix, str) for prefix in prefixes)
            for prefixes in groups
        )
        if not well_formed:
            raise ArgumentError(
                "groups",
                groups,
                "not a tuple of non-empty tuples of path prefixes",
                'Write (("embedding",), ("encoder/0", "encoder/1")).',
            )
        if len(groups) != len(norms):
            raise ArgumentError(
                "groups",
                groups,
                f"{len(groups)} groups for {len(norms)} clip norms",
                "Give release.l2_clip_norm one number for each group.",
            )


def _steps(
    steps: int | None, epochs: float | None, dataset_size: int, expected_batch_size: int
) -> int:
    if (steps is None) == (epochs is None):
        raise ArgumentError(
            "steps",
            steps,
            f"epochs = {epochs!r}: one of the two is due",
            "Pass steps, or epochs: how often an example takes part on average.",
        )
    if steps is not None:
        return checks.count("steps", steps)
    checks.count("dataset_size", dataset_size)
    checks.count("expected_batch_size", expected_batch_size)
    found = checks.positive("epochs", epochs) * dataset_size / expected_batch_size
    whole = math.ceil(round(min(found, 2.0 * checks.LARGEST_COUNT), 6))  # 0.1 * 20 is over 2
    return checks.count("steps", max(whole, 1))


def _number_of(params: PyTree | None) -> int:
    if params is None:
        raise ArgumentError(
            "num_parameters", None, "params is None too", "Pass params, or how many numbers it has."
        )
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _per_layer(
    params: PyTree | None,
    l2_clip_norm: float | tuple[float, ...],
    groups: Groups | None,
    stacked: tuple[str, ...],
) -> tuple[Groups, tuple[float, ...]]:
    if params is None:
        raise ArgumentError(
            "params", None, "per-layer clipping must know the parameters", "Pass params=params."
        )
    if groups is not None or isinstance(l2_clip_norm, tuple):
        raise ArgumentError(
            "clipping",
            "per_layer",
            "groups or several clip norms are given too",
            'Pass one l2_clip_norm and no groups, or groups and clipping="flat".',
        )
    return per_layer_groups(params, l2_clip_norm, stacked=stacked)
