"""Per-example gradient trees: exact norms, clipping, and the sum over a batch.

Formal guarantees, for every input:
  - the gradient of one example enters the sum with an L2 norm of at most C_l in each clip group l,
    measured in float64 on the float32 numbers that are added;
  - an example whose gradient, or its norm in units of C_l, is not finite in float32 contributes
    exactly zero to every group, and so does a padding example, whatever bytes it holds;
  - examples cannot influence each other: the loss only ever sees one example at a time, so that a
    batch-coupled layer (batch normalisation, in-batch negatives) sees a batch of one.

Source: Abadi et al., "Deep Learning with Differential Privacy" (2016), algorithm 1.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from dpfa_jax.core import ArgumentError

# Squares are added in runs of 256, then the run totals in runs of 256, and so on: whatever order
# the compiler adds a run in, its error is at most 256 * 2^-24, so the norm of up to 256^4 numbers
# errs by less than 2^-15. Clipping to C (1 - 2^-14) hence keeps the true norm at C or below.
_RUN = 256
CLIP_MARGIN = 2.0**-14

PerExampleLoss = Callable[[PyTree, PyTree], Float[Array, " batch"]]


def clipped_sum(
    loss_fn: PerExampleLoss,
    params: PyTree,
    batch: PyTree,
    is_real: Bool[Array, " batch"],
    *,
    l2_clip_norms: tuple[float, ...],
    leaf_groups: tuple[int, ...],
    micro_batch_size: int,
) -> PyTree:
    """Sum over the real examples of their clipped parameter gradients.

    Args:
      loss_fn: (params, batch) -> one loss an example, shape (B,). Called with B = 1 only.
      params: pytree of floating-point arrays.
      batch: pytree of arrays with leading axis B, a multiple of `micro_batch_size`.
      is_real: False for padding.
      l2_clip_norms: C_l of each clip group.
      leaf_groups: the group of each leaf of `params`, in `jax.tree.leaves` order.
      micro_batch_size: per-example gradients held in memory at a time.

    Returns: float32 sums, shaped like `params`. They are NOT private: noise is due.
    Errors: ArgumentError for a loss that is not one number an example, or for axes that disagree.
    """
    rows = is_real.shape[0]
    _check_batch(batch, rows, micro_batch_size)
    params = _local(params, (batch, is_real))
    gradients_of = jax.vmap(jax.grad(_singleton(loss_fn)), in_axes=(None, 0))

    def sum_of(examples: PyTree, real: Bool[Array, " micro"]) -> PyTree:
        gradients = gradients_of(params, examples)
        return clipped_rows_sum(
            gradients, real, l2_clip_norms=l2_clip_norms, leaf_groups=leaf_groups
        )

    if rows == micro_batch_size:
        return sum_of(batch, is_real)

    # Micro-batch j takes rows j, j + rows/micro, ...: where the batch is sharded over devices, each
    # micro-batch then has rows on all of them, and no row moves.
    def interleaved(x: Array) -> Array:
        return jnp.swapaxes(x.reshape(micro_batch_size, -1, *x.shape[1:]), 0, 1)

    def add(total: PyTree, micro: tuple[PyTree, Bool[Array, " micro"]]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, sum_of(*micro)), None

    micro_batches = jax.tree.map(interleaved, (batch, is_real))
    # Zeros of the parameters' own kind (varying over shards or not), as the carry will be.
    zeros = jax.tree.map(lambda leaf: jnp.where(leaf == leaf, 0.0, 0.0), params)
    zeros = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), zeros)
    return jax.lax.scan(add, zeros, micro_batches)[0]


def clipped_rows_sum(
    gradients: PyTree,
    is_real: Bool[Array, " batch"],
    *,
    l2_clip_norms: tuple[float, ...],
    leaf_groups: tuple[int, ...],
) -> PyTree:
    """Clips per-example gradients (leaves with leading axis B) group by group and adds them up.

    Returns: float32 sums without the leading axis. Reads each gradient twice, keeps none.
    """
    leaves, structure = jax.tree.flatten(gradients)
    rows = is_real.shape[0]
    flat = [leaf.reshape(rows, leaf.size // rows).astype(jnp.float32) for leaf in leaves]
    norms = []  # in units of the clip norm, so that neither huge nor tiny bounds under- or overflow
    for group, l2_clip_norm in enumerate(l2_clip_norms):
        squares = [
            _sum_of_squares(leaf, 1.0 / l2_clip_norm)
            for leaf, owner in zip(flat, leaf_groups, strict=True)
            if owner == group
        ]
        norms.append(jnp.sqrt(_sum_in_runs(jnp.stack(squares, axis=1))))
    counts = is_real & jnp.all(jnp.isfinite(jnp.stack(norms)), axis=0)
    scales = [jnp.minimum(1.0, (1.0 - CLIP_MARGIN) / jnp.maximum(norm, 0.5)) for norm in norms]

    def total(leaf: Float[Array, "batch numbers"], group: int) -> Float[Array, " numbers"]:
        # `where` on both factors: 0 * NaN is NaN.
        scale = jnp.where(counts, scales[group], 0.0)
        clean = jnp.where(counts[:, None], leaf, 0.0)
        return jnp.einsum("b,bn->n", scale, clean, precision=jax.lax.Precision.HIGHEST)

    sums = [
        total(leaf, group).reshape(shaped.shape[1:])
        for leaf, shaped, group in zip(flat, leaves, leaf_groups, strict=True)
    ]
    return jax.tree.unflatten(structure, sums)


def _sum_of_squares(rows: Float[Array, "batch numbers"], scale: float) -> Float[Array, " batch"]:
    return _sum_in_runs(jnp.square(rows * scale))


def _sum_in_runs(rows: Float[Array, "batch numbers"]) -> Float[Array, " batch"]:
    """Sum over the last axis in runs of `_RUN`; the barrier keeps the runs from being merged."""
    batch, numbers = rows.shape
    while numbers > _RUN:
        runs = numbers // _RUN
        head = jnp.sum(rows[:, : runs * _RUN].reshape(batch, runs, _RUN), axis=2)
        tail = jnp.sum(rows[:, runs * _RUN :], axis=1, keepdims=True)
        rows = jax.lax.optimization_barrier(jnp.concatenate([head, tail], axis=1))
        numbers = runs + 1
    return jnp.sum(rows, axis=1)


def _singleton(loss_fn: PerExampleLoss) -> Callable[[PyTree, PyTree], Float[Array, ""]]:
    def loss_of_one(params: PyTree, example: PyTree) -> Float[Array, ""]:
        losses = loss_fn(params, jax.tree.map(lambda x: x[None], example))
        if getattr(losses, "shape", None) != (1,) or not jnp.issubdtype(losses.dtype, jnp.floating):
            raise ArgumentError(
                "loss_fn",
                getattr(losses, "shape", type(losses)),
                "not one floating-point loss an example",
                "Return losses of shape (B,) for a batch of B examples: no mean, no sum, no tuple.",
            )
        return losses[0]

    return loss_of_one


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
