"""Weight gradients of single examples, with their squares, on Hopper's tensor cores.

A weight gradient contracts the tokens of one example: lhs' rhs of (T, I) and (T, O). In memory the
tokens are the slow axis of both, so the tensor cores read both operands "transposed" from shared
memory. Programs stay and walk over tiles: a producer warpgroup keeps filling a ring of operand
tiles across the end of one tile into the next, so a tile's epilogue (round, square, store) runs
behind the next one's loads, and behind the products of the warpgroups that are not there yet.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels import manual_axes
from dpfa_jax.kernels.mosaic_gpu import axes
from dpfa_jax.kernels.mosaic_gpu.layouts import WGMMA, tiled_shared
from dpfa_jax.kernels.mosaic_gpu.steps import Scalar, cdiv
from dpfa_jax.kernels.mosaic_gpu.tiles import SHARED_MEMORY_BYTES

# What is staged for one store: the rows of one instruction, 128 bytes wide as the swizzle is.
ROWS = 64
STAGED_BYTES = ROWS * 128
COLUMNS = 64  # of 16 bits; a multiple of it for 32 bits too
REGISTERS = 240  # of a thread that computes; of one that copies:
PRODUCER_REGISTERS = 24


@dataclasses.dataclass(frozen=True)
class ProductTiles:
    """Tile sizes of one product.

    Attributes:
      rows: rows of the product that one compute warpgroup owns.
      columns: columns of a tile.
      warpgroups: compute warpgroups.
      members: warpgroups that share a tile of `members * rows` by `columns`. Where fewer than all,
        the others work on the tiles that follow, so that one multiplies while one stores.
      tokens: tokens of one step.
      stages: steps in flight.
      buffers: pieces of a warpgroup's tile that wait for their store.
    """

    rows: int = 128
    columns: int = 192
    warpgroups: int = 2
    members: int = 1
    tokens: int = 64
    stages: int = 4
    buffers: int = 3

    def __post_init__(self) -> None:
        if self.rows % 64 or self.columns % COLUMNS or self.tokens % 16 or self.stages < 2:
            raise ValueError(f"{self} is no tiling: rows % 64, columns % 64, tokens % 16")
        if self.members not in (1, self.warpgroups):
            raise ValueError(f"{self}: a tile has one warpgroup or all of them")
        if self.rows // ROWS * (self.columns // COLUMNS) % self.buffers:
            raise ValueError(f"{self}: the pieces of a tile do not fill its buffers evenly")
        if self.shared_bytes > SHARED_MEMORY_BYTES:
            raise ValueError(f"{self} needs {self.shared_bytes} bytes of shared memory")

    @property
    def teams(self) -> int:
        """Tiles that a program works on at a time."""
        return self.warpgroups // self.members

    @property
    def program_rows(self) -> int:
        """Rows of one tile."""
        return self.members * self.rows

    @property
    def shared_bytes(self) -> int:
        """Shared memory of one program, for 16-bit operands."""
        operands = self.stages * self.tokens * (self.program_rows + self.columns) * 2
        return operands + self.warpgroups * (self.buffers * STAGED_BYTES + self.rows * 4)


# What one warpgroup's registers hold twice: a product and the sum of the products.
SUM_TILE = ProductTiles(rows=64, members=2)

# Tile -> time a unit of area, as measured on an H100 80GB relative to the first.
_PRODUCT_TILES = {
    ProductTiles(): 1.0,
    ProductTiles(rows=192, columns=128): 1.02,
    ProductTiles(columns=128, stages=5, buffers=4): 1.03,
}


def product_tiles(batch: int, rows: int, columns: int, processors: int) -> ProductTiles:
    """The tile for `batch` products of `rows` by `columns`."""

    def cost(tile: ProductTiles) -> float:
        tiles = batch * cdiv(rows, tile.program_rows) * cdiv(columns, tile.columns)
        area = tile.program_rows * tile.columns
        return cdiv(tiles, processors) * area * _PRODUCT_TILES[tile]

    return min(_PRODUCT_TILES, key=cost)


def batch_parts(batch: int, tiles: int, programs: int) -> int:
    """Into how many parts the batch is cut, so that the last round of programs is well filled."""

    def rounds(parts: int) -> float:
        return cdiv(parts * tiles, programs) / parts

    divisors = [parts for parts in range(1, batch + 1) if batch % parts == 0]
    fewest = min(rounds(parts) for parts in divisors)
    return next(parts for parts in divisors if rounds(parts) <= 1.05 * fewest)


class _Walk(NamedTuple):
    """Which work a program does: item `program + n * programs` for n = 0, 1, ...

    One item is a tile of the product and `examples` examples of it, one after another.
    """

    program: Scalar
    programs: int
    items: int
    row_tiles: int
    column_tiles: int
    examples: int
    steps: int

    @property
    def turns(self) -> Scalar:
        return lax.div(self.items - self.program + (self.programs - 1), jnp.int32(self.programs))

    def place(self, number: Scalar) -> tuple[Scalar, Scalar, Scalar]:
        """(part of the batch, row tile, column tile); row tiles next to each other in time."""
        item = self.program + number * self.programs
        column_item = lax.div(item, jnp.int32(self.row_tiles))
        part = lax.div(column_item, jnp.int32(self.column_tiles))
        return (
            part,
            item - column_item * self.row_tiles,
            column_item - part * self.column_tiles,
        )


def _slot(count: Scalar, stages: int) -> jax.Array:
    return lax.rem(jnp.int32(count), jnp.int32(stages))


def _produce(lhs, rhs, shared, barriers, walk: _Walk, tile: ProductTiles) -> None:
    """Streams the operand tiles of all work of this program."""

    @pl.loop(0, walk.turns)
    def _(number):
        part, row_tile, column_tile = walk.place(number)
        row_begin = row_tile * tile.program_rows
        columns = pl.ds(column_tile * tile.columns, tile.columns)

        @pl.loop(0, walk.examples * walk.steps)
        def _(local):
            count = number * (walk.examples * walk.steps) + local
            slot = _slot(count, tile.stages)
            example = lax.div(local, jnp.int32(walk.steps))
            tokens = pl.ds((local - example * walk.steps) * tile.tokens, tile.tokens)
            example = part * walk.examples + example

            @pl.when(count >= tile.stages)
            def _():
                plgpu.barrier_wait(barriers["free"].at[slot])

            full = barriers["full"].at[lax.rem(number, tile.teams) * tile.stages + slot]
            for member in range(tile.members):
                rows = pl.ds(row_begin + member * tile.rows, tile.rows)
                plgpu.copy_gmem_to_smem(
                    lhs.at[example, tokens, rows], shared["lhs"].at[slot, member], full
                )
            plgpu.copy_gmem_to_smem(
                rhs.at[example, tokens, columns],
                shared["rhs"].at[slot],
                full,
            )

    # Leave no arrival unseen.
    total = walk.turns * (walk.examples * walk.steps)

    @pl.loop(jnp.maximum(0, total - tile.stages), total)
    def _(count):
        plgpu.barrier_wait(barriers["free"].at[_slot(count, tile.stages)])


def _product(shared, barriers, first: Scalar, steps: int, tile: ProductTiles, team, member):
    """One example's tile, float32 (rows, columns): steps `first` .. `first + steps - 1`."""

    def accumulate(acc):
        @pl.loop(0, steps)
        def _(step):
            slot = _slot(first + step, tile.stages)
            plgpu.barrier_wait(barriers["full"].at[team * tile.stages + slot])
            plgpu.wgmma(acc, shared["lhs"].at[slot, member].T, shared["rhs"].at[slot])
            plgpu.wgmma_wait(1)

            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(barriers["free"].at[_slot(first + step - 1, tile.stages)])

        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(barriers["free"].at[_slot(first + steps - 1, tile.stages)])
        return acc[...]

    return pl.run_scoped(accumulate, plgpu.ACC((tile.rows, tile.columns), jnp.float32))


