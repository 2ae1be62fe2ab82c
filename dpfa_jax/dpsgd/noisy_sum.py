"""Noise on the sum of clipped gradients, once: an optax transformation that stands on its own."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, Int, Key, PyTree, UInt32

from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.dpsgd import adaptive_clipping
from dpfa_jax.dpsgd.correlated_noise import correlated, empty_memory
from dpfa_jax.dpsgd.parameters import Owner, check_parameters, check_untied, leaf_groups
from dpfa_jax.dpsgd.plan import DPSGDPlan
from dpfa_jax.dpsgd.step_checks import check_alike
from dpfa_jax.kernels import parameter_noise
from dpfa_jax.noise import counters, fields, grid, hazards, keys

# Place of training noise among the layers of counters.bind; attention layers count up from 0.
TRAINING_LAYER = 2**32 - 1


# A standard deviation or grid: the release's, or that of the clip norms at hand; of a leaf, or of
# each of its slices, (slices, 1, ..).
_Number = float | Float32[Array, "..."]


class NoisySumState(NamedTuple):
    """What the noise of the next sum depends on, beside its key.

    Attributes:
      step: how many sums have been noised; it enters the noise counters, so it must not repeat.
      l2_clip_norms: the groups' clip norms now, where the plan adapts them; else ().
      noise_memory: past noise, where the plan correlates it; else (). SECRET, as the keys are.
    """

    step: Int[Array, ""]
    l2_clip_norms: Float32[Array, " groups"] | tuple[()] = ()
    noise_memory: PyTree = ()


def noisy_sum(plan: DPSGDPlan) -> optax.GradientTransformationExtraArgs:
    """Sum of clipped gradients -> noised, snapped, divided by the EXPECTED batch size.

    `update(sum_of_clipped, state, params=None, *, noise_key, centred_counts=None)` returns float32
    means that are released: sum + s_l z on the public grid of clip group l, over the expected batch
    size. The noise of an element depends on (noise_key, state.step, leaf, global element index)
    alone, not on shards or devices. The whole batch's sum is due: noise comes after every
    all-reduce, and inside `shard_map` sums, state and key must be the same on all shards.

    A plan with adaptive clipping takes the groups' centred counts too, notes them with their own
    noise, and its next state holds the next clip norms; the sum must have been clipped to those of
    the state given. A plan with correlated noise keeps past noise in its state.

    A noise key serves one step, the one that was charged for it: a second step with it is refused
    where both are seen (outside jit, or in one traced program). A state restored from before a
    release takes a new key, charged again.

    Errors: ArgumentError for a key of the wrong kind, a wrong number of parameters, counts that are
    missing, or what differs from shard to shard; CoverageError for a parameter under no clip group;
    KeyReuseError as `noise.guard`.
    Source: Abadi et al. (2016), algorithm 1.
    """
    release = plan.release
    generator = release.record().generator
    is_adaptive = release.adaptive_clipping is not None
    is_correlated = len(release.noise_strategy) > 1

    # Jitted, so that leaves of one shape are one function of the step's program: each time anew,
    # a kernel takes half a second to lower and the generator's rounds a twentieth to trace.
    @jax.jit
    def mean_of(
        total: Array, step_key: Key[Array, ""], leaf_keys: UInt32[Array, "leaves 2"],
        index: Array, stddev: _Number, cell: _Number,
    ) -> Float32[Array, "..."]:  # fmt: skip
        divisor = release.expected_batch_size
        return parameter_noise.released_mean(
            total, step_key, index, stddev=stddev, grid=cell, divisor=divisor, leaf_keys=leaf_keys
        )

    def init(params: PyTree) -> NoisySumState:
        check_parameters(params, release.num_parameters)
        check_untied(params)
        leaf_groups(params, plan.groups)
        return first_state(plan, params)

    def update(
        updates: PyTree,
        state: NoisySumState,
        params: PyTree | None = None,
        *,
        noise_key: Key[Array, ""] | None = None,
        centred_counts: Float32[Array, " groups"] | None = None,
        **extra_args: object,
    ) -> tuple[PyTree, NoisySumState]:
        del params, extra_args
        check_noise_key(noise_key, generator)
        assert noise_key is not None  # refused above, by name
        check_parameters(updates, release.num_parameters)
        _check_counts(centred_counts, plan)
        check_state(state, plan, len(jax.tree.leaves(updates)))
        check_alike(
            {
                "updates": updates,
                "centred_counts": centred_counts,
                "state": state,
                "noise_key": noise_key,
            }
        )
        leaves, structure = jax.tree.flatten(updates)
        witnesses = [*leaves, *jax.tree.leaves((state.l2_clip_norms, state.noise_memory))]
        noise_key = hazards.guard(
            noise_key,
            *witnesses,
            centred_counts,
            uses=(TRAINING_LAYER,),
            promise=plan.release.record(),
        )
        step_key = _bound_to(noise_key, state.step)
        stddevs, grids = _noise_of(plan, state)
        scales = [
            (_of_leaf(stddevs, owner, leaf.ndim), _of_leaf(grids, owner, leaf.ndim))
            for owner, leaf in zip(leaf_groups(updates, plan.groups), leaves, strict=True)
        ]
        if is_correlated:
            means, memory = [], []
            past = jax.tree.leaves(state.noise_memory)
            for index, (leaf, (stddev, cell)) in enumerate(zip(leaves, scales, strict=True)):
                noise = stddev * fields.parameter_noise(step_key, index, leaf.shape)
                noise, kept = correlated(noise, past[index], state.step, release.noise_strategy)
                released = grid.snap(leaf.astype(jnp.float32) + noise, cell)
                means.append(released / release.expected_batch_size)
                memory.append(kept)
        else:
            means = _each(mean_of, leaves, step_key, scales)
        following = NoisySumState(state.step + 1)
        if is_correlated:
            following = following._replace(noise_memory=jax.tree.unflatten(structure, memory))
        if is_adaptive:
            assert centred_counts is not None  # refused above, by name
            counts = adaptive_clipping.released_counts(
                release, centred_counts, step_key, len(leaves)
            )
            moved = adaptive_clipping.moved(release, jnp.asarray(state.l2_clip_norms), counts)
            following = following._replace(l2_clip_norms=moved)
        return jax.tree.unflatten(structure, means), following

    return optax.GradientTransformationExtraArgs(init, update)


def _each(
    mean_of: Callable[..., Float32[Array, "..."]],
    leaves: list[Array],
    step_key: Key[Array, ""],
    scales: list[tuple[_Number, _Number]],
) -> list[Float32[Array, "..."]]:
    """`mean_of` of each leaf. Small leaves of one type are done at once: compiling the generator's
    rounds takes a third of a second each time, and a launch what the pass does."""
    indices = jnp.arange(len(leaves), dtype=jnp.uint32)
    leaf_keys = counters.bind_parameter(keys.key_words(step_key), indices)
    alike: dict[object, list[int]] = {}
    for index, leaf in enumerate(leaves):
        alone = leaf.size >= parameter_noise.FEWEST or np.ndim(scales[index][0]) > 0
        alike.setdefault(index if alone else jax.typeof(leaf), []).append(index)
    means: dict[int, Array] = {}
    for members in alike.values():
        numbers = [jnp.asarray([scales[i][part] for i in members], jnp.float32) for part in (0, 1)]
        places = np.asarray(members, np.uint32)
        if len(members) == 1:
            only = members[0]
            scale = (x[0] for x in numbers)
            means[only] = mean_of(leaves[only], step_key, leaf_keys, places[0], *scale)
        else:
            stacked = jnp.stack([leaves[i] for i in members])
            found = jax.vmap(mean_of, in_axes=(0, None, None, 0, 0, 0))(
                stacked, step_key, leaf_keys, places, *numbers
            )
            means.update(zip(members, found, strict=True))
    return [means[index] for index in range(len(leaves))]


def _of_leaf(numbers: Sequence[_Number], owner: Owner, ndim: int) -> _Number:
    """What the clip groups of a leaf have: one number, where all of its slices have the same."""
    if isinstance(owner, int):
        return numbers[owner]
    own = [numbers[group] for group in owner]
    if isinstance(own[0], float) and own.count(own[0]) == len(own):
        return own[0]
    return jnp.asarray(own, jnp.float32).reshape(-1, *[1] * (ndim - 1))


def first_state(plan: DPSGDPlan, params: PyTree) -> NoisySumState:
    """The state before the first sum."""
    memory = empty_memory(params, plan.release.noise_strategy)
    first = NoisySumState(jnp.zeros((), jnp.int32), noise_memory=memory)
    if plan.release.adaptive_clipping is None:
        return first
    return first._replace(l2_clip_norms=jnp.asarray(plan.release.l2_clip_norms, jnp.float32))


def check_noise_key(noise_key: object, generator_name: str) -> None:
    """Refuses all but ONE noise key of the release's generator. Errors: ArgumentError."""
    keys.require_key("noise_key", noise_key, generator_name)
    shape = getattr(noise_key, "shape", ())
    if shape != ():
        raise ArgumentError(
            "noise_key", f"<keys of shape {shape}>", "not a single key", "Pass one key a step."
        )


