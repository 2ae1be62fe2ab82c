"""Functions over sharded arrays: what they can have in pieces stays so, the rest is gathered.

XLA cannot see into a kernel, and would gather its operands. Under `jit` the partitioner asks here
(`jax.experimental.custom_partitioning`, a Shardy rule); where types name the sharding (a mesh with
explicit axes) the call goes through `shard_map`; inside a manual mesh arrays are pieces already.
XLA's own loops and reshapes need the same where types name the sharding, and no help elsewhere.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dpfa_jax.kernels import manual_axes

Function = Callable[..., tuple[jax.Array, ...]]
_SplitAxes = tuple[str, ...]  # mesh axes along one dimension, the outermost first


def by_batch_and_heads(
    function: Function,
    operands: Sequence[str],
    results: Sequence[str],
    *,
    key_heads: int,
    is_opaque: bool = True,
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
      is_opaque: XLA cannot partition `function` by itself. Where it can, it does so wherever types
        leave the sharding to it.
    """

    def plan(mesh: Any, shape: tuple[int, ...], spec: PartitionSpec) -> _Plan:
        split = _split(mesh, operands[0], shape, spec, key_heads)
        own, theirs = (
            tuple(_spec(letters, split, key_heads) for letters in group)
            for group in (operands, results)
        )
        return _Plan(_summed(function, results, split, key_heads), own, theirs)

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

    return _on_pieces(function, plan, rule if is_opaque else None)


