"""Per-example gradients: exact norms, clip scales, and the weighted sum over a batch.

Formal guarantees, for every input:
  - the gradient of one example enters the sum with an L2 norm of at most the clip norm of its
    group, measured in float64 on the stored numbers that are added;
  - an example whose gradient, or its norm in units of the clip norm, is not finite in float32
    contributes exactly zero, and so does a padding example, whatever bytes it holds.

Source: Abadi et al., "Deep Learning with Differential Privacy" (2016), algorithm 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, PyTree

# Squares are added in runs of 256, then the run totals in runs of 256, and so on: whatever order
# the compiler adds a run in, its error is at most 256 * 2^-24, so the norm of up to 256^4 numbers
# errs by less than 2^-15. Clipping to C (1 - 2^-14) hence keeps the true norm at C or below.
_RUN = 256
CLIP_MARGIN = 2.0**-14


class TableRows(NamedTuple):
    """Per-example gradients of a table that are zero but for some rows, each place once.

    Attributes:
      places: row numbers; `size` marks an entry that counts for nothing.
      values: the rows, float32.
      size: number of rows of the table.
    """

    places: Int[Array, "batch entries"]
    values: Float32[Array, "batch entries ..."]
    size: int


class Measured(NamedTuple):
    """Per-example gradients that were measured when they were made.

    Attributes:
      values: the gradients.
      squares: squared norms of these stored values, in units of the clip norm.
    """

    values: Float[Array, "batch ..."]
    squares: Float32[Array, " batch"]


PerExample = Float[Array, "batch ..."] | TableRows | Measured


def table_rows(
    places: Int[Array, "batch entries"], rows: Float[Array, "batch entries ..."], size: int
) -> TableRows:
    """The gradient of a lookup: rows of one example that meet in a place are added there.

    Places outside 0 .. size - 1 count for nothing.
    """
    places = jnp.where((places < 0) | (places >= size), size, places)
    same = places[:, :, None] == places[:, None, :]
    entries = places.shape[1]
    flat = rows.reshape(*places.shape, -1)
    # Zeros and ones are exact in any dtype, and the products are added in float32.
    added = jnp.einsum(
        "bts,bsd->btd",
        same.astype(flat.dtype),
        flat,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    first = jnp.argmax(same, axis=2) == jnp.arange(entries)
    places = jnp.where(first, places, size)
    values = jnp.where((places < size)[:, :, None], added, 0.0)
    return TableRows(places, values.reshape(rows.shape), size)


def squared_norms(
    gradient: PerExample, l2_clip_norm: float | Float32[Array, ""] | Float32[Array, "batch 1"]
) -> Float32[Array, " batch"]:
    """Squared norms in units of the clip norm, so that no bound makes them over- or underflow."""
    if isinstance(gradient, Measured):
        return gradient.squares
    values = gradient.values if isinstance(gradient, TableRows) else gradient
    rows = values.reshape(values.shape[0], -1).astype(jnp.float32)
    return _sum_in_runs(jnp.square(rows * (1.0 / l2_clip_norm)))


def clip_scales(
    squares: Float32[Array, "batch groups parts"], is_real: Bool[Array, " batch"]
) -> Float32[Array, "batch groups"]:
    """What each example's gradient is multiplied by, by group; zero leaves the example out of it.

    Args:
      squares: squared norms of the parts of each clip group, in units of its clip norm.
      is_real: False for padding.
    """
    batch, groups, parts = squares.shape
    norms = jnp.sqrt(_sum_in_runs(squares.reshape(batch * groups, parts))).reshape(batch, groups)
    scales = jnp.minimum(1.0, (1.0 - CLIP_MARGIN) / jnp.maximum(norms, 0.5))
    return jnp.where(is_real[:, None] & jnp.isfinite(norms), scales, 0.0)


def centred_count(scales: Float32[Array, "batch groups"]) -> Float32[Array, " groups"]:
    """+1/2 for each example that `clip_scales` leaves as it is, -1/2 for each that it clips.

    Zero for an example that it leaves out. Exact for up to 2^24 examples. It is NOT private.
    """
    halves = jnp.where(scales < 1.0, -0.5, 0.5)
    return jnp.sum(jnp.where(scales > 0.0, halves, 0.0), axis=0, dtype=jnp.float32)


def weighted_sum(
    gradient: PerExample, scales: Float32[Array, " batch"] | Float32[Array, "batch slices"]
) -> Float32[Array, "..."]:
    """Sum over the batch, float32. What has the scale zero is not touched: 0 * NaN is NaN.

    Args:
      scales: of each example, or of each slice of its gradient along the leading axis.
    """
    values = gradient.values if isinstance(gradient, (TableRows, Measured)) else gradient
    weights = scales.reshape(*scales.shape, *[1] * (values.ndim - scales.ndim))
    scaled = jnp.where(weights > 0.0, values.astype(jnp.float32), 0.0) * weights
    if not isinstance(gradient, TableRows):
        return jnp.sum(scaled, axis=0)
    shape = values.shape[2:]
    table = jnp.zeros((gradient.size, *shape), jnp.float32)
    return table.at[gradient.places.reshape(-1)].add(scaled.reshape(-1, *shape), mode="drop")


def clipped_rows_sum(
    gradients: PyTree, is_real: Bool[Array, " batch"], *, l2_clip_norm: float
) -> PyTree:
    """Clips one group of per-example gradients (leaves with leading axis B) and adds them up.

    Returns: float32 sums without the leading axis. They are NOT private: noise is due.
    """
    squares = [squared_norms(leaf, l2_clip_norm) for leaf in jax.tree.leaves(gradients)]
    scales = clip_scales(jnp.stack(squares, axis=1)[:, None], is_real)[:, 0]
    return jax.tree.map(lambda leaf: weighted_sum(leaf, scales), gradients)


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
