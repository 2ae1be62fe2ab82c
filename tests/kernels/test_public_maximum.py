"""Which calls have a public maximum, and that the bound of logits is what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.attention import checks, dot_product_attention
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, Plain
from dpfa_jax.kernels.public_maximum import SHIFT, public_maximum


def inputs(dtype, bias=None):
    x = jax.ShapeDtypeStruct((1, 2, 1, 8), dtype)
    return AttentionInputs(x, x, x, bias)


@pytest.mark.parametrize(
    ("options", "dtype", "expected"),
    [
        ({}, "bfloat16", None),
        ({"logits_bound": 3.0}, "bfloat16", 3.0),
        ({"logits_soft_cap": 30.0}, "bfloat16", 30.0),
        ({"logits_soft_cap": 50.0}, "bfloat16", None),
        ({"logits_soft_cap": 50.0, "logits_bound": 20.0}, "bfloat16", 20.0),
        ({"largest_logit": 4.0, "logits_bound": 5.0}, "float32", 4.0),
        ({"logits_bound": 10.0}, "float16", 10.0),
        ({"logits_bound": 11.0}, "float16", None),
        ({"logits_bound": 1.0}, "float64", None),
    ],
)
def test_least_of_what_is_known(options, dtype, expected):
    spec = AttentionSpec(1.0, **options)
    assert public_maximum(spec, inputs(dtype)) == expected
    # A bias is added to what the bound holds for.
    assert public_maximum(spec, inputs(dtype, bias=jnp.zeros((1, 1, 1, 1)))) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_weight_is_normal(dtype):
    """The largest bound that is taken, and the next quarter, which is not."""
    bounds = np.arange(0.25, 60, 0.25)
    taken = [b for b in bounds if public_maximum(AttentionSpec(1.0, logits_bound=b), inputs(dtype))]
    assert taken == list(bounds[: len(taken)])
    least, most = (
        np.exp2(sign * taken[-1] / np.log(2) - taken[-1] / np.log(2) + SHIFT[dtype])
        for sign in (-1, 1)
    )
    assert jnp.finfo(dtype).tiny <= least <= most <= jnp.finfo(dtype).max
    assert len(taken) < len(bounds)


def test_a_bound_that_binds_nowhere_is_dropped():
    """Under a smaller soft cap, or where rows of query and key are short, nothing is to clamp."""
    options = {"scale": 0.5, "is_causal": False, "local_window_size": None}

    def spec_of(cap, bound, norm):
        return checks.spec(
            inputs("bfloat16"), Plain(), logits_soft_cap=cap, logits_bound=bound,
            query_key_norm=norm, **options,
        )  # fmt: skip

    assert spec_of(None, 3.0, None).logits_bound == 3.0
    assert spec_of(2.0, 3.0, None).logits_bound is None
    assert spec_of(4.0, 3.0, 4.0).logits_bound == 3.0
    assert spec_of(None, 3.0, 2.0) == AttentionSpec(0.5, largest_logit=2.0)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_exact_within_and_flat_beyond(backend):
    """A bound that holds changes nothing; beyond it nothing depends on query and key; NaN stays."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 9, 1, 4)), jnp.float32) for _ in "qkv")
    key = query / jnp.linalg.norm(query, axis=-1, keepdims=True)

    @functools.partial(jax.jit, static_argnums=2)
    def run(query, key, bound):
        return dot_product_attention(
            query, key, value, scale=1.0, logits_bound=bound, implementation=backend
        )

    plain, bounded = (run(query, key, b) for b in (None, 10.0))
    np.testing.assert_allclose(plain, bounded, atol=5e-7)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(scale, bound):
        loss = lambda q, k: jnp.sum(jnp.sin(3 * run(scale * q, k, bound)))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1))(query, key)

    for one, other in zip(gradient(1.0, None), gradient(1.0, 10.0), strict=True):
        # Few weights are kept for the unbounded call and made anew for the other.
        np.testing.assert_allclose(one, other, atol=2e-6)
    assert np.abs(gradient(1.0, 10.0)[0]).max() > 0.1
    for x in gradient(1e6, 0.5):
        assert not np.any(x)
    # Exactly at the bound the gradient passes: there the bound holds.
    one_hot = jnp.tile(jnp.eye(4), (2, 3, 1))[:, :9, None]
    one, other = (
        jax.jit(jax.grad(lambda k, b=b: jnp.sum(jnp.sin(run(2.0 * one_hot, k, b)))))(one_hot)
        for b in (2.0, None)
    )
    np.testing.assert_allclose(one, other, atol=2e-6)
    assert np.all(np.isnan(run(query.at[0, 3].set(jnp.nan), key, 1.0)[0, 3]))
