"""The kernels in the Mosaic GPU simulator, on a CPU: values, not layouts.

Products whose left operand lies in registers go through plain JAX (forward) or shared memory
(backward) there: the simulator has no such operand. The GPU suite covers the rest.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle
from helpers import hidden_bytes
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.kernels import epilogue, pieces
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout, NoiseInputs
from dpfa_jax.kernels.mosaic_gpu import backend
from dpfa_jax.kernels.public_maximum import has_public_maximum
from dpfa_jax.noise import attention_noise

pytestmark = pytest.mark.quickly_compiled

BACKEND = backend.MosaicGpuBackend(interpret=plgpu.InterpretGPUParams())
# Where the noise of an example release is made.
PLACES = {
    "inside": dataclasses.replace(BACKEND, noise_pass=False),
    "after": dataclasses.replace(BACKEND, noise_pass=True),
}


def draw(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def relative(x, y):
    x = np.asarray(x, np.float64)
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.slow
def test_everything_at_once():
    """V7, V8: ragged sizes, GQA, window, causal, cap, lengths; NaN past the lengths is not seen."""
    rows, keys, lengths = 70, 90, (55, 60)
    spec = AttentionSpec(0.2, is_causal=True, local_window=(40, 3), logits_soft_cap=4.0)
    query, key, value, cotangent = (
        draw(1, n, heads, 40, seed=seed)
        for seed, (n, heads) in enumerate(((rows, 2), (keys, 1), (keys, 1), (rows, 2)))
    )
    query_lengths, key_lengths = (jnp.asarray([n], jnp.int32) for n in lengths)
    inputs = AttentionInputs(
        query.at[:, lengths[0] :].set(jnp.nan),
        key.at[:, lengths[1] :].set(jnp.nan),
        value.at[:, lengths[1] :].set(jnp.nan),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
    )
    assert BACKEND.cannot(spec, inputs, "cpu") is None
    expected = oracle.attention(
        *(query, key, value, cotangent),
        scale=spec.scale,
        soft_cap=spec.logits_soft_cap,
        is_causal=True,
        window=spec.local_window,
        query_lengths=lengths[0],
        key_lengths=lengths[1],
    )
    outputs = BACKEND.forward(spec, inputs)
    assert relative(outputs.output, expected[0]) < 4e-3  # bf16 rounds to 2^-9
    assert np.all(np.isneginf(outputs.lse[:, lengths[0] :]))
    assert np.all(np.isfinite(outputs.lse[:, : lengths[0]]))
    gradients = BACKEND.backward(spec, inputs, outputs, cotangent)
    for mine, theirs in zip(gradients[:3], expected[1:4], strict=True):
        assert relative(mine, theirs) < 6e-3


# Logits here are 5.9 at most; 5 more than is said, or 50 less than -B, is still their softmax.
PUBLIC = {
    "above the bound": ({"largest_logit": 0.9}, jnp.bfloat16),
    "float16": ({"largest_logit": 7.0}, jnp.float16),
    "large bound": ({"largest_logit": 60.0}, jnp.bfloat16),
    "cap": ({"logits_soft_cap": 4.0}, jnp.bfloat16),
    "running maximum": ({"largest_logit": 70.0}, jnp.bfloat16),
}


@pytest.mark.parametrize(
    "name", ["above the bound", *(pytest.param(n, marks=pytest.mark.slow) for n in [*PUBLIC][1:])]
)
def test_public_maximum(name):
    """V7, V8: no running maximum where it fits the dtype; rows without keys, NaN past a length."""
    options, dtype = PUBLIC[name]
    rows, keys, length = 70, 90, 60
    spec = AttentionSpec(0.3, is_causal=True, local_window=(20, 20), **options)
    arrays = [draw(1, 1, 1, 1, dtype=dtype)] * 3
    assert has_public_maximum(spec, AttentionInputs(*arrays)) == (name != "running maximum")
    query, key, value, cotangent = (
        draw(1, n, heads, 40, seed=seed, dtype=dtype)
        for seed, (n, heads) in enumerate(((rows, 2), (keys, 1), (keys, 1), (rows, 2)))
    )
    inputs = AttentionInputs(
        query,
        key.at[:, length:].set(jnp.nan),
        value.at[:, length:].set(jnp.nan),
        key_lengths=jnp.asarray([length], jnp.int32),
        query_lengths=jnp.asarray([rows - 3], jnp.int32),
    )
    expected = oracle.attention(
        *(query, key, value, cotangent),
        scale=spec.scale,
        soft_cap=spec.logits_soft_cap,
        is_causal=True,
        window=spec.local_window,
        key_lengths=length,
        query_lengths=rows - 3,
    )
    outputs = BACKEND.forward(spec, inputs)
    assert relative(outputs.output, expected[0]) < 4e-3
    assert np.array_equal(np.isneginf(outputs.lse[0, :, 0]), np.arange(rows) >= rows - 3)
    if name == "above the bound":
        return  # the quick case; the others do all
    if spec.logits_soft_cap is None:
        running = BACKEND.forward(dataclasses.replace(spec, largest_logit=None), inputs)
        seen = np.isfinite(outputs.lse)
        assert np.abs(np.where(seen, outputs.lse - running.lse, 0.0)).max() < 1e-5
    gradients = BACKEND.backward(spec, inputs, outputs, cotangent)
    for mine, theirs in zip(gradients[:3], expected[1:4], strict=True):
        assert relative(mine, theirs) < 6e-3


# Within the promise: the largest logits of rows of 64 keys are 14, then 75 and -69.
@pytest.mark.parametrize(
    ("logit", "is_softmax"),
    [(75.0, True), *(pytest.param(x, x > -80, marks=pytest.mark.slow) for x in (-69.0, -95.0))],
)
def test_how_false_a_bound_may_be(logit, is_softmax):
    """V7: the softmax of all equal logits, whatever was said; far below, a row that sees no key."""
    size = 64
    spec = AttentionSpec(abs(logit) / size, largest_logit=1.0)
    query = jnp.ones((1, 64, 1, size), jnp.bfloat16)
    value = draw(1, 64, 1, size)
    inputs = AttentionInputs(query, query if logit > 0 else -query, value)
    outputs = BACKEND.forward(spec, inputs)
    mean = np.asarray(value, np.float64).mean(axis=1, keepdims=True)
    if is_softmax:
        assert relative(outputs.output, np.broadcast_to(mean, value.shape)) < 4e-3
        assert np.abs(outputs.lse - (logit + np.log(64))).max() < 1e-4
    else:
        assert not np.any(np.asarray(outputs.output, np.float32))
        assert np.all(np.isneginf(outputs.lse))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_false_bound_costs_no_privacy(place):
    """V4, V5: rows that leave float32 inside are released as noise alone, the others as ever."""
    clip, grid = 0.5, 2.0**-4
    readout = ExampleReadout(clip, (1.0,), (grid,))
    spec = AttentionSpec(100.0 / 64, largest_logit=5.0, readout=readout)
    query = jnp.ones((2, 64, 1, 64), jnp.bfloat16).at[1].set(0.0)
    value = draw(2, 64, 1, 64)
    noise = NoiseInputs(*(jnp.asarray(x, jnp.uint32) for x in ([[1, 2], [3, 4]], [5, 6], [0, 0])))
    inputs = AttentionInputs(query, jnp.ones_like(query), value, noise=noise)
    outputs = PLACES[place].forward(spec, inputs)
    inside = np.asarray(outputs.unclipped, np.float32)
    assert not np.any(np.isfinite(inside[0]))
    drawn = attention_noise(*noise, heads=1, row_start=0, rows=64, columns=64)
    moved = np.asarray(outputs.output, np.float64) - drawn
    slack = grid / 2 + np.abs(drawn) * 2.0**-7 + 1e-3  # grid, bfloat16
    assert np.all(np.abs(moved[0]) <= slack[0])
    assert np.all(np.linalg.norm(moved[1], axis=-1) <= clip + np.linalg.norm(slack[1], axis=-1))
    # Negative control: the second example, whose logits are 0, is an answer and no mere noise.
    assert np.all(np.isfinite(inside[1]))
    assert np.abs(moved[1]).max() > 1.5 * grid


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_example_release_is_the_blocked_one(place):
    """V10, V12: same words, same clip, same grid as the XLA epilogue on the kernel's own output."""
    readout = ExampleReadout(0.3, (0.5, 0.25), (2.0**-5, 2.0**-6))
    spec = AttentionSpec(0.25, readout=readout)
    noise = NoiseInputs(
        jnp.asarray([[1, 2], [0xFFFFFFFF, 7]], jnp.uint32),
        jnp.asarray([5, 1000], jnp.uint32),
        jnp.asarray([3, 0], jnp.uint32),
    )
    arrays = [draw(2, n, heads, 64, seed=n) for n, heads in ((65, 2), (33, 1))]
    value = arrays[1].at[1, 0, 0, 0].set(jnp.inf)
    inputs = AttentionInputs(arrays[0], arrays[1], value, noise=noise)
    outputs = PLACES[place].forward(spec, inputs)
    released = np.asarray(outputs.output, np.float64)
    grids = np.asarray(readout.grids)[None, None, :, None]
    assert np.all(released % grids == 0)
    expected = epilogue.example(readout, outputs.unclipped, noise)
    steps = np.abs(released - np.asarray(expected, np.float64)) / grids
    # `unclipped` is rounded to bf16, and float32 differs in its last bits: one grid step, or the
    # bf16 rounding of the released value.
    slack = 1.0 + np.abs(released) * 2.0**-8 / grids
    assert np.all(steps <= slack)
    # A row that is not finite counts as zero: what is left is noise.
    assert not np.all(np.isfinite(np.asarray(outputs.unclipped, np.float32)))
    assert np.all(np.isfinite(released))


