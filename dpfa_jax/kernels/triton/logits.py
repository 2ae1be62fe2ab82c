"""One tile of the logits: loads, products, bias, and what is hidden.

Logits of 16-bit inputs are in base 2 (times log2 e), so that a weight is one exp2; those of float32
are natural, which costs one rounding less. `is_keys_first` turns the tile over: keys along axis 0,
as the gradient of keys and values wants them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.triton import tiles
from dpfa_jax.kernels.triton.tiles import Scalar

LOG2_E = math.log2(math.e)
# Without tensor cores the terms of a float32 product are added one by one. Up to 128 columns that
# stays within the budget of errors; 256 do not, and are added 64 at a time.
MOST_TERMS, PIECE = 128, 64


class Base(NamedTuple):
    """Logits times `unit`; `power` turns them into weights; a running maximum starts at `lowest`.

    That is finite, so that a row with no key yet gives power(-inf) = 0, no NaN. In 16 bits it is
    no lower than a log-sum-exp can be of which the backward pass makes weights: at -1e9 float32
    has no room for the logarithm of the sum, and weights would be too large by the number of keys.
    """

    unit: float
    power: Callable[[jax.Array], jax.Array]
    lowest: float

    @classmethod
    def of(cls, dtype: Any) -> "Base":
        """The base of calls in `dtype`."""
        if dtype == jnp.float32:
            return cls(1.0, jnp.exp, -1e38)
        return cls(LOG2_E, jnp.exp2, -(2.0**26))


class Arrays(NamedTuple):
    """What every kernel reads; absent ones are None. Shapes as in `AttentionInputs`."""

    query: Any
    key: Any
    value: Any
    bias: Any = None
    mask: Any = None
    query_lengths: Any = None
    key_lengths: Any = None

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.query.shape[2] // self.key.shape[2]

    def key_length(self, batch: Scalar) -> jax.Array | None:
        """Number of keys that are not hidden by their length; None: all."""
        if self.key_lengths is None:
            return None
        return jnp.clip(self.key_lengths[batch], 0, self.key.shape[1])

    def query_length(self, batch: Scalar) -> jax.Array | None:
        """First row that sees no key; None: all rows exist."""
        return None if self.query_lengths is None else self.query_lengths[batch]


class Place(NamedTuple):
    """Where a tile lies: batch row, query head, and indices of its rows and keys."""

    batch: Scalar
    head: Scalar
    rows: jax.Array
    keys: jax.Array


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Product of two tiles, summed in float32; float32 factors are not rounded to tf32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plt.dot(a, b, precision=precision)


def row_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Products of each row of `a` with each row of `b`, as `dot`; long float32 rows in pieces."""
    if a.dtype != jnp.float32:
        return plt.dot(a, b, trans_b=True)
    pieces = a.shape[1] // PIECE if a.shape[1] > MOST_TERMS else 1
    products = [
        plt.dot(x, y, trans_b=True, precision=lax.Precision.HIGHEST)
        for x, y in zip(*(jnp.split(x, pieces, axis=1) for x in (a, b)), strict=True)
    ]
    while len(products) > 1:
        products = [x + y for x, y in zip(products[::2], products[1::2], strict=True)]
    return products[0]


def indices(begin: Scalar, count: int) -> jax.Array:
    """begin .. begin + count - 1."""
    return jnp.int32(begin) + lax.iota(jnp.int32, count)


def load_rows(
    ref: Any, batch: Scalar, rows: jax.Array, head: Scalar, is_there: jax.Array | None
) -> jax.Array:
    """Rows of one head, (R, padded head size): 0 past the head size and where not `is_there`."""
    size = ref.shape[3]
    columns = lax.iota(jnp.int32, tiles.padded_size(size))
    mask = None
    if len(columns) != size:
        mask = jnp.broadcast_to((columns < size)[None, :], (len(rows), len(columns)))
    if is_there is not None:
        there = jnp.broadcast_to(is_there[:, None], (len(rows), len(columns)))
        mask = there if mask is None else mask & there
    view = ref.at[batch, rows[:, None], head, columns[None, :]]
    if mask is None:
        return plt.load(view)
    return plt.load(view, mask=mask, other=jnp.zeros((), ref.dtype))


def store_rows(
    ref: Any, batch: Scalar, rows: jax.Array, head: Scalar, x: jax.Array, limit: int
) -> None:
    """Writes rows below `limit` of one head, in the dtype of `ref`."""
    size = ref.shape[3]
    columns = lax.iota(jnp.int32, tiles.padded_size(size))
    mask = (rows < limit)[:, None] & (columns < size)[None, :]
    view = ref.at[batch, rows[:, None], head, columns[None, :]]
    plt.store(view, x.astype(ref.dtype), mask=mask)


