"""The Hopper backend: what it serves, and how a call becomes kernel launches."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpfa_jax.kernels import masks, noise_inputs
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
from dpfa_jax.kernels.mosaic_gpu.bias_gradient import bias_gradient
from dpfa_jax.kernels.mosaic_gpu.forward import ForwardArrays, ForwardResults, attention_forward
from dpfa_jax.kernels.mosaic_gpu.pairs import bytes_per_column
from dpfa_jax.kernels.mosaic_gpu.tile_choice import backward_tiles, forward_tiles
from dpfa_jax.kernels.mosaic_gpu.tiles import MAX_HEAD_SIZE, MAX_HEAD_SIZE_ONE_WARPGROUP
from dpfa_jax.kernels.pieces import over_pieces, varying_as
from dpfa_jax.kernels.public_maximum import has_public_maximum

# Dimensions of the forward kernel's operands, as `over_pieces` reads them.
FORWARD_AXES = ForwardArrays(
    "btnh", "bskh", "bskh", "b", "b", "bw", "b", head_start="bn", stddevs="bn", grids="bn",
    ones="b", mask="pair", bias="pair",
)  # fmt: skip


class _BackwardOperands(NamedTuple):
    """What the backward kernels read; the bias last."""

    query: Any
    key: Any
    value: Any
    cotangent: Any
    lse: Any
    delta: Any
    key_lengths: Any
    mask: Any
    bias: Any


_BACKWARD_AXES = _BackwardOperands(
    "btnh", "bskh", "bskh", "btnh", "bnt", "bnt", "b", "pair", "pair"
)


def _keep_rows(x: Float[Array, "B T N H"], lengths: jax.Array | None) -> Float[Array, "B T N H"]:
    """`x` with rows past their example's length replaced by zero: 0 * NaN must not reach a sum."""
    if lengths is None:
        return x
    is_row = jnp.arange(x.shape[1])[None, :] < lengths[:, None]
    return jnp.where(is_row[:, :, None, None], x, 0)


def _keep_keys(
    x: Float[Array, "B S K H"], spec: AttentionSpec, inputs: AttentionInputs
) -> Float[Array, "B S K H"]:
    """As `_keep_rows`, for keys that no row sees."""
    is_key = masks.shown_keys(spec, inputs)
    return x if is_key is None else jnp.where(is_key[:, :, None, None], x, 0)


