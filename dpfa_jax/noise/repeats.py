"""Along which axes of a traced array two places hold the same."""

import math
from typing import Any, NamedTuple

_NOTHING: frozenset[Any] = frozenset()
_ACCUMULATES = frozenset(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"))


class Value(NamedTuple):
    """What is known of one value.

    Attributes:
      identity: equal for equal values.
      varies: the loops and the mesh axes over which it may change.
      repeats: array axes along which two places hold the same.
    """

    identity: object
    varies: frozenset[object] = _NOTHING
    repeats: frozenset[int] = _NOTHING


def repeats_of(
    name: str,
    params: dict[str, Any],
    operands: list[Value],
    shapes: list[tuple[int, ...]],
    shape: tuple[int, ...],
) -> frozenset[int]:
    """Axes of the first result along which two places hold the same."""
    if name == "iota":
        return frozenset(a for a, n in enumerate(shape) if a != params["dimension"] and n > 1)
    if not operands or not shape:
        return _NOTHING
    before, held = shapes[0], operands[0].repeats
    if name == "broadcast_in_dim":
        source = dict(zip(params["broadcast_dimensions"], range(len(before)), strict=True))
        return frozenset(
            axis
            for axis, size in enumerate(shape)
            if size > 1 and (axis not in source or before[source[axis]] == 1)
        ) | {axis for axis, place in source.items() if place in held}
    if name == "tile":
        new = len(shape) - len(before)
        return frozenset(axis + new for axis in held) | {
            axis for axis, times in enumerate(params["reps"]) if times > 1
        }
    if name == "reshape":
        return _after_reshape(before, shape, held)
    if name == "transpose":
        return frozenset(to for to, axis in enumerate(params["permutation"]) if axis in held)
    if name == "squeeze":
        kept = [axis for axis in range(len(before)) if axis not in params["dimensions"]]
        return frozenset(to for to, axis in enumerate(kept) if axis in held)
    if name == "unstack":
        axis = params["axis"]
        return frozenset(a - (a > axis) for a in held if a != axis)
    if name in ("stack", "concatenate"):
        return _joined(name, params, operands)
    if name in ("random_wrap", "random_unwrap", "random_split"):
        return frozenset(axis for axis in held if axis < len(shape))
    if name in ("slice", "dynamic_slice", "rev", "sort"):
        return frozenset(axis for axis in held if shape[axis] > 1)
    if name == "gather" and not params["dimension_numbers"].offset_dims:
        return frozenset(axis for axis in operands[1].repeats if axis < len(shape))
    whole = [v.repeats for v, size in zip(operands, shapes, strict=True) if size == shape]
    small = [size for size in shapes if size != shape and math.prod(size) != 1]
    if name in _ACCUMULATES or small or not whole:
        return _NOTHING
    return frozenset.intersection(*whole)  # element by element


def _joined(name: str, params: dict[str, Any], operands: list[Value]) -> frozenset[int]:
    axis = params["axis" if name == "stack" else "dimension"]
    everywhere = frozenset.intersection(*(value.repeats for value in operands))
    twice = len({value.identity for value in operands}) < len(operands)
    if name == "stack":
        everywhere = frozenset(a + (a >= axis) for a in everywhere)
    elif any(axis in value.repeats for value in operands):
        twice = True
    return everywhere | {axis} if twice else everywhere


def _after_reshape(
    before: tuple[int, ...], after: tuple[int, ...], held: frozenset[int]
) -> frozenset[int]:
    """Runs of axes of equal products belong together: one that repeats stands for its run."""
    found: set[int] = set()
    i = j = 0
    while i < len(before) and j < len(after):
        first, start, left, right = i, j, before[i], after[j]
        i, j = i + 1, j + 1
        while left != right and (i < len(before) if left < right else j < len(after)):
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        if held & set(range(first, i)):
            found |= {axis for axis in range(start, j) if after[axis] > 1}
    return frozenset(found)
