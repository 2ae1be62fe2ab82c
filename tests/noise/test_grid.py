import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from dpfa_jax.noise import insecure_test_key, parameter_noise, snap
from dpfa_jax.release import noise_grid

SHIFT = 0.25  # sensitivity over noise standard deviation of the attacked release


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


def test_grid_is_the_power_of_two_nearest_a_sixteenth():
    """V12: the grid that the releases declare, for noise of any size."""
    for stddev in (1e-4, 0.7, 1.0, 23.0, 1e6):
        grid = noise_grid(stddev)
        assert np.log2(grid) == round(np.log2(grid))
        assert 2**-0.5 <= grid / (stddev / 16) <= 2**0.5


def _gaussian_advantage():
    return 2 * special.ndtr(SHIFT / 2) - 1


def _multiple_of_noise(y, stddev):
    """Whether some float32 z has float32(stddev * z) == y: what raw float32 noise must satisfy."""
    z = (y / stddev).astype(np.float32)
    near = (z, np.nextafter(z, np.float32(np.inf)), np.nextafter(z, np.float32(-np.inf)))
    return np.logical_or.reduce(
        [(stddev * candidate).astype(np.float32) == y for candidate in near]
    )


def _advantage(is_snapped):
    """Advantage of an attacker who knows both candidates and how float32 makes noise.

    y = float32(a + float32(1.5 z)), a = 0 or SHIFT standard deviations. Of the float32 numbers with
    a mantissa in [1.5, 2) only two thirds are multiples 1.5 z. Where a candidate cannot have
    given y the attacker knows the other did; else the Gaussian threshold decides.
    """
    stddev = np.float32(1.5)
    shift = stddev * np.float32(SHIFT)
    z = np.asarray(parameter_noise(insecure_test_key(3), 0, (400_000,)), np.float32)
    secret = np.random.default_rng(4).integers(0, 2, z.shape)
    y = stddev * z + np.where(secret == 1, shift, np.float32(0))
    if is_snapped:
        y = np.asarray(snap(jnp.asarray(y), noise_grid(float(stddev))), np.float32)
    assert y.dtype == np.float32
    threshold = y > shift / 2
    possible = _multiple_of_noise(y, stddev)
    informed = np.where(possible, threshold, True)
    # Half the draws tell whether the float test helps here; the other half is attacked.
    train, test = np.arange(len(y)) % 2 == 0, np.arange(len(y)) % 2 == 1
    helps = (informed == secret)[train].mean() > (threshold == secret)[train].mean()
    guess, secret = (informed if helps else threshold)[test], secret[test]
    return 2 * (guess == secret).mean() - 1


def test_float_consistency_attacker_gains_nothing_on_the_grid():
    """V12: at most 0.5 % over the Gaussian optimum, up to sampling error, on snapped output."""
    error = 3.3 / np.sqrt(200_000)
    assert _advantage(True) <= _gaussian_advantage() + 0.005 + error


def test_float_consistency_attacker_wins_against_raw_output():
    """V12, negative control: more than 10 % over the Gaussian optimum on raw float32 output."""
    assert _advantage(False) > _gaussian_advantage() + 0.10
