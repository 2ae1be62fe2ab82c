"""Which calls have a public maximum, and that stating one changes no result."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle

from dpfa_jax.attention import checks, dot_product_attention
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, Plain
from dpfa_jax.kernels.public_maximum import SHIFT, has_public_maximum

pytestmark = pytest.mark.quickly_compiled


def inputs(dtype, bias=None):
    x = jax.ShapeDtypeStruct((1, 2, 1, 8), dtype)
    return AttentionInputs(x, x, x, bias)


@pytest.mark.parametrize(
    ("options", "dtype", "expected"),
    [
        ({}, "bfloat16", False),
        ({"largest_logit": 3.0}, "bfloat16", True),
        ({"logits_soft_cap": 50.0}, "bfloat16", True),
        ({"logits_soft_cap": 70.0}, "bfloat16", False),
        ({"logits_soft_cap": 70.0, "largest_logit": 20.0}, "bfloat16", True),
        ({"logits_soft_cap": 20.0, "largest_logit": 70.0}, "bfloat16", True),
        ({"largest_logit": 10.0}, "float16", True),
        ({"largest_logit": 11.0}, "float16", False),
        ({"largest_logit": 1.0}, "float32", False),
    ],
)
def test_least_of_what_is_known(options, dtype, expected):
    spec = AttentionSpec(1.0, **options)
    assert has_public_maximum(spec, inputs(dtype)) is expected
    # A bias is added to what the bound holds for.
    assert not has_public_maximum(spec, inputs(dtype, bias=jnp.zeros((1, 1, 1, 1))))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_weight_is_normal(dtype):
    """The largest bound that is taken, and the next quarter, which is not."""
    bounds = np.arange(0.25, 90, 0.25)
    specs = [AttentionSpec(1.0, largest_logit=b) for b in bounds]
    taken = [s.largest_logit for s in specs if has_public_maximum(s, inputs(dtype))]
    assert taken == list(bounds[: len(taken)])
    assert len(taken) < len(bounds)
    least, most = (2.0 ** (sign * taken[-1] / math.log(2) + SHIFT[dtype]) for sign in (-1, 1))
    limits = jnp.finfo(dtype)
    assert limits.tiny <= least <= most <= limits.max
    if dtype == "bfloat16":  # 2^20 keys and values of 2^15
        assert most * 2.0**35 <= limits.max
        assert least * 2.0**-35 >= limits.tiny


def test_least_of_what_is_said():
    """From a stated bound and from the norm of rows of query and key comes one number."""
    options = {"scale": -0.5, "is_causal": False, "local_window_size": None}

    def largest(bound, norm):
        return checks.spec(
            inputs("bfloat16"), Plain(), logits_soft_cap=None, logits_bound=bound,
            query_key_norm=norm, **options,
        ).largest_logit  # fmt: skip

    found = [largest(*x) for x in ((None, None), (3.0, None), (None, 2.0), (3.0, 2.0), (1.0, 2.0))]
    assert found == [None, 3.0, 2.0, 2.0, 1.0]


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_a_statement_changes_no_result(backend):
    """V8: true or false, value and gradients are those of the softmax, bit for bit."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, 9, 1, 4)), jnp.float32) for _ in "qkvc"]

    @functools.partial(jax.jit, static_argnums=0)
    def run(bound, query, key, value, cotangent):
        def answer(*x):
            return dot_product_attention(
                *x, scale=1.0, logits_bound=bound, implementation=backend, return_residual=True
            )

        (output, lse), pull = jax.vjp(answer, query, key, value)
        return output, lse, *pull((cotangent, jnp.zeros_like(lse)))

    expected = run(None, *arrays)
    exact = oracle.attention(*arrays, scale=1.0)
    assert np.abs(np.asarray(exact[0])).max() > 0.5
    for found, other in zip((expected[0], *expected[2:]), exact, strict=False):
        np.testing.assert_allclose(found, other, atol=3e-6)
    for bound in (20.0, 0.1):  # logits are 8 at most
        for found, other in zip(run(bound, *arrays), expected, strict=True):
            np.testing.assert_array_equal(found, other)
