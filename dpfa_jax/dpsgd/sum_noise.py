"""The noise of one sum of clipped gradients: the key serves once, and each leaf leaves once.

A leaf leaves when all of its sum is there, with the others; or, where one pass can add the examples
and the noise, in that pass, and then there is no sum of it (`Released`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int, Key, PyTree

from dpfa_jax.dpsgd import adaptive_clipping
from dpfa_jax.dpsgd.correlated_noise import correlated
from dpfa_jax.dpsgd.leaf_noise import LeafNoise, Number, means_over
from dpfa_jax.dpsgd.noise_state import NoisySumState, check_counts, check_noise_key, check_state
from dpfa_jax.dpsgd.parameters import Owner, check_parameters, leaf_groups
from dpfa_jax.dpsgd.plan import DPSGDPlan
from dpfa_jax.dpsgd.released import Leaf, Release, Released, array_of, sums_of
from dpfa_jax.dpsgd.step_checks import check_alike
from dpfa_jax.noise import counters, fields, grid, hazards, keys

# Place of training noise among the layers of counters.bind; attention layers count up from 0.
TRAINING_LAYER = 2**32 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class SumNoise:
    """The noise of one sum. Only `noise_of` makes one, once its key is sure to serve once.

    Attributes:
      plan: what is promised.
      state: as the sum's clip norms, step and past noise were before it.
      leaves: the noise of this step's leaves.
    """

    plan: DPSGDPlan
    state: NoisySumState
    leaves: LeafNoise

    def releases(self) -> list[Release | None]:
        """By which each leaf may leave once the gradients of ALL examples are there.

        None where past noise is part of the noise.
        """
        count = len(self.leaves.scales)
        if len(self.plan.release.noise_strategy) > 1:
            return [None] * count
        return [functools.partial(self.leaves.of_rows, leaf) for leaf in range(count)]

    def released(
        self, sums: PyTree, centred_counts: Float32[Array, " groups"] | None
    ) -> tuple[PyTree, NoisySumState]:
        """(means of all leaves, the next state), from sums over all examples and all shards.

        A leaf that is `Released` already has its noise. Errors: as `noisy_sum`.
        """
        release, state = self.plan.release, self.state
        leaves, structure = jax.tree.flatten(sums)
        arrays = jax.tree.unflatten(structure, [*map(array_of, leaves)])
        check_parameters(arrays, release.num_parameters)
        check_counts(centred_counts, self.plan)
        check_alike({"updates": arrays, "centred_counts": centred_counts})
        following = NoisySumState(state.step + 1)
        if len(release.noise_strategy) > 1:
            means, memory = self._correlated(sums_of(leaves))
            past = jax.tree.unflatten(jax.tree.structure(state.noise_memory), memory)
            following = following._replace(noise_memory=past)
        else:
            means = self._independent(leaves)
        if release.adaptive_clipping is not None:
            assert centred_counts is not None  # refused above, by name
            counts = adaptive_clipping.released_counts(
                release, centred_counts, self.leaves.step_key, len(leaves)
            )
            moved = adaptive_clipping.moved(release, jnp.asarray(state.l2_clip_norms), counts)
            following = following._replace(l2_clip_norms=moved)
        return jax.tree.unflatten(structure, means), following

    def _independent(self, leaves: Sequence[Leaf]) -> list[Float32[Array, "..."]]:
        means: dict[int, Array] = {}
        sums: dict[int, Array] = {}
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, Released):
                sums[place] = leaf
            elif leaf.leaf == place:
                means[place] = leaf.mean
            else:
                raise TypeError(f"leaf {place} has left with the noise of leaf {leaf.leaf}")
        means.update(self.leaves.of_sums(sums))
        return [means[place] for place in range(len(leaves))]

    def _correlated(self, sums: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """(means, past noise to keep)."""
        means, memory = [], []
        release, past = self.plan.release, jax.tree.leaves(self.state.noise_memory)
        for index, (leaf, (stddev, cell)) in enumerate(zip(sums, self.leaves.scales, strict=True)):
            noise = stddev * fields.parameter_noise(self.leaves.step_key, index, leaf.shape)
            noise, kept = correlated(noise, past[index], self.state.step, release.noise_strategy)
            released = grid.snap_once(leaf.astype(jnp.float32) + noise, cell)
            means.append(released / release.expected_batch_size)
            memory.append(kept)
        return means, memory


def noise_of(plan: DPSGDPlan) -> Callable[..., SumNoise]:
    """What draws the noise of one sum after the other: `draw(noise_key, state, like=, sources=)`.

    `draw` takes the key of one step; the state before it; arrays shaped like the sum; all that the
    sum is computed from, or the sum itself, none of which may be mapped by vmap where the key is
    not. Errors: as `noisy_sum`.
    """
    release = plan.release
    generator = release.record().generator
    means = means_over(release.expected_batch_size)

    def draw(
        noise_key: Key[Array, ""] | None,
        state: NoisySumState,
        *,
        like: PyTree,
        sources: Sequence[Array | None],
    ) -> SumNoise:
        check_noise_key(noise_key, generator)
        assert noise_key is not None  # refused above, by name
        check_parameters(like, release.num_parameters)
        leaves = jax.tree.leaves(like)
        check_state(state, plan, len(leaves))
        check_alike({"state": state, "noise_key": noise_key})
        noise_key = hazards.guard(
            noise_key,
            *sources,
            *jax.tree.leaves((state.l2_clip_norms, state.noise_memory)),
            uses=(TRAINING_LAYER,),
            promise=release.record(),
        )
        step_key = _bound_to(noise_key, state.step)
        indices = jnp.arange(len(leaves), dtype=jnp.uint32)
        leaf_keys = counters.bind_parameter(keys.key_words(step_key), indices)
        stddevs, grids = _noise_of(plan, state)
        scales = [
            (_of_leaf(stddevs, owner, leaf.ndim), _of_leaf(grids, owner, leaf.ndim))
            for owner, leaf in zip(leaf_groups(like, plan.groups), leaves, strict=True)
        ]
        return SumNoise(plan, state, LeafNoise(step_key, leaf_keys, scales, means))

    return draw


def _of_leaf(numbers: Sequence[Number], owner: Owner, ndim: int) -> Number:
    """What the clip groups of a leaf have: one number, where all of its slices have the same."""
    if isinstance(owner, int):
        return numbers[owner]
    own = [numbers[group] for group in owner]
    if isinstance(own[0], float) and own.count(own[0]) == len(own):
        return own[0]
    return jnp.asarray(own, jnp.float32).reshape(-1, *[1] * (ndim - 1))


def _noise_of(plan: DPSGDPlan, state: NoisySumState) -> tuple[Sequence[Number], Sequence[Number]]:
    """Standard deviation and grid of each group's sum in this step."""
    if plan.release.adaptive_clipping is None:
        return plan.release.noise_stddevs, plan.release.grids
    stddevs, grids = adaptive_clipping.noise_for(plan.release, jnp.asarray(state.l2_clip_norms))
    return tuple(stddevs), tuple(grids)


def _bound_to(noise_key: Key[Array, ""], step: Int[Array, ""]) -> Key[Array, ""]:
    words = counters.bind(keys.key_words(noise_key), jnp.asarray(step), TRAINING_LAYER)
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(noise_key))