def _noise_of(plan: DPSGDPlan, state: NoisySumState) -> tuple[Sequence[_Number], Sequence[_Number]]:
    """Standard deviation and grid of each group's sum in this step."""
    if plan.release.adaptive_clipping is None:
        return plan.release.noise_stddevs, plan.release.grids
    stddevs, grids = adaptive_clipping.noise_for(plan.release, jnp.asarray(state.l2_clip_norms))
    return tuple(stddevs), tuple(grids)


def _check_counts(centred_counts: Array | None, plan: DPSGDPlan) -> None:
    groups = len(plan.release.l2_clip_norms)
    shape = getattr(centred_counts, "shape", None)
    if plan.release.adaptive_clipping is not None and shape != (groups,):
        raise ArgumentError(
            "centred_counts",
            shape,
            f"adaptive clipping needs one count for each of {groups} clip groups",
            "Pass unclipped examples minus clipped ones, halved, or use make_dp_step.",
        )


def check_state(state: Any, plan: DPSGDPlan, leaves: int) -> None:
    """Refuses a state, the step's or the noise's, that no plan like this gave: ArgumentError."""
    if not isinstance(state.step, jax.core.Tracer):
        step = np.asarray(state.step)
        checks.count("state.step", step.item() if step.ndim == 0 else step, minimum=0)
    adapts = plan.release.adaptive_clipping is not None
    wanted = (len(plan.release.l2_clip_norms),) if adapts else (0,)
    found = np.shape(state.l2_clip_norms)
    if found != wanted:
        raise ArgumentError(
            "state.l2_clip_norms",
            found,
            f"not of the shape {wanted} that the plan keeps",
            "Pass the state that this plan's init, or its last step, gave.",
        )
    if adapts:
        adaptive_clipping.check_norms(state.l2_clip_norms)
    wanted_leaves = leaves if len(plan.release.noise_strategy) > 1 else 0
    if len(jax.tree.leaves(state.noise_memory)) != wanted_leaves:
        raise ArgumentError(
            "state.noise_memory",
            jax.tree.map(jnp.shape, state.noise_memory),
            f"not the past noise of {wanted_leaves} parameters that the plan keeps",
            "Pass the state that this plan's init, or its last step, gave.",
        )


def _bound_to(noise_key: Key[Array, ""], step: Int[Array, ""]) -> Key[Array, ""]:
    words = counters.bind(keys.key_words(noise_key), jnp.asarray(step), TRAINING_LAYER)
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(noise_key))
