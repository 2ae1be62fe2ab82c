"""One private training step: clip each example, add up, noise once, update. Jitted whole."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, NamedSharding
from jaxtyping import Array, Bool, Float32, Int, Key, PyTree

from dpfa_jax.core import ArgumentError, BudgetExceededError
from dpfa_jax.dpsgd.clipped_sum import PerExampleLoss, late_sum
from dpfa_jax.dpsgd.noise_state import NoisySumState, check_noise_key, check_state
from dpfa_jax.dpsgd.noisy_sum import noisy_sum
from dpfa_jax.dpsgd.parameters import check_parameters, leaf_groups
from dpfa_jax.dpsgd.plan import DPSGDPlan
from dpfa_jax.dpsgd.step_checks import check_optimizer, check_rows, check_split
from dpfa_jax.dpsgd.sum_noise import TRAINING_LAYER, noise_of
from dpfa_jax.noise import hazards

_ClipNorms = Float32[Array, " groups"] | tuple[()]


class DPState(NamedTuple):
    """What a step takes and returns. All of it but `noise_memory` has been released.

    Attributes:
      step: number of steps taken. It enters the noise counters: never set it back with old keys.
      params: trainable parameters, nothing else.
      opt_state: the optimizer's state, computed from released gradients only.
      l2_clip_norms: the clip groups' norms now, where the plan adapts them; else ().
      noise_memory: the noise of the last steps, where the plan correlates it; else (). SECRET:
        whoever has it can take the noise out of what was released. `restarted` wipes it.
    """

    step: Int[Array | np.ndarray, ""]
    params: PyTree
    opt_state: PyTree
    l2_clip_norms: _ClipNorms = ()
    noise_memory: PyTree = ()


class DPStep(NamedTuple):
    """`init(params) -> DPState` and `step(state, batch, is_real, noise_key) -> DPState`."""

    init: Callable[[PyTree], DPState]
    step: Callable[[DPState, PyTree, Bool[Array, " capacity"], Key[Array, ""]], DPState]


def restarted(state: DPState) -> DPState:
    """`state` with its noise memory wiped: what a run goes on from that lost steps, or was copied.

    Two continuations of one state share its past noise, and together tell more than was charged.
    After a crash the lost steps count as one continuation: charge whole cycles again, restart, and
    draw new batches. Where noise is independent this changes nothing.
    """
    return state._replace(noise_memory=jax.tree.map(jnp.zeros_like, state.noise_memory))


def make_dp_step(
    loss_fn: PerExampleLoss,
    optimizer: optax.GradientTransformation,
    plan: DPSGDPlan,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    donate_state: bool = False,
) -> DPStep:
    """DP-SGD as planned, for any optax optimizer that asks for gradients alone.

    Args:
      loss_fn: (params, batch) -> losses of shape (B,). It is called with one example at a time, so
        no example can touch another's gradient; a batch-coupled layer sees a batch of one. Arrays
        that a `jax.tree_util.Partial` holds (frozen weights) are arguments of the compiled step;
        arrays that a plain function closes over are compiled into it as constants.
      optimizer: receives the noised mean gradient, float32, and the parameters. One that wants the
        loss too, or evaluates it (`optax.lbfgs`, line searches, `polyak_sgd`, `reduce_on_plateau`),
        is refused by `init`: the loss is private and is not released.
      plan: what is promised. Charge it before stepping (`charge`); a step does not charge.
      axis_name: inside `shard_map`: the mesh axes over which the batch is split. Clipped sums are
        added over them first, then every shard adds the same noise, once. `shard_map` must check
        types (not `check_vma=False`): they alone tell that no example is on two shards. Not needed
        under plain jit with sharded arrays, on automatic or explicit mesh axes: there the sum is
        the whole batch's in any case.
      donate_state: let the step reuse the memory of the state it is given; that state is then gone.

    `step` takes a batch of exactly `plan.capacity` rows and the mask of the real ones. It returns
    the new state and nothing else: no loss, norm, clip fraction or batch size, which are private.
    It never skips: an empty batch gives pure noise, a NaN gradient counts as zero in its group.
    Parameters that one leaf shares between layers (tied embeddings) are clipped and noised once, as
    that leaf; frozen ones stay out of `params`. Called outside jit, it refuses a noise key that has
    served a step, since one charge pays for one step, and steps beyond the plan.

    The step sees rows, not whose they are. Draw batches by `plan.index_batches`, which alone draws
    them as charged: with correlated noise (`noise_bands` > 1) any others may bring an example back
    within that many steps, and then nothing is promised.

    Errors: ArgumentError for an optimizer, state, batch, mask or key that does not fit;
    CoverageError for a parameter under no clip group; KeyReuseError; BudgetExceededError after
    `plan.steps` steps.
    Source: Abadi et al., "Deep Learning with Differential Privacy" (2016), algorithm 1.
    """
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ArgumentError(
            "optimizer", optimizer, "not an optax transformation", "Pass e.g. optax.adam(1e-3)."
        )
    release, draw = plan.release, noise_of(plan)
    is_adaptive = release.adaptive_clipping is not None
    generator = release.record().generator
    is_partial = isinstance(loss_fn, jax.tree_util.Partial)
    held, held_structure = jax.tree.flatten(loss_fn) if is_partial else ([], None)

    def init(params: PyTree) -> DPState:
        first = noisy_sum(plan).init(params)
        check_optimizer(optimizer, params)
        return DPState(np.zeros((), np.int32), params, optimizer.init(params), *first[1:])

    def updated(
        step_number: Int[Array, ""],
        params: PyTree,
        opt_state: PyTree,
        l2_clip_norms: _ClipNorms,
        noise_memory: PyTree,
        batch: PyTree,
        is_real: Bool[Array, " capacity"],
        noise_key: Key[Array, ""],
        held: list[Array],
    ) -> tuple[PyTree, PyTree, _ClipNorms, PyTree]:
        before = NoisySumState(step_number, l2_clip_norms, noise_memory)
        late = late_sum(
            jax.tree.unflatten(held_structure, held) if is_partial else loss_fn,
            params,
            batch,
            is_real,
            l2_clip_norms=tuple(l2_clip_norms) if is_adaptive else release.l2_clip_norms,
            leaf_groups=leaf_groups(params, plan.groups),
            micro_batch_size=plan.micro_batch_size,
            per_example_bytes=plan.per_example_bytes,
        )
        noise = draw(noise_key, before, like=params, sources=late.sources)
        if axis_name is None:
            total = late.added(noise.releases())
        else:  # parts of the batch, so parts of sums: noise is due when they are together
            total = jax.lax.psum(late.added([None] * len(jax.tree.leaves(params))), axis_name)
        means, after = noise.released(*total)
        updates, opt_state = optimizer.update(means, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, *after[1:]

    def placed(*arguments: Any) -> tuple[PyTree, PyTree, _ClipNorms, PyTree]:
        kept = arguments[1:5]
        mesh = _explicit_mesh(arguments)
        if mesh is None:
            return updated(*arguments)
        # The program of one example has no place for the axes of the batch in its types: inside,
        # the compiler places what is between, and results go where their arguments were.
        shardings = jax.tree.map(lambda x: NamedSharding(mesh, jax.typeof(x).sharding.spec), kept)
        return jax.sharding.auto_axes(updated, out_sharding=shardings)(*arguments)

    promise = plan.release.record()
    jitted = jax.jit(placed, donate_argnums=(1, 2, 3, 4) if donate_state else ())

    def step(
        state: DPState, batch: PyTree, is_real: Bool[Array, " capacity"], noise_key: Key[Array, ""]
    ) -> DPState:
        check_noise_key(noise_key, generator)
        check_parameters(state.params, release.num_parameters)
        check_state(state, plan, len(jax.tree.leaves(state.params)))
        check_rows(is_real, plan.capacity, axis_name)
        check_split(batch, is_real, axis_name)
        step_number = state.step
        if not isinstance(step_number, jax.core.Tracer):
            # Counted on the host: waiting for the device to count would stall it at every step.
            step_number = np.asarray(step_number, np.int32)
            if step_number >= plan.steps:
                raise BudgetExceededError(
                    f"step {int(step_number)} is beyond the plan's {plan.steps} steps; nothing was "
                    "released. Plan, and charge, more steps."
                )
        if not jax.config.jax_disable_jit:  # else noisy_sum's own guard already sees the key
            noise_key = hazards.guard(
                noise_key,
                step_number,
                uses=(TRAINING_LAYER,),
                promise=promise,
                is_answer=False,
            )
        after = jitted(step_number, *state[1:], batch, is_real, noise_key, held)
        following = step_number + 1
        if not isinstance(following, jax.core.Tracer):
            following = np.asarray(following, np.int32)
        return DPState(following, *after)

    return DPStep(init, step)


def _explicit_mesh(arguments: PyTree) -> AbstractMesh | None:
    """The mesh of arguments whose types say how they are split, if any."""
    for leaf in jax.tree.leaves(arguments):
        mesh = jax.typeof(leaf).sharding.mesh
        if mesh.explicit_axes:
            return mesh
    return None
