"""V16 for training: each broken build of the real step is caught by a named check.

The checks in `helpers.dpsgd_cases` first pass on the build as it is. A mutant then replaces one
function of the library and the check named beside it must fail.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import dpsgd_cases as cases

from dpfa_jax.clipping import trees
from dpfa_jax.dpsgd import coupling, step, sum_noise
from dpfa_jax.noise import fields, grid

pytestmark = pytest.mark.quickly_compiled

QUICK = (
    "no_clip",
    "nan_passes",
    "one_leaf_unnoised",
    "same_noise_in_every_step",
)
CHECKS = [value for name, value in vars(cases).items() if name.startswith("check_")]


# Of the build as it is, which many checks run; a mutant's programs are its own.
ONCE = {name: functools.cache(getattr(cases, name)) for name in ("releasing", "_noises")}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_build_passes(check, monkeypatch):
    for name, compiled_once in ONCE.items():
        monkeypatch.setattr(cases, name, compiled_once)
    check()


def mutant(check, where, attribute, build):
    # Each costs a compilation; the quick suite keeps one of every kind of damage.
    marks = () if build.__name__ in QUICK else (pytest.mark.slow,)
    return pytest.param(where, attribute, build, check, id=build.__name__, marks=marks)


def no_clip(original):
    return lambda gradient, l2_clip_norm: original(gradient, 1e6)


def clip_the_batch_and_not_the_example(original):
    def build(loss_fn, params, batch, is_real, **kwargs):
        def total(params, _):
            return jnp.sum(jnp.where(is_real, loss_fn(params, batch), 0.0))[None]

        one = {"none": jnp.zeros((1, 1))}
        return original(total, params, one, jnp.ones(1, bool), **kwargs | {"micro_batch_size": 1})

    return build


def looser_clip_norm(original):
    return lambda gradient, l2_clip_norm: original(gradient, 1.1 * l2_clip_norm)


def padding_counts(original):
    return lambda squares, is_real: original(squares, jnp.ones_like(is_real))


def nan_passes(original):
    return lambda gradient, scales: original(gradient, scales) + 0.0 * gradient.sum(axis=0)


def any_random_generator(original):
    return lambda eqn: None


def one_example_dropped(original):
    return lambda squares, is_real: original(squares, is_real.at[0].set(False))


def one_leaf_unnoised(original):
    return lambda key, leaf, shape: original(key, leaf, shape) * (leaf != 1)


def quieter_noise(original):
    return lambda key, leaf, shape: 0.8 * original(key, leaf, shape)


def one_number_a_leaf(original):
    return lambda key, leaf, shape: jnp.broadcast_to(original(key, leaf, ()), shape)


def same_key_for_every_leaf(original):
    return lambda key, leaf, shape: original(key, 0, shape)


def noise_before_the_sum(original):
    """As every shard of a batch would add it before the all-reduce: two draws, not one."""
    return lambda key, leaf, shape: original(key, leaf, shape) + original(key, leaf + 100, shape)


def same_noise_in_every_step(original):
    return lambda noise_key, step_number: original(noise_key, jnp.zeros_like(step_number))


def unsnapped(original):
    return lambda x, _: x


def clip_after_noise(original):
    def build(x, cell):
        snapped = original(x, cell)
        return snapped * jnp.minimum(1.0, 1.0 / jnp.maximum(jnp.linalg.norm(snapped), 1e-6))

    return build


def true_batch_size(original):
    """Divides the sum by the true batch size, as ordinary training does."""

    def build(loss_fn, params, batch, is_real, **kwargs):
        late = original(loss_fn, params, batch, is_real, **kwargs)
        factor = 8.0 / jnp.maximum(jnp.sum(is_real), 1)
        return late._replace(added=lambda by: jax.tree.map(lambda s: s * factor, late.added(by)))

    return build


def skipped_when_empty(original):
    """No step where nobody was drawn: that tells that nobody was."""
    return lambda x, cell: jnp.where(jnp.max(jnp.abs(x)) > 3.0, original(x, cell), 0.0)


@pytest.mark.parametrize(
    ("where", "attribute", "build", "check"),
    [
        mutant(cases.check_clipped_sum, trees, "squared_norms", no_clip),
        mutant(cases.check_clipped_sum, step, "late_sum", clip_the_batch_and_not_the_example),
        mutant(cases.check_clipped_sum, trees, "clip_scales", one_example_dropped),
        mutant(
            cases.check_one_example_moves_the_sum_by_at_most_the_clip_norm,
            trees,
            "squared_norms",
            looser_clip_norm,
        ),
        mutant(cases.check_padding_counts_as_zero, trees, "clip_scales", padding_counts),
        mutant(
            cases.check_a_mask_is_drawn_by_its_own_key,
            coupling,
            "_check_draw",
            any_random_generator,
        ),
        mutant(cases.check_non_finite_examples_count_as_zero, trees, "weighted_sum", nan_passes),
        mutant(cases.check_noise_on_every_number, fields, "parameter_noise", one_leaf_unnoised),
        mutant(cases.check_noise_on_every_number, fields, "parameter_noise", quieter_noise),
        mutant(cases.check_noise_on_every_number, fields, "parameter_noise", noise_before_the_sum),
        mutant(cases.check_noise_on_every_number, grid, "snap", clip_after_noise),
        mutant(cases.check_noise_on_every_number, grid, "snap", skipped_when_empty),
        mutant(
            cases.check_noise_differs_between_steps_and_numbers,
            fields,
            "parameter_noise",
            one_number_a_leaf,
        ),
        mutant(
            cases.check_noise_differs_between_steps_and_numbers,
            fields,
            "parameter_noise",
            same_key_for_every_leaf,
        ),
        mutant(
            cases.check_noise_differs_between_steps_and_numbers,
            sum_noise,
            "_bound_to",
            same_noise_in_every_step,
        ),
        mutant(cases.check_released_values_lie_on_the_grid, grid, "snap", unsnapped),
        mutant(cases.check_division_by_the_expected_batch_size, step, "late_sum", true_batch_size),
    ],
)
def test_the_mutant_is_caught(where, attribute, build, check, monkeypatch):
    monkeypatch.setattr(where, attribute, build(getattr(where, attribute)))
    with np.errstate(all="ignore"), pytest.raises(AssertionError):
        check()
