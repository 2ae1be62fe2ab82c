"""How much of a backward pass runs at once, where its logit gradients go through memory."""

import dataclasses
import math

# Logit gradients that may lie in memory at once, or more where fewer programs than `WAVES` times
# the multiprocessors would run.
LOGIT_GRADIENT_BYTES = 256 * 1024**2
WAVES = 2
MAX_PROGRAMS = 65535  # CUDA's limit on the second and third axis of a grid, any of which may be all
ITEM_BYTES = 2


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Equal parts of a backward pass: some batch rows, key heads and blocks of keys at a time.

    Attributes:
      batch, heads, key_blocks: of one chunk. Less than all key blocks only where batch and heads
        are 1; less than all heads only where batch is 1.
      counts: chunks along batch, key heads and key blocks. The last along key blocks may be short.
    """

    batch: int
    heads: int
    key_blocks: int
    counts: tuple[int, int, int]

    @property
    def total(self) -> int:
        """Number of chunks."""
        return math.prod(self.counts)

    @property
    def cuts_keys(self) -> bool:
        """Whether the gradient of a query comes from several chunks."""
        return self.counts[2] > 1


def _divisor(whole: int, limit: int) -> int:
    """Largest divisor of `whole` that does not exceed `limit`."""
    return max(size for size in range(1, max(1, min(whole, limit)) + 1) if whole % size == 0)


def chunks_of(
    batch: int,
    key_heads: int,
    key_blocks: int,
    *,
    rows: int,
    group: int,
    block: int,
    processors: int,
    is_even: bool,
) -> Chunks:
    """The fewest chunks whose logit gradients may lie in memory at once.

    Memory is linear in the rows: a chunk has a number of programs that does not depend on them.

    Args:
      batch, key_heads, key_blocks: of the whole pass; a program owns one block of one head.
      rows: queries, padded.
      group: query heads of a key head.
      block: keys of a block.
      processors: multiprocessors.
      is_even: whether all programs take about as long, as one wave of them must: with causality the
        longest takes twice the mean, and the short ones go where others were short.
    """
    block_bytes = rows * group * block * ITEM_BYTES
    # A program with one query head; one with `group` makes as many logit gradients.
    waves = math.ceil(WAVES / group) if is_even else WAVES

    def most(waves: int) -> int:
        limit = max(LOGIT_GRADIENT_BYTES // block_bytes, waves * processors, 1)
        return min(limit, MAX_PROGRAMS)

    limit = most(waves)
    if is_even and key_blocks > limit:  # cut either way: as many waves in all, with less memory
        limit = most(min(waves, 1))
    if batch * key_heads * key_blocks <= limit:
        return Chunks(batch, key_heads, key_blocks, (1, 1, 1))
    if key_heads * key_blocks <= limit:
        size = _divisor(batch, limit // (key_heads * key_blocks))
        return Chunks(size, key_heads, key_blocks, (batch // size, 1, 1))
    if key_blocks <= limit:
        size = _divisor(key_heads, limit // key_blocks)
        return Chunks(1, size, key_blocks, (batch, key_heads // size, 1))
    count = -(-key_blocks // limit)
    return Chunks(1, 1, -(-key_blocks // count), (batch, key_heads, count))
