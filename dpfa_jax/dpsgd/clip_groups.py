"""Clipped sums of gradients made late, one set of clip groups after the other, within a memory."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, PyTree

from dpfa_jax.clipping import trees
from dpfa_jax.core import ArgumentError
from dpfa_jax.dpsgd.late_gradients import (
    ClipNorm,
    LateGradient,
    after,
    largest_divisor,
    source_bytes,
)
from dpfa_jax.dpsgd.parameters import Owner
from dpfa_jax.dpsgd.released import Leaf, array_of, sums_of
from dpfa_jax.dpsgd.split import Tail
from dpfa_jax.kernels import compensated
from dpfa_jax.kernels.compensated import TwoFloat

# Held at a time where the plan says nothing: 5 % of a GPU of 80 GB.
DEFAULT_PER_EXAMPLE_BYTES = 2**32


class GroupSet(NamedTuple):
    """Clip groups that share parameters, so that they must be clipped together: mostly one.

    Attributes:
      groups: their numbers.
      members: places of the parameters of which they have a part.
    """

    groups: tuple[int, ...]
    members: tuple[int, ...]


def groups_of(owner: Owner) -> tuple[int, ...]:
    """The clip groups of a parameter's slices; one where it is not divided."""
    return (owner,) if isinstance(owner, int) else owner


def among(groups: Sequence[int], owner: Owner) -> Owner:
    """`owner` in places among `groups`."""
    if isinstance(owner, int):
        return groups.index(owner)
    return tuple(groups.index(each) for each in owner)


def sets_of(leaf_groups: Sequence[Owner]) -> list[GroupSet]:
    """The smallest sets such that no parameter has parts in two of them."""
    found: list[GroupSet] = []
    for place, owner in enumerate(leaf_groups):
        own = set(groups_of(owner))
        meets = [each for each in found if not own.isdisjoint(each.groups)]
        found = [each for each in found if each not in meets]
        groups = own.union(*(each.groups for each in meets))
        members = [place, *(member for each in meets for member in each.members)]
        found.append(GroupSet(tuple(sorted(groups)), tuple(sorted(members))))
    return sorted(found)


def is_made_once(
    tails: Sequence[Tail], leaf_groups: Sequence[Owner], rows: int, allowed: int | None
) -> bool:
    """Whether each gradient is made once: one example's of each set fit into what is allowed."""
    left = allowed or DEFAULT_PER_EXAMPLE_BYTES
    left -= sum(rows * tail.example_bytes for tail in tails if tail.kept)
    late = [0 if tail.kept else tail.example_bytes for tail in tails]
    return all(sum(late[i] for i in each.members) <= left for each in sets_of(leaf_groups))


def clipped_groups(
    gradients: Sequence[LateGradient],
    counts: Bool[Array, " micro"],
    *,
    l2_clip_norms: Sequence[ClipNorm],
    leaf_groups: Sequence[Owner],
    per_example_bytes: int | None,
) -> tuple[list[Leaf], Float32[Array, " groups"]]:
    """Clips each group of each example to its norm, and adds the examples, or releases their sum.

    Args:
      gradients: of all parameters, to be made.
      counts: False for an example that counts as zero.
      l2_clip_norms: C_l of each group.
      leaf_groups: the group of each parameter, or of each slice of it.
      per_example_bytes: as `late_sum`'s.

    Returns: (sums, float32, in the parameters' shapes, or what their `release` made of them; of
    each group half the number of unclipped examples less clipped ones).
    Errors: ArgumentError for gradients that cannot be kept within `per_example_bytes`, by name.
    """
    if not gradients:  # all are made in rounds of loops
        return [], jnp.zeros((0,), jnp.float32)
    allowed = per_example_bytes or DEFAULT_PER_EXAMPLE_BYTES
    left = _check_memory(gradients, counts.shape[0], allowed)
    sets = sets_of(leaf_groups)
    # As the backward pass gets to them, one after the other: else XLA may make all products first.
    sets.sort(key=lambda each: max(gradients[i].tail.ready for i in each.members))
    sums: dict[int, Leaf] = {}
    unclipped: dict[int, Array] = {}
    before: list[Array] = []
    for groups, members in sets:
        parts = [gradients[i] for i in members]
        memory = max(left, source_bytes(parts)) if per_example_bytes is None else left
        norms = tuple(l2_clip_norms[group] for group in groups)
        owners = [among(groups, leaf_groups[i]) for i in members]
        late = zip(after(before, parts), owners, strict=True)
        found, halves = _clipped_set([_Part(*each, norms) for each in late], counts, memory)
        sums.update(zip(members, found, strict=True))
        unclipped.update(zip(groups, halves, strict=True))
        before = [*map(array_of, found)] if any(part.values for part in parts) else before
    ordered = [unclipped[group] for group in range(len(l2_clip_norms))]
    return [sums[i] for i in range(len(gradients))], jnp.stack(ordered)


