"""Derivatives around a backend: the softmax readouts have one, a memory readout refuses it."""

import functools
from typing import NoReturn

import jax
from jax.sharding import AxisType
from jaxtyping import Array, Float

from dpfa_jax.core import PrivateAutodiffError
from dpfa_jax.kernels import epilogue, manual_axes
from dpfa_jax.kernels.base import (
    AttentionInputs,
    AttentionOutputs,
    AttentionSpec,
    Backend,
    ExampleReadout,
    MemoryReadout,
    Plain,
)


def attend(
    backend: Backend, spec: AttentionSpec, inputs: AttentionInputs
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"] | None]:
    """Output and log-sum-exp (None for a memory); what a private caller gets is the output only."""
    axes = manual_axes.varying_axes(*jax.tree.leaves(inputs))
    inputs = jax.tree.map(lambda x: manual_axes.vary_over(x, axes), inputs)
    if isinstance(spec.readout, MemoryReadout):
        return _memory(backend, spec, inputs), None
    if isinstance(spec.readout, Plain) and backend.name == "reference":
        outputs = backend.forward(spec, inputs)  # its own derivative, by JAX, in either mode
        return outputs.output, outputs.lse
    return _softmax(backend, spec, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _differentiable_softmax(
    backend: Backend, spec: AttentionSpec, inputs: AttentionInputs
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"] | None]:
    outputs = backend.forward(spec, inputs, residuals=False)
    return outputs.output, outputs.lse


def _softmax_forward(
    backend: Backend, spec: AttentionSpec, inputs: AttentionInputs
) -> tuple[
    tuple[Float[Array, "B T N H"], Float[Array, "B T N"] | None],
    tuple[AttentionInputs, AttentionOutputs],
]:
    outputs = backend.forward(spec, inputs)
    return (outputs.output, outputs.lse), (inputs, outputs)


def _softmax_backward(
    backend: Backend,
    spec: AttentionSpec,
    residuals: tuple[AttentionInputs, AttentionOutputs],
    cotangents: tuple[Float[Array, "B T N H"], Float[Array, "B T N"]],
) -> tuple[AttentionInputs]:
    inputs, outputs = residuals
    cotangent, _ = cotangents  # the log-sum-exp is returned under stop_gradient
    if isinstance(spec.readout, ExampleReadout):
        # Noise is a constant, and snapping passes the cotangent straight through.
        assert outputs.unclipped is not None
        cotangent = epilogue.clip_cotangent(spec.readout, outputs.unclipped, cotangent)
    gradients = backend.backward(spec, inputs, outputs, cotangent)
    bias = None
    if gradients.bias is not None and inputs.bias is not None:
        bias = _placed_as(gradients.bias, inputs.bias)
    query, key, value = map(_placed_as, gradients[:3], inputs[:3])
    return (AttentionInputs(query, key, value, bias),)


def _placed_as(gradient: jax.Array, primal: jax.Array) -> jax.Array:
    """`gradient`, where types name the sharding with the primal's: kernels drop axes of size 1."""
    wanted = jax.typeof(primal).sharding
    if AxisType.Explicit not in wanted.mesh.axis_types:
        return gradient
    return jax.sharding.reshard(gradient, wanted)


_differentiable_softmax.defvjp(_softmax_forward, _softmax_backward)
_softmax = jax.jit(_differentiable_softmax, static_argnums=(0, 1))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _underivable_memory(
    backend: Backend, spec: AttentionSpec, inputs: AttentionInputs
) -> Float[Array, "B T N H"]:
    return backend.forward(spec, inputs, residuals=False).output


@_underivable_memory.defjvp
def _memory_jvp(
    backend: Backend, spec: AttentionSpec, primals: object, tangents: object
) -> NoReturn:
    del backend, spec, primals, tangents
    raise PrivateAutodiffError(
        "a memory readout (RecordRelease) has no derivative: gradients through it would be "
        "noise-free functions of the private records. Put jax.lax.stop_gradient around query, "
        "key, value and bias, or train by DP-SGD (TrainingRelease)."
    )


_memory = jax.jit(_underivable_memory, static_argnums=(0, 1))
