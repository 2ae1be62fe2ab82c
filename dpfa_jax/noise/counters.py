"""Which counter belongs to which number: no two numbers of one release share one.

A release's key is first bound to its domain and to (release id, layer); the counter then tells
batch row, head, query row and pair of columns. Every map here is one-to-one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, UInt32

from dpfa_jax.core import ArgumentError
from dpfa_jax.noise.threefry import threefry2x32

PAIR_BITS = 9
ROW_BITS = 23
HEAD_BITS = 12
BATCH_BITS = 20

# First words of the counters that derive keys. jax.random.split and fold_in use first word 0, so a
# derived key never equals a child that the caller may have split off the same key.
_ATTENTION_DOMAIN = 0x61747400
_PARAMETER_DOMAIN = 0x70617200


def bind(
    key_words: UInt32[Array, "... 2"],
    release_id: int | UInt32[Array, "..."],
    layer: int | UInt32[Array, "..."],
) -> UInt32[Array, "... 2"]:
    """The key of one attention release: `key_words` bound to (release_id, layer), 32 bits each.

    Errors: ArgumentError for a host number outside 0 .. 2^32 - 1.
    """
    release_id, layer = word("release_id", release_id), word("layer", layer)
    return _derive(_derive(key_words, _ATTENTION_DOMAIN, 0), release_id, layer)


def bind_parameter(
    key_words: UInt32[Array, "... 2"], leaf_index: int | UInt32[Array, "..."]
) -> UInt32[Array, "... 2"]:
    """The key of one leaf of a parameter tree. Errors: as `bind`."""
    return _derive(key_words, _PARAMETER_DOMAIN, word("leaf_index", leaf_index))


def attention_counter(
    batch: UInt32[Array, "..."],
    head: UInt32[Array, "..."],
    row: UInt32[Array, "..."],
    pair: UInt32[Array, "..."],
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """(hi, lo) = (batch << 12 | head, row << 9 | pair) of the columns (2 pair, 2 pair + 1).

    One-to-one within the ranges that `check_attention_ranges` tests. Runs inside Pallas kernels.
    """
    hi = lax.shift_left(batch, jnp.full_like(batch, HEAD_BITS)) | head
    lo = lax.shift_left(row, jnp.full_like(row, PAIR_BITS)) | pair
    return hi, lo


def check_attention_ranges(*, batches: int, heads: int, rows: int, columns: int) -> None:
    """Refuses extents (start + size, host ints) beyond which counters would repeat.

    Limits: 2^20 batch rows, 2^12 heads, 2^23 query rows, 2^10 columns.
    Errors: ArgumentError naming the extent.
    """
    limits = {
        "batches": (batches, BATCH_BITS),
        "heads": (heads, HEAD_BITS),
        "rows": (rows, ROW_BITS),
        "columns": (columns, PAIR_BITS + 1),
    }
    for name, (extent, bits) in limits.items():
        if not 0 <= extent <= 2**bits:
            raise ArgumentError(
                name,
                extent,
                f"outside the 2^{bits} that one noise key can address",
                "Split the call and give each part its own noise key.",
            )


def parameter_counter(
    pair: UInt32[Array, "..."],
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """(hi, lo) = (0, pair) of the elements 2 pair and 2 pair + 1 of a flattened leaf."""
    return jnp.zeros_like(pair), pair


def long_radius_counter(
    pair: UInt32[Array, "..."],
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """(hi, lo) = (1, pair) of the block whose first word continues the radius of `pair`."""
    return jnp.ones_like(pair), pair


def _derive(
    key_words: UInt32[Array, "... 2"],
    hi: int | UInt32[Array, "..."],
    lo: int | UInt32[Array, "..."],
) -> UInt32[Array, "... 2"]:
    words = threefry2x32(
        key_words[..., 0],
        key_words[..., 1],
        jnp.asarray(hi, jnp.uint32),
        jnp.asarray(lo, jnp.uint32),
    )
    return jnp.stack(words, axis=-1)


def word(name: str, value: object) -> int | UInt32[Array, "..."]:
    """`value` as 32 bits: a concrete number as an int, a traced one as uint32.

    A traced negative number becomes a large one: no other of its type, but one that `is_word` of
    the number tells a caller to leave without an answer.

    Errors: ArgumentError for a concrete number outside 0 .. 2^32 - 1, or a traced one of more than
    32 bits, which would pass for another one and repeat its noise, and for what is not of an
    integer type.
    """
    dtype = jnp.dtype(int) if type(value) is int else getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise ArgumentError(name, value, "not an integer", "Pass an int or an integer array.")
    if isinstance(value, jax.core.Tracer):
        if dtype.itemsize > 4:
            raise ArgumentError(
                name,
                f"traced {dtype}",
                "more than 32 bits, which would be cut: 2^32 would be 0 again",
                "Pass .astype(jnp.uint32) of a number that is known to fit.",
            )
        return jnp.asarray(value).astype(jnp.uint32)
    number = np.asarray(value)
    if not np.all((number >= 0) & (number < 2**32)):
        raise ArgumentError(name, value, "not within 32 bits", "Pass an int in 0 .. 2^32 - 1.")
    return int(number) if number.ndim == 0 else jnp.asarray(number.astype(np.uint32))


def is_word(*values: object) -> Bool[Array, "..."] | None:
    """Where only a run can tell, whether signed values are all 0 or more; None: they are."""
    signed = [
        jnp.asarray(value) >= 0
        for value in values
        if isinstance(value, jax.core.Tracer) and jnp.issubdtype(value.dtype, jnp.signedinteger)
    ]
    return functools.reduce(jnp.logical_and, signed) if signed else None
