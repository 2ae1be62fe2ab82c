"""The backend for every device that XLA serves: blocked loops, O(T + S) memory, any option."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from dpfa_jax.kernels import epilogue, masks, memory_loop, softmax_loop
from dpfa_jax.kernels.base import (
    AttentionGradients,
    AttentionInputs,
    AttentionOutputs,
    AttentionSpec,
    MemoryReadout,
    SoftmaxRows,
)


@dataclasses.dataclass(frozen=True)
class Blocked:
    """Attention by blocks in plain XLA; see docs/kernels/blocked.md for its numerics."""

    name: str = "blocked"

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
            sums = memory_loop.sums(spec, spec.readout, inputs)
            return epilogue.of_memory(spec.readout, inputs, sums)
        return epilogue.of_softmax(spec, inputs, *softmax_loop.forward(spec, inputs))

    def backward(
        self,
        spec: AttentionSpec,
        inputs: AttentionInputs,
        outputs: AttentionOutputs,
        cotangent: Float[Array, "B T N H"],
        lse_cotangent: Float[Array, "B T N"] | None,
    ) -> AttentionGradients:
        """Gradients of plain attention; `outputs` may hold the log-sum-exp alone."""
        assert outputs.lse is not None
        if masks.hides(spec, inputs) or inputs.bias is not None:
            # A row that saw no key is the constant 0: a NaN that arrives there goes no further.
            is_seen = ~jnp.isneginf(outputs.lse)[..., None]
            cotangent = jnp.where(is_seen, cotangent, jnp.zeros((), cotangent.dtype))
        blocks = softmax_loop.Blocks.of(inputs.query.shape[1], inputs.key.shape[1])
        output_dot = None
        if not blocks.is_single or lse_cotangent is not None:
            output = outputs.output if outputs.unclipped is None else outputs.unclipped
            dtype = outputs.lse.dtype
            output_dot = jnp.sum(output.astype(dtype) * cotangent.astype(dtype), axis=-1)
            if lse_cotangent is not None:
                output_dot = output_dot - lse_cotangent.astype(dtype)
        known = outputs.rows if outputs.weights is None else outputs.weights
        query, key, value, bias = softmax_loop.backward(
            spec,
            inputs,
            _rows_of(outputs.lse) if known is None else known,
            cotangent,
            output_dot,
        )
        return AttentionGradients(
            query.astype(inputs.query.dtype),
            key.astype(inputs.key.dtype),
            value.astype(inputs.value.dtype),
            None if bias is None or inputs.bias is None else bias.astype(inputs.bias.dtype),
        )


def _rows_of(lse: Float[Array, "B T N"]) -> SoftmaxRows:
    """Rows of a backend that keeps the log-sum-exp only: maximum + log(total) is all they show."""
    # An empty row has lse = -inf; against +inf every weight is exp(-inf) = 0.
    return SoftmaxRows(jnp.where(jnp.isneginf(lse), jnp.inf, lse), jnp.ones_like(lse))


BACKEND = Blocked()