def load_vector(ref: Any, batch: Scalar, head: Scalar, rows: jax.Array, other: float) -> jax.Array:
    """Numbers of some rows of a (B, N, T) array; `other` past its end."""
    is_there = rows < ref.shape[2]
    return plt.load(ref.at[batch, head, rows], mask=is_there, other=jnp.asarray(other, ref.dtype))


def finite_or_zero(x: jax.Array) -> jax.Array:
    """`x` without NaN and infinities: a weight of 0 must remove any bytes."""
    return jnp.where(jnp.abs(x.astype(jnp.float32)) < jnp.inf, x, jnp.zeros_like(x))


def marks(x: jax.Array) -> jax.Array:
    """NaN for each row that holds NaN or an infinity, else 0."""
    odd = jnp.where(jnp.abs(x.astype(jnp.float32)) < jnp.inf, 0.0, 1.0)
    return jnp.where(jnp.max(odd, axis=1) > 0.0, jnp.nan, 0.0)


def tile_logits(
    spec: AttentionSpec,
    arrays: Arrays,
    place: Place,
    query: jax.Array,
    key: jax.Array,
    *,
    is_keys_first: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """scale q.k, capped and biased, in their base; the derivative of the cap or None."""
    unit = Base.of(query.dtype).unit
    first, second = (key, query) if is_keys_first else (query, key)
    logits = row_products(first, second)
    slope = None
    if spec.logits_soft_cap is None:
        logits = logits * (spec.scale * unit)
    else:
        ratio = jnp.tanh(logits * (spec.scale / spec.logits_soft_cap))
        logits = ratio * (spec.logits_soft_cap * unit)
        slope = 1.0 - ratio * ratio
    if arrays.bias is not None:
        bias = load_per_pair(arrays.bias, place, is_keys_first=is_keys_first)
        logits = logits + bias.astype(jnp.float32) * unit
    return logits, slope


def visible(
    spec: AttentionSpec,
    arrays: Arrays,
    place: Place,
    key_length: Scalar | None,
    *,
    is_keys_first: bool = False,
) -> jax.Array:
    """Which keys of the tile each row sees (all but query lengths, which hide whole rows)."""
    row, key = place.rows[:, None], place.keys[None, :]
    if is_keys_first:
        row, key = place.rows[None, :], place.keys[:, None]
    shape = jnp.broadcast_shapes(row.shape, key.shape)
    length = arrays.key.shape[1] if key_length is None else key_length
    seen = jnp.broadcast_to(key < length, shape)
    right, left = tiles.right_reach(spec), tiles.left_reach(spec)
    if right is not None:
        seen = seen & (key <= row + right)
    if left is not None:
        seen = seen & (key >= row - left)
    if arrays.mask is not None:
        seen = seen & load_per_pair(arrays.mask, place, is_keys_first=is_keys_first)
    return seen


def load_per_pair(ref: Any, place: Place, *, is_keys_first: bool) -> jax.Array:
    """The tile of an array (b, n, t, s), each axis full or 1; zeros past its ends."""
    batch, heads, rows, keys = ref.shape
    at = (0 if batch == 1 else place.batch, 0 if heads == 1 else place.head)
    shape = (len(place.rows), len(place.keys))
    is_row, is_key = place.rows < rows, place.keys < keys
    zero = jnp.zeros((), ref.dtype)
    if rows == 1 and keys == 1:
        return jnp.broadcast_to(ref[(*at, 0, 0)], shape[::-1] if is_keys_first else shape)
    if rows == 1:
        line = plt.load(ref.at[(*at, 0, place.keys)], mask=is_key, other=zero)
        along_keys = line[:, None] if is_keys_first else line[None, :]
        return jnp.broadcast_to(along_keys, shape[::-1] if is_keys_first else shape)
    if keys == 1:
        line = plt.load(ref.at[(*at, place.rows, 0)], mask=is_row, other=zero)
        along_rows = line[None, :] if is_keys_first else line[:, None]
        return jnp.broadcast_to(along_rows, shape[::-1] if is_keys_first else shape)
    if is_keys_first:
        view = ref.at[(*at, place.rows[None, :], place.keys[:, None])]
        return plt.load(view, mask=is_row[None, :] & is_key[:, None], other=zero)
    view = ref.at[(*at, place.rows[:, None], place.keys[None, :])]
    return plt.load(view, mask=is_row[:, None] & is_key[None, :], other=zero)