def by_elements(function: Function, rank: int, whole: int) -> Function:
    """An elementwise `function` of one array of `rank` dimensions, run on each of its pieces.

    `function` takes a piece; for each of its dimensions the global index of each place, a uint32
    vector; then `whole` arrays that each device has whole. It returns a tuple of one array like the
    piece. The function returned takes the array and the `whole` ones.
    """

    def plan(mesh: Any, shape: tuple[int, ...], spec: PartitionSpec) -> _Plan:
        axes = _cuts(mesh, shape, spec)
        own = (PartitionSpec(*axes), *(PartitionSpec(x) for x in axes))
        return _Plan(function, (*own, *(PartitionSpec(),) * whole), own[:1])

    def rule(mesh: Any, given: Any, wanted: Any) -> tuple[str, dict[str, Any]]:
        del wanted
        dims = [f"d{place}" for place in range(rank)]
        others = [
            [f"w{index}x{place}" for place in range(len(x.shape))]
            for index, x in enumerate(given[1 + rank :])
        ]
        own = " ".join(dims)
        text = f"{', '.join([own, *dims, *(' '.join(x) for x in others)])} -> {own}"
        kept = [*(dims if mesh.empty else []), *(name for x in others for name in x)]
        return text, {"need_replication_factors": tuple(kept)}

    run = _on_pieces(function, plan, rule)

    def call(array: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
        return run(array, *(jnp.arange(n, dtype=jnp.uint32) for n in array.shape), *others)

    return call


def by_rows(function: Function, rank: int) -> Function:
    """`function` of one array of `rank` dimensions, to one like it, run on each of its pieces.

    Right for any set of rows; a row, along the last axis, is whole on one device.
    """

    def plan(mesh: Any, shape: tuple[int, ...], spec: PartitionSpec) -> _Plan:
        own = (PartitionSpec(*_cuts(mesh, shape[:-1], spec)),)
        return _Plan(function, own, own)

    def rule(mesh: Any, given: Any, wanted: Any) -> tuple[str, dict[str, Any]]:
        del given, wanted
        dims = [f"d{place}" for place in range(rank)]
        own = " ".join(dims)
        kept = dims if mesh.empty else dims[-1:]
        return f"{own} -> {own}", {"need_replication_factors": tuple(kept)}

    return _on_pieces(function, plan, rule)


class _Plan(NamedTuple):
    """What runs on the pieces, and how operands and results are cut."""

    function: Function
    own: tuple[PartitionSpec, ...]
    theirs: tuple[PartitionSpec, ...]


def _on_pieces(function: Function, plan: Callable[[Any, Any, Any], _Plan], rule: Any) -> Function:
    """`function` on the pieces that `plan` makes of (mesh, shape, spec) of the first operand.

    `rule`: what the partitioner is told. None: nothing, it sees into `function`.
    """

    def partition(mesh: Any, given: Any, wanted: Any) -> tuple[Any, ...]:
        if not isinstance(given[0].sharding, NamedSharding):  # of no mesh: `rule` left all whole
            whole = (tuple(x.sharding for x in xs) for xs in (wanted, given))
            return mesh, _outside_meshes(function), *whole
        found = plan(mesh, given[0].shape, given[0].sharding.spec)
        own, theirs = (
            tuple(NamedSharding(mesh, x) for x in specs) for specs in (found.own, found.theirs)
        )
        return mesh, _outside_meshes(found.function), theirs, own

    def call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        if jax.sharding.get_abstract_mesh().manual_axes:
            return function(*arrays)
        mesh, spec = _placed(arrays)
        if mesh is not None:
            found = plan(mesh, arrays[0].shape, spec)
            pieces = (
                jax.sharding.reshard(x, NamedSharding(mesh, spec))
                for x, spec in zip(arrays, found.own, strict=True)
            )
            return jax.shard_map(
                found.function, mesh=mesh, in_specs=found.own, out_specs=found.theirs
            )(*pieces)
        if rule is None:
            return function(*arrays)
        # By position only: it cannot tell a keyword that has a default from one that is given.
        partitioned = custom_partitioning(lambda *arrays: function(*arrays))
        partitioned.def_partition(partition, sharding_rule=rule)
        return partitioned(*arrays)

    return call


def _placed(arrays: Sequence[jax.Array]) -> tuple[Any, PartitionSpec]:
    """The mesh with explicit axes on which any of the arrays lies, and the first one's sharding.

    An array of no mesh lies whole on each device of the others'.
    """
    shardings = [jax.typeof(x).sharding for x in arrays]
    meshes = (x.mesh for x in shardings if AxisType.Explicit in x.mesh.axis_types)
    mesh = next(meshes, None)
    return mesh, shardings[0].spec if shardings[0].mesh == mesh else PartitionSpec()


def _outside_meshes(function: Function) -> Function:
    """`function` of pieces, which lie on no mesh.

    The partitioner asks while the caller's mesh is still set; explicit axes of that one would have
    JAX constrain the pieces' sharding, in a program that is partitioned already.
    """

    def call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return function(*arrays)

    return call


def _split(
    mesh: Any, letters: str, shape: tuple[int, ...], spec: PartitionSpec, key_heads: int
) -> dict[str, _SplitAxes]:
    """Mesh axes along batch ("b") and query heads ("n"): those of `spec` that divide evenly."""
    found = {}
    for letter, size in (("b", None), ("n", key_heads if key_heads > 1 else None)):
        place = letters.index(letter)
        size = shape[place] if size is None else size
        found[letter] = _dividing(mesh, size, spec[place] if place < len(spec) else None)
    return found


def _cuts(mesh: Any, shape: tuple[int, ...], spec: PartitionSpec) -> list[_SplitAxes | None]:
    """Mesh axes along each dimension of `shape`: those of `spec` that divide it evenly."""
    return [
        _dividing(mesh, size, spec[place] if place < len(spec) else None) or None
        for place, size in enumerate(shape)
    ]


def _dividing(mesh: Any, size: int, named: Any) -> _SplitAxes:
    """The outermost of the `named` axes of a dimension, as many as divide its size evenly."""
    axes = () if named is None else (named,) if isinstance(named, str) else tuple(named)
    while size % math.prod(mesh.shape[axis] for axis in axes):
        axes = axes[:-1]
    return axes


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
            _sum(x, summed) if summed else x for x, summed in zip(found, over, strict=True)
        )

    return run


def _sum(x: jax.Array, axes: _SplitAxes) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.lax.psum(wide, axes).astype(x.dtype)