def test_vmap_folds_into_the_batch():
    """Nested vmap, one operand shared by the mapped axes; the folded call sees one batch axis."""
    seen = []

    def add(x, shared):
        seen.append((x.shape, shared.shape))
        return (x + shared,)

    folding = pieces.fold_vmap(add)
    x, shared = draw(2, 3, 4, 5, dtype=jnp.float32), draw(4, 5, seed=1, dtype=jnp.float32)
    mapped = jax.vmap(jax.vmap(lambda x: folding(x, shared)[0]))(x)
    assert np.array_equal(np.asarray(mapped), np.asarray(x + shared))
    assert ((24, 5), (24, 5)) in seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causality", "window", "mask of pairs"])
def test_keys_that_no_row_sees_hold_any_bytes(name):
    is_masked = name.startswith("mask")
    hidden_bytes.check(BACKEND, name, jnp.nan, dtype=jnp.bfloat16, has_bias=is_masked)


@pytest.mark.parametrize("name", hidden_bytes.CASES)
def test_hidden_values_are_zero_before_the_kernel(name):
    """V6: what the simulator shows above, without it; 0 * NaN would reach rows of the same tile."""
    options, arrays = hidden_bytes.CASES[name]
    values = jnp.zeros((1, hidden_bytes.KEYS, 1, 8)).at[:, hidden_bytes.HIDDEN].set(jnp.nan)
    inputs = AttentionInputs(jnp.zeros((1, hidden_bytes.ROWS, 2, 8)), values, values, **arrays)
    assert not backend._keep_keys(values, AttentionSpec(1.0, **options), inputs).any()