def total(
    sums_of_piece: Callable[[PyTree], list[Array]], pieces: PyTree, zeros: list[Array]
) -> list[Float32[Array, "..."]]:
    """Sums over `pieces`, rounded once.

    In plain float32 the rounding of a sum of 10^5 examples that agree moves by more than one of
    them may, once their places change.
    """

    def add(so_far: list[TwoFloat], piece: PyTree) -> tuple[list[TwoFloat], None]:
        parts = zip(so_far, sums_of_piece(piece), strict=True)
        return [compensated.add(old, part) for old, part in parts], None

    start = [TwoFloat(zero, zero) for zero in zeros]
    return [found.high for found in jax.lax.scan(add, start, pieces)[0]]


def zeros_like(leaf: Array) -> Float32[Array, "..."]:
    """Zeros of the leaf's own kind (varying over shards or not), as its sum will be."""
    return jnp.where(leaf == leaf, 0.0, 0.0).astype(jnp.float32)


class _Part(NamedTuple):
    """A parameter's gradients, and the groups and clip norms of the set that they are clipped in.

    Attributes:
      late: the gradients, to be made.
      owner: the group of the parameter, or of each of its slices: a place in `norms`.
      norms: C_l of each group.
    """

    late: LateGradient
    owner: Owner
    norms: tuple[ClipNorm, ...]

    def made(self) -> trees.PerExample:
        if isinstance(self.owner, int):
            return self.late.made(self.norms[self.owner])
        return self.late.made(None)

    def squares(self, made: trees.PerExample) -> Float32[Array, "rows slices"]:
        """Squared norms of each slice, in units of its clip norm."""
        if isinstance(self.owner, int):
            return trees.squared_norms(made, self.norms[self.owner])[:, None]
        assert isinstance(made, jax.Array)
        rows, slices = made.shape[:2]
        units = jnp.stack([jnp.float32(self.norms[group]) for group in self.owner])
        cut = made.reshape(rows * slices, -1)
        return trees.squared_norms(cut, jnp.tile(units, rows)[:, None]).reshape(rows, slices)

    def summed(self, made: trees.PerExample, scales: Float32[Array, "rows groups"]) -> Leaf:
        return self.late.summed(made, scales[:, np.asarray(self.owner)])


