"""Step ranges against brute force: no visible pair is skipped, no unmasked step hides one."""

import dataclasses
import itertools

import numpy as np
import pytest

from dpfa_jax.kernels.base import AttentionSpec, ExampleReadout
from dpfa_jax.kernels.mosaic_gpu import tiles

WINDOWS = (None, (0, 0), (3, 1), (40, 7), (5, 100))


def seen_pairs(spec, rows, keys, key_length, query_length):
    row, key = np.arange(rows)[:, None], np.arange(keys)[None, :]
    seen = (key < key_length) & (row < query_length)
    if spec.is_causal:
        seen = seen & (key <= row)
    if spec.local_window is not None:
        left, right = spec.local_window
        seen = seen & (key >= row - left) & (key <= row + right)
    return seen


def check(steps, seen_steps, all_seen):
    """`seen_steps[i]`: step i holds a visible pair; `all_seen[i]`: it hides none."""
    begin, full_begin, full_end, end = (int(x) for x in steps)
    assert 0 <= begin <= full_begin <= full_end <= end
    for step, is_needed in enumerate(seen_steps):
        assert not is_needed or begin <= step < end, (steps, step)
    for step in range(full_begin, full_end):
        assert all_seen[step], (steps, step)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("traced", [False, True])
def test_key_steps(is_causal, window, traced):
    """V7: ragged sizes and lengths, ints and traced scalars alike."""
    spec = AttentionSpec(1.0, is_causal=is_causal, local_window=window)
    rows, keys, program, block = 45, 37, 16, 8
    convert = np.int32 if traced else int
    lengths = ((20,), (17,)) if traced else ((0, 1, 20, keys), (0, 17, 48))
    for key_length, query_length in itertools.product(*lengths):
        seen = seen_pairs(spec, 48, 40, key_length, query_length)
        for begin in range(0, rows, program):
            steps = tiles.key_steps(
                spec, convert(begin), program, block, convert(key_length), convert(query_length)
            )
            mine = seen[begin : begin + program].reshape(program, -1, block)
            check(steps, mine.any(axis=(0, 2)), mine.all(axis=(0, 2)))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("traced", [False, True])
def test_query_steps(is_causal, window, traced):
    """The backward's ranges; rows past the queries are told by their log-sum-exp, not here."""
    spec = AttentionSpec(1.0, is_causal=is_causal, local_window=window)
    queries, keys, program, block = 45, 37, 16, 8
    convert = np.int32 if traced else int
    for key_length in (20,) if traced else (0, 1, 20, keys):
        seen = seen_pairs(spec, 48, 48, key_length, 48)
        for begin in range(0, keys, program):
            steps = tiles.query_steps(spec, convert(begin), program, block, queries)
            steps = tiles.within_key_length(steps, convert(begin), program, convert(key_length))
            mine = seen[:, begin : begin + program].reshape(-1, block, program)
            existing = mine.copy()
            existing[np.arange(48).reshape(-1, block) >= queries] = False
            check(steps, existing.any(axis=(1, 2)), mine.all(axis=(1, 2)))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("queries", [45, 13])
def test_programs_before(is_causal, window, queries):
    """V6: a program's turn at a query tile comes after as many as need that tile before it.

    Were one counted too many it would wait for ever, one too few and two could add at once.
    """
    spec = AttentionSpec(1.0, is_causal=is_causal, local_window=window)
    keys, program, block = 90, 8, 4
    for key_length in (0, 1, 8, 20, keys):
        ranges = []
        for begin in range(0, keys, program):
            steps = tiles.query_steps(spec, begin, program, block, queries)
            ranges.append(tiles.within_key_length(steps, begin, program, key_length))
        needed = 0
        for tile in range(-(-queries // block)):
            those = [n for n, steps in enumerate(ranges) if steps.begin <= tile < steps.end]
            for before, number in enumerate(those):
                assert number - tiles.first_program(spec, tile * block, program) == before
            needed += len(those)
        assert (needed > 0) == (key_length > 0)
        # The last tile of a program is none before that of an earlier one: who begins later, or
        # with it, passes each tile later.
        ends = [steps.end for steps in ranges if steps.begin < steps.end]
        assert ends == sorted(ends)


@pytest.mark.parametrize("block_kv", [64, 128, 256])
def test_masks_only_last(block_kv):
    """V7: where the mask is left out of all steps but the last, none of them needs it."""
    tile = tiles.ForwardTiles(block_kv=block_kv)
    served = 0
    for is_causal, window in itertools.product((False, True), (None, (3, 0), (500, 7))):
        spec = AttentionSpec(1.0, is_causal=is_causal, local_window=window)
        if not tiles.masks_only_last(spec, tile, has_query_lengths=False):
            continue
        for key_length, begin in itertools.product((1, 100, 128, 129, 500), range(0, 600, 128)):
            steps = tiles.key_steps(spec, begin, tile.rows, block_kv, key_length, None)
            assert steps.end - steps.full_end <= 1
            served += 1
    assert served
    # Negative control: half a step a program needs two masked ones under causality.
    steps = tiles.key_steps(AttentionSpec(1.0, is_causal=True), 128, 128, 64, 600, None)
    assert steps.end - steps.full_end == 2


def test_a_skipped_or_unmasked_step_is_caught():
    """Negative control of `check`."""
    with pytest.raises(AssertionError):
        check((1, 1, 2, 2), [True, True], [True, True])
    with pytest.raises(AssertionError):
        check((0, 0, 2, 2), [True, True], [True, False])


def test_where_noise_is_made():
    """Beside the products where they leave room and last; else after the plain kernel, by its tile;
    as forced, where there is room."""
    plain = AttentionSpec(1.0)
    full = dataclasses.replace(plain, readout=ExampleReadout(1.0, (1.0,), (1.0,)))
    causal = dataclasses.replace(full, is_causal=True)
    window = dataclasses.replace(full, local_window=(100, 100))
    most = tiles.NOISE_BESIDE_KEYS
    for spec, size, keys, is_bounded, is_beside in (
        (full, 128, most, False, True), (full, 128, most - 1, False, False),
        (full, 128, most, True, True), (causal, 128, 64 * most, True, False),
        (window, 128, 64 * most, False, False),
        (full, 64, most, False, False), (causal, 64, most, True, True),
        (full, 192, most, True, False), (full, 256, 64 * most, False, False),
    ):  # fmt: skip
        bare = dataclasses.replace(spec, readout=plain.readout)
        for pair_bytes in (None, 16):
            sizes = {"has_public_maximum": is_bounded, "pair_bytes": pair_bytes}
            expected = tiles.forward_tiles(bare, size, keys, **sizes)
            assert not expected.noise_warpgroup
            has_room = size == 64 or (size == 128 and pair_bytes is None)
            for forced, wants_beside in ((None, is_beside), (False, True), (True, False)):
                tile = tiles.forward_tiles(spec, size, keys, **sizes, noise_pass=forced)
                assert tile.noise_warpgroup == (wants_beside and has_room)
                assert tile.noise_warpgroup or tile == expected


def test_tiles_fit_shared_memory():
    for head_size in (64, 128, 192, 256):
        tile = tiles.forward_tiles(AttentionSpec(1.0), head_size, 4096)
        assert tile.shared_bytes(head_size) <= tiles.SHARED_MEMORY_BYTES
    with pytest.raises(ValueError, match="no tiling"):
        tiles.ForwardTiles(block_q=48)
