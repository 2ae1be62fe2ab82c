"""Fields of standard normals, each number found by its global position alone."""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int, Key, UInt32

from dpfa_jax.core import ArgumentError
from dpfa_jax.noise import counters
from dpfa_jax.noise.keys import key_words as words_of
from dpfa_jax.noise.normals import normal_pair
from dpfa_jax.noise.threefry import threefry2x32


def attention_noise(
    key_words: UInt32[Array, "B 2"],
    batch_index: UInt32[Array, " B"],
    head_start: UInt32[Array, " B"],
    *,
    heads: int,
    row_start: int | Int[Array, ""],
    rows: int,
    columns: int,
) -> Float32[Array, "B rows heads columns"]:
    """Standard normals of query rows row_start .. row_start + rows - 1.

    Columns 2j and 2j + 1 are the cosine and the sine of counter pair j. The numbers do not depend
    on how batch, heads or rows are cut into calls. A batch row, head or query row beyond the
    addressable range (see `counters`), which only a traced index can reach, is NaN.

    Errors: ArgumentError for host extents beyond the addressable range.
    """
    start = row_start if isinstance(row_start, int) else 0
    counters.check_attention_ranges(
        batches=batch_index.shape[0], heads=heads, rows=start + rows, columns=columns
    )
    shape = (batch_index.shape[0], rows, heads, (columns + 1) // 2)

    def along(axis: int) -> UInt32[Array, "B rows heads pairs"]:
        return jax.lax.broadcasted_iota(jnp.uint32, shape, axis)

    batch = jnp.broadcast_to(batch_index.astype(jnp.uint32)[:, None, None, None], shape)
    head = head_start.astype(jnp.uint32)[:, None, None, None] + along(2)
    row = jnp.asarray(row_start).astype(jnp.uint32) + along(1)
    hi, lo = counters.attention_counter(batch, head, row, along(3))
    key0, key1 = (key_words[:, word][:, None, None, None] for word in (0, 1))
    pair = jnp.stack(normal_pair(*threefry2x32(key0, key1, hi, lo)), axis=-1)
    inside = (
        (batch < jnp.uint32(2**counters.BATCH_BITS))
        & (head < jnp.uint32(2**counters.HEAD_BITS))
        & (row < jnp.uint32(2**counters.ROW_BITS))
    )
    pair = jnp.where(inside[..., None], pair, jnp.float32(jnp.nan))
    return pair.reshape(*shape[:3], 2 * shape[3])[..., :columns]


def parameter_noise(
    noise_key: Key[Array, ""], leaf_index: int | UInt32[Array, ""], shape: tuple[int, ...]
) -> Float32[Array, "..."]:
    """Standard normals for leaf `leaf_index` of a parameter tree, by global element index.

    Element e of the flattened leaf is part e & 1 of counter pair e >> 1, however it is sharded.
    Its radius has 64 bits.

    Errors: ArgumentError for a leaf of more than 2^32 elements.
    """
    size = math.prod(shape)
    if size > 2**32:
        raise ArgumentError(
            "shape", shape, "more than 2^32 elements in one leaf", "Split the parameter."
        )
    return parameter_noise_at(noise_key, leaf_index, _flat_index(shape))


def parameter_noise_at(
    noise_key: Key[Array, ""], leaf_index: int | UInt32[Array, ""], element: UInt32[Array, "..."]
) -> Float32[Array, "..."]:
    """`parameter_noise` of some elements, by their index in the flattened leaf."""
    # The barrier keeps XLA from fusing the scalar rounds that derive the leaf's key into every
    # element's own rounds, which takes its CPU compiler many seconds a leaf.
    words = jax.lax.optimization_barrier(
        counters.bind_parameter(jax.lax.optimization_barrier(words_of(noise_key)), leaf_index)
    )
    # Each element makes its own pair and takes one part of it: twice the arithmetic, but one fused
    # pass without a second copy of the leaf (on a GPU, half the time), and a sharding stays local.
    is_odd = (element & jnp.uint32(1)) == jnp.uint32(1)
    pair = lax.shift_right_logical(element, jnp.full_like(element, 1))
    drawn = threefry2x32(words[0], words[1], *counters.parameter_counter(pair))
    more, _ = threefry2x32(words[0], words[1], *counters.long_radius_counter(pair))
    cosine, sine = normal_pair(*drawn, more)
    return jnp.where(is_odd, sine, cosine)


def _flat_index(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = index + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        stride *= shape[axis]
    return index
