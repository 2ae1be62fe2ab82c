"""Maxima that are kept from step to step, in the simulator: whether each row takes a new one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import growing_logits
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.kernels.mosaic_gpu import forward as forward_module
from dpfa_jax.kernels.mosaic_gpu import softmax
from dpfa_jax.kernels.mosaic_gpu.forward import ForwardArrays, attention_forward
from dpfa_jax.kernels.mosaic_gpu.tiles import ForwardTiles
from dpfa_jax.kernels.mosaic_gpu.walk import Tiling

pytestmark = [pytest.mark.quickly_compiled, pytest.mark.usefixtures("kept_from_the_first_step")]
TILES = {"ahead": ForwardTiles(), "alone": ForwardTiles(ahead=False)}
ROWS, KEYS, SIZE = 64, 640, 64  # 5 steps


@pytest.fixture
def kept_from_the_first_step(monkeypatch):
    """Calls of few steps look for their maximum in each."""
    monkeypatch.setattr(forward_module, "KEPT_STEPS", 0)


@functools.cache
def compiled(is_causal, tile, softmax_of=None, kept=softmax.KEPT):
    """One program for all numbers of a shape; the last two name what is patched as it is traced."""
    del softmax_of, kept
    return jax.jit(
        functools.partial(
            attention_forward,
            growing_logits.spec(is_causal=is_causal),
            tile=TILES[tile],
            interpret=plgpu.InterpretGPUParams(),
        )
    )


def forward(inputs, *, is_causal=False, tile="ahead"):
    run = compiled(is_causal, tile, forward_module._softmax, softmax.KEPT)
    return run(ForwardArrays(*inputs[:3]))


def error_of_rows(found, exact):
    """Of each row's output, relative to it."""
    difference = np.asarray(found.output, np.float64) - exact
    return np.linalg.norm(difference[0, :, 0], axis=-1) / np.linalg.norm(exact[0, :, 0], axis=-1)


@pytest.mark.parametrize(
    ("dtype", "is_causal", "tile"),
    [
        (jnp.float16, False, "ahead"),
        pytest.param(jnp.bfloat16, False, "ahead", marks=pytest.mark.slow),
        pytest.param(jnp.float16, True, "ahead", marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, True, "alone", marks=pytest.mark.slow),
    ],
)
def test_each_row_has_its_softmax(dtype, is_causal, tile):
    """V7: growing by more than a maximum is kept for in each step, by less, not at all, falling."""
    inputs = growing_logits.inputs(ROWS, KEYS, SIZE, dtype)
    found = forward(inputs, is_causal=is_causal, tile=tile)
    output, lse = growing_logits.expected(inputs, is_causal=is_causal)
    # Weights and output are rounded once each; errors of the products add up as a random walk.
    assert error_of_rows(found, output).max() < float(jnp.finfo(dtype).eps)
    assert np.abs(found.lse - lse).max() < growing_logits.lse_slack(SIZE, KEYS)


def test_a_row_depends_on_no_other():
    """Rows beside one that takes a new maximum keep the bits that they have beside others."""
    inputs = growing_logits.inputs(ROWS, KEYS, SIZE, jnp.float16)
    is_calm = np.resize(np.abs(growing_logits.GROWTHS) < 1, ROWS)
    calm = inputs.query * jnp.asarray(is_calm, jnp.float16)[None, :, None, None]
    beside, alone = (forward(x) for x in (inputs, inputs._replace(query=calm)))
    for one, other in zip(beside[::2], alone[::2], strict=True):  # output, lse
        rows_first = [np.asarray(x, np.float32).reshape(ROWS, -1) for x in (one, other)]
        same = np.all(rows_first[0] == rows_first[1], axis=1)
        assert np.all(same[is_calm])
        assert not np.any(same[~is_calm])  # negative control: those were changed


def running_maximum(*_, **__):
    return softmax.RunningMaximum()


@pytest.mark.parametrize("lowest", [-np.inf, float(np.finfo(np.float32).min), -1e10])
def test_rows_that_see_no_key_for_some_steps(monkeypatch, lowest):
    """As where a maximum is looked for in each step: first keys late, none at all, lengths of 0."""
    inputs = growing_logits.inputs(ROWS, KEYS, SIZE, jnp.float16)
    query, key, value = (jnp.repeat(x, 2, axis=0) for x in inputs[:3])
    rows, keys = np.arange(ROWS)[:, None], np.arange(KEYS)
    shown = (keys >= 9 * rows) & (rows % 7 != 3)
    arrays = ForwardArrays(
        query, key, value,
        key_lengths=jnp.asarray([0, 500], jnp.int32),
        bias=jnp.asarray(np.where(shown, 0, lowest), jnp.float32)[None, None],
    )  # fmt: skip

    def run():
        found = compiled(False, "ahead", forward_module._softmax)(arrays)
        return (np.asarray(x, np.float64) for x in (found.output[:, :, 0], found.lse[:, 0]))

    output, lse = run()
    monkeypatch.setattr(forward_module, "_softmax", running_maximum)
    expected, expected_lse = run()
    is_empty = np.isneginf(lse)
    sees = (shown & (keys < 500)).any(axis=1)
    assert np.array_equal(is_empty, np.stack([np.ones(ROWS, bool), ~sees]))
    assert not np.any(output[is_empty])
    assert np.array_equal(is_empty, np.isneginf(expected_lse))
    difference = np.linalg.norm(output - expected, axis=-1)
    bound = 2 * float(jnp.finfo(jnp.float16).eps) * np.linalg.norm(expected, axis=-1)
    assert np.all(difference <= bound)
    slack = growing_logits.lse_slack(SIZE, KEYS)
    assert np.abs(lse[~is_empty] - expected_lse[~is_empty]).max() < slack


@pytest.mark.parametrize(
    ("keys", "block_kv", "is_kept"), [(1024, 128, True), (896, 128, False), (2048, 256, False)]
)
def test_long_calls_of_narrow_steps_keep_it(monkeypatch, keys, block_kv, is_kept):
    monkeypatch.undo()
    tile = ForwardTiles(block_kv=block_kv, ahead=block_kv == 128)
    tiling = Tiling(growing_logits.spec(is_causal=False), tile, 1, 1, keys, keys, 1, False, False)
    chosen = forward_module._softmax(tiling, jnp.dtype(jnp.bfloat16), False, simulate=True)
    assert isinstance(chosen, softmax.KeptMaximum) == is_kept


def test_a_maximum_kept_for_too_long_shows(monkeypatch):
    """Negative control: weights beyond what float16 holds, were they let through."""
    inputs = growing_logits.inputs(ROWS, KEYS, SIZE, jnp.float16)
    assert np.all(np.isfinite(np.asarray(forward(inputs).output, np.float32)))
    monkeypatch.setattr(softmax, "KEPT", 2.0**80)
    assert not np.all(np.isfinite(np.asarray(forward(inputs).output, np.float32)))
