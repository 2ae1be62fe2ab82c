"""Sum of clipped per-example gradients, without per-example gradients of the whole batch.

The gradient program of one example is split (`deferral`): its head runs for a whole micro-batch,
as ordinary training does, and the large weight gradients are made from it for a few examples at a
time, measured, clipped and added. Each is made once; where one example's gradients of a group are
larger than the memory allowed, once for the norm and once for the sum, bit for bit the same.

An example can influence no other: the program that is mapped over the batch only ever sees one, so
a batch-coupled layer (batch normalisation, in-batch negatives) sees a batch of one. What is added
has the norm that is promised, because norms are taken of the very numbers that are added.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, PyTree

from dpfa_jax.clipping import trees
from dpfa_jax.core import ArgumentError
from dpfa_jax.dpsgd.coupling import check_uncoupled
from dpfa_jax.dpsgd.deferral import defer
from dpfa_jax.dpsgd.late_gradients import (
    ClipNorm,
    LateGradient,
    after,
    largest_divisor,
    late_gradients,
    source_bytes,
)
from dpfa_jax.dpsgd.parameters import leaf_paths
from dpfa_jax.dpsgd.split import Split, Tail
from dpfa_jax.kernels import compensated
from dpfa_jax.kernels.compensated import TwoFloat

PerExampleLoss = Callable[[PyTree, PyTree], Float[Array, " batch"]]


# Held at a time where the plan says nothing: 5 % of a GPU of 80 GB.
DEFAULT_PER_EXAMPLE_BYTES = 2**32


class ClippedSum(NamedTuple):
    """What a batch adds up to. NOT private: noise is due.

    Attributes:
      gradients: float32 sums of clipped gradients, shaped like the parameters.
      centred_counts: for each clip group, unclipped examples minus clipped ones, halved.
    """

    gradients: PyTree
    centred_counts: Float32[Array, " groups"]


def clipped_sum(
    loss_fn: PerExampleLoss,
    params: PyTree,
    batch: PyTree,
    is_real: Bool[Array, " batch"],
    *,
    l2_clip_norms: Sequence[ClipNorm],
    leaf_groups: tuple[int, ...],
    micro_batch_size: int,
    per_example_bytes: int | None,
) -> ClippedSum:
    """Sum over the real examples of their clipped parameter gradients.

    Args:
      loss_fn: (params, batch) -> one loss an example, shape (B,). Called with B = 1 only.
      params: pytree of floating-point arrays.
      batch: pytree of arrays with leading axis B, a multiple of `micro_batch_size`.
      is_real: False for padding.
      l2_clip_norms: C_l of each clip group.
      leaf_groups: the group of each leaf of `params`, in `jax.tree.leaves` order.
      micro_batch_size: examples that go forward and backward at a time.
      per_example_bytes: memory for the per-example gradients that are held at a time. None: 4 GiB,
        or what a group's gradients are made from takes where that is more: to make them piece by
        piece, all of that must be held to the end, so all of them at once need no more.

    Returns: the sums. An example whose loss is not finite counts as zero, and so does one in each
    group where its gradient is not.
    Errors: ArgumentError for a loss that is not one number an example, for axes that disagree, and
    for gradients that cannot be kept within `per_example_bytes`, by name; CoverageError for a loss
    that couples examples (`coupling.check_uncoupled`).
    """
    _check_batch(batch, is_real.shape[0], micro_batch_size)
    params = _local(params, (batch, is_real))
    split_with = _splitter(loss_fn, params, jax.tree.map(lambda x: x[0], batch))
    groups = [
        (l2_clip_norm, [i for i, owner in enumerate(leaf_groups) if owner == group])
        for group, l2_clip_norm in enumerate(l2_clip_norms)
    ]
    leaves, structure = jax.tree.flatten(params)
    paths = leaf_paths(params)
    allowed = per_example_bytes or DEFAULT_PER_EXAMPLE_BYTES
    split = split_with()
    if _made_once(split.tails[1:], leaf_groups, micro_batch_size, allowed):
        split = split_with(recompute=True)

    # As the backward pass gets to them, one after the other: else XLA may make all products first.
    ready = [max(split.tails[1 + i].ready for i in members) for _, members in groups]
    order = sorted(range(len(groups)), key=ready.__getitem__)

    def sum_of(examples: PyTree, real: Bool[Array, " micro"]) -> list[Float32[Array, "..."]]:
        losses, gradients = late_gradients(split, leaves, examples, real.shape[0], paths)
        left = _check_memory(gradients, real.shape[0], allowed)
        counts = real & jnp.isfinite(losses)
        sums: dict[int, Array] = {}
        unclipped: dict[int, Array] = {}
        before: list[Array] = []
        for group in order:
            l2_clip_norm, members = groups[group]
            parts = [gradients[i] for i in members]
            memory = max(left, source_bytes(parts)) if per_example_bytes is None else left
            late = after(before, parts)
            *found, unclipped[group] = _clipped_group(late, counts, l2_clip_norm, memory)
            sums.update(zip(members, found, strict=True))
            before = found if any(part.values for part in parts) else before
        ordered = [unclipped[group] for group in range(len(groups))]
        return [*(sums[i] for i in range(len(leaves))), jnp.stack(ordered)]

    def result(sums: list[Array]) -> ClippedSum:
        return ClippedSum(jax.tree.unflatten(structure, sums[:-1]), sums[-1])

    if is_real.shape[0] == micro_batch_size:
        return result(sum_of(batch, is_real))

    # Micro-batch j takes rows j, j + rows/micro, ...: where the batch is sharded over devices, each
    # micro-batch then has rows on all of them, and no row moves.
    def interleaved(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(micro_batch_size, -1, *x.shape[1:]), 0, 1)

    micro_batches = jax.tree.map(interleaved, (batch, is_real))
    zeros = [*map(_zeros_like, leaves), jnp.stack([_zeros_like(is_real[0])] * len(groups))]
    return result(_total(lambda micro: sum_of(*micro), micro_batches, zeros))


def _made_once(
    tails: Sequence[Tail], leaf_groups: tuple[int, ...], rows: int, allowed: int
) -> bool:
    """Whether each gradient is made once: one example's of each group fit into what is allowed."""
    needed: dict[int, int] = {}
    for tail, group in zip(tails, leaf_groups, strict=True):
        allowed -= rows * tail.example_bytes if tail.kept else 0
        needed[group] = needed.get(group, 0) + (0 if tail.kept else tail.example_bytes)
    return max(needed.values(), default=0) <= allowed


