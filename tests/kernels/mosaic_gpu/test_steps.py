"""Step ranges against brute force: no visible pair is skipped, no unmasked step hides one."""

import itertools

import numpy as np
import pytest

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu.steps import (
    first_program,
    key_steps,
    masks_only_last,
    query_steps,
    within_key_length,
)
from dpfa_jax.kernels.mosaic_gpu.tiles import ForwardTiles

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
            steps = key_steps(
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
            steps = query_steps(spec, convert(begin), program, block, queries)
            steps = within_key_length(steps, convert(begin), program, convert(key_length))
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
            steps = query_steps(spec, begin, program, block, queries)
            ranges.append(within_key_length(steps, begin, program, key_length))
        needed = 0
        for tile in range(-(-queries // block)):
            those = [n for n, steps in enumerate(ranges) if steps.begin <= tile < steps.end]
            for before, number in enumerate(those):
                assert number - first_program(spec, tile * block, program) == before
            needed += len(those)
        assert (needed > 0) == (key_length > 0)
        # The last tile of a program is none before that of an earlier one: who begins later, or
        # with it, passes each tile later.
        ends = [steps.end for steps in ranges if steps.begin < steps.end]
        assert ends == sorted(ends)


@pytest.mark.parametrize("block_kv", [64, 128, 256])
def test_masks_only_last(block_kv):
    """V7: where the mask is left out of all steps but the last, none of them needs it."""
    tile = ForwardTiles(block_kv=block_kv)
    served = 0
    for is_causal, window in itertools.product((False, True), (None, (3, 0), (500, 7))):
        spec = AttentionSpec(1.0, is_causal=is_causal, local_window=window)
        if not masks_only_last(spec, tile, has_query_lengths=False):
            continue
        for key_length, begin in itertools.product((1, 100, 128, 129, 500), range(0, 600, 128)):
            steps = key_steps(spec, begin, tile.rows, block_kv, key_length, None)
            assert steps.end - steps.full_end <= 1
            served += 1
    assert served
    # Negative control: half a step a program needs two masked ones under causality.
    steps = key_steps(AttentionSpec(1.0, is_causal=True), 128, 128, 64, 600, None)
    assert steps.end - steps.full_end == 2


def test_a_skipped_or_unmasked_step_is_caught():
    """Negative control of `check`."""
    with pytest.raises(AssertionError):
        check((1, 1, 2, 2), [True, True], [True, True])
    with pytest.raises(AssertionError):
        check((0, 0, 2, 2), [True, True], [True, False])
