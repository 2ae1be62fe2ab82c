"""(T) Training release: every iterate of a model trained by DP-SGD."""

import dataclasses
import math

from dpfa_jax.core import INSECURE_TEST_LONG, THREEFRY_LONG, ArgumentError, checks
from dpfa_jax.release import sensitivity
from dpfa_jax.release.adaptive_clipping import AdaptiveClipping
from dpfa_jax.release.gaussian import GaussianRecord, Sampling, noise_grid
from dpfa_jax.release.shares import checked_shares


@dataclasses.dataclass(frozen=True)
class TrainingRelease:
    """One step of DP-SGD: the noised sum of clipped per-example parameter gradients.

    Attributes:
      l2_clip_norm: C, or one C_l a clip group (layer); the first ones where clipping adapts.
      noise_multiplier: sigma, noise standard deviation over sensitivity, all groups (and counts)
        folded: 1 / sigma^2 = sum (Delta / s)^2.
      dataset_size: public number of training examples n.
      expected_batch_size: n times the sampling probability; gradients are divided by it.
      num_parameters: how many numbers one step releases.
      truncated_batch_size: capacity of a Poisson batch; mean + 5 standard deviations where None.
      sampling: "poisson", "shuffled" (charged per epoch, unamplified) or "full".
      noise_shares: relative noise standard deviations of the groups; equal where None.
      insecure_test_noise: noise from a test seed. Protects nobody; the record says so.
      adaptive_clipping: how clip norms follow the gradients; fixed where None. The record is that
        of the first step: later ones have other norms and the same ratios of noise to norm.
      noise_strategy: c_0 .. c_{b-1}, the band of the strategy matrix that correlates the noise of b
        steps (`dpsgd.banded_strategy`); (1.0,) is independent noise. Batches are then cyclic:
        step t draws from the t mod b-th of b fixed groups of examples.

    Errors: ArgumentError for a number outside its range, and for adaptive clipping together with
    correlated noise: a past step's noise has the scale of a past clip norm.
    Source: Abadi et al., "Deep Learning with Differential Privacy" (2016); Andrew et al. (2021);
    Choquette-Choo et al., "(Amplified) banded matrix factorization" (2023).
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
    adaptive_clipping: AdaptiveClipping | None = None
    noise_strategy: tuple[float, ...] = (1.0,)

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
        self._check_strategy()
        self.batches()

    @property
    def l2_clip_norms(self) -> tuple[float, ...]:
        """Clip norm of each group; one group where `l2_clip_norm` is a number."""
        if isinstance(self.l2_clip_norm, tuple):
            return self.l2_clip_norm
        return (self.l2_clip_norm,)

    @property
    def l2_sensitivities(self) -> tuple[float, ...]:
        """Delta of each group's sum, C_l; then 1/2 for each group's count, where it is released."""
        return (*self._gradient_sensitivities(), *self._count_sensitivities())

    @property
    def gradient_noise_multiplier(self) -> float:
        """sigma of the gradients alone: that of the release, less what the counts take."""
        return self.noise_multiplier / math.sqrt(1.0 - self._budget_share())

    @property
    def noise_stddevs(self) -> tuple[float, ...]:
        """Standard deviation of the (independent) noise on each group's sum, then on each count."""
        gradients = sensitivity.stddevs_for(
            self.gradient_noise_multiplier, self._gradient_sensitivities(), self._shares()
        )
        counts = self._count_sensitivities()
        if not counts:
            return gradients
        counting = self.noise_multiplier / math.sqrt(self._budget_share())
        return gradients + sensitivity.stddevs_for(counting, counts, (1.0,) * len(counts))

    @property
    def grids(self) -> tuple[float, ...]:
        """Public grid of each group's released sums, then of each count."""
        return tuple(noise_grid(stddev) for stddev in self.noise_stddevs)

    def batches(self) -> Sampling:
        """The sampling that this step is accounted under."""
        bands = len(self.noise_strategy)
        probability = self.expected_batch_size / max(self.dataset_size // bands, 1)
        spread = math.sqrt(max(self.expected_batch_size * (1.0 - probability), 0.0))
        capacity = min(
            self.dataset_size // bands, math.ceil(self.expected_batch_size + 5.0 * spread)
        )
        if self.sampling != "poisson":
            capacity = self.expected_batch_size
        if self.truncated_batch_size is not None:
            capacity = checks.count("truncated_batch_size", self.truncated_batch_size)
        return Sampling(self.sampling, self.dataset_size, self.expected_batch_size, capacity, bands)

    def record(self) -> GaussianRecord:
        """The frozen record of one step."""
        generator = INSECURE_TEST_LONG if self.insecure_test_noise else THREEFRY_LONG
        return GaussianRecord(
            kind="training",
            unit=self.unit,
            relation=self.relation,
            sensitivities=self.l2_sensitivities,
            noise_stddevs=self.noise_stddevs,
            dimension=self.num_parameters * len(self.noise_strategy)
            + len(self._count_sensitivities()),
            tail=generator.tail,
            grids=self.grids,
            generator=generator.name,
            sampling=self.batches(),
        )

    def _shares(self) -> tuple[float, ...]:
        return checked_shares(
            "noise_shares", self.noise_shares, len(self.l2_clip_norms), "clip groups"
        )

    def _gradient_sensitivities(self) -> tuple[float, ...]:
        return tuple(
            sensitivity.training_group(norm, self.noise_strategy) for norm in self.l2_clip_norms
        )

    def _count_sensitivities(self) -> tuple[float, ...]:
        if self.adaptive_clipping is None:
            return ()
        return (sensitivity.centred_count(),) * len(self.l2_clip_norms)

    def _budget_share(self) -> float:
        return 0.0 if self.adaptive_clipping is None else self.adaptive_clipping.budget_share

    def _check_strategy(self) -> None:
        strategy = self.noise_strategy
        if not isinstance(strategy, tuple) or not strategy:
            raise ArgumentError(
                "noise_strategy", strategy, "not a non-empty tuple", "Pass (1.0,) or a band."
            )
        for number in strategy:
            checks.real("noise_strategy", number)
        if len(strategy) == 1 and strategy != (1.0,):
            raise ArgumentError(
                "noise_strategy", strategy, "one band is independent noise", "Pass (1.0,)."
            )
        if strategy[0] <= 1e-3 * math.hypot(*strategy):
            raise ArgumentError(
                "noise_strategy",
                strategy,
                "its first number must be positive and not small beside the others",
                "Pass what dpsgd.banded_strategy(steps, bands) gives.",
            )
        if len(strategy) > 1 and self.sampling != "poisson":
            raise ArgumentError(
                "noise_strategy",
                strategy,
                f"correlated noise is not accounted for sampling = {self.sampling!r}",
                'Pass sampling="poisson", or (1.0,).',
            )
        if len(strategy) > 1 and self.adaptive_clipping is not None:
            raise ArgumentError(
                "noise_strategy",
                strategy,
                "the noise of past steps has the scale of their clip norms, and these adapt",
                "Pass fixed clip norms (adaptive_clipping=None), or (1.0,).",
            )
