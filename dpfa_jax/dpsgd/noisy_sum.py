"""Noise on the sum of clipped gradients, once: an optax transformation that stands on its own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key, PyTree

from dpfa_jax.core import ArgumentError
from dpfa_jax.dpsgd.parameters import check_parameters, check_untied, leaf_groups
from dpfa_jax.dpsgd.plan import DPSGDPlan
from dpfa_jax.noise import counters, fields, grid, hazards, keys

# Place of training noise among the layers of counters.bind; attention layers count up from 0.
TRAINING_LAYER = 2**32 - 1


class NoisySumState(NamedTuple):
    """How many sums have been noised; it enters the noise counters, so it must not repeat."""

    step: Int[Array, ""]


def noisy_sum(plan: DPSGDPlan) -> optax.GradientTransformationExtraArgs:
    """Sum of clipped gradients -> noised, snapped, divided by the EXPECTED batch size.

    `update(sum_of_clipped, state, params=None, *, noise_key)` returns float32 means that are
    released: sum + s_l z on the public grid of clip group l, over the expected batch size. The
    noise of an element depends on (noise_key, state.step, leaf, global element index) alone, not
    on shards or devices. The whole batch's sum is due: noise comes after every all-reduce.

    A noise key may serve several steps of one run as long as the step numbers differ. A state
    restored from before a release, with the key of that release, would repeat its noise: charge
    again and take the new key.

    Errors: ArgumentError for a key of the wrong kind or a wrong number of parameters;
    CoverageError for a parameter under no clip group; KeyReuseError as `noise.guard`.
    Source: Abadi et al. (2016), algorithm 1.
    """
    release = plan.release
    stddevs, grids = release.noise_stddevs, release.grids
    generator = release.record().generator

    def init(params: PyTree) -> NoisySumState:
        check_parameters(params, release.num_parameters)
        check_untied(params)
        leaf_groups(params, plan.groups)
        return NoisySumState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree,
        state: NoisySumState,
        params: PyTree | None = None,
        *,
        noise_key: Key[Array, ""] | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, NoisySumState]:
        del params, extra_args
        check_noise_key(noise_key, generator)
        assert noise_key is not None  # refused above, by name
        check_parameters(updates, release.num_parameters)
        leaves, structure = jax.tree.flatten(updates)
        noise_key = hazards.guard(noise_key, *leaves, uses=(state.step, TRAINING_LAYER))
        step_key = _bound_to(noise_key, state.step)
        owners = leaf_groups(updates, plan.groups)
        means = []
        for index, (leaf, group) in enumerate(zip(leaves, owners, strict=True)):
            noise = stddevs[group] * fields.parameter_noise(step_key, index, leaf.shape)
            released = grid.snap(leaf.astype(jnp.float32) + noise, grids[group])
            means.append(released / release.expected_batch_size)
        return jax.tree.unflatten(structure, means), NoisySumState(state.step + 1)

    return optax.GradientTransformationExtraArgs(init, update)


def check_noise_key(noise_key: object, generator_name: str) -> None:
    """Refuses all but ONE noise key of the release's generator. Errors: ArgumentError."""
    keys.require_key("noise_key", noise_key, generator_name)
    shape = getattr(noise_key, "shape", ())
    if shape != ():
        raise ArgumentError(
            "noise_key", f"<keys of shape {shape}>", "not a single key", "Pass one key a step."
        )


def _bound_to(noise_key: Key[Array, ""], step: Int[Array, ""]) -> Key[Array, ""]:
    words = counters.bind(keys.key_words(noise_key), jnp.asarray(step), TRAINING_LAYER)
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(noise_key))
