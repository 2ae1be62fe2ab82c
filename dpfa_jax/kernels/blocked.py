"""The backend for every device that XLA serves: blocked loops, O(T + S) memory, any option."""

import dataclasses
from typing import Any, NamedTuple

import jax
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
from dpfa_jax.kernels.compensated import TwoFloat
from dpfa_jax.kernels.pieces import over_pieces
from dpfa_jax.kernels.rectangles import Blocks
from dpfa_jax.kernels.softmax_loop import SoftmaxResults


class _Operands(NamedTuple):
    """All that the loops read, flat; the bias last."""

    query: Any
    key: Any
    value: Any
    mask: Any = None
    query_lengths: Any = None
    key_lengths: Any = None
    weights: Any = None
    maximum: Any = None
    total: Any = None
    cotangent: Any = None
    output_dot: Any = None
    bias: Any = None

    @property
    def inputs(self) -> AttentionInputs:
        return AttentionInputs(
            self.query, self.key, self.value, self.bias, self.mask, self.query_lengths,
            self.key_lengths,
        )  # fmt: skip


# Their dimensions, as `over_pieces` reads them.
_AXES = _Operands(
    "btnh", "bskh", "bskh", "pair", "b", "b", "bnts", "btn", "btn", "btnh", "btn", "pair"
)


def _operands(inputs: AttentionInputs, **more: Any) -> _Operands:
    arrays = inputs._asdict()
    del arrays["noise"]
    return _Operands(**arrays, **more)


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
            sums = _memory_sums(spec, spec.readout, inputs)
            return epilogue.of_memory(spec.readout, inputs, sums)
        return epilogue.of_softmax(spec, inputs, *_softmax(spec, inputs))

    def backward(
        self,
        spec: AttentionSpec,
        inputs: AttentionInputs,
        outputs: AttentionOutputs,
        cotangent: Float[Array, "B T N H"],
    ) -> AttentionGradients:
        """Gradients of plain attention; `outputs` may hold the log-sum-exp alone."""
        assert outputs.lse is not None
        if masks.hides(spec, inputs) or inputs.bias is not None:
            # A row that saw no key is the constant 0: a NaN that arrives there goes no further.
            is_seen = ~jnp.isneginf(outputs.lse)[..., None]
            cotangent = jnp.where(is_seen, cotangent, jnp.zeros((), cotangent.dtype))
        output_dot = None
        if not Blocks.of(inputs.query.shape[1], inputs.key.shape[1]).is_single:
            output = outputs.output if outputs.unclipped is None else outputs.unclipped
            dtype = outputs.lse.dtype
            output_dot = jnp.sum(output.astype(dtype) * cotangent.astype(dtype), axis=-1)
        known = {"weights": outputs.weights}
        if outputs.weights is None:
            rows = _rows_of(outputs.lse) if outputs.rows is None else outputs.rows
            known = rows._asdict()
        given = _operands(inputs, **known, cotangent=cotangent, output_dot=output_dot)
        query, key, value, bias = _gradients(spec, given)
        return AttentionGradients(
            query.astype(inputs.query.dtype),
            key.astype(inputs.key.dtype),
            value.astype(inputs.value.dtype),
            None if bias is None or inputs.bias is None else bias.astype(inputs.bias.dtype),
        )


def _softmax(spec: AttentionSpec, inputs: AttentionInputs) -> SoftmaxResults:
    """`softmax_loop.forward` of arrays that may be in pieces."""
    has_weights = softmax_loop.keeps_weights(spec, inputs.query.shape[1], inputs.key.shape[1])

    def run(given: _Operands) -> tuple[jax.Array, ...]:
        found = softmax_loop.forward(spec, given.inputs)
        return tuple(jax.tree.leaves(found))

    results = ["btnh", "btn", *(["bnts"] if has_weights else ["btn", "btn"])]
    key_heads = inputs.key.shape[2]
    output, lse, *more = over_pieces(
        run, _operands(inputs), _AXES, results, key_heads=key_heads, is_opaque=False
    )
    weights, rows = (more[0], None) if has_weights else (None, SoftmaxRows(*more))
    return SoftmaxResults(output, lse, weights, rows)


def _gradients(
    spec: AttentionSpec, given: _Operands
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """`softmax_loop.backward` of arrays that may be in pieces."""

    def run(given: _Operands) -> tuple[jax.Array, ...]:
        known = given.weights
        if known is None:
            known = SoftmaxRows(given.maximum, given.total)
        found = softmax_loop.backward(spec, given.inputs, known, given.cotangent, given.output_dot)
        return tuple(x for x in found if x is not None)

    results = ["btnh", "bskh", "bskh", *(["pair"] if given.bias is not None else [])]
    key_heads = given.key.shape[2]
    query, key, value, *bias = over_pieces(
        run, given, _AXES, results, key_heads=key_heads, is_opaque=False
    )
    return query, key, value, bias[0] if bias else None


def _memory_sums(spec: AttentionSpec, readout: MemoryReadout, inputs: AttentionInputs) -> TwoFloat:
    """`memory_loop.sums` of arrays that may be in pieces."""

    def run(given: _Operands) -> tuple[jax.Array, ...]:
        return tuple(memory_loop.sums(spec, readout, given.inputs))

    key_heads = inputs.key.shape[2]
    return TwoFloat(
        *over_pieces(
            run, _operands(inputs), _AXES, ["btnh", "btnh"], key_heads=key_heads, is_opaque=False
        )
    )


def _rows_of(lse: Float[Array, "B T N"]) -> SoftmaxRows:
    """Rows of a backend that keeps the log-sum-exp only: maximum + log(total) is all they show."""
    # An empty row has lse = -inf; against +inf every weight is exp(-inf) = 0.
    return SoftmaxRows(jnp.where(jnp.isneginf(lse), jnp.inf, lse), jnp.ones_like(lse))


BACKEND = Blocked()
