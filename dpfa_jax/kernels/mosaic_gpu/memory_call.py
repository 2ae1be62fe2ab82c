"""A memory readout's call: what the kernel serves, and the operands it takes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from dpfa_jax.kernels import noise_inputs
from dpfa_jax.kernels.base import AttentionInputs, AttentionOutputs, AttentionSpec, MemoryReadout
from dpfa_jax.kernels.mosaic_gpu.memory import MemoryArrays, MemoryResults, memory_forward
from dpfa_jax.kernels.mosaic_gpu.memory_numbers import Numbers, memory_numbers
from dpfa_jax.kernels.mosaic_gpu.tiles import MAX_HEAD_SIZE
from dpfa_jax.kernels.pieces import over_pieces
from dpfa_jax.kernels.row_clip import clip_rows_stored

# Dimensions of the kernel's operands, as `over_pieces` reads them.
_AXES = MemoryArrays(
    "btnh", "bskh", "bskh", "bs", "bw", "b", "bn", "b", "bn", "bn", "bn", "bn", "b"
)


def cannot(spec: AttentionSpec, inputs: AttentionInputs) -> str | None:
    """None if the kernel serves this memory readout, else why not; dtypes are checked before."""
    readout = spec.readout
    assert isinstance(readout, MemoryReadout)
    batch, rows, _, head_size = inputs.query.shape
    if readout.form != "sum":
        return "the ratio form of a memory readout is not served, the sum form is"
    if inputs.bias is not None:
        return "an additive bias is not served by these kernels"
    if inputs.mask is not None and inputs.mask.shape[1:3] != (1, 1):
        return f"a mask of shape {inputs.mask.shape} is not served, one over slots alone is"
    if head_size > MAX_HEAD_SIZE:
        return f"head size {head_size} is above {MAX_HEAD_SIZE} for a memory readout"
    if not math.isfinite(spec.scale):
        return f"scale={spec.scale} must be finite"
    if 0 in (batch, rows, inputs.key.shape[1], head_size):
        return "an axis is empty"
    numbers = _numbers(readout, inputs)
    return numbers if isinstance(numbers, str) else None


def _numbers(readout: MemoryReadout, inputs: AttentionInputs) -> Numbers | str:
    keys, head_size = inputs.key.shape[1], inputs.query.shape[3]
    return memory_numbers(readout, head_size, keys, inputs.value.dtype)


def answer(
    spec: AttentionSpec,
    inputs: AttentionInputs,
    *,
    keep_sums: bool = False,
    interpret: Any = None,
) -> MemoryResults:
    """The released answer, in the query's dtype, of a call that `cannot` has let pass.

    `keep_sums` adds the un-noised sums, for tests. Errors: ArgumentError without noise inputs, or
    where the readout is for another number of heads.
    """
    assert isinstance(spec.readout, MemoryReadout)
    numbers = _numbers(spec.readout, inputs)
    assert isinstance(numbers, Numbers)
    arrays = _arrays(spec.readout, numbers, inputs)

    def run(arrays: MemoryArrays) -> tuple[jax.Array, ...]:
        arrays = arrays._replace(head_start=arrays.head_start[:, 0])
        results = memory_forward(spec, arrays, numbers, keep_sums=keep_sums, interpret=interpret)
        return tuple(x for x in results if x is not None)

    made = ["btnh", *(["btnh", "bnt"] if keep_sums else [])]
    return MemoryResults(*over_pieces(run, arrays, _AXES, made, key_heads=inputs.key.shape[2]))


def outputs(results: MemoryResults) -> AttentionOutputs:
    """What a backend returns: the noised answer alone."""
    return AttentionOutputs(results.output, None, None)


def _arrays(readout: MemoryReadout, numbers: Numbers, inputs: AttentionInputs) -> MemoryArrays:
    batch, rows, heads, size = inputs.query.shape
    noise = noise_inputs.placed(readout, inputs.noise, (batch, rows, heads, size + 1))
    dtype = inputs.value.dtype
    value = clip_rows_stored(inputs.value, numbers.value_clip_norm)
    normaliser = jnp.full(inputs.key.shape[:2], numbers.weight_scale, dtype)
    seen = _seen(inputs)
    if seen is not None:
        # A hidden slot adds weight * (+0): the same bits whatever it holds.
        value = jnp.where(seen[:, :, None, None], value, jnp.zeros((), dtype))
        normaliser = jnp.where(seen, normaliser, jnp.zeros((), dtype))
    stddevs, grids = (np.asarray(x, np.float64) for x in (readout.noise_stddevs, readout.grids))
    shifts = np.asarray(numbers.shifts, np.int32)

    def per_head(x: np.ndarray, dtype: Any = np.float32) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(x.astype(dtype)), (batch, heads))

    return MemoryArrays(
        inputs.query,
        inputs.key,
        value,
        normaliser,
        *noise,
        jnp.ones((batch,), jnp.uint32),
        per_head(stddevs / grids),
        per_head(grids),
        per_head(shifts, np.int32),
        per_head(2.0 ** -np.minimum(shifts, 23)),
        inputs.query_lengths,
    )


def _seen(inputs: AttentionInputs) -> Bool[Array, "B S"] | None:
    """Which slots are seen; None: all."""
    shape = inputs.key.shape[:2]
    seen = None
    if inputs.mask is not None:
        seen = jnp.broadcast_to(inputs.mask[:, 0, 0, :], shape)
    if inputs.key_lengths is not None:
        exists = jnp.arange(shape[1])[None, :] < inputs.key_lengths[:, None]
        seen = exists if seen is None else seen & exists
    return seen
