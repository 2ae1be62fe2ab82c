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
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, PyTree

from dpfa_jax.core import ArgumentError
from dpfa_jax.dpsgd.clip_groups import (
    among,
    clipped_groups,
    groups_of,
    is_made_once,
    total,
    zeros_like,
)
from dpfa_jax.dpsgd.coupling import check_uncoupled
from dpfa_jax.dpsgd.deferral import defer
from dpfa_jax.dpsgd.late_gradients import ClipNorm, late_gradients
from dpfa_jax.dpsgd.parameters import Owner, leaf_paths
from dpfa_jax.dpsgd.released import Leaf, Release, sums_of
from dpfa_jax.dpsgd.rounds import Rounds, columns_of
from dpfa_jax.dpsgd.split import Split
from dpfa_jax.kernels import manual_axes

PerExampleLoss = Callable[[PyTree, PyTree], Float[Array, " batch"]]


class ClippedSum(NamedTuple):
    """What a batch adds up to. NOT private: noise is due.

    Attributes:
      gradients: float32 sums of clipped gradients, shaped like the parameters. A leaf that has
        left with its noise is a `Released`, which nothing takes for a sum.
      centred_counts: for each clip group, unclipped examples minus clipped ones, halved.
    """

    gradients: PyTree
    centred_counts: Float32[Array, " groups"]


class LateSum(NamedTuple):
    """A sum whose gradients are due, where the batch is one micro-batch; else the sum.

    Attributes:
      sources: all that the sum is computed from: whatever tells on examples is among them.
      added: (what each leaf is released by, if it is) -> the sum. Only of a whole micro-batch.
    """

    sources: list[Array]
    added: Callable[[Sequence[Release | None]], ClippedSum]


def late_sum(
    loss_fn: PerExampleLoss,
    params: PyTree,
    batch: PyTree,
    is_real: Bool[Array, " batch"],
    *,
    l2_clip_norms: Sequence[ClipNorm],
    leaf_groups: tuple[Owner, ...],
    micro_batch_size: int,
    per_example_bytes: int | None,
) -> LateSum:
    """Sum over the real examples of their clipped parameter gradients.

    In two steps, so that noise can be made ready between them.

    Args:
      loss_fn: (params, batch) -> one loss an example, shape (B,). Called with B = 1 only.
      params: pytree of floating-point arrays.
      batch: pytree of arrays with leading axis B, a multiple of `micro_batch_size`.
      is_real: False for padding.
      l2_clip_norms: C_l of each clip group.
      leaf_groups: the group of each leaf of `params`, in `jax.tree.leaves` order, or the groups of
        its slices along the leading axis.
      micro_batch_size: examples that go forward and backward at a time.
      per_example_bytes: memory for the per-example gradients that are held at a time. None: 4 GiB,
        or what a group's gradients are made from takes where that is more: to make them piece by
        piece, all of that must be held to the end, so all of them at once need no more.

    Returns: the sum, due. An example whose loss is not finite counts as zero, and so does one in
    each group where its gradient is not.
    Errors: ArgumentError for a loss that is not one number an example, for axes that disagree, and
    for gradients that cannot be kept within `per_example_bytes`, by name; CoverageError for a loss
    that couples examples (`coupling.check_uncoupled`).
    """
    _check_batch(batch, is_real.shape[0], micro_batch_size)
    params = _local(params, (batch, is_real))
    leaves, structure = jax.tree.flatten(params)
    paths = leaf_paths(params)
    split = _split_for(loss_fn, params, batch, leaf_groups, micro_batch_size, per_example_bytes)
    late = [place - 1 for place in split.outputs[1:]]
    late_owners = [leaf_groups[i] for i in late]
    late_groups = sorted({group for owner in late_owners for group in groups_of(owner)})
    rounds = []
    for loop in split.loops:
        members = tuple(place - 1 for place in loop.outputs)
        owners = tuple(groups_of(leaf_groups[i]) for i in members)
        rounds.append(Rounds(loop, members, owners, tuple(paths[i] for i in members)))

    def made_from(examples: PyTree, real: Bool[Array, " micro"]) -> list[Array]:
        def head(example: PyTree, is_real: Bool[Array, ""]) -> list[Array]:
            work = [each.work(leaves, is_real, l2_clip_norms, per_example_bytes) for each in rounds]
            return split.head([*leaves, *jax.tree.leaves(example)], work)

        out_axes = [0 if mapped else None for mapped in split.mapped]
        return jax.vmap(head, out_axes=out_axes)(examples, real)

    def sum_of(
        values: list[Array], real: Bool[Array, " micro"], releases: Sequence[Release | None]
    ) -> tuple[list[Leaf], Float32[Array, " groups"]]:
        loss, *gradients = late_gradients(
            split.tails,
            values,
            split.mapped,
            real.shape[0],
            ["loss", *(paths[i] for i in late)],
            [leaves[0], *(leaves[i] for i in late)],
            [None, *(releases[i] for i in late)],
        )
        found, halves = clipped_groups(
            gradients,
            real & jnp.isfinite(loss.unclipped()),
            l2_clip_norms=[l2_clip_norms[group] for group in late_groups],
            leaf_groups=[among(late_groups, owner) for owner in late_owners],
            per_example_bytes=per_example_bytes,
        )
        sums = dict(zip(late, found, strict=True))
        counts = dict(zip(late_groups, halves, strict=True))
        for each in rounds:
            *stacked, halves = (values[i] for i in each.loop.results)
            sums.update(zip(each.members, stacked, strict=True))
            counts.update(each.counts(halves))
        ordered = [counts[group] for group in range(len(l2_clip_norms))]
        return [sums[i] for i in range(len(leaves))], jnp.stack(ordered)

    def result(sums: Sequence[Leaf], counts: Float32[Array, " groups"]) -> ClippedSum:
        return ClippedSum(jax.tree.unflatten(structure, sums), counts)

    if is_real.shape[0] == micro_batch_size:
        values = made_from(batch, is_real)
        return LateSum([*values, is_real], lambda by: result(*sum_of(values, is_real, by)))

    # Micro-batch j takes rows j, j + rows/micro, ...: where the batch is sharded over devices, each
    # micro-batch then has rows on all of them, and no row moves.
    def interleaved(x: Array) -> Array:
        pieces = x.shape[0] // micro_batch_size
        return jnp.swapaxes(x.reshape(micro_batch_size, pieces, *x.shape[1:]), 0, 1)

    def sum_of_micro_batch(micro: tuple[PyTree, Array]) -> list[Float32[Array, "..."]]:
        sums, halves = sum_of(made_from(*micro), micro[1], [None] * len(leaves))
        return [*sums_of(sums), halves]

    micro_batches = jax.tree.map(interleaved, (batch, is_real))
    zeros = [*map(zeros_like, leaves), jnp.stack([zeros_like(is_real[0])] * len(l2_clip_norms))]
    *sums, halves = total(sum_of_micro_batch, micro_batches, zeros)
    return LateSum([*sums, halves], lambda _: result(sums, halves))