def _clipped_group(
    parts: list[LateGradient], counts: Bool[Array, " micro"], l2_clip_norm: ClipNorm, memory: int
) -> list[Float32[Array, "..."]]:
    """Clipped sums of one group, its gradients made within `memory` bytes; last its count."""
    together = sum(part.tail.example_bytes for part in parts if not part.tail.kept)
    if together <= memory:
        clipped = functools.partial(_clipped, l2_clip_norm=l2_clip_norm)
        most = memory // together if together else counts.shape[0]
        return _added(clipped, parts, counts, most)
    _check_repeatable(parts, together, memory)
    sizes = [memory // max(1, part.tail.example_bytes) for part in parts]  # of no numbers: any
    norms = [_measured(part, l2_clip_norm, n) for part, n in zip(parts, sizes, strict=True)]
    scales = trees.clip_scales(norms, counts)
    weighted = functools.partial(_weighted, l2_clip_norm=l2_clip_norm)
    sums: list[Array] = []
    for part, n in zip(parts, sizes, strict=True):
        sums += _added(weighted, [part], scales, n)[:-1]
    return [*sums, trees.centred_count(scales)]


def _clipped(
    parts: list[LateGradient], counts: Bool[Array, " chunk"], *, l2_clip_norm: ClipNorm
) -> list[Float32[Array, "..."]]:
    made = [part.made(l2_clip_norm) for part in parts]
    scales = trees.clip_scales([trees.squared_norms(one, l2_clip_norm) for one in made], counts)
    sums = [part.summed(one, scales) for part, one in zip(parts, made, strict=True)]
    return [*sums, trees.centred_count(scales)]


def _weighted(
    parts: list[LateGradient], scales: Float32[Array, " chunk"], *, l2_clip_norm: ClipNorm
) -> list[Float32[Array, "..."]]:
    sums = [part.summed(part.made(l2_clip_norm), scales) for part in parts]
    return [*sums, trees.centred_count(scales)]


def _measured(part: LateGradient, l2_clip_norm: ClipNorm, most: int) -> Float32[Array, " micro"]:
    """Squared norms of one parameter's gradients, `most` examples at a time."""

    size = largest_divisor(part.rows, most)

    def norms_of(carry: None, values: list[Array]) -> tuple[None, Float32[Array, " chunk"]]:
        return carry, trees.squared_norms(
            part.holding(values, size).made(l2_clip_norm), l2_clip_norm
        )

    chunks = part.chunks(most)
    return jax.lax.scan(norms_of, None, chunks, length=part.rows // size)[1].reshape(-1)


def _added(
    sums_of: Callable[[list[LateGradient], Array], list[Array]],
    parts: list[LateGradient],
    per_row: Array,
    most: int,
) -> list[Float32[Array, "..."]]:
    """Sums over the batch of `sums_of(gradients, their rows)`, `most` examples at a time."""
    rows = per_row.shape[0]
    size = largest_divisor(rows, most)
    if size == rows:
        return sums_of(parts, per_row)

    def sums_of_chunk(chunk: tuple[list[list[Array]], Array]) -> list[Array]:
        values, these = chunk
        held = [part.holding(own, size) for part, own in zip(parts, values, strict=True)]
        return sums_of(held, these)

    zeros = [*(_zeros_like(part.parameter) for part in parts), _zeros_like(per_row[0])]
    chunks = [part.chunks(most) for part in parts], per_row.reshape(-1, size)
    return _total(sums_of_chunk, chunks, zeros)


def _total(
    sums_of: Callable[[PyTree], list[Array]], pieces: PyTree, zeros: list[Array]
) -> list[Float32[Array, "..."]]:
    """Sums over `pieces`, rounded once.

    In plain float32 the rounding of a sum of 10^5 examples that agree moves by more than one of
    them may, once their places change.
    """

    def add(total: list[TwoFloat], piece: PyTree) -> tuple[list[TwoFloat], None]:
        parts = zip(total, sums_of(piece), strict=True)
        return [compensated.add(so_far, part) for so_far, part in parts], None

    start = [TwoFloat(zero, zero) for zero in zeros]
    return [total.high for total in jax.lax.scan(add, start, pieces)[0]]


def _zeros_like(leaf: Array) -> Float32[Array, "..."]:
    """Zeros of the leaf's own kind (varying over shards or not), as its sum will be."""
    return jnp.where(leaf == leaf, 0.0, 0.0).astype(jnp.float32)


def _check_memory(gradients: list[LateGradient], rows: int, allowed: int) -> int:
    """What is left of `allowed` beside the gradients that the head has made for all examples."""
    kept = {part.path: rows * part.tail.example_bytes for part in gradients if part.tail.kept}
    largest = max((part for part in gradients), key=lambda part: part.tail.example_bytes)
    if sum(kept.values()) > allowed:
        worst = max(kept, key=kept.__getitem__)
        raise ArgumentError(
            "per_example_bytes",
            allowed,
            f"the gradients of {rows} examples that cannot be made one after another need "
            f"{sum(kept.values())} bytes, {kept[worst]} of them for {worst!r}",
            "Lower micro_batch_size, or raise per_example_bytes.",
        )
    left = allowed - sum(kept.values())
    if not largest.tail.kept and largest.tail.example_bytes > left:
        raise ArgumentError(
            "per_example_bytes",
            allowed,
            f"one example's gradient of {largest.path!r} needs {largest.tail.example_bytes} bytes",
            f"Raise per_example_bytes to {allowed - left + largest.tail.example_bytes} or more.",
        )
    return left


def _check_repeatable(parts: list[LateGradient], needed: int, memory: int) -> None:
    """What is made once for the norm and once for the sum must be the same both times."""
    for part in parts:
        if not part.tail.repeatable:
            raise ArgumentError(
                "per_example_bytes",
                memory,
                f"the gradients of one example in the group of {part.path!r} need {needed} bytes; "
                "made one after another, they would be made twice, and this one is added up in an "
                "order that a GPU may change",
                f"Raise it by {needed - memory} bytes, or give {part.path!r} a clip group.",
            )


def split_gradient(loss_fn: PerExampleLoss, params: PyTree, example: PyTree) -> Split:
    """The program of one example, (loss, gradient of each leaf), in two parts.

    `params` and `example` may be arrays or `jax.ShapeDtypeStruct`s.
    """
    return _splitter(loss_fn, params, example)()


def _splitter(loss_fn: PerExampleLoss, params: PyTree, example: PyTree) -> Callable[..., Split]:
    leaves, structure = jax.tree.flatten(params)
    example, layout = jax.tree.flatten(example)

    def program(*inputs: Array) -> list[Array]:
        given = jax.tree.unflatten(structure, inputs[: len(leaves)])
        one = jax.tree.unflatten(layout, inputs[len(leaves) :])
        loss, gradient = jax.value_and_grad(_loss_of_one)(given, one, loss_fn)
        return [loss, *jax.tree.leaves(gradient)]

    varies = [False] * len(leaves) + [True] * len(example)
    traced = jax.make_jaxpr(program)(*leaves, *example)
    check_uncoupled(traced.jaxpr, example)
    return functools.partial(defer, traced, varies)


def _loss_of_one(params: PyTree, example: PyTree, loss_fn: PerExampleLoss) -> Float[Array, ""]:
    losses = loss_fn(params, jax.tree.map(lambda x: x[None], example))
    if getattr(losses, "shape", None) != (1,) or not jnp.issubdtype(losses.dtype, jnp.floating):
        raise ArgumentError(
            "loss_fn",
            getattr(losses, "shape", type(losses)),
            "not one floating-point loss an example",
            "Return losses of shape (B,) for a batch of B examples: no mean, no sum, no tuple.",
        )
    return losses[0]


def _local(params: PyTree, witnesses: PyTree) -> PyTree:
    """Parameters as each device's own values, where the batch is split by shard_map.

    Differentiating a replicated value there sums its gradient over the devices: examples of
    different devices would be added BEFORE they are clipped.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return params
    # A choice between two equal values takes the device-dependence of what decides it.
    decides = functools.reduce(
        jnp.logical_or, [jnp.ravel(leaf)[0] != 0 for leaf in jax.tree.leaves(witnesses)]
    )
    return jax.tree.map(lambda leaf: jnp.where(decides, leaf, leaf), params)


def _check_batch(batch: PyTree, rows: int, micro_batch_size: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        shape = getattr(leaf, "shape", ())
        if shape[:1] != (rows,):
            raise ArgumentError(
                f"batch{jax.tree_util.keystr(path)}",
                shape,
                f"its leading axis is not the {rows} rows of is_real",
                "Give every leaf of the batch one row an example.",
            )
    if rows == 0 or rows % micro_batch_size:
        raise ArgumentError(
            "micro_batch_size",
            micro_batch_size,
            f"does not divide the {rows} rows of the batch",
            "Pass a divisor, or pad the batch with rows whose is_real is False.",
        )
