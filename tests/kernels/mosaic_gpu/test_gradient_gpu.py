"""The kernels of DP-SGD on the device: V4, V6, V8, V10, V12 for what they serve.

python -m pytest -m gpu tests/kernels/mosaic_gpu
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.kernels import gradient_products as products
from dpfa_jax.kernels import parameter_noise, released_rows
from dpfa_jax.kernels.mosaic_gpu import device
from dpfa_jax.kernels.mosaic_gpu import gradient_products as product_kernel
from dpfa_jax.kernels.mosaic_gpu import parameter_noise as noise_kernel
from dpfa_jax.noise import insecure_test_key, normal_pair
from dpfa_jax.noise.threefry import threefry2x32

pytestmark = pytest.mark.gpu
KERNEL = {"implementation": "mosaic_gpu"}
BATCH, TOKENS, ROWS, COLUMNS = 24, 1000, 576, 448


def draw(dtype):
    rng = np.random.default_rng(1)
    shapes = ((BATCH, TOKENS, ROWS), (BATCH, TOKENS, COLUMNS))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_error_is_that_of_the_library(dtype):
    """V8: ragged tiles and tokens; the norm of the stored numbers to 2^-15."""
    lhs, rhs = draw(dtype)
    made, squares = jax.jit(functools.partial(products.gradient_products, unit=3.0, **KERNEL))(
        lhs, rhs
    )
    made = np.asarray(made, np.float64)
    theirs = jax.jit(functools.partial(products.gradient_products, implementation="xla"))(lhs, rhs)
    exact = np.einsum(
        "bti,bto->bio", np.asarray(lhs, np.float64), np.asarray(rhs, np.float64), optimize=True
    )
    error = np.linalg.norm(np.asarray(theirs[0], np.float64) - exact)
    assert np.linalg.norm(made - exact) <= 1.001 * error
    norms = np.linalg.norm(made.reshape(BATCH, -1) / 3.0, axis=1)
    assert np.all(np.abs(np.sqrt(np.asarray(squares, np.float64)) / norms - 1) < 2.0**-15)


def test_every_tile_gives_the_same_bits():
    """V6: whichever tile forms a product, and each time; measuring without storing as well."""
    lhs, rhs = draw(jnp.bfloat16)

    def run(tile, store):
        call = functools.partial(
            product_kernel.product_squares,
            tile=tile,
            unit=1.0,
            store=store,
            processors=device.processors(),
        )
        return jax.jit(call)(lhs, rhs)

    first, _ = run(product_kernel.ProductTiles(), True)
    for tile in (*product_kernel._PRODUCT_TILES, product_kernel.SUM_TILE):
        made, squares = run(tile, True)
        assert np.array_equal(np.asarray(made, np.float32), np.asarray(first, np.float32))
        assert np.array_equal(np.asarray(run(tile, False)[1]), np.asarray(squares))


def test_weighted_sum_adds_the_stored_products():
    """V4, V8: bit for bit what was measured; scale zero leaves NaN and infinity out."""
    lhs, rhs = draw(jnp.bfloat16)
    made, _ = jax.jit(functools.partial(products.gradient_products, **KERNEL))(lhs, rhs)
    scales = np.linspace(0.2, 1.0, BATCH, dtype=np.float32)
    scales[[3, 7]] = 0.0
    exact = np.einsum("b,bio->io", scales.astype(np.float64), np.asarray(made, np.float64))
    lhs = lhs.at[3, 5, 7].set(jnp.nan).at[7, 0, 0].set(jnp.inf)
    run = jax.jit(functools.partial(products.weighted_product_sum, **KERNEL))
    total = np.asarray(run(lhs, rhs, jnp.asarray(scales)))
    assert np.abs(total - exact).max() <= BATCH * 2.0**-24 * np.abs(exact).max()
    assert np.array_equal(total, np.asarray(run(lhs, rhs, jnp.asarray(scales))))


def test_non_finite_examples_show_in_their_square_only():
    """V4, V6."""
    lhs, rhs = draw(jnp.bfloat16)
    run = jax.jit(functools.partial(products.gradient_product_squares, **KERNEL))
    clean = np.asarray(run(lhs, rhs))
    hurt = np.asarray(run(lhs.at[1, 5, 7].set(jnp.nan), rhs.at[2, 3, 9].set(jnp.inf)))
    assert np.array_equal(np.isfinite(hurt), ~np.isin(np.arange(BATCH), [1, 2]))
    assert np.array_equal(np.delete(hurt, [1, 2]), np.delete(clean, [1, 2]))


@pytest.mark.parametrize("shape", [(9_999, 1004), (50304, 768), (2**14 + 4,)])
def test_noise_is_the_oracle_s(shape):
    """V10, V12: every element, on the grid, at most one cell away where the functions differ."""
    total = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    numbers = {"stddev": 1.5, "grid": 2.0**-10, "divisor": 256.0}

    def mean(implementation):
        def run(total):
            key = insecure_test_key(3)
            return parameter_noise.released_mean(
                total, key, 5, implementation=implementation, **numbers
            )

        return np.asarray(jax.jit(run)(total), np.float64) * 256.0 * 2**10

    mine, theirs = mean("mosaic_gpu"), mean("xla")
    assert np.all(mine % 1 == 0)
    away = np.abs(mine - theirs)
    assert away.max() <= 1
    assert np.mean(away > 0) < 1e-3
    # Negative control: another leaf's noise is elsewhere.
    assert np.mean(away > 0) < np.mean(np.abs(mine - np.roll(theirs, 2)) > 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("count", [1, 8, 13])
def test_rows_are_added_and_noised_in_one_pass(count, dtype):
    """V4, V8, V10, V12: as the sum by XLA and the noise kernel; NaN of scale zero is left out."""
    shape = (count, 301, 1004)
    rows = jnp.asarray(np.random.default_rng(0).standard_normal(shape), dtype)
    scales = np.linspace(1.0, 0.2, count, dtype=np.float32)
    if count > 1:
        scales[1], rows = 0.0, rows.at[1].set(jnp.nan)
    numbers = {"stddev": 1.5, "grid": 2.0**-10, "divisor": 256.0}

    def mean(rows, scales, implementation):
        key = insecure_test_key(3)
        return released_rows.released_mean_of_rows(
            rows, scales, key, 5, implementation=implementation, **numbers
        )

    run = jax.jit(mean, static_argnums=2)
    found = (run(rows, scales, kind) for kind in ("mosaic_gpu", "xla"))
    mine, theirs = (np.asarray(x, np.float64) * 256.0 * 2**10 for x in found)
    assert mine.shape == shape[1:] and np.all(mine % 1 == 0)
    away = np.abs(mine - theirs)
    assert away.max() <= 1
    # Both sums err by 2^-24 of about 8, a 2000th of a cell: so many values change theirs.
    assert np.mean(away > 0) < 3e-3
    # Negative control: the noise of another leaf.
    assert np.mean(away > 0) < np.mean(np.abs(mine - np.roll(theirs, 2)) > 0)


def test_the_pair_whose_radius_goes_on():
    """V9, V10: pair 479 of this key has first word 0; its program alone draws the third word."""
    words, pair = jnp.asarray([7, 3158553], jnp.uint32), 479
    w0, w1 = threefry2x32(words[0], words[1], jnp.uint32(0), jnp.uint32(pair))
    more, _ = threefry2x32(words[0], words[1], jnp.uint32(1), jnp.uint32(pair))
    assert int(w0) == 0
    numbers = jnp.asarray([1.0, 2.0**-14, 1.0], jnp.float32)
    first = jnp.asarray([0])
    rows = jnp.zeros((1, 2**15)), jnp.ones(1)
    mean = np.asarray(noise_kernel.released_mean(*rows, words[None], first, numbers))
    long, short = (np.ravel(normal_pair(w0, w1, third)) for third in (more, None))
    found = mean[2 * pair : 2 * pair + 2]
    assert np.abs(found - long).max() <= 2.0**-13
    assert np.abs(found - short).max() > 2.0**-10
