"""Loops against brute force: no visible pair is skipped, no inner tile hides one."""

import itertools

import numpy as np
import pytest
from helpers import attention_oracle as oracle

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.triton import tiles

pytestmark = pytest.mark.quickly_compiled

BLOCK_Q, BLOCK_KV = 8, 16
SIZES = ((1, 1), (8, 16), (45, 37), (32, 64), (20, 90))


def check(loops, is_seen, is_whole):
    """`is_seen[i]`: tile i holds a visible pair; `is_whole[i]`: it hides none."""
    walked = []
    for begin, end, is_edge in loops:
        for step in range(int(begin), int(end)):
            walked.append(step)
            assert is_edge or is_whole[step], (loops, step)
    assert walked == sorted(set(walked))
    assert set(np.flatnonzero(is_seen)) <= set(walked), (loops, is_seen)


def cases():
    windows = (None, (0, 0), (3, 1), (40, 7), (5, 100))
    for is_causal, window, (rows, keys) in itertools.product((False, True), windows, SIZES):
        spec = AttentionSpec(1.0, is_causal=is_causal, local_window=window)
        seen = oracle.visibility((1, 1, rows, keys), is_causal=is_causal, window=window)[0, 0]
        yield spec, seen


@pytest.mark.parametrize("convert", [int, np.int32])
@pytest.mark.parametrize("is_masked", [False, True])
def test_key_loops(convert, is_masked):
    """V7: ragged sizes and lengths, ints and scalars of the kernel alike."""
    for spec, seen in itertools.islice(cases(), 0, None, 1 if convert is int else 11):
        rows, keys = seen.shape
        lengths = (None, 0, keys // 2, keys)
        for begin, key_length, query_length in itertools.product(
            range(0, rows, BLOCK_Q), lengths, (None, 0, 9)
        ):
            tile = np.zeros((BLOCK_Q, -(-keys // BLOCK_KV) * BLOCK_KV), bool)
            part = seen[begin : begin + BLOCK_Q].copy()
            part[:, keys if key_length is None else key_length :] = False
            tile[: len(part), :keys] = part
            # Rows that do not exist, or see nothing, are settled after the loop.
            exists = np.arange(begin, begin + BLOCK_Q) < rows
            visible = tile.copy()
            if query_length is not None:
                visible[np.arange(begin, begin + BLOCK_Q) >= query_length] = False
            blocks = tile[exists].reshape(exists.sum(), -1, BLOCK_KV)
            loops = tiles.key_loops(
                spec, convert(begin), BLOCK_Q, BLOCK_KV, keys,
                None if key_length is None else convert(key_length),
                None if query_length is None else convert(query_length),
                is_masked=is_masked,
            )  # fmt: skip
            seen_blocks = visible.reshape(BLOCK_Q, -1, BLOCK_KV).any((0, 2))
            check(loops, seen_blocks, blocks.all((0, 2)))


@pytest.mark.parametrize("convert", [int, np.int32])
@pytest.mark.parametrize("is_masked", [False, True])
def test_query_loops(convert, is_masked):
    for spec, seen in itertools.islice(cases(), 0, None, 1 if convert is int else 11):
        rows, keys = seen.shape
        for begin, length in itertools.product(range(0, keys, BLOCK_KV), (None, 0, 9, rows)):
            tile = np.zeros((-(-rows // BLOCK_Q) * BLOCK_Q, keys), bool)
            tile[:rows] = seen
            part = tile[:, begin : begin + BLOCK_KV].reshape(
                -1, BLOCK_Q, min(BLOCK_KV, keys - begin)
            )
            whole = (part | ~(np.arange(len(tile)) < rows).reshape(-1, BLOCK_Q, 1)).all((1, 2))
            loops = tiles.query_loops(
                spec, convert(begin), BLOCK_KV, BLOCK_Q, rows,
                None if length is None else convert(length), is_masked=is_masked,
            )  # fmt: skip
            if length is not None:
                part[np.arange(len(tile)).reshape(-1, BLOCK_Q) >= length] = False
            check(loops, part.any((1, 2)), whole)
            # Tiles past the last row are left out: their keys may hold any bytes.
            walked = [step.end for step in loops if step.begin < step.end]
            assert length is None or all(end * BLOCK_Q < length + BLOCK_Q for end in walked)


def test_a_skipped_or_unmasked_tile_is_caught():
    """Negative control of `check`."""
    with pytest.raises(AssertionError):
        check([tiles.Steps(1, 2, True)], np.array([True, True]), [True, True])
    with pytest.raises(AssertionError):
        check([tiles.Steps(0, 2, False)], np.array([True, True]), [True, False])


def test_tilings_are_checked():
    assert [tiles.padded_size(n) for n in (1, 16, 17, 80, 128, 200, 256)] == [
        16, 16, 32, 128, 128, 256, 256,
    ]  # fmt: skip
    for size, itemsize in itertools.product((16, 32, 64, 128, 256), (2, 4)):
        assert tiles.kernel_tiles(size, itemsize).memory.block_kv <= 32
    for sizes in ((8, 64), (48, 64), (64, 100)):
        with pytest.raises(ValueError, match="power of two"):
            tiles.Tiles(*sizes)
