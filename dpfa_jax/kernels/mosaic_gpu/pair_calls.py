"""Masks and biases under vmap and sharding: any axis of a (b, n, t, s) array may be 1."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax.kernels.partitioning import by_batch_and_heads


def summing_vmap(function: Any, by_row: Any) -> Any:
    """`function` of arrays, to the gradient of the last one, an array of pairs.

    Folded into the batch, members of a mapped axis would be summed into one gradient: under vmap
    each batch row makes its own, by `by_row`, the same function under a rule that folds.
    """
    folding = jax.custom_batching.custom_vmap(lambda *args: function(*args)[0])

    @folding.def_vmap
    def _(axis_size, in_batched, *args):
        def one(*args: jax.Array) -> jax.Array:
            *others, pair = args
            whole = jnp.broadcast_to(pair, (args[0].shape[0], *pair.shape[1:]))
            (found,) = by_row(*others, whole)
            return found if len(pair) == len(found) else found.sum(0, keepdims=True)

        in_axes = [0 if is_batched else None for is_batched in in_batched]
        return jax.vmap(one, in_axes=in_axes, axis_size=axis_size)(*args), True

    return folding


def pairs_of(axes: Sequence[str]) -> list[int]:
    """Which operands are arrays of pairs."""
    return [index for index, letters in enumerate(axes) if letters == "pair"]


def in_pieces(
    function: Any, operands: Sequence[str], results: Sequence[str], key_heads: int
) -> Any:
    """`by_batch_and_heads` with "pair" for a (b, n, t, s) array whose axes are full or 1.

    The first two operands are query and key. A result that is a pair is the last operand's
    gradient: a sum over the axes along which that one was broadcast.
    """

    def call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        sizes = (arrays[0].shape[0], arrays[0].shape[2], arrays[0].shape[1], arrays[1].shape[1])

        def letters(axes: str, x: jax.Array, broadcast: str) -> str:
            if axes != "pair":
                return axes
            places = zip(x.shape, sizes, "bnts", broadcast, strict=True)
            return "".join(full if size == whole else one for size, whole, full, one in places)

        taken = [letters(axes, x, "uvxy") for axes, x in zip(operands, arrays, strict=True)]
        made = [letters(axes, arrays[-1], "BNxy") for axes in results]
        return by_batch_and_heads(function, taken, made, key_heads=key_heads)(*arrays)

    return call
