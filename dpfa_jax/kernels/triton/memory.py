"""Memory readout, sum form: (N, Z) under a public maximum, noised, snapped and divided.

One program owns `block_q` query rows of one head and sums `block_kv` keys at a time. A step's
sums are float32; steps are combined in two floats (`kernels.compensated`). With b = 32 keys a step
and a tensor core that truncates, a step errs by at most (b + 2) 2^-23 sum |e_j (v_j, kappa)|, hence
two neighbours by 2 (b + 2) b 2^-23 = 2.6e-4 of one key's largest share: inside the 1e-3 that the
sensitivity holds for it.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels import compensated
from dpfa_jax.kernels.base import AttentionSpec, MemoryReadout
from dpfa_jax.kernels.compensated import TwoFloat
from dpfa_jax.kernels.triton import logits
from dpfa_jax.kernels.triton.forward import NoiseArrays
from dpfa_jax.kernels.triton.launch import launch
from dpfa_jax.kernels.triton.logits import Arrays, Place
from dpfa_jax.kernels.triton.noise import snapped_two
from dpfa_jax.kernels.triton.tiles import Tiles

# The bound above; larger steps would break it.
MOST_KEYS_A_STEP = 32


def _body(
    operands: tuple[Arrays, NoiseArrays], output: Any, *, spec: AttentionSpec, tile: Tiles
) -> None:
    arrays, noise = operands
    readout = spec.readout
    assert isinstance(readout, MemoryReadout)
    block, head, batch = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    length, keys = arrays.query.shape[1], arrays.key.shape[1]
    kv_head = lax.div(head, jnp.int32(arrays.group))
    rows = logits.indices(block * tile.block_q, tile.block_q)
    key_length, query_length = arrays.key_length(batch), arrays.query_length(batch)
    is_row = rows < length if length % tile.block_q else None
    query = logits.load_rows(arrays.query, batch, rows, head, is_row)
    base = logits.Base.of(query.dtype)
    bound = readout.logit_bound * base.unit

    def step(j: jax.Array, carry: tuple[TwoFloat, TwoFloat]) -> tuple[TwoFloat, TwoFloat]:
        numerator, normaliser = carry
        columns = logits.indices(j * tile.block_kv, tile.block_kv)
        place = Place(batch, head, rows, columns)
        is_key = columns < keys
        key = logits.load_rows(arrays.key, batch, columns, kv_head, is_key)
        value = logits.load_rows(arrays.value, batch, columns, kv_head, is_key)
        s, _ = logits.tile_logits(spec, arrays, place, query, key)
        # A NaN logit counts as the smallest one.
        s = jnp.where(s == s, jnp.minimum(s, bound), -jnp.inf)
        weights = jnp.minimum(base.power(s - bound), 1.0)
        seen = logits.visible(spec, arrays, place, key_length)
        if query_length is not None:
            seen = seen & (rows < query_length)[:, None]
        # Rounded once; numerator and normaliser use the same number.
        rounded = jnp.where(seen, weights, 0.0).astype(value.dtype)
        share = jnp.sum(rounded.astype(jnp.float32), axis=1) * readout.weight_scale
        numerator = compensated.add(numerator, logits.dot(rounded, value))
        return numerator, compensated.add(normaliser, share)

    zeros = jnp.zeros(query.shape, jnp.float32)
    none = jnp.zeros((tile.block_q,), jnp.float32)
    # Every key is visited, hidden or not: the order of the sums is a public matter.
    numerator, normaliser = lax.fori_loop(
        0, pl.cdiv(keys, tile.block_kv), step, (TwoFloat(zeros, zeros), TwoFloat(none, none))
    )
    stddev, inverse_grid, grid = (noise.per_head[batch, head, part] for part in range(3))
    stream = noise.stream(batch, head)
    drawn = stream.columns(rows, query.shape[1]) * stddev
    released = snapped_two(*compensated.add(numerator, drawn), inverse_grid, grid)
    drawn = stream.column(rows, arrays.query.shape[3]) * stddev
    total = snapped_two(*compensated.add(normaliser, drawn), inverse_grid, grid)
    total = jnp.maximum(total / readout.weight_scale, readout.floor)
    logits.store_rows(output, batch, rows, head, released / total[:, None], length)


def memory_forward(
    spec: AttentionSpec, arrays: Arrays, noise: NoiseArrays, tile: Tiles, *, interpret: bool
) -> jax.Array:
    """The released answer, in the query's dtype. `arrays.value` holds rows clipped as stored."""
    assert tile.block_kv <= MOST_KEYS_A_STEP
    batch, length, heads, _ = arrays.query.shape
    shape = jax.ShapeDtypeStruct(arrays.query.shape, arrays.query.dtype)
    grid = (pl.cdiv(length, tile.block_q), heads, batch)
    (output,) = launch(
        _body, (arrays, noise), [shape], grid, tile, name="memory", interpret=interpret, spec=spec
    )
    return output
