"""Kernel launches on whatever pieces of batch and heads a call's arrays are in."""

import functools
from typing import Any, NamedTuple

import jax

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.pieces import over_pieces
from dpfa_jax.kernels.triton.backward import BackwardArrays, bias_gradient, input_gradients
from dpfa_jax.kernels.triton.forward import ForwardResults, NoiseArrays, attention_forward
from dpfa_jax.kernels.triton.logits import Arrays
from dpfa_jax.kernels.triton.memory import memory_forward
from dpfa_jax.kernels.triton.tiles import KernelTiles, Tiles


class _Operands(NamedTuple):
    """All that any kernel reads, flat: `Arrays`, `NoiseArrays`, `BackwardArrays`; the bias last."""

    query: Any
    key: Any
    value: Any
    mask: Any = None
    query_lengths: Any = None
    key_lengths: Any = None
    key_words: Any = None
    batch_index: Any = None
    head_index: Any = None
    per_head: Any = None
    cotangent: Any = None
    shift: Any = None
    delta: Any = None
    factor: Any = None
    bias: Any = None

    @property
    def inputs(self) -> Arrays:
        return Arrays(*(getattr(self, name) for name in Arrays._fields))

    @property
    def noise(self) -> NoiseArrays | None:
        if self.key_words is None:
            return None
        return NoiseArrays(*(getattr(self, name) for name in NoiseArrays._fields))

    @property
    def backward(self) -> BackwardArrays:
        return BackwardArrays(*(getattr(self, name) for name in BackwardArrays._fields))


# Their dimensions, as `over_pieces` reads them.
_AXES = _Operands(
    "btnh", "bskh", "bskh", "pair", "b", "b", "bw", "b", "bn", "bnc", "btnh", "bnt", "bnt", "bnt",
    bias="pair",
)  # fmt: skip


def _operands(arrays: Arrays, more: NoiseArrays | BackwardArrays | None) -> _Operands:
    return _Operands(**arrays._asdict(), **({} if more is None else more._asdict()))


def forward(
    spec: AttentionSpec,
    arrays: Arrays,
    noise: NoiseArrays | None,
    tile: Tiles,
    *,
    dtype: Any,
    keep_unclipped: bool,
    interpret: bool,
) -> ForwardResults:
    """`attention_forward` of arrays that may be in pieces."""

    def run(given: _Operands) -> tuple[jax.Array, ...]:
        results = attention_forward(
            spec, given.inputs, given.noise, tile, dtype=dtype, keep_unclipped=keep_unclipped,
            interpret=interpret,
        )  # fmt: skip
        return tuple(x for x in results if x is not None)

    made = ["btnh", "bnt", "bnt", *(["btnh"] if keep_unclipped else [])]
    results = over_pieces(run, _operands(arrays, noise), _AXES, made, key_heads=arrays.key.shape[2])
    return ForwardResults(*results)


def memory(
    spec: AttentionSpec, arrays: Arrays, noise: NoiseArrays, tile: Tiles, *, interpret: bool
) -> jax.Array:
    """`memory_forward` of arrays that may be in pieces."""

    def run(given: _Operands) -> tuple[jax.Array, ...]:
        assert given.noise is not None
        return (memory_forward(spec, given.inputs, given.noise, tile, interpret=interpret),)

    key_heads = arrays.key.shape[2]
    (output,) = over_pieces(run, _operands(arrays, noise), _AXES, ["btnh"], key_heads=key_heads)
    return output


def backward(
    spec: AttentionSpec,
    arrays: Arrays,
    given: BackwardArrays,
    tile: KernelTiles,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of query, key, value and bias (None without one), in their dtypes."""

    def run(given: _Operands) -> tuple[jax.Array, ...]:
        return input_gradients(spec, given.inputs, given.backward, tile, interpret=interpret)

    def run_bias(given: _Operands) -> tuple[jax.Array, ...]:
        found = bias_gradient(spec, given.inputs, given.backward, tile, interpret=interpret)
        return (found,)

    on_pieces = functools.partial(over_pieces, key_heads=arrays.key.shape[2])
    operands = _operands(arrays, given)
    d_query, d_key, d_value = on_pieces(run, operands, _AXES, ["btnh", "bskh", "bskh"])
    d_bias = None
    if arrays.bias is not None:
        (d_bias,) = on_pieces(run_bias, operands, _AXES, ["pair"])
        d_bias = d_bias.astype(arrays.bias.dtype)
    return d_query, d_key, d_value, d_bias