def _clipped_set(
    parts: list[_Part], counts: Bool[Array, " micro"], memory: int
) -> tuple[list[Leaf], Float32[Array, " groups"]]:
    """(clipped sums of one set, its gradients made within `memory` bytes; its counts)."""
    together = sum(part.late.tail.example_bytes for part in parts if not part.late.tail.kept)
    if together <= memory:
        most = memory // together if together else counts.shape[0]
        return _added(_clipped, parts, counts, most)
    _check_repeatable([part.late for part in parts], together, memory)
    sizes = [memory // max(1, part.late.tail.example_bytes) for part in parts]  # of no numbers: any
    squares = [_measured(part, most) for part, most in zip(parts, sizes, strict=True)]
    scales = _scales(parts, squares, counts)
    sums: list[Leaf] = []
    for part, most in zip(parts, sizes, strict=True):
        sums += _added(_weighted, [part], scales, most)[0]
    return sums, trees.centred_count(scales)


def _clipped(
    parts: list[_Part], counts: Bool[Array, " chunk"]
) -> tuple[list[Leaf], Float32[Array, " groups"]]:
    made = [part.made() for part in parts]
    squares = [part.squares(one) for part, one in zip(parts, made, strict=True)]
    scales = _scales(parts, squares, counts)
    sums = [part.summed(one, scales) for part, one in zip(parts, made, strict=True)]
    return sums, trees.centred_count(scales)


def _weighted(
    parts: list[_Part], scales: Float32[Array, "chunk groups"]
) -> tuple[list[Leaf], Float32[Array, " groups"]]:
    sums = [part.summed(part.made(), scales) for part in parts]
    return sums, trees.centred_count(scales)


def _scales(
    parts: list[_Part], squares: list[Float32[Array, "rows slices"]], counts: Bool[Array, " rows"]
) -> Float32[Array, "rows groups"]:
    """What each group of each example is multiplied by, from the squared norms of its slices."""
    owner_of = [group for part in parts for group in groups_of(part.owner)]
    groups = range(len(parts[0].norms))
    places = [[place for place, own in enumerate(owner_of) if own == group] for group in groups]
    most = max(map(len, places))
    found = jnp.concatenate(squares, axis=1)
    if len(places) == 1:
        return trees.clip_scales(found[:, None], counts)
    # Where a group has fewer slices than others: the last place holds a zero.
    table = np.asarray([own + [len(owner_of)] * (most - len(own)) for own in places])
    return trees.clip_scales(jnp.pad(found, ((0, 0), (0, 1)))[:, table], counts)


def _measured(part: _Part, most: int) -> Float32[Array, "micro slices"]:
    """Squared norms of one parameter's gradients, `most` examples at a time."""
    late = part.late
    size = largest_divisor(late.rows, most)

    def squares_of(carry: None, values: list[Array]) -> tuple[None, Float32[Array, "..."]]:
        held = part._replace(late=late.holding(values, size))
        return carry, held.squares(held.made())

    found = jax.lax.scan(squares_of, None, late.chunks(most), length=late.rows // size)[1]
    return found.reshape(late.rows, -1)


def _added(
    clip: Callable[[list[_Part], Array], tuple[list[Leaf], Array]],
    parts: list[_Part],
    per_row: Array,
    most: int,
) -> tuple[list[Leaf], Float32[Array, " groups"]]:
    """Sums over the batch of `clip(gradients, their rows)`, `most` examples at a time."""
    rows = per_row.shape[0]
    size = largest_divisor(rows, most)
    if size == rows:
        return clip(parts, per_row)

    def sums_of_chunk(chunk: tuple[list[list[Array]], Array]) -> list[Array]:
        values, these = chunk
        held = [
            part._replace(late=part.late.holding(own, size))
            for part, own in zip(parts, values, strict=True)
        ]
        found, halves = clip(held, these)
        return [*sums_of(found), halves]

    halves = jnp.broadcast_to(zeros_like(per_row.ravel()[0]), (len(parts[0].norms),))
    zeros = [*(zeros_like(part.late.parameter) for part in parts), halves]
    chunks = (
        [part.late.chunks(most) for part in parts],
        per_row.reshape(-1, size, *per_row.shape[1:]),
    )
    *sums, halves = total(sums_of_chunk, chunks, zeros)
    return [*sums], halves


def _check_memory(gradients: Sequence[LateGradient], rows: int, allowed: int) -> int:
    """What is left of `allowed` beside the gradients that the head has made for all examples."""
    kept = {part.path: rows * part.tail.example_bytes for part in gradients if part.tail.kept}
    largest = max(gradients, key=lambda part: part.tail.example_bytes)
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
