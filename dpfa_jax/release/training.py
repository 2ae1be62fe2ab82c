"""(T) Training release: every iterate of a model trained by DP-SGD."""

import dataclasses
import math

from dpfa_jax.core import INSECURE_TEST, THREEFRY, checks
from dpfa_jax.release import sensitivity
from dpfa_jax.release.gaussian import GaussianRecord, Sampling, noise_grid
from dpfa_jax.release.shares import checked_shares


@dataclasses.dataclass(frozen=True)
class TrainingRelease:
    """One step of DP-SGD: the noised sum of clipped per-example parameter gradients.

    Attributes:
      l2_clip_norm: C, or one C_l a clip group (layer).
      noise_multiplier: sigma, noise standard deviation over sensitivity, all groups folded.
      dataset_size: public number of training examples n.
      expected_batch_size: n times the sampling probability; gradients are divided by it.
      num_parameters: how many numbers one step releases.
      truncated_batch_size: capacity of a Poisson batch; mean + 5 standard deviations where None.
      sampling: "poisson", "shuffled" (charged per epoch, unamplified) or "full".
      noise_shares: relative noise standard deviations of the groups; equal where None.
      insecure_test_noise: noise from a test seed. Protects nobody; the record says so.

    Errors: ArgumentError for a number outside its range.
    Source: Abadi et al., "Deep Learning with Differential Privacy" (2016).
    """

    l2_clip_norm: float | tuple[float, ...]
    noise_multiplier: float
    dataset_size: int
    expected_batch_size: int
    num_parameters: int
    truncated_batch_size: int | None = None
    sampling: str = "poisson"
    noise_shares: tuple[float, ...] | None = None
    insecure_test_noise: bool = False

    unit = "one training example"
    relation = "add_or_remove"
    does_not_protect = (
        "inputs of inference",
        "metrics, logs and true batch sizes",
        "the choice of hyper-parameters, where it was made on the same examples",
    )

    def __post_init__(self) -> None:
        checks.magnitude("noise_multiplier", self.noise_multiplier)
        checks.count("num_parameters", self.num_parameters)
        for norm in self.l2_clip_norms:
            checks.magnitude("l2_clip_norm", norm)
        self._shares()
        self.batches()

    @property
    def l2_clip_norms(self) -> tuple[float, ...]:
        """Clip norm of each group; one group where `l2_clip_norm` is a number."""
        if isinstance(self.l2_clip_norm, tuple):
            return self.l2_clip_norm
        return (self.l2_clip_norm,)

    @property
    def l2_sensitivities(self) -> tuple[float, ...]:
        """Delta of each group: C_l."""
        return tuple(sensitivity.training_group(norm) for norm in self.l2_clip_norms)

    @property
    def noise_stddevs(self) -> tuple[float, ...]:
        """Standard deviation of the noise on each group's sum."""
        return sensitivity.stddevs_for(self.noise_multiplier, self.l2_sensitivities, self._shares())

    @property
    def grids(self) -> tuple[float, ...]:
        """Public grid of each group's released sums."""
        return tuple(noise_grid(stddev) for stddev in self.noise_stddevs)

    def batches(self) -> Sampling:
        """The sampling that this step is accounted under."""
        probability = self.expected_batch_size / max(self.dataset_size, 1)
        spread = math.sqrt(max(self.expected_batch_size * (1.0 - probability), 0.0))
        capacity = min(self.dataset_size, math.ceil(self.expected_batch_size + 5.0 * spread))
        if self.sampling != "poisson":
            capacity = self.expected_batch_size
        if self.truncated_batch_size is not None:
            capacity = checks.count("truncated_batch_size", self.truncated_batch_size)
        return Sampling(self.sampling, self.dataset_size, self.expected_batch_size, capacity)

    def record(self) -> GaussianRecord:
        """The frozen record of one step."""
        generator = INSECURE_TEST if self.insecure_test_noise else THREEFRY
        return GaussianRecord(
            kind="training",
            unit=self.unit,
            relation=self.relation,
            sensitivities=self.l2_sensitivities,
            noise_stddevs=self.noise_stddevs,
            dimension=self.num_parameters,
            tail=generator.tail,
            grids=self.grids,
            generator=generator.name,
            sampling=self.batches(),
        )

    def _shares(self) -> tuple[float, ...]:
        return checked_shares(
            "noise_shares", self.noise_shares, len(self.l2_clip_norms), "clip groups"
        )
