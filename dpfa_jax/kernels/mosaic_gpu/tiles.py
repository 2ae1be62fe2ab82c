"""Sizes of the tiles of each kernel: what fits a processor, and of that what was measured."""

import dataclasses
import math

from dpfa_jax.kernels.base import AttentionSpec, ExampleReadout
from dpfa_jax.kernels.mosaic_gpu.steps import cdiv, is_dense

# Shared memory that one block of a Hopper GPU can own, less room for barriers.
SHARED_MEMORY_BYTES = 227 * 1024 - 1024
SHARED_MEMORY_ALIGNMENT = 1024  # of each array in it
WARPGROUP_ROWS = 64
COMPUTE_WARPGROUPS = 2
MAX_HEAD_SIZE = 256
# Past this the accumulators of dK and dV, 64 keys each, do not fit the registers of a warpgroup.
MAX_HEAD_SIZE_ONE_WARPGROUP = 128


@dataclasses.dataclass(frozen=True)
class ForwardTiles:
    """Tile sizes of the forward kernel.

    Attributes:
      block_q: query rows of one compute warpgroup; a program owns two such blocks.
      block_kv: keys of one step.
      stages: key and value tiles in flight.
      ahead: the next step's logits are begun together with a step's weighted values. Needs
        registers for the weights of one step beside the logits of the next.
      noise_warpgroup: a spare warpgroup makes the noise of a release during the key loop,
      noise_columns: so many columns at a time (else: no noise in this kernel; a pass over its plain
        answer releases it).
      pair_stages: tiles of mask and bias in flight.
      overlaps: a tile's end runs under the next one's first products. Else its answer waits in the
        place of its queries, and the next tile's queries are loaded when it has left.
    """

    block_q: int = 64
    block_kv: int = 128
    stages: int = 2
    ahead: bool = True
    noise_warpgroup: bool = False
    noise_columns: int = 16
    pair_stages: int = 2
    overlaps: bool = True

    def __post_init__(self) -> None:
        if self.block_q % WARPGROUP_ROWS or self.block_kv % 64 or self.stages < 2:
            raise ValueError(f"{self} is no tiling: block_q % 64, block_kv % 64, stages >= 2")

    @property
    def rows(self) -> int:
        """Query rows of one program."""
        return COMPUTE_WARPGROUPS * self.block_q

    def shared_bytes(self, head_size: int, pair_bytes: int = 0, *, columns: int = 0) -> int:
        """Shared memory of one program, for 16-bit inputs.

        `pair_bytes`: mask and bias of a key. `columns`: a tile's part of the values; 0: all.
        """
        columns = columns or head_size
        q = self.rows * head_size * 2
        kv = self.stages * self.block_kv * (head_size + columns) * 2
        noise = self.rows * columns * 4 if self.noise_warpgroup else 0
        pairs = self.pair_stages * self.block_kv * pair_bytes
        # With a noise warpgroup the answer takes the noise's place.
        output = self.rows * columns * 2 if self.overlaps and not self.noise_warpgroup else 0
        return q + kv + noise + pairs + output + self.rows * 4


NOISE_BESIDE_KEYS = 1024


def makes_noise_beside(
    spec: AttentionSpec, head_size: int, keys: int, *, has_public_maximum: bool = False
) -> bool:
    """Whether an example release's noise is made beside the products, or else in a pass after them.

    As measured on an H200. Of the call alone, not of what a gradient needs: one noise must not hide
    two roundings of one answer. Above head size 128 no place for it is left.
    """
    if not isinstance(spec.readout, ExampleReadout) or head_size > MAX_HEAD_SIZE_ONE_WARPGROUP:
        return False
    if head_size == 64:
        return has_public_maximum
    return is_dense(spec) and keys >= NOISE_BESIDE_KEYS


