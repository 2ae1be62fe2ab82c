"""Tiles of a call: measured ones where this device has a table, else those of `tiles`."""

import functools

from dpfa_jax.kernels import tile_tables
from dpfa_jax.kernels.tile_tables import Fields
from dpfa_jax.kernels.triton import tiles
from dpfa_jax.kernels.triton.tiles import KernelTiles, Tiles

# The memory kernel's step is part of its sensitivity bound: it is in no table.
MEASURED = ("forward", "queries", "keys")


def key_of(kernel: str, head_size: int, itemsize: int) -> str:
    """Key of one kernel."""
    return tile_tables.key_of(f"triton/{kernel}", head_size, f"{8 * itemsize} bits")


def kernel_tiles(head_size: int, itemsize: int) -> KernelTiles:
    """As `tiles.kernel_tiles`."""
    found = {
        kernel: tile_tables.measured(
            key_of(kernel, head_size, itemsize),
            tile_of,
            functools.partial(fits, kernel, head_size=head_size, itemsize=itemsize),
        )
        for kernel in MEASURED
    }
    chosen = {kernel: tile for kernel, tile in found.items() if tile is not None}
    return tiles.kernel_tiles(head_size, itemsize)._replace(**chosen)


def tile_of(fields: Fields) -> Tiles:
    """Of a table's fields. Errors: TypeError, ValueError."""
    return Tiles(**fields)  # type: ignore[arg-type]


def fits(kernel: str, tile: Tiles, *, head_size: int, itemsize: int) -> bool:
    """Whether the operands of one program fit the least shared memory that is served."""
    rows = {
        "forward": tile.block_q + 2 * tile.stages * tile.block_kv,
        "queries": 2 * tile.block_q + 2 * tile.stages * tile.block_kv,
        "keys": 2 * tile.block_kv + 2 * tile.stages * tile.block_q,
    }
    return rows[kernel] * head_size * itemsize <= tiles.SHARED_MEMORY_BYTES
