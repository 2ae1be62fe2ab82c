"""Masks and biases, an entry for each pair of query row and key: how they reach a tile of logits.

A kernel owns the rows of its tiles (queries; keys where the tile is turned over) and steps along
their columns. What differs from step to step comes through a ring of its own in shared memory,
filled by the producer; a mask as one bit a pair.
"""

import dataclasses
import enum
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.mosaic_gpu.layouts import COLUMN, ROW, WGMMA, tiled_shared
from dpfa_jax.kernels.mosaic_gpu.steps import Scalar, most
from dpfa_jax.kernels.mosaic_gpu.tiles import COMPUTE_WARPGROUPS, WARPGROUP_ROWS

WORD = 32  # columns in one word of a packed mask
PROGRAM_ROWS = COMPUTE_WARPGROUPS * WARPGROUP_ROWS
COLUMN_MULTIPLE = 256  # of every kernel's step


class Form(enum.Enum):
    """How an array of pairs lies in memory; b and n are full or 1.

    TILES: (b, n, R, C), a bias in its own dtype. BITS: (b, n, C / 32, R / 64, 64) uint32, a mask.
    COLUMNS: (b, n, C) float32, the same for each row. ROWS: (b, n, R) float32, for each column.
    """

    TILES = enum.auto()
    BITS = enum.auto()
    COLUMNS = enum.auto()
    ROWS = enum.auto()


class PairArrays(NamedTuple):
    """Mask and bias as `arranged`, and their forms; None where there is none."""

    mask: Any = None
    bias: Any = None
    mask_form: Form | None = None
    bias_form: Form | None = None

    @property
    def is_there(self) -> bool:
        """Whether there is a mask or a bias."""
        return self.mask_form is not None or self.bias_form is not None


class Fixed(NamedTuple):
    """What is the same in each step of a program: a number for each row."""

    mask: jax.Array | None = None
    bias: jax.Array | None = None


def arranged(
    mask: jax.Array | None, bias: jax.Array | None, *, rows: int, is_turned: bool = False
) -> PairArrays:
    """(b, n, t, s) arrays as a kernel reads them; `is_turned`: its rows are the keys.

    `rows` counts the queries, or where turned the keys.
    """
    mask_form = bias_form = None
    if mask is not None:
        mask_form = _form(mask.shape, Form.BITS, is_turned)
        if mask_form is Form.BITS:
            mask = _packed(mask, is_turned)
        else:
            mask = _line(mask.astype(jnp.float32), mask_form, rows)
    if bias is not None:
        bias_form = _form(bias.shape, Form.TILES, is_turned)
        if bias_form is not Form.TILES:
            bias = _line(bias.astype(jnp.float32), bias_form, rows)
        else:
            if bias.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
                bias = bias.astype(jnp.float32)
            bias = _padded(jnp.swapaxes(bias, 2, 3) if is_turned else bias)
    return PairArrays(mask, bias, mask_form, bias_form)


def _form(shape: tuple[int, ...], full: Form, is_turned: bool) -> Form:
    rows, columns = shape[2:][::-1] if is_turned else shape[2:]
    if columns == 1:
        return Form.ROWS
    return Form.COLUMNS if rows == 1 else full


def _line(x: jax.Array, form: Form, rows: int) -> jax.Array:
    """(b, n, t, s), of which t or s is 1, as (b, n, R or C) in whole tiles."""
    line = x.reshape(*x.shape[:2], -1)
    if form is Form.ROWS:
        line = jnp.broadcast_to(line, (*line.shape[:2], rows))
    multiple = PROGRAM_ROWS if form is Form.ROWS else COLUMN_MULTIPLE
    return jnp.pad(line, ((0, 0), (0, 0), (0, -line.shape[2] % multiple)))


def _padded(bias: jax.Array) -> jax.Array:
    """Zeros up to whole tiles of shared memory."""
    multiple = 128 // bias.dtype.itemsize
    return jnp.pad(bias, ((0, 0), (0, 0), (0, -bias.shape[2] % 8), (0, -bias.shape[3] % multiple)))