def forward_tiles(
    spec: AttentionSpec,
    head_size: int,
    keys: int,
    *,
    has_public_maximum: bool = False,
    pair_bytes: int | None = None,
    noise_pass: bool | None = None,
) -> ForwardTiles:
    """Tiles for a padded head size and a number of keys, as measured on an H100 and an H200.

    `pair_bytes`: shared memory that mask and bias of one key need; None without them.
    `noise_pass`: whether a pass of its own makes the noise of an example release; False: only where
    it has no place beside the products; None: `makes_noise_beside` decides.
    """
    is_beside = isinstance(spec.readout, ExampleReadout) and not noise_pass
    if noise_pass is None:
        is_beside = makes_noise_beside(spec, head_size, keys, has_public_maximum=has_public_maximum)
    columns = 8 if has_public_maximum and is_dense(spec) else 16
    beside = ForwardTiles(noise_warpgroup=True, noise_columns=columns)
    # Without a maximum the logits of a step end with its weights, which leaves room for wider ones.
    is_wide = has_public_maximum and is_dense(spec) and keys >= 1024
    alone = ForwardTiles(block_kv=256 if is_wide else 128, ahead=False)
    is_alone = head_size == 64 and pair_bytes is None and (is_wide or not has_public_maximum)
    for candidate in (
        *((beside,) if is_beside else ()),
        *((alone,) if is_alone else ()),
        ForwardTiles(),
        ForwardTiles(pair_stages=1),
        ForwardTiles(block_kv=64),
        ForwardTiles(block_kv=64, pair_stages=1),
    ):
        for overlaps in (True, False):
            found = dataclasses.replace(candidate, overlaps=overlaps)
            if found.shared_bytes(head_size, pair_bytes or 0) <= SHARED_MEMORY_BYTES:
                return found
    raise ValueError(f"head_size={head_size}: no tile of the forward kernel fits")


def value_columns(head_size: int) -> int:
    """Columns of the values that one tile of the memory kernel sums, of a padded head size.

    Its sums, one block of products and 128 keys of logits fill the registers of 64 rows.
    """
    return min(head_size, 128)


def memory_tiles(head_size: int) -> ForwardTiles:
    """Tiles of the memory kernel for a padded head size."""
    for block_kv in (128, 64):
        tile = ForwardTiles(block_kv=block_kv, noise_warpgroup=True, noise_columns=8)
        bytes_used = tile.shared_bytes(head_size, columns=value_columns(head_size))
        if bytes_used <= SHARED_MEMORY_BYTES:
            return tile
    raise ValueError(f"head_size={head_size}: no tile of the memory kernel fits")


@dataclasses.dataclass(frozen=True)
class BackwardTiles:
    """Tile sizes of the two backward kernels (rows are those of one warpgroup)."""

    block_q_dq: int = 64
    block_kv_dq: int = 64
    block_q_dkv: int = 64
    block_kv_dkv: int = 64
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class FusedTiles:
    """Of the one kernel that makes all three gradients; its tiles are 64 by 64.

    Attributes:
      heads: key heads, of all examples, whose programs start side by side. More of them are fewer
        programs of one head at a time, which wait less for each other and share fewer loads.
    """

    heads: int


# Tiles of queries and cotangents in flight in the one kernel.
FUSED_STAGES = 2


def adders_and_places(head_size: int) -> tuple[int, int]:
    """Warps that add dQ in the one kernel, each every so many-th tile, and tiles of dQ they share.

    A round of counter, addition and fence may take as long as there are warps, in tiles. Places are
    dealt in turn to the warps and to the two compute warpgroups: three warps where there is room
    for six, that is at head size 64, else two.
    """
    rows = WARPGROUP_ROWS * head_size * 2  # bytes of a tile in 16 bits
    numbers = 2 * cdiv(FUSED_STAGES * WARPGROUP_ROWS * 4, SHARED_MEMORY_ALIGNMENT)
    pairs = COMPUTE_WARPGROUPS**2 * WARPGROUP_ROWS * WARPGROUP_ROWS * 2
    owned_and_streamed = 2 * (COMPUTE_WARPGROUPS + FUSED_STAGES) * rows
    left = SHARED_MEMORY_BYTES - owned_and_streamed - pairs - numbers * SHARED_MEMORY_ALIGNMENT
    for adders in (3, 2):
        places = math.lcm(adders, COMPUTE_WARPGROUPS)
        if places * 2 * rows <= left:  # in float32
            return adders, places
    raise ValueError(f"head_size={head_size}: no tile of the one backward kernel fits")


