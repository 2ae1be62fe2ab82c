"""What the noise of a sum depends on beside the sum, and what of it is refused."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, PyTree

from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.dpsgd import adaptive_clipping
from dpfa_jax.dpsgd.correlated_noise import empty_memory
from dpfa_jax.dpsgd.plan import DPSGDPlan
from dpfa_jax.noise import keys


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


def check_counts(centred_counts: Array | None, plan: DPSGDPlan) -> None:
    """Refuses adaptive clipping without a count for each group: ArgumentError."""
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
