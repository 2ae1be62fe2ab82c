"""The Triton backend: what it serves, and how a call becomes kernel launches."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dpfa_jax.kernels import epilogue, noise_inputs
from dpfa_jax.kernels.base import (
    AttentionGradients,
    AttentionInputs,
    AttentionOutputs,
    AttentionSpec,
    ExampleReadout,
    MemoryReadout,
    SoftmaxRows,
)
from dpfa_jax.kernels.compute_capability import reason_without
from dpfa_jax.kernels.pieces import varying_as
from dpfa_jax.kernels.row_clip import clip_rows_stored
from dpfa_jax.kernels.triton import calls, tile_choice, tiles
from dpfa_jax.kernels.triton.backward import BackwardArrays
from dpfa_jax.kernels.triton.forward import NoiseArrays
from dpfa_jax.kernels.triton.launch import MAX_GRID
from dpfa_jax.kernels.triton.logits import Arrays, Base

MAX_HEAD_SIZE = 256
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
LEAST_CAPABILITY = 8.0


@functools.cache
def _device_reason() -> str | None:
    """None where the default GPU is Ampere or later."""
    return reason_without(lambda capability: capability >= LEAST_CAPABILITY, f"{LEAST_CAPABILITY}")


@dataclasses.dataclass(frozen=True)
class TritonBackend:
    """Pallas Triton kernels for Ampere, Ada and later.

    Attributes:
      interpret: run the kernels as plain JAX (tests on a CPU).
    """

    name: str = "triton"
    interpret: bool = False

    def cannot(self, spec: AttentionSpec, inputs: AttentionInputs, platform: str) -> str | None:
        """None if the kernels serve the call on `platform`, else why not."""
        batch, rows, heads, head_size = inputs.query.shape
        if not self.interpret:
            if platform != "gpu":
                return f"needs an NVIDIA GPU, the call is on {platform}"
            reason = _device_reason()
            if reason is not None:
                return reason
        dtypes = {x.dtype for x in (inputs.query, inputs.key, inputs.value)}
        if len(dtypes) > 1 or next(iter(dtypes)) not in DTYPES:
            names = ", ".join(sorted(str(dtype) for dtype in dtypes))
            return f"query, key and value must share bfloat16, float16 or float32, got {names}"
        if isinstance(spec.readout, MemoryReadout) and spec.readout.form != "sum":
            return "the ratio form of a memory readout is not served, the sum form is"
        if head_size > MAX_HEAD_SIZE:
            return f"head size {head_size} is above {MAX_HEAD_SIZE}"
        if max(batch, heads, math.prod(getattr(inputs.bias, "shape", ())[:2])) > MAX_GRID:
            return f"batch {batch}, heads {heads}, or both of a bias, above {MAX_GRID}"
        if 0 in (batch, rows, inputs.key.shape[1], head_size):
            return "an axis is empty"
        return None

    def forward(
        self, spec: AttentionSpec, inputs: AttentionInputs, *, residuals: bool = True
    ) -> AttentionOutputs:
        """The readout and its residuals; without `residuals`, `unclipped` is None."""
        dtype, readout = inputs.query.dtype, spec.readout
        tile, arrays = _tiles(inputs), _arrays(inputs)
        if isinstance(readout, MemoryReadout):
            noise = _noise(readout, inputs)
            clipped = clip_rows_stored(inputs.value, readout.value_clip_norm)
            arrays = arrays._replace(value=clipped)
            released = calls.memory(spec, arrays, noise, tile.memory, interpret=self.interpret)
            return varying_as(inputs, AttentionOutputs(released, None, None))
        run = functools.partial(
            calls.forward, spec, arrays, tile=tile.forward, interpret=self.interpret
        )
        if isinstance(readout, ExampleReadout) and readout.clip == "row":
            results = run(_noise(readout, inputs), dtype=dtype, keep_unclipped=residuals)
            output, unclipped = results.output, results.unclipped
        elif isinstance(readout, ExampleReadout):
            # The norm of a whole example spans programs: clip and noise follow the kernel.
            results = run(None, dtype=jnp.float32, keep_unclipped=False)
            unclipped = results.output
            output = epilogue.example(readout, unclipped, inputs.noise).astype(dtype)
        else:
            # The backward pass takes each row's product of output and cotangent: from an output
            # rounded to 16 bits, every gradient of a row would share that error.
            is_rounded = dtype != jnp.float32
            results = run(None, dtype=dtype, keep_unclipped=residuals and is_rounded)
            output, unclipped = results.output, results.unclipped
        rows = SoftmaxRows(jnp.swapaxes(results.maximum, 1, 2), jnp.swapaxes(results.total, 1, 2))
        is_empty = rows.total == 0.0
        rows = rows._replace(total=jnp.where(is_empty, 1.0, rows.total))
        lse = jnp.where(is_empty, -jnp.inf, rows.maximum + jnp.log(rows.total))
        return varying_as(inputs, AttentionOutputs(output, unclipped, lse, rows=rows))

    def backward(
        self,
        spec: AttentionSpec,
        inputs: AttentionInputs,
        outputs: AttentionOutputs,
        cotangent: Float[Array, "B T N H"],
    ) -> AttentionGradients:
        """Gradients of plain attention; `outputs` may hold the log-sum-exp alone."""
        assert outputs.lse is not None
        is_empty = jnp.isneginf(outputs.lse)
        may_be_empty = any(x is not None for x in inputs[3:7]) or spec.local_window is not None
        if may_be_empty:
            # A row that saw no key is the constant 0: a NaN that arrives there goes no further.
            cotangent = jnp.where(is_empty[..., None], jnp.zeros((), cotangent.dtype), cotangent)
        answer = outputs.output if outputs.unclipped is None else outputs.unclipped
        cotangent = cotangent.astype(inputs.query.dtype)  # as the kernels multiply it
        delta = jnp.sum(answer.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
        by_head = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
        shift, factor = outputs.lse, None
        if inputs.query.dtype == jnp.float32 and outputs.rows is not None:
            # exp(logit - lse) would round as coarsely as the log-sum-exp, all of a row alike.
            shift, factor = outputs.rows.maximum, by_head(1.0 / outputs.rows.total)
        shift = jnp.where(is_empty, jnp.inf, shift * Base.of(inputs.query.dtype).unit)
        given = BackwardArrays(cotangent, by_head(shift), by_head(delta), factor)
        gradients = calls.backward(
            spec, _arrays(inputs), given, _tiles(inputs), interpret=self.interpret
        )
        return varying_as((inputs, cotangent), AttentionGradients(*gradients))


def _arrays(inputs: AttentionInputs) -> Arrays:
    return Arrays(*inputs[:7])


def _tiles(inputs: AttentionInputs) -> tiles.KernelTiles:
    size = tiles.padded_size(inputs.query.shape[3])
    return tile_choice.kernel_tiles(size, inputs.query.dtype.itemsize)


def _noise(readout: ExampleReadout | MemoryReadout, inputs: AttentionInputs) -> NoiseArrays:
    """The operands of the noise. Errors: ArgumentError where there is none, or for other heads."""
    batch, rows, heads, size = inputs.query.shape
    columns = size + isinstance(readout, MemoryReadout)
    noise = noise_inputs.placed(readout, inputs.noise, (batch, rows, heads, columns))
    grids = np.asarray(readout.grids, np.float32)
    per_head = np.stack([np.asarray(readout.noise_stddevs, np.float32), 1 / grids, grids], axis=1)
    return NoiseArrays(
        *noise,
        jnp.broadcast_to(jnp.asarray(per_head), (batch, *per_head.shape)),
    )


BACKEND = TritonBackend()
