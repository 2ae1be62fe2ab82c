"""Attention in float64 numpy, written from its definition, and error budgets against it."""

import jax.numpy as jnp
import numpy as np


def visibility(
    shape, *, mask=None, is_causal=False, window=None, query_lengths=None, key_lengths=None
):
    """Boolean (B, N, T, S)."""
    batch, _, rows, keys = shape
    row, column = np.arange(rows)[:, None], np.arange(keys)[None, :]
    seen = np.ones(shape, bool)
    if is_causal:
        seen &= row >= column
    if window is not None:
        seen &= (column >= row - window[0]) & (column <= row + window[1])
    if query_lengths is not None:
        seen &= row[None, None] < np.asarray(query_lengths).reshape(batch, 1, 1, 1)
    if key_lengths is not None:
        seen &= column[None, None] < np.asarray(key_lengths).reshape(batch, 1, 1, 1)
    if mask is not None:
        seen &= np.asarray(mask)
    return seen


def attention(query, key, value, cotangent=None, *, bias=None, scale=None, soft_cap=None, **hiding):
    """Output and, with `cotangent`, gradients of (query, key, value, logits); all float64.

    Shapes as in jax.nn (BTNH, BSKH). Rows that see no key give zeros.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, _, heads, size = query.shape
    groups = heads // key.shape[2]
    key, value = np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)
    scale = 1 / np.sqrt(size) if scale is None else scale
    query, key, value = (np.moveaxis(x, 2, 1) for x in (query, key, value))  # (B, N, T or S, H)
    raw = scale * (query @ np.swapaxes(key, 2, 3))
    capped = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    slope = 1.0 if soft_cap is None else 1 - (capped / soft_cap) ** 2
    logits = capped if bias is None else capped + np.asarray(bias, np.float64)
    seen = visibility(raw.shape, **hiding)
    logits = np.where(seen, logits, -np.inf)
    largest = logits.max(axis=-1, keepdims=True, initial=-1e300)
    weights = np.exp(logits - largest) * seen
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    output = np.moveaxis(weights @ value, 1, 2)
    if cotangent is None:
        return output
    cotangent = np.moveaxis(np.asarray(cotangent, np.float64), 2, 1)
    d_weights = cotangent @ np.swapaxes(value, 2, 3)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    d_raw = d_logits * slope * scale

    def shared(x):
        return np.moveaxis(x.reshape(batch, heads // groups, groups, -1, size).sum(2), 1, 2)

    return (
        output,
        np.moveaxis(d_raw @ key, 1, 2),
        shared(np.swapaxes(d_raw, 2, 3) @ query),
        shared(np.swapaxes(weights, 2, 3) @ cotangent),
        d_logits,
    )


def reduced_like(d_logits, bias_shape):
    """Gradient of a bias that was broadcast to the logits."""
    axes = tuple(a for a in range(4) if bias_shape[a] == 1)
    return d_logits.sum(axis=axes, keepdims=True)


def assert_within_budget(draws, label=""):
    """Errors at most twice those of the naive program.

    `draws`: (ours, naive, exact) of each draw, where naive holds the naive program's results in
    one or more orders of its sums. Root mean square: strictly, in every draw, against the first
    order. Maximum: over all draws and orders; on top half a unit in the last place of the largest
    exact number, by which even a perfectly rounded result may err where the naive one is lucky.
    """
    most = most_budget = most_exact = 0.0
    for ours, naive, exact in draws:
        assert all(ours.dtype == x.dtype for x in naive), label
        assert ours.shape == exact.shape, (label, ours.shape, exact.shape)
        assert np.isfinite(np.asarray(ours, np.float64)).all(), label
        if not exact.size:
            continue
        error, *budgets = (np.abs(np.asarray(x, np.float64) - exact) for x in (ours, *naive))
        mean, mean_budget = (np.sqrt(np.mean(x**2)) for x in (error, budgets[0]))
        assert mean <= 2 * mean_budget, f"{label} rms: {mean:.3g} > {2 * mean_budget:.3g}"
        most = max(most, error.max())
        most_budget = max(most_budget, *(2 * x.max() for x in budgets))
        most_exact = max(most_exact, np.abs(exact).max())
    most_budget += 0.5 * float(jnp.finfo(draws[0][0].dtype).eps) * most_exact
    assert most <= most_budget, f"{label} max: {most:.3g} > {most_budget:.3g}"
