"""Masks and biases of the Hopper kernels on the device: V6 to V8, V10, V12.

python -m pytest -m gpu tests/kernels/mosaic_gpu/test_pairs_gpu.py
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle
from helpers import padding_cases

from dpfa_jax.attention import core
from dpfa_jax.kernels import epilogue
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout, NoiseInputs
from dpfa_jax.kernels.mosaic_gpu.backend import MosaicGpuBackend

pytestmark = pytest.mark.gpu
BACKEND = MosaicGpuBackend()
HIDDEN = 7


class Case(NamedTuple):
    sizes: tuple[int, ...]  # B, T, S, N, K, H
    mask: tuple[int, ...] | None
    bias: tuple[int, ...] | None
    bias_dtype: Any = jnp.bfloat16
    dtype: Any = jnp.bfloat16
    options: Any = ()


CASES = {
    "all axes, GQA": Case((2, 300, 333, 4, 2, 64), (2, 4, 300, 333), (2, 4, 300, 333), jnp.float32),
    "causal": Case(
        (3, 384, 384, 2, 1, 128),
        (3, 1, 384, 384),
        (1, 2, 384, 384),
        options=(("is_causal", True),),
    ),
    "keys only, cap": Case(
        (2, 260, 520, 4, 2, 128),
        (2, 1, 1, 520),
        (1, 4, 1, 520),
        jnp.float32,
        options=(("logits_soft_cap", 6.0),),
    ),
    "rows only, window": Case(
        (2, 300, 300, 2, 2, 128),
        (1, 2, 300, 1),
        (2, 1, 300, 1),
        jnp.float16,
        jnp.float16,
        (("local_window", (60, 30)),),
    ),
    "one bias for all, head size 80": Case(
        (3, 257, 391, 4, 1, 80), None, (1, 1, 257, 391), jnp.float32
    ),
    "mask alone, bound": Case(
        (2, 640, 1100, 2, 2, 128),
        (2, 1, 640, 1100),
        None,
        options=(("largest_logit", 6.0),),
    ),
    # A row's maximum is kept.
    "mask and bias, many keys": Case(
        (2, 260, 1100, 2, 2, 128), (2, 1, 260, 1100), (1, 2, 260, 1100), dtype=jnp.float16
    ),
    "float32 bias and mask, float16": Case(
        (2, 300, 520, 2, 2, 128), (1, 2, 300, 520), (1, 2, 300, 520), jnp.float32, jnp.float16
    ),
    "head size 256": Case((1, 200, 300, 2, 2, 256), (1, 1, 200, 300), (1, 2, 200, 300)),
}


def draw(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def call(case):
    batch, rows, keys, heads, kv_heads, size = case.sizes
    rng = np.random.default_rng(1)
    query, cotangent = (draw(rng, (batch, rows, heads, size), case.dtype) for _ in range(2))
    key, value = (draw(rng, (batch, keys, kv_heads, size), case.dtype) for _ in range(2))
    mask = None
    if case.mask is not None:
        mask = rng.random(case.mask) < 0.7
        if case.mask[2] > 1:
            mask[0, 0, 5] = False
        if case.mask[3] > 1:
            mask[..., HIDDEN] = False
        mask = jnp.asarray(mask)
    bias = None if case.bias is None else draw(rng, case.bias, case.bias_dtype)
    spec = AttentionSpec(size**-0.5, **dict(case.options))
    return spec, AttentionInputs(query, key, value, bias, mask), cotangent


def run(spec, inputs, cotangent):
    """(output, lse, dq, dk, dv, dbias) by one compiled program."""

    def program(inputs, cotangent):
        def answer(*arrays):
            names = ("query", "key", "value", "bias")
            given = inputs._replace(**dict(zip(names, arrays, strict=True)))
            return core.attend(BACKEND, spec, given)

        (output, lse), pull = jax.vjp(answer, *inputs[:4])
        return output, lse, *pull((cotangent, jnp.zeros_like(lse)))

    return jax.jit(program)(inputs, cotangent)


def naive(spec, mask, query, key, value, bias):
    """Attention as a textbook writes it, products and weights in the inputs' precision."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    logits = logits * spec.scale
    if spec.logits_soft_cap is not None:
        logits = spec.logits_soft_cap * jnp.tanh(logits / spec.logits_soft_cap)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    seen = jnp.asarray(
        oracle.visibility(
            logits.shape, mask=mask, is_causal=spec.is_causal, window=spec.local_window
        )
    )
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
    weights = jnp.where(seen, weights, 0).astype(value.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def distance(x, y):
    return np.linalg.norm(np.asarray(x, np.float64) - y)


@pytest.mark.parametrize("keys", [512, 2048])  # of 2048 a row's maximum may be kept
@pytest.mark.parametrize(
    ("dtype", "lowest", "options"),
    [
        ("bfloat16", -1e10, {}),
        ("float16", -1e9, {"is_masked": True}),
        ("float16", -1e10, {"size": 128}),
        ("bfloat16", float(np.finfo(np.float32).min), {"cap": 20.0, "size": 128}),
        ("bfloat16", -1e10, {"size": 256}),
    ],
)
def test_padding_by_a_bias_is_padding_by_a_mask(keys, dtype, lowest, options):
    """V6, V7: a weight is one multiply-add with a rounded maximum or log-sum-exp, and finite."""
    spec, by_bias, by_mask, cotangent = padding_cases.calls(
        dtype, lowest, keys=keys, padding=256, **options
    )
    found, expected = (run(spec, inputs, cotangent) for inputs in (by_bias, by_mask))
    padding_cases.assert_alike(found, expected, 256)


@pytest.mark.parametrize("case", CASES)
def test_error_is_within_twice_the_naive_one(case):
    """V6, V7, V8: answer and gradients against float64; bytes that a mask hides move no bit."""
    spec, inputs, cotangent = call(CASES[case])
    mask = None if inputs.mask is None else np.asarray(inputs.mask)
    assert BACKEND.cannot(spec, inputs, "gpu") is None
    found = run(spec, inputs, cotangent)
    if mask is not None and mask.shape[3] > 1:
        dirty = inputs._replace(
            key=inputs.key.at[:, HIDDEN].set(jnp.nan),
            value=inputs.value.at[:, HIDDEN].set(jnp.inf),
        )
        for one, other in zip(found, run(spec, dirty, cotangent), strict=True):
            if one is not None:
                one, other = (np.asarray(x, np.float32) for x in (one, other))
                assert np.array_equal(one, other)
    hiding = {"mask": mask, "is_causal": spec.is_causal, "window": spec.local_window}
    expected = oracle.attention(
        *inputs[:3],
        cotangent,
        bias=inputs.bias,
        scale=spec.scale,
        soft_cap=spec.logits_soft_cap,
        **hiding,
    )
    theirs, pull = jax.vjp(functools.partial(naive, spec, mask), *inputs[:4])
    theirs = (theirs, *pull(cotangent))
    output, lse, *gradients = found
    exact = list(expected[:4])
    if inputs.bias is not None:
        exact.append(oracle.reduced_like(expected[4], inputs.bias.shape))
    # Where a gradient cancels to nothing, float32 leaves 2^-24 of each product in the sum.
    size = inputs.query.shape[3]
    largest = [np.abs(np.asarray(x, np.float64)).max() for x in inputs[:3]]
    products = size * spec.scale * np.linalg.norm(np.asarray(cotangent, np.float64))
    floor = 2.0**-24 * products * largest[2] * max(largest[:2])
    for mine, other, number in zip((output, *gradients), theirs, exact, strict=False):
        assert mine.dtype == other.dtype
        assert distance(mine, number) <= 2 * distance(other, number) + floor
    shape = (inputs.query.shape[0], inputs.query.shape[2], output.shape[1], inputs.key.shape[1])
    is_empty = ~oracle.visibility(shape, **hiding).any(-1).swapaxes(1, 2)
    assert np.array_equal(np.isneginf(np.asarray(lse)), is_empty)
    assert not np.any(np.asarray(output, np.float32)[is_empty])


def test_minus_infinity_in_a_bias_is_a_mask():
    """V7: the same answer as a mask and the same bias without it, also in rows that see no key."""
    rng = np.random.default_rng(2)
    query, key, value, cotangent = (
        draw(rng, (2, 300, 2, 128), jnp.bfloat16) for _ in range(4)
    )  # fmt: skip
    bias = draw(rng, (1, 2, 300, 300), jnp.bfloat16)
    mask = rng.random(bias.shape) < 0.7
    mask[0, 0, 9] = False
    spec = AttentionSpec(128**-0.5, is_causal=True)
    plain = AttentionInputs(query, key, value, bias, jnp.asarray(mask))
    hidden = AttentionInputs(query, key, value, jnp.where(mask, bias, -jnp.inf))
    masked, biased = (run(spec, inputs, cotangent) for inputs in (plain, hidden))
    is_empty = np.isneginf(np.asarray(masked[1]))
    assert is_empty.any()
    assert np.array_equal(is_empty, np.isneginf(np.asarray(biased[1])))
    for one, other in zip(masked, biased, strict=True):
        one, other = (np.nan_to_num(np.asarray(x, np.float64), neginf=0.0) for x in (one, other))
        assert np.linalg.norm(one - other) <= 2.0**-10 * np.linalg.norm(one)


@pytest.mark.parametrize("is_after", [False, True])
@pytest.mark.parametrize("keys_only", [False, True])
def test_example_release(keys_only, is_after):
    """V4, V10, V12: the noise of the XLA epilogue; rows without keys are noise; vmap moves no bit.

    With a mask of keys a warpgroup makes the noise or a pass does, with a full mask a pass always.
    """
    backend = dataclasses.replace(BACKEND, noise_pass=is_after)
    batch, rows, keys, heads, size = 2, 300, 390, 2, 128
    readout = ExampleReadout(0.3, (0.5, 0.25), (2.0**-5, 2.0**-6))
    spec = AttentionSpec(size**-0.5, readout=readout)
    rng = np.random.default_rng(3)
    mask = rng.random((batch, 1, 1 if keys_only else rows, keys)) < 0.7
    mask[0, 0, 0 if keys_only else 4] = False
    query = draw(rng, (batch, rows, heads, size), jnp.bfloat16)
    key, value = (draw(rng, (batch, keys, 1, size), jnp.bfloat16) for _ in range(2))
    noise = NoiseInputs(
        jnp.asarray([[1, 2], [3, 4]], jnp.uint32),
        jnp.asarray([5, 9], jnp.uint32),
        jnp.full(2, 3, jnp.uint32),
    )
    inputs = AttentionInputs(query, key, value, mask=jnp.asarray(mask), noise=noise)
    outputs = jax.jit(lambda x: backend.forward(spec, x))(inputs)
    released = np.asarray(outputs.output, np.float64)
    grids = np.asarray(readout.grids)[:, None]
    assert np.all(released % grids == 0)
    expected = np.asarray(epilogue.example(readout, outputs.unclipped, noise), np.float64)
    slack = 1.0 + np.abs(released) * 2.0**-8 / grids
    assert np.all(np.abs(released - expected) / grids <= slack)
    is_empty = np.isneginf(np.asarray(outputs.lse))
    assert is_empty.any()
    assert not np.any(np.asarray(outputs.unclipped, np.float32)[is_empty])
    single = jax.tree.map(lambda x: x[:, None], inputs)
    mapped = jax.jit(jax.vmap(lambda x: backend.forward(spec, x).output))(single)
    assert np.array_equal(np.asarray(mapped[:, 0], np.float64), released)
