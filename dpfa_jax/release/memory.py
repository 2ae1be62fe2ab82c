"""(M) Record release: noised attention of public queries over a private memory."""

import dataclasses

from dpfa_jax.core import INSECURE_TEST, THREEFRY, ArgumentError, checks
from dpfa_jax.release import sensitivity
from dpfa_jax.release.gaussian import GaussianRecord, noise_grid
from dpfa_jax.release.shares import checked_shares


@dataclasses.dataclass(frozen=True)
class RecordRelease:
    """A memory readout: (N, Z) with noise (sum form), or the normalised output (ratio form).

    Sum form: s = min(scale q.k + bias, B), e = exp(s - B) rounded once to the storage type, and
    (N, Z) = sum_j e_j (v_j, kappa) + noise; the output is N / max(Z / kappa, floor). Ratio form:
    |s| <= B and the output softmax(s) v + noise, for a public, fixed number of keys only.

    One record pays for one answer of one memory: all its queries lie along T, `num_queries` of
    them. Batch rows, also those of several calls under one key (`batch_start`), are memories that
    share no record. No program can see whether they do: two rows about one memory, or about two
    that hold the same record, are two answers about it, and each is due a charge.

    Attributes:
      logit_bound: B, the public maximum of the logits.
      value_clip_norm: C, the norm of each stored value row.
      noise_multiplier: sigma, noise standard deviation over sensitivity, all heads folded.
      num_queries: m, query rows in one answer.
      num_heads: H, QUERY heads (also under GQA and MQA).
      head_dim: d.
      form: "sum" or "ratio".
      relation: "mask" (a record's slots are masked) or "substitute". The ratio form is
        offered under substitution only.
      weight_scale: kappa, the weight of the normaliser column; C where None. Sum form only.
      floor: the least normaliser Z / kappa that divides, in units of one key. Sum form only.
      memory_length: n, public and fixed. Ratio form only, where it is required.
      tokens_per_record: g, the fixed slots of one record.
      noise_shares: relative noise standard deviations of the heads; equal where None.
      insecure_test_noise: noise from a test seed. Protects nobody; the record says so.

    Errors: ArgumentError for a number outside its range or a form whose preconditions fail.
    """

    logit_bound: float
    value_clip_norm: float
    noise_multiplier: float
    num_queries: int
    num_heads: int
    head_dim: int
    form: str = "sum"
    relation: str = "mask"
    weight_scale: float | None = None
    floor: float = 1.0
    memory_length: int | None = None
    tokens_per_record: int = 1
    noise_shares: tuple[float, ...] | None = None
    insecure_test_noise: bool = False

    does_not_protect = (
        "the queries",
        "weights trained without differential privacy on the same records",
        "the number of records, where it is used",
        "logits, row maxima, LSE and key-value caches, which are never returned",
    )

    def __post_init__(self) -> None:
        checks.positive("logit_bound", self.logit_bound)
        checks.magnitude("value_clip_norm", self.value_clip_norm)
        checks.magnitude("noise_multiplier", self.noise_multiplier)
        checks.count("num_queries", self.num_queries)
        checks.count("num_heads", self.num_heads)
        checks.count("head_dim", self.head_dim)
        checks.count("tokens_per_record", self.tokens_per_record)
        checks.choice("form", self.form, ("sum", "ratio"))
        checks.choice("relation", self.relation, ("mask", "substitute"))
        checks.positive("floor", self.floor)
        if self.weight_scale is not None:
            checks.magnitude("weight_scale", self.weight_scale)
        self._shares()
        if self.form == "ratio":
            self._check_ratio()
        elif self.memory_length is not None:
            raise ArgumentError(
                "memory_length",
                self.memory_length,
                "the sum form holds for every number of keys",
                "Leave memory_length out.",
            )

    def _check_ratio(self) -> None:
        if self.relation != "substitute":
            raise ArgumentError(
                "relation",
                self.relation,
                "the ratio form's bound holds under substitution only",
                'Pass relation="substitute", or use form="sum".',
            )
        if self.memory_length is None:
            raise ArgumentError(
                "memory_length",
                None,
                "the ratio form needs the public, fixed number of keys",
                'Pass memory_length, or use form="sum" where it is not public.',
            )
        checks.count("memory_length", self.memory_length, minimum=self.tokens_per_record)

    @property
    def unit(self) -> str:
        """What one individual contributes."""
        tokens = self.tokens_per_record
        return "one memory record" if tokens == 1 else f"one memory record of {tokens} tokens"

    @property
    def kappa(self) -> float:
        """The weight of the normaliser column."""
        return self.value_clip_norm if self.weight_scale is None else self.weight_scale

    @property
    def l2_sensitivities(self) -> tuple[float, ...]:
        """Delta of each query head, floating-point slack included."""
        if self.form == "ratio":
            assert self.memory_length is not None
            bound = sensitivity.memory_ratio(
                self.value_clip_norm,
                self.logit_bound,
                self.num_queries,
                self.memory_length,
                self.tokens_per_record,
            )
        else:
            bound = sensitivity.memory_sum(
                self.value_clip_norm,
                self.kappa,
                self.num_queries,
                self.tokens_per_record,
                self.relation,
            )
        return ((1.0 + sensitivity.ACCUMULATION_SLACK) * bound,) * self.num_heads

    @property
    def noise_stddevs(self) -> tuple[float, ...]:
        """Standard deviation of the noise, one for each query head."""
        return sensitivity.stddevs_for(self.noise_multiplier, self.l2_sensitivities, self._shares())

    @property
    def grids(self) -> tuple[float, ...]:
        """Public grid of the noised numbers, one for each query head."""
        return tuple(noise_grid(stddev) for stddev in self.noise_stddevs)

    def record(self) -> GaussianRecord:
        """The frozen record of one answer."""
        generator = INSECURE_TEST if self.insecure_test_noise else THREEFRY
        columns = self.head_dim + 1 if self.form == "sum" else self.head_dim
        return GaussianRecord(
            kind=f"memory-{self.form}",
            unit=self.unit,
            relation=self.relation,
            sensitivities=self.l2_sensitivities,
            noise_stddevs=self.noise_stddevs,
            dimension=self.num_queries * self.num_heads * columns,
            tail=generator.tail,
            grids=self.grids,
            generator=generator.name,
        )

    def _shares(self) -> tuple[float, ...]:
        return checked_shares("noise_shares", self.noise_shares, self.num_heads, "heads")
