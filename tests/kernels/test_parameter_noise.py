"""The released mean by XLA, and which leaves go to the Hopper kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.core import ArgumentError, UnsupportedBackendError
from dpfa_jax.kernels import parameter_noise, released_rows
from dpfa_jax.kernels.mosaic_gpu import device
from dpfa_jax.noise import fields, insecure_test_key, normal_pair
from dpfa_jax.noise.threefry import threefry2x32

KEY = insecure_test_key(5)


def released(total, **more):
    numbers = {"stddev": 1.5, "grid": 2.0**-6, "divisor": 8.0}
    return parameter_noise.released_mean(total, KEY, 3, **{**numbers, **more})


def test_the_mean_is_sum_and_noise_on_the_grid():
    """V10, V12: the oracle's noise, once; every released value on the public grid."""
    shape = (7, 3)
    total = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    mean = np.asarray(jax.jit(released)(total), np.float64)
    noise = np.asarray(jax.jit(lambda: fields.parameter_noise(KEY, 3, shape))(), np.float64)
    assert mean.shape == shape
    assert np.all(mean * 8 % 2.0**-6 == 0)
    exact = np.asarray(total, np.float64) + 1.5 * noise
    assert np.all(np.abs(mean * 8 - exact) <= 2.0**-7 + 1e-5)


def test_the_field_continues_a_radius(monkeypatch):
    """V9: XLA's field too: with this key pair 479 has first word 0."""
    words = jnp.asarray([7, 3158553], jnp.uint32)
    monkeypatch.setattr(fields.counters, "bind_parameter", lambda *_: words)

    @jax.jit
    def field_and_pair():
        drawn = [threefry2x32(*words, jnp.uint32(high), jnp.uint32(479)) for high in (0, 1)]
        pair = normal_pair(*drawn[0], drawn[1][0])
        return fields.parameter_noise(KEY, 0, (960,)), drawn[0][0], jnp.stack(pair)

    noise, first_word, exact = map(np.asarray, field_and_pair())
    assert first_word == 0
    np.testing.assert_allclose(noise[958:], exact, rtol=1e-6)
    assert np.hypot(*noise[958:]) > 6.6


def test_one_fused_pass_without_a_second_copy():
    """The noise takes no memory of its own."""
    total = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    compiled = jax.jit(released).lower(total).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**16


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (2**14, None),
        (124_475_904, None),
        (768, "fewer"),
        (2**20 + 2, "multiple of 4"),
        (2**32, "more"),
    ],
)
def test_cannot_says_why(size, words, monkeypatch):
    monkeypatch.setattr(device, "cannot_pieces", lambda array: None)
    reason = parameter_noise.cannot(jax.ShapeDtypeStruct((size,), jnp.float32))
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((32, 2**20), None),
        ((0, 2**20), "no example"),
        ((64, 2**25), "were tried"),
        ((8, 4), "fewer"),
    ],
)
def test_cannot_says_why_of_rows(shape, words, monkeypatch):
    monkeypatch.setattr(device, "cannot", lambda array: None)
    reason = released_rows.cannot(jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    assert reason is None if words is None else words in reason


def test_wrong_calls_are_refused():
    """V23."""
    with pytest.raises(ArgumentError, match="implementation = 'torch'"):
        released(jnp.zeros(4), implementation="torch")
    if jax.default_backend() == "cpu":
        with pytest.raises(UnsupportedBackendError, match="mosaic_gpu: needs a Hopper GPU"):
            released(jnp.zeros(4), implementation="mosaic_gpu")
