"""Masks and biases on the Hopper kernels, on a CPU: packing, vmap, lowering, simulated values."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle
from helpers import pair_cases

from dpfa_jax.attention import core
from dpfa_jax.kernels import pieces
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout, NoiseInputs
from dpfa_jax.kernels.mosaic_gpu import backend, pairs, tiles

BACKEND = backend.MosaicGpuBackend()
struct = jax.ShapeDtypeStruct


@pytest.mark.parametrize("is_turned", [False, True])
@pytest.mark.parametrize(("rows", "keys"), [(1, 33), (130, 257), (128, 256)])
def test_bits_of_a_mask(is_turned, rows, keys):
    """V7: bit i of word w is column 32 w + i; what lies past the ends is hidden."""
    mask = np.random.default_rng(0).random((2, 3, rows, keys)) < 0.5
    found = pairs.arranged(
        jnp.asarray(mask), None, rows=keys if is_turned else rows, is_turned=is_turned
    )
    wanted = mask.swapaxes(2, 3) if is_turned else mask
    if rows == 1:
        assert found.mask_form is (pairs.Form.ROWS if is_turned else pairs.Form.COLUMNS)
        line = np.asarray(found.mask) > 0.5
        assert np.array_equal(line[..., :keys], mask[:, :, 0]) and not line[..., keys:].any()
        return
    assert found.mask_form is pairs.Form.BITS
    words = np.asarray(found.mask)
    words = words.reshape(*words.shape[:3], -1)  # (b, n, words, rows)
    assert words.shape[2] % 8 == 0 and words.shape[3] % 128 == 0
    bits = (words[:, :, :, None, :] >> np.arange(32)[:, None]) & 1
    bits = bits.reshape(2, 3, -1, words.shape[3]).swapaxes(2, 3).astype(bool)
    shape = wanted.shape
    assert np.array_equal(bits[:, :, : shape[2], : shape[3]], wanted)
    assert not bits[:, :, shape[2] :].any() and not bits[..., shape[3] :].any()


@pytest.mark.parametrize("head_size", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("is_noisy", [False, True])
def test_tiles_fit_beside_mask_and_bias(head_size, dtype, is_noisy):
    """Shared memory suffices for the largest of each."""
    mask, bias = struct((1, 1, 9, 9), bool), struct((1, 1, 9, 9), dtype)
    wanted = pairs.bytes_per_column(mask, bias)
    assert wanted == 16 + 128 * jnp.dtype(dtype).itemsize
    readout = ExampleReadout(1.0, (1.0,), (0.5,))
    spec = AttentionSpec(1.0, readout=readout) if is_noisy else AttentionSpec(1.0)
    tile = tiles.forward_tiles(spec, head_size, 4096, pair_bytes=wanted)
    assert tile.shared_bytes(head_size, wanted) <= tiles.SHARED_MEMORY_BYTES
    assert pairs.bytes_per_column(None, None) is None


def shapes(mask=None, bias=None, dtype=jnp.float32, size=64, noise=None):
    kv = struct((2, 93, 1, size), jnp.bfloat16)
    return AttentionInputs(
        struct((2, 100, 2, size), jnp.bfloat16),
        kv,
        kv,
        None if bias is None else struct(bias, dtype),
        None if mask is None else struct(mask, bool),
        noise=noise,
    )


def lower(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def loss(spec, query, bias, inputs):
    outputs, _ = core.attend(BACKEND, spec, inputs._replace(query=query, bias=bias))
    return outputs.astype(jnp.float32).sum()


FULL = (2, 2, 100, 93)


@pytest.mark.parametrize(
    ("mask", "bias", "dtype", "size"),
    [
        pytest.param((2, 1, 100, 93), (1, 2, 100, 93), jnp.bfloat16, 128, marks=pytest.mark.slow),
        pytest.param(FULL, FULL, jnp.float32, 64, marks=pytest.mark.slow),
        pytest.param((1, 1, 1, 93), (1, 2, 1, 93), jnp.float16, 64, marks=pytest.mark.slow),
        pytest.param((1, 2, 100, 1), (2, 1, 100, 1), jnp.float32, 128, marks=pytest.mark.slow),
        pytest.param(None, (1, 1, 1, 1), jnp.float32, 64, marks=pytest.mark.slow),
    ],
)
def test_gradient_lowers(mask, bias, dtype, size):
    """Layouts and copies of each form, for CUDA."""
    inputs = shapes(mask, bias, dtype, size)
    spec = AttentionSpec(0.1, is_causal=True)
    gradient = jax.grad(functools.partial(loss, spec), argnums=(0, 1))
    text = lower(gradient, inputs.query, inputs.bias, inputs)
    for kernel in ("forward", "backward_kv", "backward_q"):
        assert f"dpfa_attention_{kernel}" in text
    assert ("dpfa_attention_backward_bias" in text) == (bias[3] > 1)


def test_a_bias_that_nobody_derives_costs_no_kernel():
    """Its gradient is a call of its own, which is dropped."""
    inputs = shapes((2, 1, 100, 93), (1, 2, 100, 93))
    gradient = jax.grad(functools.partial(loss, AttentionSpec(0.1)))
    text = lower(gradient, inputs.query, inputs.bias, inputs)
    assert "dpfa_attention_backward_q" in text
    assert "dpfa_attention_backward_bias" not in text


@pytest.mark.slow
def test_private_program_with_a_mask_is_one_kernel():
    """V24: as without a mask: no callback, one kernel, nothing but the answer."""
    words = functools.partial(struct, dtype=jnp.uint32)
    noise = NoiseInputs(words((2, 2)), words((2,)), words((2,)))
    inputs = shapes((2, 1, 100, 93), size=64, noise=noise)  # at 128 there is no place for it
    spec = AttentionSpec(0.1, readout=ExampleReadout(1.0, (0.5, 0.5), (2.0**-5,) * 2))
    inside = dataclasses.replace(BACKEND, noise_pass=False)
    text = lower(lambda x: inside.forward(spec, x, residuals=False).output, inputs)
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "callback" not in text


def test_served(monkeypatch):
    """V23: neither array is refused, whatever its broadcast."""
    module = "dpfa_jax.kernels.mosaic_gpu.device.reason_without_hopper"
    monkeypatch.setattr(module, lambda: None)
    for shape in (FULL, (1, 2, 100, 1), (2, 1, 1, 93), (1, 1, 1, 1)):
        assert BACKEND.cannot(AttentionSpec(1.0), shapes(shape, shape), "gpu") is None


def test_vmap_of_broadcast_pairs():
    """A shared (1, ...) array stays one; a mapped one gets the batch axis of its group."""
    seen = []

    def add(x, pair):
        seen.append(pair.shape)
        return (x + pair,)

    folding = pieces.fold_vmap(add, [1])
    x = jnp.arange(24.0).reshape(4, 3, 2)
    shared, mapped = jnp.full((1, 2), 100.0), jnp.arange(4.0).reshape(4, 1, 1) * jnp.ones((1, 2))
    found = jax.vmap(lambda x: folding(x, shared)[0])(x)
    assert np.array_equal(found, x + shared) and seen[-1] == (1, 2)
    found = jax.vmap(lambda x, p: folding(x, p)[0])(x, mapped)
    assert np.array_equal(found, x + mapped) and seen[-1] == (12, 2)
    nested = jax.vmap(jax.vmap(lambda x: folding(x, shared)[0]))(x.reshape(2, 2, 3, 2))
    assert np.array_equal(nested.reshape(x.shape), x + shared) and seen[-1] == (1, 2)


def test_vmap_of_a_bias_gradient():
    """Each member of a mapped axis keeps its own sum over its batch."""

    def gradient(x, pair):
        ones = jnp.ones(pair.shape)
        return (x.sum(0, keepdims=True) * ones if pair.shape[0] == 1 else x * ones,)

    folding = pieces.summing_vmap(gradient, pieces.fold_vmap(gradient))
    x = jnp.arange(24.0).reshape(4, 3, 2)
    assert np.array_equal(folding(x[0], jnp.ones((1, 2))), x[0].sum(0, keepdims=True))
    found = jax.vmap(lambda x: folding(x, jnp.ones((1, 2))))(x)
    assert np.array_equal(found, x.sum(1, keepdims=True))
    found = jax.vmap(folding)(x, jnp.ones((4, 3, 2)))
    assert np.array_equal(found, x)
    nested = jax.vmap(jax.vmap(lambda x: folding(x, jnp.ones((1, 2)))))(x.reshape(2, 2, 3, 2))
    assert np.array_equal(nested, x.reshape(2, 2, 3, 2).sum(2, keepdims=True))


def relative(x, y):
    return np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y)


@pytest.mark.slow
@pytest.mark.parametrize("name", pair_cases.CASES)
def test_values(name, tmp_path):
    """V6, V7, V8: against float64; NaN in a key that the mask hides; a row that sees no key."""
    environment = {
        **os.environ, "NPROC": "8", "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    path = tmp_path / "found.npz"
    program = [sys.executable, str(Path(pair_cases.__file__)), str(path), name]
    subprocess.run(program, env=environment, check=True, timeout=300)
    found = np.load(path)
    spec, inputs, cotangent = pair_cases.arrays(name)
    expected = oracle.attention(
        *inputs[:3],
        cotangent,
        bias=inputs.bias,
        scale=spec.scale,
        soft_cap=spec.logits_soft_cap,
        is_causal=spec.is_causal,
        window=spec.local_window,
        mask=np.asarray(inputs.mask),
    )
    assert relative(found[f"{name} output"], expected[0]) < 4e-3
    seen = oracle.visibility(
        expected[4].shape,
        mask=np.asarray(inputs.mask),
        is_causal=spec.is_causal,
        window=spec.local_window,
    )
    is_empty = ~seen.any(-1).swapaxes(1, 2)
    assert np.array_equal(np.isneginf(found[f"{name} lse"]), is_empty)
    assert not np.any(found[f"{name} output"][is_empty])
    for one, theirs in zip(("query", "key", "value"), expected[1:4], strict=True):
        assert relative(found[f"{name} {one}"], theirs) < 6e-3
    if inputs.bias is not None:
        theirs = oracle.reduced_like(expected[4], inputs.bias.shape)
        if inputs.bias.shape[3] == 1:  # what a whole row shares changes no weight
            assert np.abs(theirs).max() < 1e-12 and not found[f"{name} bias"].any()
        else:
            assert relative(found[f"{name} bias"], theirs) < 6e-3
