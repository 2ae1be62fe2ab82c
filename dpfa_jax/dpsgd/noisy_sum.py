"""Noise on the sum of clipped gradients, once: an optax transformation that stands on its own."""

import jax
import optax
from jaxtyping import Array, Float32, Key, PyTree

from dpfa_jax.dpsgd.noise_state import NoisySumState, check_counts, first_state
from dpfa_jax.dpsgd.parameters import check_parameters, check_untied, leaf_groups
from dpfa_jax.dpsgd.plan import DPSGDPlan
from dpfa_jax.dpsgd.sum_noise import noise_of


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
    draw = noise_of(plan)

    def init(params: PyTree) -> NoisySumState:
        check_parameters(params, plan.release.num_parameters)
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
        check_counts(centred_counts, plan)  # before the key has served
        sources = [*jax.tree.leaves(updates), centred_counts]
        noise = draw(noise_key, state, like=updates, sources=sources)
        return noise.released(updates, centred_counts)

    return optax.GradientTransformationExtraArgs(init, update)
