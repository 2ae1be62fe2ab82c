import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.statistics import (
    chi_square_normal,
    distinct_fraction,
    kolmogorov_normal,
    tail_p_value,
)
from scipy import special

from dpfa_jax.core.generators import BOX_MULLER_TAIL, LONG_TAIL, THREEFRY, THREEFRY_LONG
from dpfa_jax.noise import insecure_test_key, normal_pair, parameter_noise

DRAWS = 200_000

_leaf = jax.jit(parameter_noise, static_argnums=(1, 2))
_pair = jax.jit(normal_pair)


@functools.cache
def _noise(size, seed=1):
    return np.asarray(_leaf(insecure_test_key(seed), 0, (size,)), np.float64)


def _words(n, k):
    """The two words whose radius bits are n (40 bits) and whose angle bits are k (24 bits)."""
    n, k = np.asarray(n, np.uint64), np.asarray(k, np.uint64)
    low = (n & np.uint64(0xFF)) << np.uint64(24) | k
    return jnp.asarray((n >> np.uint64(8)).astype(np.uint32)), jnp.asarray(low.astype(np.uint32))


def _exact(n, k):
    """The same two normals in float64."""
    t = np.minimum(n, 2**40 - 1 - n) + 0.5
    log_u = np.where(n < 2**39, np.log(t * 2.0**-40), np.log1p(-t * 2.0**-40))
    angle = 2 * np.pi * (k + 0.5 - 2**23) / 2**24
    radius = np.sqrt(-2 * log_u)
    return radius, radius * np.cos(angle), radius * np.sin(angle)


def test_distribution():
    """V9: standard deviation within 1 %, Kolmogorov-Smirnov and 64 cells with p > 1e-4."""
    z = _noise(DRAWS)
    assert abs(z.std() - 1) < 0.01
    assert kolmogorov_normal(z) > 1e-4
    assert chi_square_normal(z) > 1e-4
    assert distinct_fraction(z) > 0.95


def test_sixteen_bit_noise_would_be_caught():
    """V9, negative control: bfloat16 noise."""
    z = np.asarray(jnp.asarray(_noise(DRAWS)).astype(jnp.bfloat16), np.float64)
    assert kolmogorov_normal(z) < 1e-4 or chi_square_normal(z) < 1e-4
    assert distinct_fraction(z) < 0.1


def test_wrong_scale_would_be_caught():
    """V9, negative control: 2 % too little noise."""
    z = 0.98 * _noise(DRAWS)
    assert abs(z.std() - 1) > 0.01
    assert chi_square_normal(z) < 1e-4


def test_declared_tail_is_the_largest_draw():
    """V9: the extreme word gives `BOX_MULLER_TAIL` and the tail exceeds what D = 1e6 can tell."""
    largest = np.abs(np.asarray(_pair(*_words([0, 0], [2**23, 2**23 - 1]))[0])).max()
    assert largest == pytest.approx(BOX_MULLER_TAIL, rel=2e-7)
    n = np.concatenate([np.arange(1000), 2**40 - 1 - np.arange(1000)])
    every = np.abs(np.asarray(_pair(*_words(n, np.full_like(n, 2**23)))[0]))
    assert every.max() <= BOX_MULLER_TAIL * (1 + 2e-7)
    assert THREEFRY.tail == BOX_MULLER_TAIL
    assert 2e6 * special.ndtr(-THREEFRY.tail) < 1e-6


def test_third_word_continues_the_radius_and_changes_nothing_else():
    """V9: where w0 = 0 the radius has 64 bits, to its declared end; elsewhere it is unread."""
    rng = np.random.default_rng(2)
    n, fine = rng.integers(0, 256, 5000), 2.0 ** rng.uniform(0, 24, 5000)
    n[:2], fine[:2] = 0, 0
    fine = fine.astype(np.int64)
    more = jnp.asarray((fine << 8 | 255).astype(np.uint32))  # its low 8 bits are not used
    k = np.full_like(n, 2**23)
    z0, z1 = (np.asarray(z, np.float64) for z in _pair(*_words(n, k), more))
    radius = np.sqrt(-2 * np.log((n + (fine + 0.5) * 2.0**-24) * 2.0**-40))
    assert np.abs(np.hypot(z0, z1) / radius - 1).max() < 4e-7
    assert np.abs(z0).max() == pytest.approx(LONG_TAIL, rel=4e-7)
    assert THREEFRY_LONG.tail == LONG_TAIL > 9.4
    words = _words(rng.integers(256, 2**40, 5000), rng.integers(0, 2**24, 5000))
    for z, short in zip(_pair(*words, more), _pair(*words), strict=True):
        assert np.array_equal(np.asarray(z), np.asarray(short))