@dataclasses.dataclass(frozen=True)
class MosaicGpuBackend:
    """Pallas Mosaic GPU kernels for Hopper.

    Attributes:
      interpret: parameters of the Mosaic GPU simulator (tests on a CPU); None on a GPU.
      noise_pass: where an example release's noise is made, as `tiles.forward_tiles` (tests and
        benchmarks); None: the tiles decide.
    """

    name: str = "mosaic_gpu"
    interpret: Any = None
    noise_pass: bool | None = None

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
        if isinstance(spec.readout, ExampleReadout) and spec.readout.clip != "row":
            return (
                f"clip={spec.readout.clip!r} needs the norm of the whole example; 'row' is served"
            )
        if not (math.isfinite(spec.scale) and spec.scale > 0):
            return f"scale={spec.scale} must be positive for the running maximum"
        if head_size > MAX_HEAD_SIZE:
            return f"head size {head_size} is above {MAX_HEAD_SIZE}"
        if 0 in (batch, rows, inputs.key.shape[1], head_size):
            return "an axis is empty"
        return None

    def forward(
        self, spec: AttentionSpec, inputs: AttentionInputs, *, residuals: bool = True
    ) -> AttentionOutputs:
        """The readout and its residuals; without `residuals`, `unclipped` is None."""
        if isinstance(spec.readout, MemoryReadout):
            released = memory_call.answer(spec, inputs, interpret=self.interpret)
            return varying_as(inputs, memory_call.outputs(released))
        batch = inputs.query.shape[0]
        arrays = ForwardArrays(
            inputs.query,
            inputs.key,
            _keep_keys(inputs.value, spec, inputs),
            inputs.query_lengths,
            inputs.key_lengths,
            mask=inputs.mask,
            bias=inputs.bias,
        )
        if isinstance(spec.readout, ExampleReadout):
            noise = noise_inputs.placed(spec.readout, inputs.noise, inputs.query.shape)
            per_head = (spec.readout.noise_stddevs, spec.readout.grids)
            stddevs, grids = (
                jnp.broadcast_to(jnp.asarray(x, jnp.float32), (batch, len(x))) for x in per_head
            )
            ones = jnp.ones((batch,), jnp.uint32)
            arrays = arrays._replace(
                key_words=noise.key_words,
                batch_index=noise.batch_index,
                head_start=noise.head_index,
                stddevs=stddevs,
                grids=grids,
                ones=ones,
            )
        head_size = inputs.query.shape[3]
        pair_bytes = bytes_per_column(inputs.mask, inputs.bias)
        is_bounded = has_public_maximum(spec, inputs)
        tile = forward_tiles(
            spec,
            -(-head_size // 64) * 64,
            inputs.key.shape[1],
            has_public_maximum=is_bounded,
            pair_bytes=pair_bytes,
            noise_pass=self.noise_pass,
        )

        def run(arrays: ForwardArrays) -> tuple[jax.Array, ...]:
            if arrays.head_start is not None:
                arrays = arrays._replace(head_start=arrays.head_start[:, 0])
            results = attention_forward(
                spec,
                arrays,
                tile,
                has_public_maximum=is_bounded,
                keep_unclipped=residuals,
                interpret=self.interpret,
            )
            return tuple(x for x in results if x is not None)

        is_kept = residuals and isinstance(spec.readout, ExampleReadout)
        results = ["btnh", *(["btnh"] if is_kept else []), "bnt"]
        key_heads = inputs.key.shape[2]
        output, *unclipped, lse = over_pieces(
            run, arrays, FORWARD_AXES, results, key_heads=key_heads
        )
        found = ForwardResults(output, unclipped[0] if unclipped else None, lse)
        outputs = AttentionOutputs(found.output, found.unclipped, jnp.swapaxes(found.lse, 1, 2))
        return varying_as(inputs, outputs)

    def backward(
        self,
        spec: AttentionSpec,
        inputs: AttentionInputs,
        outputs: AttentionOutputs,
        cotangent: Float[Array, "B T N H"],
    ) -> AttentionGradients:
        """Gradients of plain attention; above head size 128 a bias has its by the blocked one."""
        assert outputs.lse is not None
        answer = outputs.output if outputs.unclipped is None else outputs.unclipped
        rows = (inputs.query, cotangent)
        if inputs.mask is None and inputs.bias is None:
            query, cotangent = (_keep_rows(x, inputs.query_lengths) for x in rows)
        else:  # they may leave a row no key
            is_empty = jnp.isneginf(outputs.lse)[..., None]
            query, cotangent = (jnp.where(is_empty, jnp.zeros((), x.dtype), x) for x in rows)
        key, value = (_keep_keys(x, spec, inputs) for x in (inputs.key, inputs.value))
        delta = jnp.einsum(
            "btnh,btnh->btn", answer.astype(jnp.float32), cotangent.astype(jnp.float32)
        )
        lse, delta = (jnp.swapaxes(x, 1, 2) for x in (outputs.lse, delta))
        tile = backward_tiles(
            spec,
            -(-query.shape[3] // 64) * 64,
            min(query.shape[1], key.shape[1]),
            pair_bytes=bytes_per_column(inputs.mask, inputs.bias),
        )
        operands = _BackwardOperands(
            query, key, value, cotangent.astype(query.dtype), lse, delta, inputs.key_lengths,
            inputs.mask, inputs.bias,
        )  # fmt: skip

        def run(given: _BackwardOperands) -> tuple[jax.Array, ...]:
            return attention_backward(
                spec, *given[:7], tile, mask=given.mask, bias=given.bias, interpret=self.interpret
            )

        def run_bias(given: _BackwardOperands) -> tuple[jax.Array, ...]:
            return (bias_gradient(spec, **given._asdict(), interpret=self.interpret),)

        on_pieces = functools.partial(over_pieces, key_heads=key.shape[2])
        made = ["btnh", "bskh", "bskh"]
        d_query, d_key, d_value = on_pieces(run, operands, _BACKWARD_AXES, made)
        d_bias = None
        if inputs.bias is not None and inputs.bias.shape[3] == 1:
            d_bias = jnp.zeros_like(inputs.bias)  # all keys of a row share it: it moves no weight
        elif inputs.bias is not None and query.shape[3] > MAX_HEAD_SIZE_ONE_WARPGROUP:
            from dpfa_jax.kernels.blocked import BACKEND as BLOCKED

            # XLA drops it where nobody reads the gradient, as the call below.
            d_bias = BLOCKED.backward(spec, inputs, outputs, cotangent).bias
        elif inputs.bias is not None:
            # A call of its own: XLA drops it where nobody reads the gradient.
            (d_bias,) = on_pieces(run_bias, operands, _BACKWARD_AXES, ["pair"])
            d_bias = d_bias.astype(inputs.bias.dtype)
        gradients = AttentionGradients(d_query, d_key, d_value, d_bias)
        return varying_as((inputs, cotangent), gradients)


BACKEND = MosaicGpuBackend()
