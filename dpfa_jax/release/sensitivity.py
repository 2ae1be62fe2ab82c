"""L2 sensitivities of every release. Nothing else in the library computes one.

Symbols: m query rows, H query heads, n memory keys, g tokens per record, c and C clip norms,
B the logit bound, kappa the weight of the normaliser column. Each function returns the
sensitivity of ONE head (or one clip group), so that noise may differ between heads;
`effective_noise_multiplier` folds the heads back into the one Gaussian that is accounted.
"""

import math

# Floating-point slack of a memory readout. Weights are rounded once and shared by numerator and
# denominator, values are clipped as stored, and block sums are combined with compensation, so two
# neighbours differ by rounding inside one block of keys only.
ACCUMULATION_SLACK = 1e-3


def training_group(l2_clip_norm: float, noise_strategy: tuple[float, ...] = (1.0,)) -> float:
    """Sums of per-example gradients clipped to `l2_clip_norm`, one example added or removed.

    Noise of b > 1 steps may be correlated: step t releases c_0 g_t + .. + c_{b-1} g_{t-b+1} plus
    independent noise, and then, as post-processing, g_t plus correlated noise. An example that
    takes part in step t alone among b steps moves b of these answers, all together by C |c|.
    """
    return l2_clip_norm * math.hypot(*noise_strategy)


def centred_count() -> float:
    """Sum of +1/2 for an unclipped and -1/2 for a clipped example, one added or removed."""
    return 0.5


def example_rows(l2_clip_norm: float, query_length: int) -> float:
    """One head's `query_length` rows, each clipped to `l2_clip_norm`, the example replaced.

    2 c sqrt(m): every row may move from one end of its ball to the other. Tight.
    """
    return 2.0 * l2_clip_norm * math.sqrt(query_length)


def example_whole(l2_clip_norm: float) -> float:
    """An example's whole output clipped to `l2_clip_norm` (all heads together), replaced. Tight."""
    return 2.0 * l2_clip_norm


def memory_sum(
    value_clip_norm: float,
    weight_scale: float,
    num_queries: int,
    tokens_per_record: int,
    relation: str,
) -> float:
    """One head of (N, Z) = sum_j e_j (v_j, kappa), 0 <= e_j <= 1, |v_j| <= C, m query rows.

    Masking one record moves each row by at most g sqrt(C^2 + kappa^2). Substituting it moves a row
    by |a (v, kappa) - b (w, kappa)|, convex in (a, b), hence largest at a corner of [0, 1]^2:
    g max(2C, sqrt(C^2 + kappa^2)), which is 2 C g where kappa <= sqrt(3) C.
    """
    masked = math.hypot(value_clip_norm, weight_scale)
    per_row = masked if relation == "mask" else max(2.0 * value_clip_norm, masked)
    return tokens_per_record * per_row * math.sqrt(num_queries)


def memory_ratio(
    value_clip_norm: float,
    logit_bound: float,
    num_queries: int,
    memory_length: int,
    tokens_per_record: int,
) -> float:
    """One head of softmax(s) v with |s| <= B and n public and fixed, one record substituted.

    2 C w_g sqrt(m), w_g = 1 / (1 + ((n - g) / g) e^(-2B)): the most weight g tokens can carry.
    Tight.
    """
    others = (memory_length - tokens_per_record) / tokens_per_record
    weight = 1.0 / (1.0 + others * math.exp(-2.0 * logit_bound))
    return 2.0 * value_clip_norm * weight * math.sqrt(num_queries)


def effective_noise_multiplier(
    sensitivities: tuple[float, ...], noise_stddevs: tuple[float, ...]
) -> float:
    """The sigma of the one Gaussian that releases with (Delta_r, s_r) compose to.

    1 / sigma^2 = sum_r (Delta_r / s_r)^2. Exact, since independent Gaussians of every group are one
    Gaussian in the coordinates divided by s_r.
    """
    return 1.0 / math.sqrt(
        sum((d / s) ** 2 for d, s in zip(sensitivities, noise_stddevs, strict=True))
    )


def stddevs_for(
    noise_multiplier: float, sensitivities: tuple[float, ...], shares: tuple[float, ...]
) -> tuple[float, ...]:
    """Standard deviations proportional to `shares` that fold to `noise_multiplier`."""
    scale = noise_multiplier * math.sqrt(
        sum((d / share) ** 2 for d, share in zip(sensitivities, shares, strict=True))
    )
    return tuple(scale * share for share in shares)
