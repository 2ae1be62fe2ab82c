"""How a call reaches a kernel: vmapped axes join the batch, pieces of arrays stay pieces.

Masks and biases keep axes of length 1: "pair" is a (b, n, t, s) array, each axis full or 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax.kernels import manual_axes
from dpfa_jax.kernels.partitioning import by_batch_and_heads


def over_pieces(
    function: Callable[[Any], tuple[jax.Array, ...]],
    arrays: Any,
    axes: Any,
    results: Sequence[str],
    *,
    key_heads: int,
    is_opaque: bool = True,
) -> tuple[jax.Array, ...]:
    """`function(arrays)`, on each piece of batch and heads, under any number of vmaps.

    Args:
      function: of the tuple, to a tuple of arrays; right for any part of batch and heads.
      arrays: a named tuple of arrays, None where absent; the first two are query and key.
      axes: the same tuple, of the dimensions of each array, as `by_batch_and_heads` reads them, or
        "pair".
      results: the same for each result. A "pair" is the gradient of the last array; of an opaque
        function it is the only result.
      key_heads: number of key heads.
      is_opaque: XLA sees a kernel in `function`, hence can neither partition nor batch it.
    """
    present = [x is not None for x in arrays]
    letters = [x for x, there in zip(axes, present, strict=True) if there]
    operands = [x for x in arrays if x is not None]

    def run(*operands: jax.Array) -> tuple[jax.Array, ...]:
        given = iter(operands)
        return function(type(arrays)(*(next(given) if there else None for there in present)))

    split = in_pieces(run, letters, results, key_heads, is_opaque)
    if not is_opaque:
        return split(*operands)
    if list(results) == ["pair"]:
        by_row = fold_vmap(split, pairs_of(letters[:-1]))
        return (summing_vmap(split, by_row)(*operands),)
    return fold_vmap(split, pairs_of(letters))(*operands)


def fold_vmap(function: Any, pairs: Sequence[int] = ()) -> Any:
    """`function` of arrays with a leading batch axis; a vmapped axis is folded into that axis.

    `pairs`: which arguments may have 1 there for any batch. They keep it unless they are mapped.
    """
    folding = jax.custom_batching.custom_vmap(function)

    @folding.def_vmap
    def _(axis_size: int, in_batched: list[bool], *args: jax.Array) -> tuple[Any, Any]:
        batch = args[0].shape[1 if in_batched[0] else 0]

        def fold(x: jax.Array, is_batched: bool, is_pair: bool) -> jax.Array:
            if is_pair and not is_batched and x.shape[0] == 1:
                return x
            if not is_batched:
                x = jnp.broadcast_to(x, (axis_size, *x.shape))
            if is_pair:
                x = jnp.broadcast_to(x, (axis_size, batch, *x.shape[2:]))
            return x.reshape(axis_size * x.shape[1], *x.shape[2:])

        def unfold(x: jax.Array) -> jax.Array:
            return x.reshape(axis_size, x.shape[0] // axis_size, *x.shape[1:])

        is_pair = tuple(index in pairs for index in range(len(args)))
        results = folding(*jax.tree.map(fold, args, tuple(in_batched), is_pair))
        return jax.tree.map(unfold, results), jax.tree.map(lambda _: True, results)

    return folding


def summing_vmap(function: Any, by_row: Any) -> Any:
    """`function` of arrays, to the gradient of the last one, an array of pairs.

    Folded into the batch, members of a mapped axis would be summed into one gradient: under vmap
    each batch row makes its own, by `by_row`, the same function under a rule that folds.
    """
    folding = jax.custom_batching.custom_vmap(lambda *args: function(*args)[0])

    @folding.def_vmap
    def _(axis_size: int, in_batched: list[bool], *args: jax.Array) -> tuple[Any, Any]:
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
    function: Any,
    operands: Sequence[str],
    results: Sequence[str],
    key_heads: int,
    is_opaque: bool = True,
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
        run = by_batch_and_heads(function, taken, made, key_heads=key_heads, is_opaque=is_opaque)
        return run(*arrays)

    return call


def varying_as(inputs: Any, results: Any) -> Any:
    """`results`, marked as varying over the manual mesh axes of `inputs`."""
    axes = manual_axes.varying_axes(*jax.tree.leaves(inputs))
    return jax.tree.map(lambda x: manual_axes.vary_over(x, axes), results)
