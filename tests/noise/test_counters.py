import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.core import ArgumentError
from dpfa_jax.noise import attention_counter, bind, insecure_test_key, key_words
from dpfa_jax.noise.counters import bind_parameter, check_attention_ranges

pytestmark = pytest.mark.quickly_compiled

LIMITS = {"batch": 2**20, "head": 2**12, "row": 2**23, "pair": 2**9}


def _pack(batch, head, row, pair):
    hi, lo = attention_counter(*(jnp.asarray(x, jnp.uint32) for x in (batch, head, row, pair)))
    return np.asarray(hi).astype(np.uint64) << np.uint64(32) | np.asarray(lo)


def test_counters_of_random_grids_are_unique():
    """V11: 1e4 random boxes of 2^4 positions, corners of the ranges among them, no collision."""
    rng = np.random.default_rng(0)
    starts = np.stack([rng.integers(0, n - 1, 10_000) for n in LIMITS.values()], 1)
    starts[:4] = [0, 0, 0, 0], [n - 2 for n in LIMITS.values()], [0, 0, 2**23 - 2, 0], [1, 1, 1, 1]
    corners = np.array(list(itertools.product((0, 1), repeat=4)))
    places = np.unique((starts[:, None] + corners).reshape(-1, 4), axis=0)
    assert len(np.unique(_pack(*places.T))) == len(places)
    # Control: one bit less for the rows makes positions share a counter.
    lo = places[:, 2] << 8 | places[:, 3]
    assert len(np.unique((places[:, 0] << 12 | places[:, 1]) << 32 | lo)) < len(places)


def test_counters_fill_their_words():
    """The largest position has the largest counter, so no field reaches into another."""
    assert _pack(*(n - 1 for n in LIMITS.values())) == 2**64 - 1
    for place, size in enumerate(LIMITS.values()):
        one = [0, 0, 0, 0]
        one[place] = size - 1
        assert bin(int(_pack(*one))).count("1") == size.bit_length() - 1


def test_derived_keys_are_distinct():
    """V11: 1e4 (release id, layer), leaves and children of split share no key."""
    from jax import random

    key = insecure_test_key(1)
    words = key_words(key)
    ids, layers = (x.ravel().astype(jnp.uint32) for x in jnp.indices((100, 100)))
    broad = jnp.broadcast_to(words, (10_000, 2))
    every = np.concatenate(
        [
            bind(broad, ids, layers),
            bind_parameter(broad, jnp.arange(10_000, dtype=jnp.uint32)),
            random.key_data(random.split(key, 10_000)),
        ]
    )
    assert len(np.unique(every, axis=0)) == 30_000
    assert (bind(words, 3, 4) == every[304]).all()


def test_ranges_are_checked():
    """V23."""
    fits = {"batches": 2**20, "heads": 2**12, "rows": 2**23, "columns": 2**10}
    check_attention_ranges(**fits)
    for name in fits:
        with pytest.raises(ArgumentError, match=name):
            check_attention_ranges(**{**fits, name: fits[name] + 1})
    for name, bad in itertools.product(("release_id", "layer"), (-1, 2**32, 1.5)):
        with pytest.raises(ArgumentError, match=name):
            bind(key_words(insecure_test_key(0)), **{"release_id": 0, "layer": 0, name: bad})


@pytest.mark.parametrize("name", ["release_id", "layer"])
def test_a_traced_number_of_64_bits_is_refused(name):
    """V23: 2^32 would be 0 again, and repeat its noise."""
    words = key_words(insecure_test_key(0))

    def bound(number):
        return bind(words, **{"release_id": 0, "layer": 0, name: number})

    with jax.enable_x64(True):
        for dtype in (jnp.int64, jnp.uint64):
            with pytest.raises(ArgumentError, match=f"{name} = .*64"):
                jax.jit(bound)(jnp.asarray(2**32, dtype))
        for dtype in (jnp.uint8, jnp.int32, jnp.uint32):
            assert (jax.jit(bound)(jnp.asarray(3, dtype)) == bound(3)).all()
