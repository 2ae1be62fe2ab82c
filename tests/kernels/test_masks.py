"""Which keys some row sees, against the whole matrix of what each argument hides."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.kernels import masks
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec

WINDOWS = (None, (0, 0), (2, 1), (-2, 5), (-1, 9), (9, -2), (1, -3), (-9, 20))


@pytest.mark.parametrize(("rows", "keys"), [(3, 9), (9, 3), (5, 5), (1, 4)])
def test_shown_keys(rows, keys):
    """V6: a key counts as shown unless an argument hides it from every row."""
    by_pair = np.random.default_rng(0).random((2, 2, rows, keys)) < 0.3
    arguments = itertools.product(
        (False, True), WINDOWS, (None, [keys - 1, 0]), (None, by_pair, by_pair[:, :, :1])
    )
    for is_causal, window, lengths, mask in arguments:
        spec = AttentionSpec(1.0, is_causal=is_causal, local_window=window)
        inputs = AttentionInputs(
            jnp.zeros((2, rows, 2, 4)), *[jnp.zeros((2, keys, 2, 4))] * 2,
            mask=None if mask is None else jnp.asarray(mask),
            key_lengths=None if lengths is None else jnp.asarray(lengths),
        )  # fmt: skip
        wanted = np.ones((2, keys), bool)
        steps = inputs._replace(mask=None, key_lengths=None)
        seen = masks.visible(spec, steps, None, jnp.arange(rows), jnp.arange(keys))
        if seen is not None:
            wanted &= np.asarray(seen).any((1, 2))
        if lengths is not None:
            wanted &= np.arange(keys) < np.asarray(lengths)[:, None]
        if mask is not None:
            wanted &= mask.any((1, 2))
        found = masks.shown_keys(spec, inputs)
        found = np.ones((2, keys), bool) if found is None else np.broadcast_to(found, wanted.shape)
        np.testing.assert_array_equal(found, wanted, err_msg=str((spec, lengths, mask is None)))