def _each_tile(body, walk: _Walk, tile: ProductTiles, warpgroup) -> None:
    """Calls body(number, team, member) for the tiles of one compute warpgroup."""
    if tile.teams == 1:
        pl.loop(0, walk.turns)(lambda number: body(number, 0, warpgroup))
        return

    @pl.loop(0, lax.div(walk.turns - warpgroup + (tile.teams - 1), jnp.int32(tile.teams)))
    def _(turn):
        body(turn * tile.teams + warpgroup, warpgroup, 0)


def _staging(tile: ProductTiles, dtype: Any) -> Any:
    columns = STAGED_BYTES // ROWS // jnp.dtype(dtype).itemsize
    return tiled_shared((tile.warpgroups, tile.buffers, ROWS, columns), dtype)


def _store(values, target, staging, row: Scalar, column: Scalar) -> None:
    """Begins to store a warpgroup's tile at (row, column), piece by piece through its buffers."""
    rows, columns = values.shape
    buffers, _, width = staging.shape
    for piece in range(rows // ROWS * (columns // width)):
        down, right = divmod(piece, columns // width)
        down, right = down * ROWS, right * width
        staged = staging.at[piece % buffers]
        plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
        staged[...] = values[down : down + ROWS, right : right + width]
        plgpu.commit_smem()
        place = (pl.ds(row + down, ROWS), pl.ds(column + right, width))
        plgpu.copy_smem_to_gmem(staged, target.at[place])


def _launch(compute, operands, out_type, shared, walk_of, tile, programs, name, interpret):
    """Runs `compute(in_refs, out_refs, shared, barriers, walk, warpgroup)` per warpgroup."""
    simulate = interpret is not None
    # A thread must see every turn of a barrier, so each team has its own.
    full = {"num_arrivals": tile.members + 1, "num_barriers": tile.teams * tile.stages}
    freed = {"num_arrivals": tile.members, "num_barriers": tile.stages}
    barriers = {"full": plgpu.Barrier(**full), "free": plgpu.Barrier(**freed)}
    dtype = operands[0].dtype
    shared = {
        "lhs": tiled_shared((tile.stages, tile.members, tile.tokens, tile.rows), dtype),
        "rhs": tiled_shared((tile.stages, tile.tokens, tile.columns), dtype),
        **shared,
    }

    def kernel(*refs):
        in_refs = refs[: len(operands)]
        out_refs = refs[len(operands) : len(operands) + len(out_type)]
        shared_refs, barrier_refs = refs[len(operands) + len(out_type) :]
        warpgroup = lax.axis_index(axes.WARPGROUP)
        walk = walk_of(lax.axis_index(axes.PROGRAM))

        @pl.when(warpgroup < tile.warpgroups)
        def _():
            if not simulate:
                plgpu.set_max_registers(REGISTERS, action="increase")
            compute(in_refs, out_refs, shared_refs, barrier_refs, walk, warpgroup)

        @pl.when(warpgroup == tile.warpgroups)
        def _():
            if not simulate:
                plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            _produce(in_refs[0], in_refs[1], shared_refs, barrier_refs, walk, tile)

    return plgpu.kernel(
        kernel,
        out_type=tuple(manual_axes.result(x.shape, x.dtype, operands[0]) for x in out_type),
        scratch_types=(shared, barriers),
        grid=(programs,),
        grid_names=(axes.PROGRAM,),
        num_threads=tile.warpgroups + 1,
        thread_name=axes.WARPGROUP,
        # Sums along a row stay inside a quad of lanes: they need no shared memory.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name=name,
        interpret=interpret,
    )(*operands)


def _tiles(lhs: jax.Array, rhs: jax.Array, tile: ProductTiles) -> tuple[int, int, int]:
    """(row tiles, column tiles, steps)."""
    tokens, rows = lhs.shape[1:]
    return (
        cdiv(rows, tile.program_rows),
        cdiv(rhs.shape[2], tile.columns),
        cdiv(tokens, tile.tokens),
    )


def product_squares(
    lhs: jax.Array,
    rhs: jax.Array,
    tile: ProductTiles,
    *,
    unit: float,
    store: bool,
    processors: int,
    interpret: Any = None,
) -> tuple[jax.Array | None, jax.Array]:
    """The products and sums of squares along parts of their rows.

    Args:
      lhs: (B, T, I), rhs: (B, T, O); T a multiple of 8, I and O of 64.
      tile: tile sizes.
      unit: squares are those of the stored numbers over `unit`.
      store: whether the products are wanted.
      processors: of the GPU; programs stay on them.
      interpret: parameters of the Mosaic GPU simulator, None on a GPU.

    Returns: products (B, I, O) or None; squares (B, column tiles, rows) float32, to be added up.
    """
    batch, _, rows = lhs.shape
    columns, dtype = rhs.shape[2], lhs.dtype
    row_tiles, column_tiles, steps = _tiles(lhs, rhs, tile)
    programs = max(1, min(batch * row_tiles * column_tiles, processors))

    def walk_of(program):
        items = batch * row_tiles * column_tiles
        return _Walk(program, programs, items, row_tiles, column_tiles, 1, steps)

    def compute(in_refs, out_refs, shared, barriers, walk, warpgroup):
        squares_out = out_refs[-1]

        def one_tile(number, team, member):
            example, row_tile, column_tile = walk.place(number)
            row = row_tile * tile.program_rows + member * tile.rows
            column = column_tile * tile.columns
            product = _product(shared, barriers, number * steps, steps, tile, team, member)
            stored = product.astype(dtype)
            if store:
                target = out_refs[0].at[example]
                _store(stored, target, shared["out"].at[warpgroup], row, column)
            scaled = stored.astype(jnp.float32)
            if unit != 1.0:
                scaled *= 1.0 / unit
            sums = (scaled * scaled).sum(axis=1)
            plgpu.wait_smem_to_gmem(tile.buffers if store else 0, wait_read_only=True)
            squares = shared["squares"].at[warpgroup]
            squares[...] = sums
            plgpu.commit_smem()
            own_rows = pl.ds(row, tile.rows)
            plgpu.copy_smem_to_gmem(squares, squares_out.at[example, column_tile, own_rows])

        _each_tile(one_tile, walk, tile, warpgroup)
        plgpu.wait_smem_to_gmem(0)

    squares_rows = row_tiles * tile.program_rows
    out_type = [jax.ShapeDtypeStruct((batch, column_tiles, squares_rows), jnp.float32)]
    shared = {"squares": plgpu.SMEM((tile.warpgroups, tile.rows), jnp.float32)}
    if store:
        out_type.insert(0, jax.ShapeDtypeStruct((batch, rows, columns), dtype))
        shared["out"] = _staging(tile, dtype)
    *products, squares = _launch(
        compute, (lhs, rhs), out_type, shared, walk_of, tile, programs,
        "dpfa_gradient_products", interpret,
    )  # fmt: skip
    return (products[0] if products else None), squares


def weighted_sum(
    lhs: jax.Array,
    rhs: jax.Array,
    scales: jax.Array,
    tile: ProductTiles,
    *,
    processors: int,
    interpret: Any = None,
) -> jax.Array:
    """Sums over parts of the batch of scale times product, each product rounded to its dtype.

    Args: as `product_squares`; `scales`: (B,) float32. A scale of zero leaves its example out.

    Returns: (parts, I, O) float32, to be added up. One program adds its examples in order.
    """
    batch, _, rows = lhs.shape
    columns, dtype = rhs.shape[2], lhs.dtype
    row_tiles, column_tiles, steps = _tiles(lhs, rhs, tile)
    parts = batch_parts(batch, row_tiles * column_tiles, processors)
    items = parts * row_tiles * column_tiles
    programs = max(1, min(items, processors))
    examples = batch // parts

    def walk_of(program):
        return _Walk(program, programs, items, row_tiles, column_tiles, examples, steps)

    def compute(in_refs, out_refs, shared, barriers, walk, warpgroup):
        def one_tile(number, team, member):
            part, row_tile, column_tile = walk.place(number)
            row = row_tile * tile.program_rows + member * tile.rows
            column = column_tile * tile.columns

            def add(example, total):
                first = (number * examples + example) * steps
                product = _product(shared, barriers, first, steps, tile, team, member)
                product = product.astype(dtype).astype(jnp.float32)
                scale = jnp.full_like(product, in_refs[2][part * examples + example])
                # A select, not only a product: 0 * NaN is NaN.
                return total + jnp.where(scale > 0.0, product, 0.0) * scale

            zeros = jnp.zeros((tile.rows, tile.columns), jnp.float32)
            total = lax.fori_loop(0, examples, add, plgpu.layout_cast(zeros, WGMMA))
            _store(total, out_refs[0].at[part], shared["out"].at[warpgroup], row, column)

        _each_tile(one_tile, walk, tile, warpgroup)
        plgpu.wait_smem_to_gmem(0)

    shared = {"out": _staging(tile, jnp.float32)}
    out_type = (jax.ShapeDtypeStruct((parts, rows, columns), jnp.float32),)
    (sums,) = _launch(
        compute, (lhs, rhs, scales), out_type, shared, walk_of, tile, programs,
        "dpfa_weighted_product_sum", interpret,
    )  # fmt: skip
    return sums
