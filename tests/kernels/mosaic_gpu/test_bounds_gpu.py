"""Logits at, and past, the bound that arguments state, on the device.

python -m pytest -m gpu tests/kernels/mosaic_gpu    (-n 8 where pytest-xdist is installed)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.hopper_cases import BACKEND, PLACES, PLACES_OF_SIZES, draw, noise_inputs

from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout
from dpfa_jax.kernels.public_maximum import has_public_maximum
from dpfa_jax.noise.fields import attention_noise

pytestmark = pytest.mark.gpu


# Logits as far as a statement may lie, and beyond it up to where the docstring promises a softmax.
@pytest.mark.parametrize(
    ("logit", "dtype"),
    [(x, jnp.bfloat16) for x in (-69.0, -62.0, 62.0, 78.0)]
    + [(x, jnp.float16) for x in (-10.3, -10.0, 10.0, 10.3)],
)
def test_every_logit_at_the_bound(logit, dtype):
    """V7: all weights as small, or as large, as they get: their sum is neither 0 nor infinite."""
    rows, keys, size = 200, 3000, 128
    rng = np.random.default_rng(6)
    query = jnp.full((1, rows, 2, size), 1.0, dtype)
    key = jnp.full((1, keys, 2, size), 1.0, dtype)
    value = jnp.clip(draw(rng, (1, keys, 2, size), dtype), -2, 2)
    bound = 62.0 if dtype == jnp.bfloat16 else 10.0
    spec = AttentionSpec(abs(logit) / size, largest_logit=bound)
    key = key if logit > 0 else -key
    inputs = AttentionInputs(query, key, value)
    assert has_public_maximum(spec, inputs)
    outputs = jax.jit(lambda *x: BACKEND.forward(spec, AttentionInputs(*x)))(*inputs[:3])
    mean = np.asarray(value, np.float64).mean(axis=1, keepdims=True)
    assert np.abs(np.asarray(outputs.output, np.float64) - mean).max() < 1e-3
    assert np.abs(np.asarray(outputs.lse) - (logit + np.log(keys))).max() < 1e-4


@pytest.mark.parametrize(("size", "place"), PLACES_OF_SIZES)
@pytest.mark.parametrize("logit", [95.0, 200.0])
def test_a_false_bound_costs_no_privacy(logit, size, place):
    """V4, V5: rows that leave float32 are released as noise, the others within clip and noise."""
    clip, grid, rows = 0.5, 2.0**-4, 256
    readout = ExampleReadout(clip, (1.0, 1.0), (grid, grid))
    spec = AttentionSpec(logit / size, largest_logit=5.0, readout=readout)
    rng = np.random.default_rng(9)
    query = jnp.ones((2, rows, 2, size), jnp.bfloat16).at[1].set(0.0)
    value = draw(rng, (2, rows, 2, size), jnp.bfloat16)
    inputs = AttentionInputs(query, jnp.ones_like(query), value, noise=noise_inputs(2))
    assert has_public_maximum(spec, inputs)
    outputs = jax.jit(lambda inputs: PLACES[place].forward(spec, inputs))(inputs)
    inside = np.asarray(outputs.unclipped, np.float32)
    assert not np.any(np.isfinite(inside[0]) & (inside[0] != 0))  # the bound is false there
    drawn = np.asarray(
        attention_noise(*inputs.noise, heads=2, row_start=0, rows=rows, columns=size), np.float64
    )
    moved = np.asarray(outputs.output, np.float64) - drawn
    slack = grid / 2 + np.abs(drawn) * 2.0**-7 + 1e-3  # grid, bfloat16
    assert np.all(np.abs(moved[0]) <= slack[0])
    assert np.all(np.linalg.norm(moved[1], axis=-1) <= clip + np.linalg.norm(slack[1], axis=-1))
    assert np.abs(moved[1]).max() > grid


@pytest.mark.parametrize("place", PLACES)
def test_noise_under_a_public_maximum(place):
    """V10, V12: the same noise, element by element, as under a running maximum; NaN stays local."""
    heads, size, rows = 4, 128, 300
    readout = ExampleReadout(0.3, (0.5,) * heads, (2.0**-5,) * heads)
    rng = np.random.default_rng(7)
    query, key, value = (draw(rng, (3, rows, heads, size), jnp.bfloat16) for _ in range(3))
    value = value.at[1, 7].set(jnp.nan)
    lengths = jnp.asarray([rows, rows, 200], jnp.int32)
    key = key.at[2, 200:].set(jnp.nan)
    inputs = AttentionInputs(query, key, value, key_lengths=lengths, noise=noise_inputs(3))
    for is_causal in (False, True):
        spec = AttentionSpec(size**-0.5, is_causal=is_causal, readout=readout)
        released = {}
        for bound in (None, 12.0):
            bounded = dataclasses.replace(spec, largest_logit=bound)
            run = jax.jit(functools.partial(PLACES[place].forward, bounded, residuals=False))
            released[bound] = np.asarray(run(inputs).output, np.float64)
        cells = released[12.0] / 2.0**-5
        assert np.array_equal(cells, np.round(cells))
        # The two softmaxes differ in their last bits: a value at a cell's edge may change cells.
        away = np.abs(released[12.0] - released[None])
        assert away.max() <= 2.0**-5 + 2.0**-7 * np.abs(released[None]).max()
        assert np.mean(away > 0) < 0.03
        drawn = 0.5 * np.asarray(
            attention_noise(*inputs.noise, heads=heads, row_start=0, rows=rows, columns=size)
        )
        hurt = slice(7, None) if is_causal else slice(None)  # rows that see the NaN: noise alone
        off = np.abs(released[12.0][1, hurt] - drawn[1, hurt])
        assert np.all(off <= 2.0**-6 + 2.0**-8 * np.abs(drawn[1, hurt]) + 1e-5)
