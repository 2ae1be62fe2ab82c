"""Logits that grow along the keys of some rows, fast and slowly, and fall along those of others."""

import jax.numpy as jnp
import numpy as np
from helpers import attention_oracle as oracle

from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec

# Of a row, in turn, times 40 for 128 keys: more than a maximum is kept for in one step; in several;
# never; none; falling, which is never either.
GROWTHS = (1.0, 0.1, 0.01, 0.0, -1.0)
SCALE = 0.5


def inputs(rows, keys, size, dtype):
    rng = np.random.default_rng(0)
    query, key, value = (0.5 * rng.standard_normal((1, n, 1, size)) for n in (rows, keys, keys))
    query[0, :, 0, 0] = np.resize(GROWTHS, rows)
    key[0, :, 0, 0] = 40 / SCALE * np.arange(keys) / 128
    return AttentionInputs(*(jnp.asarray(x, dtype) for x in (query, key, value)))


def spec(*, is_causal=False):
    return AttentionSpec(SCALE, is_causal=is_causal)


def lse_slack(size, keys):
    """Of float32 logits, 40 more for 128 keys: four times a random walk of `size` additions.

    The tensor cores cut off what they align, where float32 rounds.
    """
    return 4 * size**0.5 * (40 * keys / 128) * 2.0**-24


def expected(inputs, *, is_causal=False):
    """(output, lse (1, 1, T)) in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in inputs[:3])
    output = oracle.attention(query, key, value, scale=SCALE, is_causal=is_causal)
    logits = SCALE * query[0, :, 0] @ key[0, :, 0].T
    seen = oracle.visibility((1, 1, *logits.shape), is_causal=is_causal)
    logits = np.where(seen, logits, -np.inf)
    largest = logits.max(axis=-1)
    return output, largest + np.log(np.exp(logits - largest[..., None]).sum(axis=-1))
