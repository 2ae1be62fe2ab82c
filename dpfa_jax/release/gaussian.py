"""The frozen record of one noisy answer: all that accounting and the ledger ever see."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from dpfa_jax.core import GENERATORS, ArgumentError, checks
from dpfa_jax.release import sensitivity

if TYPE_CHECKING:
    import dp_accounting

RELATIONS = ("add_or_remove", "replace", "mask", "substitute")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How examples reach a training step.

    Attributes:
      scheme: "poisson" (each example independently, then truncated to `truncated_batch_size`),
        "shuffled" (each example once an epoch; no amplification) or "full" (each step).
      dataset_size: the public number of examples n.
      expected_batch_size: number of examples that may be drawn times the sampling probability.
      truncated_batch_size: the largest batch; a drawn batch beyond it is cut to a random subset.
      cycle_length: b: the examples are cut into b groups of floor(n / b), fixed beforehand, and
        step t draws from group t mod b only (cyclic Poisson sampling, Choquette-Choo et al. 2023).
    """

    scheme: str
    dataset_size: int
    expected_batch_size: int
    truncated_batch_size: int
    cycle_length: int = 1

    def __post_init__(self) -> None:
        checks.choice("sampling", self.scheme, ("poisson", "shuffled", "full"))
        checks.count("dataset_size", self.dataset_size)
        checks.count("expected_batch_size", self.expected_batch_size)
        checks.count("cycle_length", self.cycle_length)
        if self.cycle_length > 1 and self.scheme != "poisson":
            raise ArgumentError(
                "cycle_length",
                self.cycle_length,
                f"sampling = {self.scheme!r} knows no cycles",
                'Pass sampling="poisson", or 1.',
            )
        if self.expected_batch_size > self.group_size:
            whose = f" // {self.cycle_length} groups" if self.cycle_length > 1 else ""
            raise ArgumentError(
                "expected_batch_size",
                self.expected_batch_size,
                f"larger than dataset_size = {self.dataset_size}{whose}",
                "Pass a smaller batch.",
            )
        if self.truncated_batch_size < self.expected_batch_size:
            raise ArgumentError(
                "truncated_batch_size",
                self.truncated_batch_size,
                f"smaller than expected_batch_size = {self.expected_batch_size}",
                "Leave room: the mean plus five standard deviations is usual.",
            )

    @property
    def group_size(self) -> int:
        """How many examples may be drawn in one step."""
        return self.dataset_size // self.cycle_length

    @property
    def probability(self) -> float:
        """Chance that an example is drawn in a step that may draw it."""
        return self.expected_batch_size / self.group_size

    @property
    def steps_per_turn(self) -> int:
        """Steps in which one example takes part at most once.

        An epoch of a shuffled loader (the fewest steps in which it can pass over all examples), a
        cycle of cyclic Poisson batches, else one step.
        """
        if self.scheme == "shuffled":
            return self.dataset_size // self.expected_batch_size
        return self.cycle_length


@dataclasses.dataclass(frozen=True)
class GaussianRecord:
    """One Gaussian answer, as charged.

    Attributes:
      kind: "training", "example", "memory-sum" or "memory-ratio".
      unit: what one individual contributes, in words ("one training example").
      relation: one of `RELATIONS`, already folded into `sensitivities`: every record is accounted
        as GaussianDpEvent(s / Delta) under add-or-remove.
      sensitivities: Delta_r, the L2 sensitivity of each independently noised group.
      noise_stddevs: s_r, the noise standard deviation of each group, in the same order.
      dimension: D, how many numbers one answer releases (all that one turn of an example reaches,
        where noise is correlated over a cycle of steps).
      tail: the largest |z| the sampler draws, in standard deviations.
      grids: the public grid on which each group's released values lie.
      generator: the name of the noise generator.
      sampling: how units reach the answer, or None where every unit takes part.
    """

    kind: str
    unit: str
    relation: str
    sensitivities: tuple[float, ...]
    noise_stddevs: tuple[float, ...]
    dimension: int
    tail: float
    grids: tuple[float, ...]
    generator: str
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        checks.choice("relation", self.relation, RELATIONS)
        checks.count("dimension", self.dimension)
        checks.positive("tail", self.tail)
        checks.choice("generator", self.generator, tuple(GENERATORS))
        for name in ("sensitivities", "noise_stddevs", "grids"):
            for number in getattr(self, name):
                checks.positive(name, number)
            if len(getattr(self, name)) != len(self.sensitivities) or not self.sensitivities:
                raise ArgumentError(
                    name, getattr(self, name), "one number a group is due", "Match the lengths."
                )

    @property
    def noise_multiplier(self) -> float:
        """sigma of the one Gaussian event that all groups fold into."""
        return sensitivity.effective_noise_multiplier(self.sensitivities, self.noise_stddevs)

    @property
    def is_secret_noise(self) -> bool:
        """False where the noise came from a test seed; such an answer protects nobody."""
        return GENERATORS[self.generator].is_secret

    def dp_event(self) -> dp_accounting.DpEvent:
        """The dp_accounting event of ONE answer, to be read under ADD_OR_REMOVE_ONE always.

        Poisson batches are cut at their capacity, which the event knows. Shuffled and full batches
        are not amplified. `accounting.dp_event` counts epochs of a shuffled loader, and cycles.
        """
        import dp_accounting

        if self.sampling is not None and self.sampling.scheme == "poisson":
            return dp_accounting.TruncatedSubsampledGaussianDpEvent(
                dataset_size=self.sampling.group_size,
                sampling_probability=self.sampling.probability,
                truncated_batch_size=self.sampling.truncated_batch_size,
                noise_multiplier=self.noise_multiplier,
            )
        return dp_accounting.GaussianDpEvent(self.noise_multiplier)


def noise_grid(noise_stddev: float) -> float:
    """The power of two nearest `noise_stddev` / 16 (in the logarithm)."""
    return 2.0 ** round(math.log2(noise_stddev / 16.0))
