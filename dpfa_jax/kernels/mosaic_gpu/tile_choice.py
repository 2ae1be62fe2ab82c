"""Tiles of a call: measured ones where this device has a table, else the heuristic of `tiles`."""

import dataclasses
from typing import Any

from dpfa_jax.kernels import tile_tables
from dpfa_jax.kernels.base import AttentionSpec, Plain
from dpfa_jax.kernels.mosaic_gpu import tiles
from dpfa_jax.kernels.mosaic_gpu.tiles import BackwardTiles, ForwardTiles, FusedTiles, WideTiles
from dpfa_jax.kernels.tile_tables import Fields

# "kernels" of a backward entry: which kernels run.
BACKWARD_KINDS: dict[str, type[BackwardTiles] | type[FusedTiles]] = {
    "two": BackwardTiles,
    "fused": FusedTiles,
}


def forward_key(spec: AttentionSpec, head_size: int, keys: int) -> str:
    """Key of a forward call without arrays of pairs."""
    return tile_tables.key_of(
        "mosaic_gpu/forward",
        head_size,
        tile_tables.mask_class(spec),
        tile_tables.length_class(keys),
        tile_tables.readout_class(spec),
    )


def backward_key(spec: AttentionSpec, head_size: int, length: int) -> str:
    """Key of a backward call without arrays of pairs."""
    return tile_tables.key_of(
        "mosaic_gpu/backward",
        head_size,
        tile_tables.mask_class(spec),
        tile_tables.length_class(length),
        "same bits" if spec.deterministic else "any order",
    )


def forward_tiles(
    spec: AttentionSpec,
    head_size: int,
    keys: int,
    *,
    has_public_maximum: bool = False,
    pair_bytes: int | None = None,
    noise_pass: bool | None = None,
) -> ForwardTiles:
    """As `tiles.forward_tiles`; calls with a public maximum, mask or bias are in no table."""
    sizes: dict[str, Any] = {"has_public_maximum": has_public_maximum, "pair_bytes": pair_bytes}
    is_noisy = not isinstance(spec.readout, Plain)
    if pair_bytes is None and not has_public_maximum:
        found = tile_tables.measured(
            forward_key(spec, head_size, keys),
            lambda fields: forward_tile(fields, is_noisy=is_noisy),
            lambda tile: (
                fits_forward(tile, head_size) and noise_pass in (None, not tile.noise_warpgroup)
            ),
        )
        if found is not None:
            return found
    tile = tiles.forward_tiles(spec, head_size, keys, **sizes, noise_pass=noise_pass)
    if is_noisy and not tile.noise_warpgroup:  # the plain kernel, which may be in a table
        return forward_tiles(dataclasses.replace(spec, readout=Plain()), head_size, keys, **sizes)
    return tile


def backward_tiles(
    spec: AttentionSpec, head_size: int, length: int, *, pair_bytes: int | None = None
) -> BackwardTiles | FusedTiles | WideTiles:
    """As `tiles.backward_tiles`; calls with a mask or a bias are in no table."""
    found = None
    if pair_bytes is None:
        found = tile_tables.measured(
            backward_key(spec, head_size, length),
            backward_tile,
            lambda tile: fits_backward(tile, head_size),
        )
    return found or tiles.backward_tiles(spec, head_size, length, pair_bytes=pair_bytes)


def forward_tile(fields: Fields, *, is_noisy: bool) -> ForwardTiles:
    """Of a table's fields; without noise no warpgroup makes any. Errors: TypeError, ValueError."""
    tile = ForwardTiles(**fields)  # type: ignore[arg-type]
    return tile if is_noisy else dataclasses.replace(tile, noise_warpgroup=False)


def backward_tile(fields: Fields) -> BackwardTiles | FusedTiles:
    """Of a table's fields. Errors: KeyError, TypeError."""
    sizes = dict(fields)
    return BACKWARD_KINDS[str(sizes.pop("kernels"))](**sizes)  # type: ignore[arg-type]


def fits_forward(tile: ForwardTiles, head_size: int) -> bool:
    """Whether one program's shared memory holds it."""
    return tile.shared_bytes(head_size) <= tiles.SHARED_MEMORY_BYTES


def fits_backward(tile: BackwardTiles | FusedTiles, head_size: int) -> bool:
    """Whether the kernels serve the head size and shared memory holds the tile."""
    if head_size > tiles.MAX_HEAD_SIZE_ONE_WARPGROUP:
        return False
    if isinstance(tile, FusedTiles):
        return True
    owned_and_streamed = (
        (tile.block_q_dq, tile.block_kv_dq),
        (tile.block_kv_dkv, tile.block_q_dkv),
    )
    return all(
        (tiles.COMPUTE_WARPGROUPS * owned + tile.stages * streamed) * head_size * 4
        <= tiles.SHARED_MEMORY_BYTES
        for owned, streamed in owned_and_streamed
    )
