"""Per-example clipping of gradient trees (V4, V8, V10)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.dpsgd_cases import batch_of, clipped_by_hand, flat, loss_fn, params_of

from dpfa_jax.clipping.trees import CLIP_MARGIN, clipped_rows_sum, clipped_sum
from dpfa_jax.core import ArgumentError


def summed(batch, is_real, *, l2_clip_norm=1.0, micro_batch_size=4):
    return jax.jit(
        lambda params, batch, is_real: clipped_sum(
            loss_fn,
            params,
            batch,
            is_real,
            l2_clip_norms=(l2_clip_norm,),
            leaf_groups=(0, 0, 0),
            micro_batch_size=micro_batch_size,
        )
    )(params_of(), batch, jnp.asarray(is_real))


@pytest.mark.parametrize("l2_clip_norm", [0.03, 1.0, 1e6])
def test_sums_equal_the_float64_oracle(l2_clip_norm):
    """V8: error at most twice that of the chain rule in float32; without the clip it is not."""
    batch, real = batch_of(32), np.arange(32) < 27
    effective = l2_clip_norm * (1.0 - CLIP_MARGIN)
    exact = clipped_by_hand(params_of(), batch, real, effective, np.float64).sum(axis=0)
    naive = clipped_by_hand(params_of(), batch, real, effective, np.float32).sum(axis=0)
    error = np.linalg.norm(flat(summed(batch, real, l2_clip_norm=l2_clip_norm)) - exact)
    rounding = 2.0**-24 * np.linalg.norm(exact)  # a lucky naive sum may err less than one rounding
    assert error <= 2.0 * max(np.linalg.norm(naive - exact), rounding)
    if l2_clip_norm == 1.0:
        unclipped = flat(summed(batch, real, l2_clip_norm=1e6))
        assert np.linalg.norm(unclipped - exact) > 1e3 * error


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
                    row[None], jnp.ones(1, bool), l2_clip_norms=(norm,), leaf_groups=(0,)
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
    clipped = clipped_rows_sum(row, jnp.ones(1, bool), l2_clip_norms=(1.0,), leaf_groups=(0,))
    norm = np.linalg.norm(np.asarray(clipped, np.float64))
    assert 1.0 - 2.0 * CLIP_MARGIN <= norm <= 1.0


def test_groups_are_clipped_apart_and_a_bad_example_leaves_all_of_them():
    tree = {"a": jnp.array([[3.0, 4.0], [3.0, 4.0]]), "b": jnp.array([[0.0], [jnp.nan]])}
    found = clipped_rows_sum(
        tree | {"c": jnp.array([[0.1], [0.1]])},
        jnp.ones(2, bool),
        l2_clip_norms=(1.0, 0.5),
        leaf_groups=(0, 1, 1),
    )
    np.testing.assert_allclose(found["a"], np.array([0.6, 0.8]) * (1 - CLIP_MARGIN), rtol=1e-6)
    np.testing.assert_array_equal(found["c"], np.float32(0.1))


def test_micro_batches_do_not_change_the_sum():
    """V10: to rounding; and an example sees no other one (V6's sense for gradients)."""
    batch, real = batch_of(24), np.arange(24) < 19
    whole = flat(summed(batch, real, micro_batch_size=24))
    for micro_batch_size in (1, 3, 8):
        part = flat(summed(batch, real, micro_batch_size=micro_batch_size))
        np.testing.assert_allclose(part, whole, atol=19 * 2.0**-23)


def test_a_batch_coupled_loss_sees_one_example():
    """Batch normalisation over the batch axis cannot couple examples: each is a batch of one."""

    def coupled(params, batch):
        centred = batch["x"] - batch["x"].mean(axis=0)  # zero in a batch of one
        return loss_fn(params, {"x": centred, "y": batch["y"]})

    batch, real = batch_of(8), np.ones(8, bool)
    alone = batch | {"x": np.zeros_like(batch["x"])}
    arguments = {"l2_clip_norms": (1.0,), "leaf_groups": (0, 0, 0), "micro_batch_size": 4}
    found = clipped_sum(coupled, params_of(), batch, real, **arguments)
    expected = clipped_sum(loss_fn, params_of(), alone, real, **arguments)
    np.testing.assert_array_equal(flat(found), flat(expected))


@pytest.mark.parametrize(
    ("loss", "parameter"),
    [
        (lambda p, b: loss_fn(p, b).mean(), "loss_fn"),
        (lambda p, b: (loss_fn(p, b), 0), "loss_fn"),
        (lambda p, b: loss_fn(p, b)[:, None], "loss_fn"),
    ],
)
def test_losses_that_are_not_per_example_are_refused(loss, parameter):
    """V23."""
    with pytest.raises(ArgumentError, match="losses of shape") as error:
        clipped_sum(
            loss,
            params_of(),
            batch_of(4),
            jnp.ones(4, bool),
            l2_clip_norms=(1.0,),
            leaf_groups=(0, 0, 0),
            micro_batch_size=4,
        )
    assert error.value.parameter == parameter


def test_axes_that_disagree_are_refused():
    """V23: a leaf of another length is named; so is a micro-batch that does not divide."""
    with pytest.raises(ArgumentError, match=r"batch\['y'\]"):
        summed(batch_of(8) | {"y": np.zeros(7, np.float32)}, np.ones(8, bool))
    with pytest.raises(ArgumentError, match="micro_batch_size = 3"):
        summed(batch_of(8), np.ones(8, bool), micro_batch_size=3)
