"""(F) Example release: the noised attention output of each example."""

import dataclasses

from dpfa_jax.core import INSECURE_TEST, THREEFRY, ArgumentError, checks
from dpfa_jax.release import sensitivity
from dpfa_jax.release.gaussian import GaussianRecord, noise_grid
from dpfa_jax.release.shares import checked_shares


@dataclasses.dataclass(frozen=True)
class ExampleRelease:
    """Attention output clipped, noised and snapped, one answer an example (batch row).

    Attributes:
      l2_clip_norm: c, the norm to which each row of each head is clipped (`clip="row"`), or C, the
        norm of the example's whole output (`clip="example"`).
      noise_multiplier: sigma, noise standard deviation over sensitivity, all heads folded.
      query_length: public, padded number of query rows m.
      num_heads: query heads H.
      head_dim: head size d.
      clip: "row" or "example".
      noise_shares: relative noise standard deviations of the heads; equal where None, and equal
        they must be under `clip="example"`, whose one norm spans all heads.
      query_key_clip_norm: norm to which rows of query and key are clipped, as stored, before their
        product; None: they are not. Part of the released function, with its gradient; the
        sensitivity does not need it. No logit then exceeds scale times its square, which spares a
        kernel the running maximum. A row with NaN or infinity counts as zero.
      insecure_test_noise: noise from a test seed. Protects nobody; the record says so.

    Errors: ArgumentError for a number outside its range.
    """

    l2_clip_norm: float
    noise_multiplier: float
    query_length: int
    num_heads: int
    head_dim: int
    clip: str = "row"
    noise_shares: tuple[float, ...] | None = None
    insecure_test_noise: bool = False
    query_key_clip_norm: float | None = None

    unit = "one example (its whole input)"
    relation = "replace"
    does_not_protect = (
        "a residual or skip path: x + noised(attention(x)) releases x",
        "labels and the example's length beyond the public padding",
        "other layers' outputs, unless each is released and charged too",
        "gradients of parameters below the noise",
    )

    def __post_init__(self) -> None:
        checks.magnitude("l2_clip_norm", self.l2_clip_norm)
        checks.magnitude("noise_multiplier", self.noise_multiplier)
        checks.count("query_length", self.query_length)
        checks.count("num_heads", self.num_heads)
        checks.count("head_dim", self.head_dim)
        if self.query_key_clip_norm is not None:
            checks.magnitude("query_key_clip_norm", self.query_key_clip_norm)
        checks.choice("clip", self.clip, ("row", "example"))
        if len(set(self._shares())) > 1 and self.clip == "example":
            raise ArgumentError(
                "noise_shares",
                self.noise_shares,
                'heads cannot differ under clip="example"',
                'Use clip="row", or leave noise_shares out.',
            )

    @property
    def l2_sensitivities(self) -> tuple[float, ...]:
        """Delta of each independently noised group: each head, or the whole example."""
        if self.clip == "example":
            return (sensitivity.example_whole(self.l2_clip_norm),)
        return (sensitivity.example_rows(self.l2_clip_norm, self.query_length),) * self.num_heads

    @property
    def noise_stddevs(self) -> tuple[float, ...]:
        """Standard deviation of the noise, one for each query head."""
        if self.clip == "example":
            return (self.noise_multiplier * self.l2_sensitivities[0],) * self.num_heads
        return sensitivity.stddevs_for(self.noise_multiplier, self.l2_sensitivities, self._shares())

    @property
    def grids(self) -> tuple[float, ...]:
        """Public grid of the released values, one for each query head."""
        return tuple(noise_grid(stddev) for stddev in self.noise_stddevs)

    def record(self) -> GaussianRecord:
        """The frozen record of one example's answer."""
        generator = INSECURE_TEST if self.insecure_test_noise else THREEFRY
        groups = len(self.l2_sensitivities)
        return GaussianRecord(
            kind="example",
            unit=self.unit,
            relation=self.relation,
            sensitivities=self.l2_sensitivities,
            noise_stddevs=self.noise_stddevs[:groups],
            dimension=self.query_length * self.num_heads * self.head_dim,
            tail=generator.tail,
            grids=self.grids[:groups],
            generator=generator.name,
        )

    def _shares(self) -> tuple[float, ...]:
        return checked_shares("noise_shares", self.noise_shares, self.num_heads, "heads")
