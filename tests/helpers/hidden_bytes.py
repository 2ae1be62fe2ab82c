"""What may lie in the bytes of a key that no row sees: anything, with one answer.

A key that a bias of -inf hides is no such key: its logit and its value are still multiplied.
"""

import jax.numpy as jnp
import numpy as np

from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec

ROWS, KEYS, HIDDEN = 20, 40, slice(30, 36)
_IS_SEEN = (np.arange(KEYS) < HIDDEN.start) | (np.arange(KEYS) >= HIDDEN.stop)
_SOME = np.random.default_rng(1).random((1, 2, ROWS, KEYS)) < 0.7

# Each hides the keys in HIDDEN from every row, by one argument. More keys than rows.
CASES = {
    "causality": ({"is_causal": True}, {}),
    "window": ({"local_window": (3, 3)}, {}),
    "window before the first row": ({"local_window": (-36, 40)}, {}),
    "lengths": ({}, {"key_lengths": jnp.array([HIDDEN.start], jnp.int32)}),
    "mask of keys": ({}, {"mask": jnp.asarray(_IS_SEEN[None, None, None])}),
    "mask of pairs": ({"is_causal": True}, {"mask": jnp.asarray(_SOME & _IS_SEEN)}),
}


def check(backend, name, filler, *, dtype=jnp.float32, has_bias=False):
    """V6: output, log-sum-exp and every gradient keep their bits, beside a bias too."""
    options, arrays = CASES[name]
    rng = np.random.default_rng(0)
    shapes = [(1, ROWS, 2, 16), *[(1, KEYS, 1, 16)] * 2]
    query, key, value = (jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)
    bias = jnp.asarray(rng.standard_normal((1, 1, ROWS, KEYS)), dtype) if has_bias else None
    spec = AttentionSpec(0.25, **options)

    def found(byte):
        inputs = AttentionInputs(
            query, key.at[:, HIDDEN].set(byte), value.at[:, HIDDEN].set(byte), bias, **arrays
        )
        outputs = backend.forward(spec, inputs)
        return outputs.output, outputs.lse, *backend.backward(spec, inputs, outputs, query)

    for mine, other in zip(found(filler), found(0.0), strict=True):
        if mine is not None:
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))
            assert not np.isnan(np.asarray(mine, np.float32)).any()
