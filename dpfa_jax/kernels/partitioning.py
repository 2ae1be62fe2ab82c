"""Kernels over sharded arrays: batch and heads stay in pieces, the rest is brought together.

XLA cannot see into a kernel, and would gather its operands. Under `jit` the partitioner asks here
(`jax.experimental.custom_partitioning`, a Shardy rule); where types name the sharding (a mesh with
explicit axes) the call goes through `shard_map`; inside a manual mesh arrays are pieces already.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dpfa_jax.kernels import manual_axes

Function = Callable[..., tuple[jax.Array, ...]]
_SplitAxes = tuple[str, ...]  # mesh axes along one dimension, the outermost first


def by_batch_and_heads(
    function: Function, operands: Sequence[str], results: Sequence[str], *, key_heads: int
) -> Function:
    """`function`, run on each piece of batch and heads.

    Args:
      function: of arrays, to a tuple of arrays; right for any part of batch and heads.
      operands, results: one letter a dimension: b batch, n query heads, k key heads, which may be
        in pieces; any other letter is whole on each device. The first operand has b and n, and
        its sharding decides. Query heads keep their key heads: where pieces are more than
        `key_heads` allows, or an axis of the mesh has a size that shares a divisor with it and
        does not divide it, heads are brought together. One key head is given to all pieces, and
        results for it are summed. An axis of length 1 named B or N in a result says that it is a
        sum over batch or query heads: it is summed over their pieces.
      key_heads: number of key heads.
    """

    def partition(mesh: Any, given: Any, wanted: Any) -> tuple[Any, ...]:
        if not isinstance(given[0].sharding, NamedSharding):  # of no mesh: `rule` left all whole
            return mesh, function, *(tuple(x.sharding for x in xs) for xs in (wanted, given))
        split = _split(mesh, operands[0], given[0].shape, given[0].sharding.spec, key_heads)
        own, theirs = (
            tuple(NamedSharding(mesh, _spec(letters, split, key_heads)) for letters in group)
            for group in (operands, results)
        )
        return mesh, _summed(function, results, split, key_heads), theirs, own

    def rule(mesh: Any, given: Any, wanted: Any) -> tuple[str, dict[str, Any]]:
        del wanted
        # Part of a mesh axis has no name in JAX: none may come to lie along the key heads.
        is_cut = any(1 < math.gcd(n, key_heads) < n for n in mesh.axis_sizes)
        members = given[0].shape[operands[0].index("n")] // key_heads
        heads = "n" if key_heads == 1 or is_cut else "k" if members == 1 else "(k g)"
        taken, made = (
            ", ".join(" ".join(heads if x == "n" else x for x in letters) for letters in group)
            for group in (operands, results)
        )
        text = f"{taken} -> {made}"
        split = () if mesh.empty else ("b",) if is_cut else ("b", "n" if key_heads == 1 else "k")
        factors = dict.fromkeys(text.translate(str.maketrans("(),->", "     ")).split())
        whole = tuple(name for name in factors if name not in split)
        sizes = {"g": members} if heads == "(k g)" else {}
        return text, {**sizes, "need_replication_factors": whole}

    def call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        if jax.sharding.get_abstract_mesh().manual_axes:
            return function(*arrays)
        sharding = jax.typeof(arrays[0]).sharding
        mesh = sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            split = _split(mesh, operands[0], arrays[0].shape, sharding.spec, key_heads)
            own, theirs = (
                tuple(_spec(letters, split, key_heads) for letters in group)
                for group in (operands, results)
            )
            pieces = (
                jax.sharding.reshard(x, NamedSharding(mesh, spec))
                for x, spec in zip(arrays, own, strict=True)
            )
            piecewise = _summed(function, results, split, key_heads)
            return jax.shard_map(piecewise, mesh=mesh, in_specs=own, out_specs=theirs)(*pieces)
        partitioned = custom_partitioning(function)
        partitioned.def_partition(partition, sharding_rule=rule)
        return partitioned(*arrays)

    return call


def _split(
    mesh: Any, letters: str, shape: tuple[int, ...], spec: PartitionSpec, key_heads: int
) -> dict[str, _SplitAxes]:
    """Mesh axes along batch ("b") and query heads ("n"): those of `spec` that divide evenly."""
    found = {}
    for letter, size in (("b", None), ("n", key_heads if key_heads > 1 else None)):
        place = letters.index(letter)
        named = spec[place] if place < len(spec) else None
        axes = () if named is None else (named,) if isinstance(named, str) else tuple(named)
        size = shape[place] if size is None else size
        while size % math.prod(mesh.shape[axis] for axis in axes):
            axes = axes[:-1]
        found[letter] = axes
    return found


def _spec(letters: str, split: dict[str, _SplitAxes], key_heads: int) -> PartitionSpec:
    along = {**split, "k": split["n"] if key_heads > 1 else ()}
    return PartitionSpec(*(along.get(letter) or None for letter in letters))


def _summed(
    function: Function, results: Sequence[str], split: dict[str, _SplitAxes], key_heads: int
) -> Function:
    """`function`, whose results for one key head, or with B or N, are sums over pieces."""
    sums = {"B": split["b"], "N": split["n"], "k": split["n"] if key_heads == 1 else ()}
    over = [tuple(axis for x in letters for axis in sums.get(x, ())) for letters in results]
    if not any(over):
        return function

    def run(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        axes = manual_axes.varying_axes(*arrays)
        found = (manual_axes.vary_over(x, axes) for x in function(*arrays))
        return tuple(
            jax.lax.psum(x.astype(jnp.float32), summed).astype(x.dtype) if summed else x
            for x, summed in zip(found, over, strict=True)
        )

    return run