def _split_for(
    loss_fn: PerExampleLoss,
    params: PyTree,
    batch: PyTree,
    leaf_groups: tuple[Owner, ...],
    rows: int,
    per_example_bytes: int | None,
) -> Split:
    """The program in parts, its tails free to recompute where each gradient is made once."""
    split_with = _splitter(loss_fn, params, jax.tree.map(lambda x: x[0], batch), leaf_groups)
    split = split_with()
    owners = [leaf_groups[place - 1] for place in split.outputs[1:]]
    once = is_made_once(split.tails[1:], owners, rows, per_example_bytes)
    return split_with(recompute=True) if once else split


def split_gradient(
    loss_fn: PerExampleLoss, params: PyTree, example: PyTree, leaf_groups: Sequence[Owner] = ()
) -> Split:
    """The program of one example, (loss, gradient of each leaf), in two parts.

    `params` and `example` may be arrays or `jax.ShapeDtypeStruct`s. `leaf_groups`: as for
    `late_sum`; which slices are finished in a loop depends on them.
    """
    return _splitter(loss_fn, params, example, leaf_groups)()


def _splitter(
    loss_fn: PerExampleLoss, params: PyTree, example: PyTree, leaf_groups: Sequence[Owner]
) -> Callable[..., Split]:
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
    return functools.partial(
        defer,
        traced,
        varies,
        columns=[[1 + i for i in members] for members in columns_of(leaf_groups)],
        divided={1 + i for i, owner in enumerate(leaf_groups) if not isinstance(owner, int)},
    )


def _loss_of_one(params: PyTree, example: PyTree, loss_fn: PerExampleLoss) -> Float[Array, ""]:
    return checked_losses(loss_fn(params, jax.tree.map(lambda x: x[None], example)), 1)[0]


def checked_losses(losses: object, rows: int) -> Float[Array, " rows"]:
    """What a loss function gave for `rows` examples. Errors: ArgumentError unless one loss each."""
    shape, dtype = getattr(losses, "shape", None), getattr(losses, "dtype", np.dtype(object))
    if shape != (rows,) or not jnp.issubdtype(dtype, jnp.floating):
        raise ArgumentError(
            "loss_fn",
            type(losses) if shape is None else shape,
            "not one floating-point loss an example",
            "Return losses of shape (B,) for a batch of B examples: no mean, no sum, no tuple.",
        )
    return jnp.asarray(losses)


def _local(params: PyTree, witnesses: PyTree) -> PyTree:
    """Parameters as each device's own values, where the batch is split by shard_map.

    Differentiating a replicated value there sums its gradient over the devices: examples of
    different devices would be added BEFORE they are clipped.
    """
    axes = manual_axes.varying_axes(*jax.tree.leaves(witnesses))
    return jax.tree.map(lambda leaf: manual_axes.vary_over(leaf, axes), params)


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
