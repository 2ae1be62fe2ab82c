"""Per-example gradients: norms, scales, weighted sums (V4, V8)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.clipping import trees
from dpfa_jax.clipping.trees import CLIP_MARGIN, clipped_rows_sum


def test_stored_norm_is_at_most_the_clip_norm():
    """V4: every example alone, across 60 orders of magnitude, 0, inf and NaN."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((400, 3000)) * 10.0 ** rng.uniform(-44, 38, (400, 1))
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32)
    rows[0], rows[1, 5], rows[2, 7], rows[3] = 0.0, np.nan, np.inf, 3e38
    true_norms = np.linalg.norm(rows.astype(np.float64), axis=1)
    for l2_clip_norm in (1e-20, 0.1, 7.0):
        one = jax.jit(
            jax.vmap(
                lambda row, norm=l2_clip_norm: clipped_rows_sum(
                    row[None], jnp.ones(1, bool), l2_clip_norm=norm
                )
            )
        )
        norms = np.linalg.norm(np.asarray(one(rows), np.float64), axis=1)
        assert np.all(norms <= l2_clip_norm)
        assert np.all(norms[1:3] == 0.0)
        # A norm beyond float32's squares counts as zero; all others that are clipped use the ball.
        clipped = (true_norms > l2_clip_norm) & (true_norms < 1e19 * l2_clip_norm)
        assert clipped.sum() > 50
        np.testing.assert_array_less(l2_clip_norm * (1.0 - 2.0 * CLIP_MARGIN), norms[clipped])


@pytest.mark.parametrize("numbers", [1, 255, 256, 257, 70_001, 2**20 + 3])
def test_the_norm_is_accurate_at_every_size(numbers):
    """Long sums do not lose the norm: a row of equal numbers, the worst case of a running sum."""
    row = jnp.full((1, numbers), 1.2345, jnp.float32)
    clipped = clipped_rows_sum(row, jnp.ones(1, bool), l2_clip_norm=1.0)
    norm = np.linalg.norm(np.asarray(clipped, np.float64))
    assert 1.0 - 2.0 * CLIP_MARGIN <= norm <= 1.0


def test_an_example_that_is_not_finite_is_left_out():
    """Its scale is zero, and a scale of zero keeps its numbers out, whatever they are."""
    gradient = jnp.array([[3.0, 4.0], [jnp.nan, 0.0], [jnp.inf, 1.0], [3.0, 4.0], [0.3, 0.4]])
    real = jnp.array([True, True, True, False, True])
    scales = trees.clip_scales(trees.squared_norms(gradient, 1.0)[:, None, None], real)[:, 0]
    np.testing.assert_allclose(scales, [0.2 * (1 - CLIP_MARGIN), 0, 0, 0, 1], rtol=1e-6)
    total = trees.weighted_sum(gradient, scales)
    np.testing.assert_allclose(total, [0.9, 1.2], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_table_rows_are_the_dense_gradient(dtype):
    """Rows that meet in a place are added before they are measured; bad places count for nothing.

    The control leaves the addition out: its norm is another one.
    """
    rng = np.random.default_rng(0)
    places = jnp.array([[0, 3, 0, 2], [5, 9, -1, 5], [1, 1, 1, 1]])  # 9 and -1 lie outside
    rows = jnp.asarray(rng.standard_normal((3, 4, 2)), dtype)
    dense = np.zeros((3, 6, 2))
    for b in range(3):
        for place, row in zip(np.asarray(places[b]), np.asarray(rows[b], np.float64), strict=True):
            if 0 <= place < 6:
                dense[b, place] += row
    found = trees.table_rows(places, rows, 6)
    exact = (dense**2).sum(axis=(1, 2))
    np.testing.assert_allclose(trees.squared_norms(found, 1.0), exact, rtol=1e-6)
    weights = jnp.array([0.5, 0.25, 1.0])
    np.testing.assert_allclose(
        trees.weighted_sum(found, weights),
        np.einsum("b,bnd->nd", weights, dense),
        rtol=1e-5,
        atol=1e-6,
    )
    apart = (np.asarray(rows, np.float64) ** 2).sum(axis=(1, 2))
    assert np.abs(apart[2] / exact[2] - 1) > 0.05
