import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from dpfa_jax.noise import insecure_test_key, parameter_noise, snap
from dpfa_jax.release import noise_grid

STDDEV = np.float32(1.5)
SHIFT = np.float32(11 / 128)  # how far one individual moves each of the COLUMNS numbers
COLUMNS = 16


def test_values_are_the_nearest_multiples():
    """V12: every value on the grid; nearest, ties to even; large and odd values kept."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(50_000) * 10.0 ** rng.uniform(-6, 9, 50_000)).astype(np.float32)
    x[:6] = 0.125, 0.375, -0.125, 0.49999997 * 0.25, 2.0**23 + 1, -(2.0**22) - 0.125
    for grid in (2.0**-6, 0.25, 8.0):
        for run in (snap, jax.jit(snap)):
            y = np.asarray(run(jnp.asarray(x), grid), np.float64)
            assert (y == np.round(x.astype(np.float64) / grid) * grid).all()
    grids = jnp.asarray([0.25, 8.0], jnp.float32)
    both = np.asarray(snap(jnp.asarray(x).reshape(-1, 2), grids))
    assert (both[:, 1] == np.asarray(snap(jnp.asarray(x[1::2]), 8.0))).all()
    special_values = np.asarray(snap(jnp.asarray([np.inf, -np.inf, np.nan]), 0.25))
    assert np.isinf(special_values[:2]).all()
    assert np.isnan(special_values[2])


def test_no_compiler_takes_the_rounding_away():
    """V12: also where the sign is known. With one constant shift, the compiled program is x."""
    x = jnp.asarray(np.random.default_rng(1).uniform(-99, 99, 4096), jnp.float32)
    for known in (jnp.abs, jnp.square, lambda x: -jnp.exp(x / 50), lambda x: jnp.clip(x, 1.0, 9.0)):
        y = np.asarray(jax.jit(lambda x, known=known: snap(known(x), 0.25))(x), np.float64)
        assert (y / 0.25 == np.round(y / 0.25)).all()
    if jax.__version_info__ < (0, 12):  # later compilers leave the shift alone
        shift = np.float32(2.0**23)
        cancelled = np.asarray(jax.jit(lambda x: (x + shift) - shift)(jnp.abs(x)))
        assert (cancelled == np.abs(np.asarray(x))).all()


def test_grid_is_the_power_of_two_nearest_a_sixteenth():
    """V12: the grid that the releases declare, for noise of any size."""
    for stddev in (1e-4, 0.7, 1.0, 23.0, 1e6):
        grid = noise_grid(stddev)
        assert np.log2(grid) == round(np.log2(grid))
        assert 2**-0.5 <= grid / (stddev / 16) <= 2**0.5


def _neighbours(x):
    return x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))


def _is_raw_noise(y):
    """Whether some float32 z has float32(STDDEV z) == y."""
    return np.logical_or.reduce([(STDDEV * z) == y for z in _neighbours(y / STDDEV)])


def _is_shifted_noise(y):
    """Whether some raw noise w has float32(w + SHIFT) == y."""
    return np.logical_or.reduce(
        [(w + SHIFT == y) & _is_raw_noise(w) for w in _neighbours(y - SHIFT)]
    )


@functools.cache
def _noise():
    draw = jax.jit(parameter_noise, static_argnums=(1, 2))
    return np.asarray(draw(insecure_test_key(3), 0, (40_000, COLUMNS)), np.float32)


def _gain(is_snapped):
    """How much knowing float32 adds to the advantage of the Gaussian optimum, on the same answers.

    y = float32(a + float32(1.5 z)) in each column, a = 0 or SHIFT. Of the float32 numbers with a
    mantissa in [1.5, 2) only two thirds are float32(1.5 z) of some z. Where one candidate alone can
    have given y, the attacker knows; else the Gaussian threshold decides. Half of the answers tell
    whether knowing so much helps, the other half is attacked.
    """
    z = _noise()
    secret = np.random.default_rng(4).integers(0, 2, len(z))
    y = STDDEV * z + np.where(secret == 1, SHIFT, np.float32(0))[:, None]
    if is_snapped:
        y = np.asarray(snap(jnp.asarray(y), noise_grid(float(STDDEV))), np.float32)
    assert y.dtype == np.float32
    optimum = y.mean(1, dtype=np.float64) > SHIFT / 2
    raw, shifted = _is_raw_noise(y).sum(1), _is_shifted_noise(y).sum(1)
    informed = np.where(raw == shifted, optimum, shifted > raw)
    train, test = np.arange(len(y)) % 2 == 0, np.arange(len(y)) % 2 == 1
    helps = (informed == secret)[train].mean() > (optimum == secret)[train].mean()
    best, plain = [2 * (g == secret)[test].mean() - 1 for g in (informed, optimum)]
    expected = 2 * special.ndtr(float(SHIFT / STDDEV) * np.sqrt(COLUMNS) / 2) - 1
    assert abs(plain - expected) < 3.3 / np.sqrt(len(y) / 2)
    return best - plain if helps else 0.0


def test_float_consistency_attacker_gains_nothing_on_the_grid():
    """V12: at most 0.5 % over the Gaussian optimum on snapped output."""
    assert _gain(True) <= 0.005


def test_float_consistency_attacker_wins_against_raw_output():
    """V12, negative control: more than 10 % over the Gaussian optimum on raw float32 output."""
    assert _gain(False) > 0.10
