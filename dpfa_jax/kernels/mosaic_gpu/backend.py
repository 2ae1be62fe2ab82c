"""The Hopper backend: what it serves, and how a call becomes kernel launches."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpfa_jax.kernels import manual_axes
from dpfa_jax.kernels.base import (
    AttentionGradients,
    AttentionInputs,
    AttentionOutputs,
    AttentionSpec,
    ExampleReadout,
    MemoryReadout,
)
from dpfa_jax.kernels.mosaic_gpu import device, memory_call
from dpfa_jax.kernels.mosaic_gpu.backward import attention_backward
from dpfa_jax.kernels.mosaic_gpu.forward import ForwardArrays, ForwardResults, attention_forward
from dpfa_jax.kernels.mosaic_gpu.tiles import backward_tiles, forward_tiles
from dpfa_jax.kernels.partitioning import by_batch_and_heads
from dpfa_jax.kernels.public_maximum import has_public_maximum

MAX_HEAD_SIZE = 256
# Past this the accumulators of dK and dV do not fit the registers of a warpgroup.
MAX_HEAD_SIZE_BACKWARD = 128
MAX_BATCH = 65535
# Dimensions of the forward kernel's operands, as `by_batch_and_heads` reads them.
FORWARD_AXES = ForwardArrays(
    "btnh", "bskh", "bskh", "b", "b", "bw", "b", head_start="bn", stddevs="bn", grids="bn", ones="b"
)


def _fold_vmap(function: Any) -> Any:
    """`function` of arrays with a leading batch axis; a vmapped axis is folded into that axis."""
    folding = jax.custom_batching.custom_vmap(function)

    @folding.def_vmap
    def _(axis_size, in_batched, *args):
        def fold(x: jax.Array, is_batched: bool) -> jax.Array:
            if not is_batched:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        def unfold(x: jax.Array) -> jax.Array:
            return x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:])

        results = folding(*jax.tree.map(fold, args, tuple(in_batched)))
        return jax.tree.map(unfold, results), jax.tree.map(lambda _: True, results)

    return folding


def _varying_as(inputs: Any, results: Any) -> Any:
    """`results`, marked as varying over the manual mesh axes of `inputs`."""
    axes = manual_axes.varying_axes(*jax.tree.leaves(inputs))
    return jax.tree.map(lambda x: manual_axes.vary_over(x, axes), results)


def _keep_rows(x: Float[Array, "B T N H"], lengths: jax.Array | None) -> Float[Array, "B T N H"]:
    """`x` with rows past their example's length replaced by zero: 0 * NaN must not reach a sum."""
    if lengths is None:
        return x
    is_row = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
    return jnp.where(is_row[:, :, None, None], x, 0)


