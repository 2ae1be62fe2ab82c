"""Where the batch rows and the heads of a call lie among all that its noise key serves."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from dpfa_jax.core import ArgumentError
from dpfa_jax.kernels.base import AttentionInputs
from dpfa_jax.noise import (
    check_attention_ranges,
    mesh_axes,
    require_offsets_under_manual_mesh,
)
from dpfa_jax.noise.counters import BATCH_BITS

Index = int | Int[Array, ""] | UInt32[Array, ""]
# A first index, or the mesh axes along which shards follow each other.
Start = Index | str | tuple[str, ...]


class Place(NamedTuple):
    """One range of global indices.

    Attributes:
      start: the first of them.
      drawn: (start, size) of what is drawn of the key's counters, by all shards together.
      is_inside: where only a run can tell, whether all of them may be answered; None: they may.
    """

    start: Index
    drawn: tuple[Index, int]
    is_inside: Bool[Array, ""] | None

    @property
    def end(self) -> int:
        """One past the last index that is drawn; of a place that needs no run to tell."""
        return int(self.drawn[0]) + self.drawn[1]


class Placement(NamedTuple):
    """Where a call lies: its batch rows, and its query heads."""

    batch: Place
    heads: Place

    def answered(self, output: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """`output`, NaN where a traced index leaves what the release, or one key, may answer."""
        for place in self:
            if place.is_inside is not None:
                output = jnp.where(place.is_inside, output, jnp.nan)
        return output


def of_call(
    inputs: AttentionInputs,
    noise_key: Array,
    num_heads: int,
    *,
    batch_start: Start | None,
    head_start: Start | None,
) -> Placement:
    """The place of a call of a release of `num_heads` heads; 0 where a start is absent.

    Errors: ArgumentError for a start that is no index, or ends beyond the release's heads or what
    one key can address; KeyReuseError for one by which shards could draw the same noise.
    """
    given = {"batch_start": batch_start, "head_start": head_start}
    require_offsets_under_manual_mesh(noise_key, *jax.tree.leaves(inputs), **given)
    batch, _, heads, _ = inputs.query.shape
    rows = _place("batch_start", batch_start, batch, 2**BATCH_BITS)
    if rows.is_inside is None:
        check_attention_ranges(batches=rows.end, heads=heads, rows=0, columns=0)
    columns = _place("head_start", head_start, heads, num_heads)
    if columns.is_inside is None and columns.end > num_heads:
        raise ArgumentError(
            "head_start",
            head_start,
            f"heads up to {columns.end}, but release.num_heads is {num_heads}",
            "Heads beyond those of the release are no part of what was charged.",
        )
    return Placement(rows, columns)


def _place(name: str, start: Start | None, size: int, limit: int) -> Place:
    if start is None:
        return Place(0, (0, size), None)
    if isinstance(start, (str, tuple)):
        axes = mesh_axes(start)
        shards = jax.lax.axis_size(axes)
        return Place(jax.lax.axis_index(axes) * size, (0, shards * size), None)
    dtype = getattr(start, "dtype", int if isinstance(start, int) else None)
    if isinstance(start, bool) or dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise ArgumentError(name, start, "not an integer", "Pass an int or an integer array.")
    if jnp.shape(start) != ():
        raise ArgumentError(name, jnp.shape(start), "not a scalar", "Pass one index.")
    if isinstance(start, jax.core.Tracer):
        # Negative numbers are large as unsigned ones. 64 bits would be cut: they stay.
        number = start if start.dtype.itemsize == 8 else start.astype(jnp.uint32)
        return Place(start, (start, size), (number >= 0) & (number <= limit - size))
    if int(start) < 0:
        raise ArgumentError(name, int(start), "negative", "Pass an index of 0 or more.")
    return Place(int(start), (int(start), size), None)