@dataclasses.dataclass(frozen=True)
class WideTiles:
    """Of the two kernels above head size 128; their tiles are 64 by 64.

    Attributes:
      stages: tiles of queries in flight.
      cotangent_stages: tiles of cotangents in flight.
      pair_stages: tiles of mask and bias in flight.
      key_stages: tiles of keys and logit gradients in flight, in the kernel of dQ.
    """

    stages: int = 2
    cotangent_stages: int = 2
    pair_stages: int = 2
    key_stages: int = 3

    def shared_bytes(self, head_size: int, pair_bytes: int | None = None) -> tuple[int, int]:
        """Shared memory of one program of each kernel.

        `pair_bytes`: of mask and bias, as `ForwardTiles`, None without them. Keys are the rows
        here: what is the same for each key, another 4 bytes a column, may count as none there.
        """
        rows = WARPGROUP_ROWS * head_size * 2
        pairs = COMPUTE_WARPGROUPS * WARPGROUP_ROWS * WARPGROUP_ROWS * 2

        def whole(size: int) -> int:
            return -(-size // SHARED_MEMORY_ALIGNMENT) * SHARED_MEMORY_ALIGNMENT

        streamed = (self.stages + self.cotangent_stages) * rows
        numbers = 2 * whole(self.stages * WARPGROUP_ROWS * 4)
        arrays = 0
        if pair_bytes is not None:  # of half the rows for which they count
            columns = self.pair_stages * WARPGROUP_ROWS
            arrays = whole(columns * (pair_bytes // 2 + 2 * 4)) + SHARED_MEMORY_ALIGNMENT
        return (
            2 * rows + streamed + numbers + 2 * pairs + arrays,
            COMPUTE_WARPGROUPS * rows + self.key_stages * (rows + pairs),
        )


# With fewer queries, that is fewer tiles of a program, waiting for turns costs more than two
# products, and with fewer keys passes over the sum of dQ do. With causality programs have half as
# many tiles, and their lengths differ.
LONG_BACKWARD = 2048
LONG_CAUSAL_BACKWARD = {64: 8192, 128: 16384}


def backward_tiles(
    spec: AttentionSpec, head_size: int, length: int, *, pair_bytes: int | None = None
) -> BackwardTiles | FusedTiles | WideTiles:
    """Tiles for a padded head size and a length, as measured on an H100 and an H200 where T = S.

    `length`: the lesser of T and S. Programs of many keys and few queries would spend their time
    waiting for each other, one addition to a tile of dQ after the other.

    The same for any order of additions as for one, which leaves only the waiting out. A window
    leaves a program few tiles, whatever the number of keys: two kernels.

    `pair_bytes`: as `forward_tiles`.
    """
    if head_size > MAX_HEAD_SIZE_ONE_WARPGROUP:
        for wide in (
            WideTiles(stages=3, cotangent_stages=3, key_stages=4),
            WideTiles(),
            WideTiles(cotangent_stages=1),
            WideTiles(cotangent_stages=1, pair_stages=1),
        ):
            if max(wide.shared_bytes(head_size, pair_bytes)) <= SHARED_MEMORY_BYTES:
                return wide
        raise ValueError(f"head_size={head_size}: no tile of the backward kernels fits")
    if pair_bytes is None and spec.local_window is None:
        if not spec.is_causal and length >= LONG_BACKWARD:
            return FusedTiles(heads=8)
        if spec.is_causal and length >= LONG_CAUSAL_BACKWARD[head_size]:
            return FusedTiles(heads=32 if head_size == 64 else 16)
    longer = BackwardTiles(block_kv_dq=128)
    rows = COMPUTE_WARPGROUPS * longer.block_q_dq + longer.stages * longer.block_kv_dq
    bytes_used = rows * head_size * 4 + longer.stages * longer.block_kv_dq * (pair_bytes or 0)
    return longer if head_size == 64 and bytes_used <= SHARED_MEMORY_BYTES else BackwardTiles()