@dataclasses.dataclass(frozen=True)
class MosaicGpuBackend:
    """Pallas Mosaic GPU kernels for Hopper.

    Attributes:
      interpret: parameters of the Mosaic GPU simulator (tests on a CPU); None on a GPU.
    """

    name: str = "mosaic_gpu"
    interpret: Any = None

    def cannot(self, spec: AttentionSpec, inputs: AttentionInputs, platform: str) -> str | None:
        """None if the kernels serve the call on `platform`, else why not."""
        batch, rows, _, head_size = inputs.query.shape
        dtypes = {x.dtype for x in (inputs.query, inputs.key, inputs.value)}
        if self.interpret is None:
            if platform != "gpu":
                return f"needs a Hopper GPU, the call is on {platform}"
            reason = device.reason_without_hopper()
            if reason is not None:
                return reason
        if len(dtypes) > 1 or next(iter(dtypes)) not in (jnp.bfloat16, jnp.float16):
            names = ", ".join(sorted(str(dtype) for dtype in dtypes))
            return f"query, key and value must share bfloat16 or float16, got {names}"
        if isinstance(spec.readout, MemoryReadout):
            return memory_call.cannot(spec, inputs)
        if inputs.bias is not None:
            return "an additive bias is not served by these kernels"
        if inputs.mask is not None:
            return "a mask array is not served (causal, local window and lengths are)"
        if isinstance(spec.readout, ExampleReadout) and spec.readout.clip != "row":
            return (
                f"clip={spec.readout.clip!r} needs the norm of the whole example; 'row' is served"
            )
        if not (math.isfinite(spec.scale) and spec.scale > 0):
            return f"scale={spec.scale} must be positive for the running maximum"
        if head_size > MAX_HEAD_SIZE:
            return f"head size {head_size} is above {MAX_HEAD_SIZE}"
        if batch > MAX_BATCH:
            return f"batch {batch} is above {MAX_BATCH}"
        if 0 in (batch, rows, inputs.key.shape[1], head_size):
            return "an axis is empty"
        return None

    def waits(self, spec: AttentionSpec) -> str | None:
        """Why a call that names no backend is not served yet; None where it is."""
        if isinstance(spec.readout, MemoryReadout) and not memory_call.PROVED_ON_DEVICE:
            return 'the memory readout is served where implementation="mosaic_gpu" asks for it'
        return None

    def forward(
        self, spec: AttentionSpec, inputs: AttentionInputs, *, residuals: bool = True
    ) -> AttentionOutputs:
        """The readout and its residuals; without `residuals`, `unclipped` is None."""
        if isinstance(spec.readout, MemoryReadout):
            released = memory_call.answer(
                spec, inputs, fold_vmap=_fold_vmap, interpret=self.interpret
            )
            return _varying_as(inputs, memory_call.outputs(released))
        batch = inputs.query.shape[0]
        arrays = ForwardArrays(
            inputs.query,
            inputs.key,
            _keep_rows(inputs.value, inputs.key_lengths),
            inputs.query_lengths,
            inputs.key_lengths,
        )
        if isinstance(spec.readout, ExampleReadout):
            if inputs.noise is None:
                raise ValueError("noise=None: an example readout needs NoiseInputs")
            per_head = (spec.readout.noise_stddevs, spec.readout.grids)
            stddevs, grids = (
                jnp.broadcast_to(jnp.asarray(x, jnp.float32), (batch, len(x))) for x in per_head
            )
            ones = jnp.ones((batch,), jnp.uint32)
            # The global index of each head, of which every piece of the heads has its own first.
            start = inputs.noise.head_start[:, None]
            heads = start + jnp.arange(inputs.query.shape[2], dtype=jnp.uint32)
            noise = inputs.noise._replace(head_start=heads)._asdict()
            arrays = arrays._replace(**noise, stddevs=stddevs, grids=grids, ones=ones)
        head_size = inputs.query.shape[3]
        tile = forward_tiles(spec, -(-head_size // 64) * 64, inputs.key.shape[1])
        present = [x is not None for x in arrays]

        def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
            given = iter(operands)
            filled = ForwardArrays(*(next(given) if there else None for there in present))
            if filled.head_start is not None:
                filled = filled._replace(head_start=filled.head_start[:, 0])
            results = attention_forward(
                spec,
                filled,
                tile,
                has_public_maximum=has_public_maximum(spec, inputs),
                keep_unclipped=residuals,
                interpret=self.interpret,
            )
            return tuple(x for x in results if x is not None)

        is_kept = residuals and isinstance(spec.readout, ExampleReadout)
        run = by_batch_and_heads(
            run,
            [axes for axes, there in zip(FORWARD_AXES, present, strict=True) if there],
            ["btnh", *(["btnh"] if is_kept else []), "bnt"],
            key_heads=inputs.key.shape[2],
        )
        output, *unclipped, lse = _fold_vmap(run)(*(x for x in arrays if x is not None))
        results = ForwardResults(output, unclipped[0] if unclipped else None, lse)
        outputs = AttentionOutputs(
            results.output, results.unclipped, jnp.swapaxes(results.lse, 1, 2)
        )
        return _varying_as(inputs, outputs)

    def backward(
        self,
        spec: AttentionSpec,
        inputs: AttentionInputs,
        outputs: AttentionOutputs,
        cotangent: Float[Array, "B T N H"],
        lse_cotangent: Float[Array, "B T N"] | None,
    ) -> AttentionGradients:
        """Gradients of plain attention; above head size 128 through the blocked backend."""
        if inputs.query.shape[3] > MAX_HEAD_SIZE_BACKWARD:
            from dpfa_jax.kernels.blocked import BACKEND as BLOCKED

            return BLOCKED.backward(spec, inputs, outputs, cotangent, lse_cotangent)
        assert outputs.lse is not None
        answer = outputs.output if outputs.unclipped is None else outputs.unclipped
        query, cotangent = (_keep_rows(x, inputs.query_lengths) for x in (inputs.query, cotangent))
        key, value = (_keep_rows(x, inputs.key_lengths) for x in (inputs.key, inputs.value))
        delta = jnp.einsum(
            "btnh,btnh->btn", answer.astype(jnp.float32), cotangent.astype(jnp.float32)
        )
        if lse_cotangent is not None:
            delta -= lse_cotangent.astype(jnp.float32)
        lse, delta = (jnp.swapaxes(x, 1, 2) for x in (outputs.lse, delta))
        lengths = () if inputs.key_lengths is None else (inputs.key_lengths,)
        tile = backward_tiles(-(-query.shape[3] // 64) * 64, deterministic=spec.deterministic)

        def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
            query, key, value, cotangent, lse, delta, *more = operands
            return attention_backward(
                spec, query, key, value, cotangent, lse, delta, more[0] if more else None, tile,
                interpret=self.interpret,
            )  # fmt: skip

        operands = (query, key, value, cotangent.astype(query.dtype), lse, delta, *lengths)
        run = by_batch_and_heads(
            run,
            ["btnh", "bskh", "bskh", "btnh", "bnt", "bnt", *("b" for _ in lengths)],
            ["btnh", "bskh", "bskh"],
            key_heads=key.shape[2],
        )
        d_query, d_key, d_value = _fold_vmap(run)(*operands)
        gradients = AttentionGradients(d_query, d_key, d_value, None)
        return _varying_as((inputs, cotangent), gradients)


BACKEND = MosaicGpuBackend()
