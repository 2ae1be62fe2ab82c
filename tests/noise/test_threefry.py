import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.extend.random import threefry2x32_p

from dpfa_jax.noise import insecure_test_key, key_words, threefry2x32

pytestmark = pytest.mark.quickly_compiled

WORDS = key_words(insecure_test_key(2024))


def test_words_are_those_of_jax_random_bits():
    """V10: 4096 counters (0, i) give the two words of jax's 64-bit draw i."""
    with jax.enable_x64(True):
        key = jax.random.wrap_key_data(WORDS, impl="threefry2x32")
        expected = np.asarray(jax.random.bits(key, (4096,), "uint64"))
    index = jnp.arange(4096, dtype=jnp.uint32)
    y0, y1 = map(np.asarray, threefry2x32(WORDS[0], WORDS[1], jnp.zeros_like(index), index))
    assert (expected == (y0.astype(np.uint64) << np.uint64(32) | y1)).all()


def test_words_of_any_key_and_counter_are_those_of_jax():
    """V10: 4096 random (key, counter) pairs against jax's own primitive; published vectors too."""
    four = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (4, 4096), np.uint32))
    ours, theirs = threefry2x32(*four), threefry2x32_p.bind(*four)
    assert all((a == b).all() for a, b in zip(ours, theirs, strict=True))
    ones = jnp.uint32(0xFFFFFFFF)
    assert [int(y) for y in threefry2x32(ones, ones, ones, ones)] == [0x1CB996FC, 0xBB002BE7]


def test_words_inside_a_kernel_are_the_same():
    """V10: the same text in a Pallas kernel under interpretation."""

    def kernel(words, out0, out1):
        row = jax.lax.broadcasted_iota(jnp.uint32, (32, 64), 0)
        column = jax.lax.broadcasted_iota(jnp.uint32, (32, 64), 1)
        out0[...], out1[...] = threefry2x32(words[0], words[1], row, column)

    shape = jax.ShapeDtypeStruct((32, 64), jnp.uint32)
    inside = pl.pallas_call(kernel, out_shape=(shape, shape), interpret=True)(WORDS)
    row, column = (x.astype(jnp.uint32) for x in jnp.indices((32, 64)))
    outside = threefry2x32(WORDS[0], WORDS[1], row, column)
    assert all((a == b).all() for a, b in zip(inside, outside, strict=True))