def _packed(mask: jax.Array, is_turned: bool) -> jax.Array:
    """Bits along the columns; zeros, which hide, past the ends."""
    row_axis, column_axis = (3, 2) if is_turned else (2, 3)
    more = [(0, 0)] * 4
    more[row_axis] = (0, -mask.shape[row_axis] % PROGRAM_ROWS)
    more[column_axis] = (0, -mask.shape[column_axis] % COLUMN_MULTIPLE)
    mask = jnp.pad(mask, more)
    batch, heads, *sizes = mask.shape
    sizes[column_axis - 2 : column_axis - 1] = [sizes[column_axis - 2] // WORD, WORD]
    place = column_axis + 1
    bit = lax.broadcasted_iota(jnp.uint32, (batch, heads, *sizes), place)
    bits = jnp.where(mask.reshape(batch, heads, *sizes), jnp.uint32(1) << bit, jnp.uint32(0))
    words = bits.sum(place, dtype=jnp.uint32)  # (b, n, T, S / 32), or (b, n, T / 32, S)
    words = words if is_turned else jnp.swapaxes(words, 2, 3)
    return words.reshape(*words.shape[:3], -1, WARPGROUP_ROWS)


def _copies(pairs: PairArrays, readers: int) -> int:
    """Copies that fill one slot."""
    copies = int(pairs.mask_form in (Form.BITS, Form.COLUMNS))
    if pairs.bias_form is Form.TILES:
        return copies + readers
    return copies + (pairs.bias_form is Form.COLUMNS)


def bytes_per_column(mask: Any, bias: Any) -> int | None:
    """Shared memory of one column of one slot, of (b, n, t, s) arrays; None without any."""
    if mask is None and bias is None:
        return None
    needed = 0
    if mask is not None:
        form = _form(mask.shape, Form.BITS, is_turned=False)
        needed += {Form.BITS: PROGRAM_ROWS // 8, Form.COLUMNS: 4}.get(form, 0)
    if bias is not None:
        form = _form(bias.shape, Form.TILES, is_turned=False)
        itemsize = 2 if bias.dtype in (jnp.bfloat16, jnp.float16) else 4
        needed += {Form.TILES: PROGRAM_ROWS * itemsize, Form.COLUMNS: 4}.get(form, 0)
    return needed


def is_shared_by_batch(pairs: PairArrays) -> bool:
    """Whether each example reads the same tiles of bias.

    Tiles of one head in all batch rows are then taken together, and find its bias in the
    second-level cache.
    """
    return pairs.bias_form is Form.TILES and pairs.bias.shape[0] == 1


def scratch(
    pairs: PairArrays, stages: int, columns: int, readers: int = COMPUTE_WARPGROUPS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shared memory and barriers of the ring; `columns`, `readers`: as `PairReader`."""
    copies = _copies(pairs, readers)
    if not copies:
        return {}, {}
    shared = {}
    line = plgpu.SMEM((stages, columns), jnp.float32)
    if pairs.mask_form is Form.BITS:
        words = (stages, columns // WORD, readers, WARPGROUP_ROWS)
        shared["mask"] = plgpu.SMEM(words, jnp.uint32)
    elif pairs.mask_form is Form.COLUMNS:
        shared["mask"] = line
    if pairs.bias_form is Form.TILES:
        shape = (stages * readers, WARPGROUP_ROWS, columns)
        shared["bias"] = tiled_shared(shape, pairs.bias.dtype)
    elif pairs.bias_form is Form.COLUMNS:
        shared["bias"] = line
    return shared, {
        "pairs": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "pairs_free": plgpu.Barrier(num_arrivals=readers, num_barriers=stages),
    }


def place(array: Any, batch: Scalar, head: Scalar) -> tuple[Scalar, Scalar]:
    """Index of the first two axes: 0 along one that is broadcast."""
    return (0 if array.shape[0] == 1 else batch, 0 if array.shape[1] == 1 else head)


@dataclasses.dataclass(frozen=True)
class PairReader:
    """Mask and bias inside a kernel.

    Attributes:
      pairs: references instead of arrays.
      shared, barriers: the kernel's, with those of `scratch` among them.
      stages: slots of the ring.
      columns: of one step.
      readers: warpgroups that read, each 64 rows of its own.
    """

    pairs: PairArrays
    shared: dict[str, Any]
    barriers: dict[str, Any]
    stages: int
    columns: int
    readers: int = COMPUTE_WARPGROUPS

    @property
    def _copies(self) -> int:
        return _copies(self.pairs, self.readers)

    def _slot(self, count: Scalar) -> jax.Array:
        return lax.rem(jnp.int32(count), jnp.int32(self.stages))

    def load(self, count: Scalar, batch: Scalar, head: Scalar, block: Scalar, step: Scalar) -> None:
        """The producer's part of a step: `count` steps came before it in the program.

        `block`: which rows, in units of a program's; `step`: which columns.
        """
        if not self._copies:
            return
        slot = self._slot(count)

        @pl.when(count >= self.stages)
        def _():
            plgpu.barrier_wait(self.barriers["pairs_free"].at[slot])

        def copy(source: Any, target: Any) -> None:
            plgpu.copy_gmem_to_smem(source, target, self.barriers["pairs"].at[slot])

        columns = pl.ds(step * self.columns, self.columns)
        mask, bias = self.pairs.mask, self.pairs.bias
        if self.pairs.mask_form is Form.BITS:
            count_words = self.columns // WORD
            words = pl.ds(step * count_words, count_words)
            rows = pl.ds(block * self.readers, self.readers)
            copy(mask.at[(*place(mask, batch, head), words, rows)], self.shared["mask"].at[slot])
        elif self.pairs.mask_form is Form.COLUMNS:
            copy(mask.at[(*place(mask, batch, head), columns)], self.shared["mask"].at[slot])
        if self.pairs.bias_form is Form.TILES:
            for group in range(self.readers):
                rows = pl.ds((block * self.readers + group) * WARPGROUP_ROWS, WARPGROUP_ROWS)
                copy(
                    bias.at[(*place(bias, batch, head), rows, columns)],
                    self.shared["bias"].at[slot * self.readers + group],
                )
        elif self.pairs.bias_form is Form.COLUMNS:
            copy(bias.at[(*place(bias, batch, head), columns)], self.shared["bias"].at[slot])

    def drain(self, total: Scalar) -> None:
        """Sees the last arrivals, so that no barrier ends in an unobserved phase."""
        if not self._copies:
            return

        @pl.loop(most(0, total - self.stages), total)
        def _(count):
            plgpu.barrier_wait(self.barriers["pairs_free"].at[self._slot(count)])

    def fixed(self, batch: Scalar, head: Scalar, rows: Any) -> Fixed:
        """What one warpgroup's `rows` keep through all steps."""

        def line(array: Any, form: Form | None) -> jax.Array | None:
            if form is not Form.ROWS:
                return None
            at = (*place(array, batch, head), rows)
            return plgpu.load(array.at[at], layout=ROW, optimized=False)

        pairs = self.pairs
        return Fixed(line(pairs.mask, pairs.mask_form), line(pairs.bias, pairs.bias_form))

    def read(
        self, count: Scalar, warpgroup: Scalar, fixed: Fixed
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """(which pairs the mask shows, bias in float32) of one warpgroup's rows in a step."""
        shape = (WARPGROUP_ROWS, self.columns)
        slot = self._slot(count)

        def of_columns(lines: Any) -> jax.Array:
            line = plgpu.load(lines.at[slot], layout=COLUMN)
            return lax.broadcast_in_dim(line, shape, [1])

        if self._copies:
            plgpu.barrier_wait(self.barriers["pairs"].at[slot])
        seen, bias = fixed
        if seen is not None:
            seen = lax.broadcast_in_dim(seen, shape, [0]) > 0.5
        if bias is not None:
            bias = lax.broadcast_in_dim(bias, shape, [0])
        if self.pairs.mask_form is Form.BITS:
            words = [
                plgpu.load(self.shared["mask"].at[slot, word, warpgroup], layout=ROW)
                for word in range(self.columns // WORD)
            ]
            seen = _unpacked(words, shape)
        elif self.pairs.mask_form is Form.COLUMNS:
            seen = of_columns(self.shared["mask"]) > 0.5
        if self.pairs.bias_form is Form.TILES:
            tile = self.shared["bias"].at[slot * self.readers + warpgroup]
            bias = plgpu.load(tile, layout=WGMMA).astype(jnp.float32)
        elif self.pairs.bias_form is Form.COLUMNS:
            bias = of_columns(self.shared["bias"])
        return seen, bias

    def free(self, count: Scalar) -> None:
        """One warpgroup has used what it `read`."""
        if self._copies:
            plgpu.barrier_arrive(self.barriers["pairs_free"].at[self._slot(count)])

    def skip(self, count: Scalar) -> None:
        """One warpgroup needs nothing of a step."""
        if self._copies:
            plgpu.barrier_wait(self.barriers["pairs"].at[self._slot(count)])
            self.free(count)


def _unpacked(words: list[jax.Array], shape: tuple[int, int]) -> jax.Array:
    parts = [lax.broadcast_in_dim(word, (shape[0], WORD), [0]) for word in words]
    word = jnp.concatenate(parts, axis=1)
    column = plgpu.broadcasted_iota(jnp.uint32, shape, 1, layout=WGMMA)
    # Two bits of the column are the lane's, the others are constants of a register: one shift a
    # word, one test a pair.
    shifted = word >> (column & jnp.uint32(6))
    return (shifted & (jnp.uint32(1) << (column & jnp.uint32(25)))) != jnp.uint32(0)
