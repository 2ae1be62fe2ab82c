"""Lengths of any integer dtype: beyond the axis nothing is hidden, below 0 everything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.attention import dot_product_attention, dp_attention
from dpfa_jax.core import ArgumentError
from dpfa_jax.noise import insecure_test_key
from dpfa_jax.release import RecordRelease

pytestmark = pytest.mark.quickly_compiled

ROWS, KEYS = 3, 5
FAR = {
    "int8": 127,
    "uint8": 255,
    "uint32": 2**32 - 1,
    "int64": 2**40,
    "uint64": 2**63,
}
NAMES = ("query_seq_lengths", "key_value_seq_lengths")


def arrays(rows=ROWS, keys=KEYS):
    rng = np.random.default_rng(0)
    shapes = (2, rows, 2, 8), (2, keys, 1, 8), (2, keys, 1, 8)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FAR)
def test_a_length_beyond_the_axis_hides_nothing(name, dtype):
    """Traced too, and with 64 bits."""
    lengths = np.array([FAR[dtype], 2], dtype)
    want = dot_product_attention(*arrays(), **{name: jnp.array([5, 2], jnp.int32)})
    np.testing.assert_array_equal(dot_product_attention(*arrays(), **{name: lengths}), want)
    with jax.enable_x64(True):
        traced = jax.jit(lambda given: dot_product_attention(*arrays(), **{name: given}))
        assert lengths.dtype == jnp.asarray(lengths).dtype
        np.testing.assert_array_equal(traced(lengths), traced(np.array([5, 2], np.int32)))


@pytest.mark.parametrize("name", NAMES)
def test_lengths_in_a_list(name):
    call = functools.partial(dot_product_attention, *arrays())
    want = call(**{name: jnp.array([5, 2], jnp.int32)})
    for lengths in ([2**40, 2], [jnp.int32(9), jnp.int32(2)], (np.int64(2**40), np.int64(2))):
        np.testing.assert_array_equal(call(**{name: lengths}), want)


@pytest.mark.parametrize("name", NAMES)
def test_negative_lengths_hide_everything(name):
    for dtype in ("int8", "int64"):
        lengths = np.array([np.iinfo(dtype).min, -1], dtype)
        assert not dot_product_attention(*arrays(), **{name: lengths}).any()


def test_an_axis_longer_than_the_dtype_counts():
    """An int8 length is at most 127 of 200 keys, and is meant so."""
    lengths = np.array([127, 2], np.int8)
    call = functools.partial(dot_product_attention, *arrays(keys=200))
    want = call(key_value_seq_lengths=lengths.astype(np.int32))
    np.testing.assert_array_equal(call(key_value_seq_lengths=lengths), want)


@pytest.mark.parametrize("name", NAMES)
def test_of_a_private_memory(name):
    """A hidden key leaves its record out of the release; a wrapped length left all of them out."""
    release = RecordRelease(1.0, 1.0, 1.0, ROWS, 2, 8, insecure_test_noise=True)
    call = functools.partial(
        dp_attention, *arrays(), release=release, noise_key=insecure_test_key(0)
    )
    lengths = np.full(2, 2**32 - 1, np.uint32)
    np.testing.assert_array_equal(call(**{name: lengths}), call())


@pytest.mark.parametrize("lengths", [[1, [2]], [2.0, 1.0], ["a", "b"], [2**70, 1], [None, 1]])
def test_other_lists_are_refused(lengths):
    with pytest.raises(ArgumentError, match="query_seq_lengths"):
        dot_product_attention(*arrays(), query_seq_lengths=lengths)
