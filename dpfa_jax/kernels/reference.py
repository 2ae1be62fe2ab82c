"""The O(T S) backend: attention as its definition reads, kept for comparison and for jvp.

Everything is in float32 (float64 for float64 inputs); the counters of the noise and the private
epilogue are those of the other backends. Plain attention is ordinary JAX code, differentiable any
number of times in either mode.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpfa_jax.kernels import epilogue, manual_axes, masks, memory_loop, tiles
from dpfa_jax.kernels.base import (
    AttentionGradients,
    AttentionInputs,
    AttentionOutputs,
    AttentionSpec,
    MemoryReadout,
    group_size,
)
from dpfa_jax.kernels.compensated import TwoFloat


def whole_matrix(spec: AttentionSpec, inputs: AttentionInputs) -> tiles.Tile:
    """All rows and keys as one rectangle, in the accumulator's type."""
    batch, length, heads, size = inputs.query.shape
    groups = group_size(inputs)
    dtype = tiles.accumulator(inputs.query.dtype)
    rows, columns = jnp.arange(length), jnp.arange(inputs.key.shape[1])
    seen = masks.visible(spec, inputs, inputs.mask, rows, columns)
    return tiles.Tile(
        inputs.query.reshape(batch, length, heads // groups, groups, size).astype(dtype),
        inputs.key.astype(dtype),
        inputs.value.astype(dtype),
        tiles.grouped(inputs.bias, heads, groups),
        tiles.grouped(seen, heads, groups),
    )


def softmax_attention(
    spec: AttentionSpec, inputs: AttentionInputs
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Normalised output and log-sum-exp; differentiable by JAX."""
    is_key = masks.shown_keys(spec, inputs)
    if is_key is not None:  # gradients of the others: 0 * NaN must not reach a sum
        key, value = (
            jnp.where(is_key[:, :, None, None], x, jnp.zeros((), x.dtype))
            for x in (inputs.key, inputs.value)
        )
        inputs = inputs._replace(key=key, value=value)
    tile = whole_matrix(spec, inputs)
    logits_BKGTS = tiles.biased(tiles.raw_logits(spec, tile), tile)
    is_seen = jnp.any(~jnp.isneginf(logits_BKGTS), axis=-1, keepdims=True)
    logits_BKGTS = jnp.where(is_seen, logits_BKGTS, 0.0)
    lse = jax.nn.logsumexp(logits_BKGTS, axis=-1, keepdims=True)
    # Not exp(logits - lse): all weights of a row would share the rounding of its log-sum-exp.
    weights = jnp.where(is_seen, jax.nn.softmax(logits_BKGTS, axis=-1), 0.0)
    values = jnp.einsum(
        "bkgts,bskh->btkgh",
        weights,
        tiles.shielded_values(tile.value),
        precision=jax.lax.Precision.HIGHEST,
    )
    shape = inputs.query.shape
    lse = jnp.where(is_seen, lse, -jnp.inf)[..., 0]
    return tiles.unshielded(values).reshape(shape), jnp.moveaxis(lse, 3, 1).reshape(shape[:3])


def memory_sums(spec: AttentionSpec, readout: MemoryReadout, inputs: AttentionInputs) -> TwoFloat:
    """Un-noised (N, Z) of a private memory, (B, T, N, H + 1), from the whole matrix at once."""
    tile = whole_matrix(spec, inputs)._replace(
        value=memory_loop.stored_values(readout, inputs.value)
    )
    batch, rows, key_heads, groups, _ = tile.query.shape
    shape = (batch, rows, key_heads, groups, tile.value.shape[-1])
    zero = manual_axes.zeros(shape, jnp.float32, manual_axes.varying_axes(*inputs[:7]))
    empty = TwoFloat(zero, zero)
    total = memory_loop.total_of(readout, spec, tile, inputs.value.dtype, empty)
    heads = (batch, rows, key_heads * groups, shape[-1])
    return TwoFloat(total.high.reshape(heads), total.low.reshape(heads))


@dataclasses.dataclass(frozen=True)
class Reference:
    """Attention by its definition, O(T S) memory."""

    name: str = "reference"

    def cannot(self, spec: AttentionSpec, inputs: AttentionInputs, platform: str) -> str | None:
        """None: it serves every call."""
        del spec, inputs, platform
        return None

    def forward(
        self, spec: AttentionSpec, inputs: AttentionInputs, *, residuals: bool = True
    ) -> AttentionOutputs:
        """The readout and its residuals; XLA drops those that nobody reads."""
        del residuals
        if isinstance(spec.readout, MemoryReadout):
            sums = memory_sums(spec, spec.readout, inputs)
            return epilogue.of_memory(spec.readout, inputs, sums)
        return epilogue.of_softmax(spec, inputs, *softmax_attention(spec, inputs))

    def backward(
        self,
        spec: AttentionSpec,
        inputs: AttentionInputs,
        outputs: AttentionOutputs,
        cotangent: Float[Array, "B T N H"],
    ) -> AttentionGradients:
        """Gradients of plain attention, by JAX."""
        assert outputs.lse is not None

        def answer(
            query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None
        ) -> jax.Array:
            replaced = inputs._replace(query=query, key=key, value=value, bias=bias)
            return softmax_attention(spec, replaced)[0]

        output, pull_back = jax.vjp(answer, inputs.query, inputs.key, inputs.value, inputs.bias)
        return AttentionGradients(*pull_back(cotangent.astype(output.dtype)))


BACKEND = Reference()