def test_twenty_three_bit_noise_would_be_caught():
    """V9, negative control: an inverse CDF of 23 bits has no draw beyond 5.42 standard deviations,
    where ours has the mass of the normal law: its extreme word ends far below the declared tail."""
    uniform = np.float32(1) - np.float32(2.0**-24)
    inverse = np.sqrt(2) * special.erfinv(2 * np.float64(uniform) - 1)
    assert inverse < 5.5 < BOX_MULLER_TAIL - 1
    # And in a plain sample: its values repeat, ours do not.
    bits = np.random.default_rng(3).integers(0, 2**23, 2_000_000)
    coarse = special.ndtri((bits + 0.5) * 2.0**-23).astype(np.float32)
    ours = _noise(2_000_000, seed=5).astype(np.float32)
    assert distinct_fraction(coarse) < 0.95 * distinct_fraction(ours)


def test_both_ends_of_the_radius_are_accurate():
    """Relative error of the float32 radius against float64, from u = 2^-41 to 1 - 2^-41."""
    rng = np.random.default_rng(0)
    n = np.unique((2.0 ** rng.uniform(0, 39.99, 50_000)).astype(np.int64))
    n = np.concatenate([[0], n, 2**40 - 1 - n])
    k = rng.integers(0, 2**24, len(n))
    radius, cosine, sine = _exact(n, k)
    z0, z1 = (np.asarray(z, np.float64) for z in _pair(*_words(n, k)))
    assert (np.abs(z0 - cosine) / radius).max() < 5e-7
    assert (np.abs(z1 - sine) / radius).max() < 5e-7
    assert np.abs(np.hypot(z0, z1) / radius - 1).max() < 4e-7


def test_cell_probabilities_of_the_float32_sampler():
    """V9: each cell of width 1/16 out to 5.5 sigma has its probability to 1e-5 (relative).

    For each of 2048 evenly spread angles, the number of radius words beyond a cell's edge is found
    by bisection on the float32 sampler itself; Craig's formula averages over the angle.
    """
    angles, edges = 2048, np.arange(0.0, 5.5 + 1 / 16, 1 / 16)
    k = 2**22 + 1000 + np.arange(angles) * (2**23 // angles)  # cosine > 0
    shape = (len(edges), angles)
    low, high = np.zeros(shape, np.int64), np.full(shape, 2**40, np.int64)
    draw = jax.jit(lambda w0, w1: normal_pair(w0, w1)[0])
    for _ in range(41):  # z falls as n grows: count of n with z >= edge
        middle = (low + high) // 2
        beyond = np.asarray(draw(*_words(middle, np.broadcast_to(k, shape)))) >= edges[:, None]
        beyond &= middle < 2**40
        low, high = np.where(beyond, middle + 1, low), np.where(beyond, high, middle)
    above = 0.5 * (low / 2.0**40).mean(axis=1)
    cells, exact = -np.diff(above), -np.diff(special.ndtr(-edges))
    assert np.abs(cells / exact - 1).max() < 1e-5


@pytest.mark.slow
def test_distribution_far_out():
    """V9 long: 2e8 draws, tail counts beyond 3, 4, 5 and 5.4 sigma, largest draw > 5.42."""
    largest = 0.0
    counts = np.zeros(4, np.int64)
    thresholds = (3.0, 4.0, 5.0, 5.4)
    for part in range(20):
        z = np.abs(np.asarray(parameter_noise(insecure_test_key(77), part, (10_000_000,))))
        largest = max(largest, float(z.max()))
        counts += [int((z > t).sum()) for t in thresholds]
    for threshold, count in zip(thresholds, counts, strict=True):
        expected = 2e8 * 2 * special.ndtr(-threshold)
        assert abs(count - expected) < 4 * np.sqrt(expected)
    assert largest > 5.42
    assert tail_p_value(np.full(10, 6.0), 5.4) < 1e-4  # the control: ten draws beyond 5.4 are seen
