"""The largest micro-batch that fits, read from compiled programs; nothing is run."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.dpsgd.clipped_sum import PerExampleLoss
from dpfa_jax.dpsgd.plan import DPSGDPlan
from dpfa_jax.dpsgd.step import make_dp_step
from dpfa_jax.noise import keys


def largest_micro_batch(
    loss_fn: PerExampleLoss,
    params: PyTree,
    batch: PyTree,
    plan: DPSGDPlan,
    optimizer: optax.GradientTransformation,
    memory_bytes: int | None = None,
    *,
    donate_state: bool = False,
) -> int:
    """The largest divisor of the plan's capacity whose compiled step fits into memory.

    Bisects the divisors: about log2 of their number, at most 8, steps are compiled for the default
    device. Memory grows with the micro-batch; where a compiler breaks that rule, the answer still
    fits, but may not be the largest. Use it as
    `dataclasses.replace(plan, micro_batch_size=...)`: it is a speed setting and not private.

    Args:
      loss_fn, optimizer, plan: as for `make_dp_step`.
      params: pytree of arrays or of `jax.ShapeDtypeStruct`.
      batch: the same, with leading axis `plan.capacity`.
      memory_bytes: what the step may use, its arguments and results included; what the device
        reports as its limit where None.
      donate_state: whether the step will reuse the memory of its state.

    Errors: ArgumentError where one example at a time does not fit, with what it needs; where the
    device does not tell its memory; and for a plan, batch or loss that do not fit each other.
    """
    memory_bytes = _device_memory() if memory_bytes is None else memory_bytes
    checks.count("memory_bytes", memory_bytes)
    sizes = [size for size in range(1, plan.capacity + 1) if plan.capacity % size == 0]

    @functools.cache
    def needed(size: int) -> int:
        sized = dataclasses.replace(plan, micro_batch_size=size)
        return step_bytes(loss_fn, params, batch, sized, optimizer, donate_state)

    def fits(size: int) -> bool:
        try:
            return needed(size) <= memory_bytes
        except ArgumentError as error:
            # Gradients that cannot be made one after another pass the plan's own limit.
            if error.parameter != "per_example_bytes" or size == 1:
                raise
            return False

    if not fits(1):
        raise ArgumentError(
            "memory_bytes",
            memory_bytes,
            f"one example at a time needs {needed(1)} bytes",
            "Shrink the model or its inputs, use jax.checkpoint in the loss, lower "
            "plan.per_example_bytes, or pass donate_state=True here and to make_dp_step.",
        )
    least, most = 0, len(sizes)
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(sizes[middle]) else (least, middle)
    return sizes[least]


def step_bytes(
    loss_fn: PerExampleLoss,
    params: PyTree,
    batch: PyTree,
    plan: DPSGDPlan,
    optimizer: optax.GradientTransformation,
    donate_state: bool = False,
) -> int:
    """Bytes of device memory that one compiled step uses: arguments, results and in between.

    Arguments and errors as `largest_micro_batch`.
    """
    dp = make_dp_step(loss_fn, optimizer, plan)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch))
    state = jax.eval_shape(dp.init, shapes[0])
    is_real = jax.ShapeDtypeStruct((plan.capacity,), jnp.bool_)
    some_key = (
        keys.insecure_test_key(0) if plan.release.insecure_test_noise else keys.new_noise_key()
    )
    step = jax.jit(dp.step, donate_argnums=(0,) if donate_state else ())
    figures = step.lower(state, shapes[1], is_real, some_key).compile().memory_analysis()
    if figures is None:
        raise ArgumentError(
            "memory_bytes",
            None,
            f"the {jax.default_backend()} compiler tells no memory figures",
            "Choose micro_batch_size by hand.",
        )
    return (
        figures.temp_size_in_bytes
        + figures.argument_size_in_bytes
        + figures.output_size_in_bytes
        - figures.alias_size_in_bytes
    )


def _device_memory() -> int:
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise ArgumentError(
            "memory_bytes", None, f"{device} does not tell its memory", "Pass memory_bytes."
        )
    return int(limit)
