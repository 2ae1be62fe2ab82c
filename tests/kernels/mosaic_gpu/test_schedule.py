"""Which tiles each program walks over: every tile once, equal shares, neighbours together."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu.schedule import balanced
from dpfa_jax.kernels.mosaic_gpu.steps import StepRange, at_least_one
from dpfa_jax.kernels.mosaic_gpu.tiles import ForwardTiles
from dpfa_jax.kernels.mosaic_gpu.walk import Lengths, Tiling


def shares(table):
    return [row[1 : 1 + row[0]].tolist() for row in table]


def tiling(batch, heads, length, *, head_bytes=2**20, **options):
    return Tiling(
        AttentionSpec(1.0, **options), ForwardTiles(), batch, heads, length, length,
        head_bytes=head_bytes, heads_first=False, has_lengths=False,
    )  # fmt: skip


@pytest.mark.parametrize("costs", [(1.0,) * 16, tuple(range(1, 17)), (5.0, 1.0, 3.0)])
@pytest.mark.parametrize(("groups", "programs", "together"), [(128, 132, 16), (7, 3, 2), (1, 2, 4)])
def test_every_tile_once_and_balanced(costs, groups, programs, together):
    table = balanced(costs, groups, programs, together)
    found = shares(table)
    assert sorted(tile for share in found for tile in share) == list(range(groups * len(costs)))
    loads = [sum(costs[tile % len(costs)] for tile in share) for share in found]
    # A program that takes a tile was the first to be free: nobody is further behind than one tile.
    assert max(loads) - sum(loads) / programs <= max(costs)
    # Behind its last tile a row names that tile again.
    for row in table:
        assert row[0] == 0 or row[1 + row[0]] == row[row[0]]


def test_causal_tiles_are_shared_fairly():
    """In launch order a program would take long and short tiles as they come: a fifth more work."""
    call = tiling(8, 16, 2048, is_causal=True)
    table = call.schedule(132)
    costs = np.arange(1, 17) + 0.7
    loads = np.array([sum(costs[tile % 16] for tile in share) for share in shares(table)])
    assert loads.max() / loads.mean() < 1.02
    in_turn = np.zeros(132)
    for place in range(2048):
        in_turn[place % 132] += costs[15 - place % 256 // 16]
    assert in_turn.max() / in_turn.mean() > 1.05


def test_heads_that_start_together_fit_the_cache():
    for head_bytes, most in ((2**20, 24), (2**24, 1), (2**30, 1)):
        table = tiling(4, 16, 2048, head_bytes=head_bytes).schedule(132)
        seen = [{int(row[1 + turn]) // 16 for row in table if row[0] > turn} for turn in range(2)]
        for heads in seen:  # 132 tiles that start at once
            assert len(heads) <= most + 132 // 16 + 1


def test_no_more_programs_than_tiles():
    assert len(tiling(1, 2, 300).schedule(132)) == 2 * 3


@pytest.mark.parametrize("parts", [1, 2])
def test_each_part_of_each_block_has_a_tile(parts):
    call = dataclasses.replace(tiling(2, 3, 300, is_causal=True), parts=parts)
    numbers = sorted(x for share in shares(call.schedule(5)) for x in share)
    found = [call.at(Lengths(), jnp.int32(number), jnp.int32(0)) for number in numbers]
    places = [tuple(int(x) for x in (t.batch, t.head, t.row_begin, t.part)) for t in found]
    # In this order: those of a block side by side.
    expected = itertools.product(range(2), range(3), range(0, 300, 128), range(parts))
    assert places == list(expected)
    starts = [int(found[-1].value_columns(128).start), int(found[0].value_columns(128).start)]
    assert starts == [128 * (parts - 1), 0]


def test_keys_of_no_size_worth_counting():
    """One key for many heads: less than a byte a head."""
    assert len(tiling(1, 64, 1, head_bytes=0).schedule(132)) == 64


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (StepRange(0, 0, 4, 4), StepRange(0, 0, 4, 4)),
        (StepRange(0, 0, 0, 0), StepRange(0, 0, 0, 1)),
        (StepRange(6, 6, 6, 6), StepRange(3, 4, 4, 4)),  # a window beyond the last key
        (StepRange(2, 3, 3, 4), StepRange(2, 3, 3, 4)),
    ],
)
def test_a_tile_has_a_step_that_may_hide_everything(steps, expected):
    assert at_least_one(steps, 4) == expected
    begin, full_begin, full_end, end = at_least_one(steps, 4)
    assert begin <= full_begin <= full_end <= end <= 4
