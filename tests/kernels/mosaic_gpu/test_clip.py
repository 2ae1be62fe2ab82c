"""The clip of a tile's rows, on a CPU: the arithmetic that the kernel's epilogue runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.kernels.mosaic_gpu import noise

pytestmark = pytest.mark.quickly_compiled


clip_rows = jax.jit(noise.clip_rows, static_argnums=1)


@pytest.mark.parametrize("bound", [1e-6, 1e-4, 0.1, 1.0, 10.0, 1e4])
def test_no_row_is_longer(bound):
    """V4: zeros, subnormals, every magnitude to the largest, one entry alone; NaN and infinity."""
    rng = np.random.default_rng(0)
    x = [rng.standard_normal(64) * 2.0**e for e in range(-140, 127, 3)]
    x += [np.full(64, y) for y in (3e38, 1e38, 8.6e37, 8.4e37, 1e-40, 0.0)]
    x += [np.eye(1, 64)[0] * y for y in (3.4e38, 1e38, bound, 1e-45)]
    x = np.asarray(x, np.float32)
    bad = x[:3].copy()
    bad[:, 5] = np.nan, np.inf, -np.inf
    clipped = np.asarray(clip_rows(jnp.asarray(np.concatenate([x, bad])), bound), np.float64)
    assert np.all(clipped[len(x) :] == 0.0)
    clipped = clipped[: len(x)]
    found = np.linalg.norm(clipped, axis=1)
    assert np.all(found <= bound)
    own = np.linalg.norm(x.astype(np.float64), axis=1)
    far = own > 2.0 * bound
    assert np.all(found[far] >= (1 - 2.0**-16) * bound)
    short = (own < bound * (1 - 2.0**-15)) & (own > 2.0**-100)  # no entry is subnormal
    assert np.array_equal(clipped[short], x[short].astype(np.float64))


def test_a_product_with_the_inverse_is_caught():
    """Negative control: 1 / largest is subnormal above 2^126, and a row passed as it was."""
    x = jnp.full((1, 64), 3e38, jnp.float32)

    @jax.jit
    def naive(x):
        largest = jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True), 1e-30)
        square = jnp.square(x * (1.0 / largest)).sum(axis=1, keepdims=True)
        return x * jnp.minimum(1.0, (10.0 / largest) * jax.lax.rsqrt(square))

    assert not np.linalg.norm(np.asarray(naive(x), np.float64)) <= 10.0
