"""The noise of one sum of clipped gradients: the key serves once, and each leaf leaves once.

A leaf leaves when all of its sum is there, with the others; or, where one pass can add the examples
and the noise, in that pass, and then there is no sum of it (`Released`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Key, PyTree, UInt32

from dpfa_jax.dpsgd import adaptive_clipping
from dpfa_jax.dpsgd.correlated_noise import correlated
from dpfa_jax.dpsgd.noise_state import NoisySumState, check_counts, check_noise_key, check_state
from dpfa_jax.dpsgd.parameters import Owner, check_parameters, leaf_groups
from dpfa_jax.dpsgd.plan import DPSGDPlan
from dpfa_jax.dpsgd.released import Leaf, Release, Released, array_of, sums_of
from dpfa_jax.dpsgd.step_checks import check_alike
from dpfa_jax.kernels import parameter_noise, released_rows
from dpfa_jax.noise import counters, fields, grid, hazards, keys

# Place of training noise among the layers of counters.bind; attention layers count up from 0.
TRAINING_LAYER = 2**32 - 1

# A standard deviation or grid: the release's, or that of the clip norms at hand; of a leaf, or of
# each of its slices, (slices, 1, ..).
_Number = float | Float32[Array, "..."]


@dataclasses.dataclass(frozen=True, eq=False)
class SumNoise:
    """The noise of one sum. Only `noise_of` makes one, once its key is sure to serve once.

    Attributes:
      plan: what is promised.
      state: as the sum's clip norms, step and past noise were before it.
      step_key: the noise key, bound to the step.
      leaf_keys: that key, bound to each leaf.
      scales: standard deviation and grid of each leaf.
      mean_of: (sum, step key, leaf keys, leaf, standard deviation, grid) -> its released mean.
      mean_of_rows: (rows, what each is multiplied by, the same) -> the same of their sum.
    """

    plan: DPSGDPlan
    state: NoisySumState
    step_key: Key[Array, ""]
    leaf_keys: UInt32[Array, "leaves 2"]
    scales: Sequence[tuple[_Number, _Number]]
    mean_of: Callable[..., Float32[Array, "..."]]
    mean_of_rows: Callable[..., Float32[Array, "..."]]

    def releases(self) -> list[Release | None]:
        """By which each leaf may leave once the gradients of ALL examples are there.

        None where past noise is part of the noise.
        """
        if len(self.plan.release.noise_strategy) > 1:
            return [None] * len(self.scales)
        return [functools.partial(self._release, leaf) for leaf in range(len(self.scales))]

    def _release(self, leaf: int, rows: Array, scales: Float32[Array, " batch"]) -> Released | None:
        stddev, cell = self.scales[leaf]
        if not released_rows.chosen(rows, stddev):
            return None
        # Flat, so that leaves of one size share a kernel.
        mean = self.mean_of_rows(
            rows.reshape(rows.shape[0], -1), scales, self.step_key, self.leaf_keys,
            np.uint32(leaf), jnp.float32(stddev), jnp.float32(cell),
        )  # fmt: skip
        return Released(leaf, mean.reshape(rows.shape[1:]))

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
                release, centred_counts, self.step_key, len(leaves)
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
        means.update(self._each(sums))
        return [means[place] for place in range(len(leaves))]

    def _each(self, sums: Mapping[int, Array]) -> dict[int, Float32[Array, "..."]]:
        """`mean_of` of each leaf. Small leaves of one type are done at once: compiling the
        generator's rounds takes a third of a second each time, and a launch what the pass does."""
        alike: dict[object, list[int]] = {}
        for index, leaf in sums.items():
            alone = leaf.size >= parameter_noise.FEWEST or np.ndim(self.scales[index][0]) > 0
            alike.setdefault(index if alone else jax.typeof(leaf), []).append(index)
        means: dict[int, Array] = {}
        shared = self.step_key, self.leaf_keys
        for members in alike.values():
            numbers = [
                jnp.asarray([self.scales[i][part] for i in members], jnp.float32) for part in (0, 1)
            ]
            places = np.asarray(members, np.uint32)
            if len(members) == 1:
                only = members[0]
                scale = (x[0] for x in numbers)
                means[only] = self.mean_of(sums[only], *shared, places[0], *scale)
            else:
                stacked = jnp.stack([sums[i] for i in members])
                found = jax.vmap(self.mean_of, in_axes=(0, None, None, 0, 0, 0))(
                    stacked, *shared, places, *numbers
                )
                means.update(zip(members, found, strict=True))
        return means

    def _correlated(self, sums: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """(means, past noise to keep)."""
        means, memory = [], []
        release, past = self.plan.release, jax.tree.leaves(self.state.noise_memory)
        for index, (leaf, (stddev, cell)) in enumerate(zip(sums, self.scales, strict=True)):
            noise = stddev * fields.parameter_noise(self.step_key, index, leaf.shape)
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
    divisor = release.expected_batch_size

    # Jitted, so that leaves of one shape are one function of the step's program: each time anew,
    # a kernel takes half a second to lower and the generator's rounds a twentieth to trace.
    @jax.jit
    def mean_of(
        total: Array, step_key: Key[Array, ""], leaf_keys: UInt32[Array, "leaves 2"],
        leaf: Array, stddev: _Number, cell: _Number,
    ) -> Float32[Array, "..."]:  # fmt: skip
        return parameter_noise.released_mean(
            total, step_key, leaf, stddev=stddev, grid=cell, divisor=divisor, leaf_keys=leaf_keys
        )

    @jax.jit
    def mean_of_rows(
        rows: Array, scales: Array, step_key: Key[Array, ""], leaf_keys: UInt32[Array, "leaves 2"],
        leaf: Array, stddev: _Number, cell: _Number,
    ) -> Float32[Array, "..."]:  # fmt: skip
        return released_rows.released_mean_of_rows(
            rows, scales, step_key, leaf,
            stddev=stddev, grid=cell, divisor=divisor, leaf_keys=leaf_keys,
        )  # fmt: skip

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
        return SumNoise(plan, state, step_key, leaf_keys, scales, mean_of, mean_of_rows)

    return draw


def _of_leaf(numbers: Sequence[_Number], owner: Owner, ndim: int) -> _Number:
    """What the clip groups of a leaf have: one number, where all of its slices have the same."""
    if isinstance(owner, int):
        return numbers[owner]
    own = [numbers[group] for group in owner]
    if isinstance(own[0], float) and own.count(own[0]) == len(own):
        return own[0]
    return jnp.asarray(own, jnp.float32).reshape(-1, *[1] * (ndim - 1))


def _noise_of(plan: DPSGDPlan, state: NoisySumState) -> tuple[Sequence[_Number], Sequence[_Number]]:
    """Standard deviation and grid of each group's sum in this step."""
    if plan.release.adaptive_clipping is None:
        return plan.release.noise_stddevs, plan.release.grids
    stddevs, grids = adaptive_clipping.noise_for(plan.release, jnp.asarray(state.l2_clip_norms))
    return tuple(stddevs), tuple(grids)


def _bound_to(noise_key: Key[Array, ""], step: Int[Array, ""]) -> Key[Array, ""]:
    words = counters.bind(keys.key_words(noise_key), jnp.asarray(step), TRAINING_LAYER)
    return jax.random.wrap_key_data(words, impl=jax.random.key_impl(noise_key))
