"""Which query row sees which key, for any rectangle of the logits.

A rectangle is given by the global indices of its rows and columns. Backends ask for the whole
matrix or for one tile of it; the answer is the same function of the indices.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec


def hides(spec: AttentionSpec, inputs: AttentionInputs) -> bool:
    """Whether any argument may hide a key from a row."""
    arrays = (inputs.mask, inputs.query_lengths, inputs.key_lengths)
    is_hidden = any(array is not None for array in arrays)
    return spec.is_causal or spec.local_window is not None or is_hidden


def is_row_dependent(spec: AttentionSpec, inputs: AttentionInputs) -> bool:
    """Whether one key may be visible to one row (or head) and hidden from another."""
    mask = inputs.mask
    return (
        spec.is_causal
        or spec.local_window is not None
        or (mask is not None and (mask.shape[1] > 1 or mask.shape[2] > 1))
    )


def visible_keys(inputs: AttentionInputs) -> Bool[Array, "b S"] | None:
    """Keys that some row may see; None where no argument hides whole keys."""
    length = inputs.key.shape[1]
    seen = None
    if inputs.key_lengths is not None:
        seen = jnp.arange(length)[None, :] < inputs.key_lengths[:, None]
    if inputs.mask is not None and inputs.mask.shape[1:3] == (1, 1):
        by_mask = inputs.mask[:, 0, 0, :]
        seen = by_mask if seen is None else seen & by_mask
    return seen


def shown_keys(spec: AttentionSpec, inputs: AttentionInputs) -> Bool[Array, "b S"] | None:
    """Keys that lengths, the mask, and causality and window each show to some row; None: all.

    The bytes of the others may be replaced by zeros, since 0 * NaN must not reach a sum.
    """
    if inputs.mask is not None:
        inputs = inputs._replace(mask=inputs.mask.any(axis=(1, 2), keepdims=True))
    seen = visible_keys(inputs)
    rows, keys = inputs.query.shape[1], inputs.key.shape[1]
    left, right = (rows, keys) if spec.local_window is None else spec.local_window
    right = min(0, right) if spec.is_causal else right
    begin, end = max(0, -left), min(keys, rows + right) if left + right >= 0 else 0
    if begin == 0 and end == keys:
        return seen
    column = jnp.arange(keys)[None, :]
    inside = (begin <= column) & (column < end)
    return inside if seen is None else seen & inside


def visible(
    spec: AttentionSpec,
    inputs: AttentionInputs,
    mask_tile: Bool[Array, "b n t s"] | None,
    rows: Int[Array, " t"],
    columns: Int[Array, " s"],
) -> Bool[Array, "b n t s"] | None:
    """Visibility of one rectangle, broadcastable to (B, N, t, s); None where all is seen.

    `mask_tile` is the part of `inputs.mask` that belongs to the rectangle.
    """
    row, column = rows[:, None], columns[None, :]
    parts: list[jax.Array] = []
    if spec.is_causal:
        parts.append((row >= column)[None, None])
    if spec.local_window is not None:
        left, right = spec.local_window
        parts.append(((row <= column + left) & (row >= column - right))[None, None])
    if inputs.query_lengths is not None:
        parts.append((row[None] < inputs.query_lengths[:, None, None])[:, None])
    if inputs.key_lengths is not None:
        parts.append((column[None] < inputs.key_lengths[:, None, None])[:, None])
    if mask_tile is not None:
        parts.append(mask_tile)
    if not parts:
        return None
    seen = parts[0]
    for part in parts[1:]:
        seen = seen & part
    return seen


def key_blocks(
    spec: AttentionSpec, first_row: Int[Array, ""], rows: int, length: int, block: int
) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
    """Half-open range of the key blocks that rows [first_row, first_row + rows) can see.

    Only what is public and static about visibility is used: causality and the window.
    """
    first: Int[Array, ""] | int = 0
    stop: Int[Array, ""] | int = math.ceil(length / block)
    last_row = first_row + rows - 1
    if spec.is_causal:
        stop = jnp.minimum(stop, last_row // block + 1)
    if spec.local_window is not None:
        left, right = spec.local_window
        first = jnp.maximum(first, (first_row - left) // block)
        stop = jnp.minimum(stop, (last_row + right) // block + 1)
    return first, stop


def query_blocks(
    spec: AttentionSpec, first_key: Int[Array, ""], keys: int, length: int, block: int
) -> tuple[Int[Array, ""] | int, Int[Array, ""] | int]:
    """Half-open range of the query blocks that can see keys [first_key, first_key + keys)."""
    first: Int[Array, ""] | int = 0
    stop: Int[Array, ""] | int = math.ceil(length / block)
    last_key = first_key + keys - 1
    if spec.is_causal:
        first = jnp.maximum(first, first_key // block)
    if spec.local_window is not None:
        left, right = spec.local_window
        first = jnp.maximum(first, (first_key - right) // block)
        stop = jnp.minimum(stop, (last_key + left) // block + 1)
    return first, stop
