"""Left padding told by a bias, as many models tell it, beside the same told by a mask.

Under causality the first rows see padding alone, and whole steps of keys have one large bias.
"""

import jax.numpy as jnp
import numpy as np

from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec


def calls(dtype, lowest, *, keys, padding, size=64, cap=None, is_masked=False):
    """(spec, inputs with the bias, with the mask, cotangent): one example, two heads.

    `is_masked`: both calls hide three pairs in ten by a mask as well, but no row from itself.
    """
    rng = np.random.default_rng([keys, padding])
    draw = lambda: jnp.asarray(rng.standard_normal((1, keys, 2, size)), dtype)  # noqa: E731
    query, key, value, cotangent = (draw() for _ in range(4))
    is_key = np.arange(keys)[None, None, None] >= padding
    shown = np.ones((1, 1, keys, keys), bool)
    if is_masked:
        shown &= (rng.random((keys, keys)) < 0.7) | np.eye(keys, dtype=bool)
    bias = jnp.asarray(np.where(is_key, 0.0, lowest), jnp.float32)
    arrays = AttentionInputs(query, key, value, bias, jnp.asarray(shown) if is_masked else None)
    by_mask = arrays._replace(bias=jnp.zeros_like(bias), mask=jnp.asarray(shown & is_key))
    spec = AttentionSpec(size**-0.5, is_causal=True, logits_soft_cap=cap)
    return spec, arrays, by_mask, cotangent


def assert_alike(found, expected, padding):
    """V6, V7: (output, lse, gradients) with the bias are those with the mask; padding gets 0."""
    names = ("output", "query", "key", "value", "bias")
    for name, mine, other in zip(
        names, (found[0], *found[2:]), (expected[0], *expected[2:]), strict=True
    ):
        mine, other = (np.asarray(x, np.float64) for x in (mine, other))
        unit = float(jnp.finfo(found[0].dtype).eps)
        assert np.all(np.isfinite(mine)), name
        assert np.linalg.norm(mine - other) <= unit * np.linalg.norm(other), name
        hidden = mine[..., :padding] if name == "bias" else mine[:, :padding]
        assert not np.any(hidden), name
    is_empty = np.isneginf(np.asarray(found[1], np.float32))
    assert np.all(is_empty[:, :padding]) and not np.any(is_empty[:, padding:])
