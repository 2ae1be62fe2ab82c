"""Clip, noise and grid of one tile."""

import jax
import jax.numpy as jnp
from jax import lax

from dpfa_jax.clipping.float_rows import norm_limit, unit_scale
from dpfa_jax.noise.counters import BATCH_BITS, HEAD_BITS, ROW_BITS, attention_counter
from dpfa_jax.noise.grid import snap
from dpfa_jax.noise.normals import normal_pair
from dpfa_jax.noise.threefry import threefry2x32


def clip_rows(x: jax.Array, l2_clip_norm: float) -> jax.Array:
    """Rows of norm <= l2_clip_norm; a row that holds NaN or an infinity becomes zero.

    `clipping.rows.clip_rows` with more room, for the GPU's quotient and root.
    """
    limit = norm_limit(l2_clip_norm, x.shape[1], is_approximate=True)
    is_odd = jnp.max(jnp.where(jnp.abs(x) < jnp.inf, 0.0, 1.0), axis=1) > 0.0
    x = jnp.where(is_odd[:, None], 0.0, x)
    scale = unit_scale(jnp.max(jnp.abs(x), axis=1))
    scaled = x * scale[:, None]
    squares = jnp.sum(scaled * scaled, axis=1)
    length = jnp.sqrt(jnp.where(squares > 0.0, squares, 1.0))
    keeps = (squares == 0.0) | (length <= limit * scale)
    return jnp.where(keeps[:, None], x, scaled * (limit / length)[:, None])


class Stream:
    """The noise of one head of one batch row: key words, and the upper word of its counters."""

    def __init__(
        self, key_words: tuple[jax.Array, jax.Array], batch_index: jax.Array, head: jax.Array
    ):
        self.key_words, self.batch, self.head = key_words, batch_index, head
        # What lies beyond would repeat a counter; only a traced index can reach it.
        self.is_inside = (batch_index < jnp.uint32(2**BATCH_BITS)) & (
            head < jnp.uint32(2**HEAD_BITS)
        )

    def pairs(self, rows: jax.Array, pair: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(cosine, sine) normals of the columns (2 pair, 2 pair + 1) of some rows, (R, P)."""
        shape = (len(rows), len(pair))
        row = jnp.broadcast_to(rows.astype(jnp.uint32)[:, None], shape)
        pair = jnp.broadcast_to(pair.astype(jnp.uint32)[None, :], shape)
        high, low = attention_counter(
            jnp.broadcast_to(self.batch, shape), jnp.broadcast_to(self.head, shape), row, pair
        )
        both = normal_pair(*threefry2x32(*self.key_words, high, low))
        is_inside = self.is_inside & (row < jnp.uint32(2**ROW_BITS))
        cosine, sine = (jnp.where(is_inside, z, jnp.nan) for z in both)
        return cosine, sine

    def columns(self, rows: jax.Array, count: int) -> jax.Array:
        """Normals of columns 0 .. count - 1 (a power of two), (R, count)."""
        cosine, sine = self.pairs(rows, lax.iota(jnp.int32, count // 2))
        return jnp.stack([cosine, sine], axis=-1).reshape(len(rows), count)

    def column(self, rows: jax.Array, index: int) -> jax.Array:
        """Normals of one column, (R,)."""
        # A tile of one column has no layout of its own: sixteen are made and the first is kept.
        lane = lax.iota(jnp.int32, 16)
        drawn = self.pairs(rows, lane + index // 2)[index % 2]
        return jnp.sum(jnp.where(lane[None, :] == 0, drawn, 0.0), axis=1)


def snapped(x: jax.Array, inverse_grid: jax.Array, grid: jax.Array) -> jax.Array:
    """Nearest multiples of `grid`, a power of two. Its inverse is given: the GPU's quotient of two
    powers of two need not be one."""
    return snap(x * inverse_grid, 1.0) * grid


def snapped_two(
    high: jax.Array, low: jax.Array, inverse_grid: jax.Array, grid: jax.Array
) -> jax.Array:
    """Multiples of `grid` nearest high + low."""
    scaled = high * inverse_grid
    near = snap(scaled, 1.0)
    rest = (scaled - near) + low * inverse_grid
    return (near + snap(rest, 1.0)) * grid
