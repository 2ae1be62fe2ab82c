"""How the two backward kernels walk: whose steps are whose, what fits, values over many tiles."""

import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import backward_simulation

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import device
from dpfa_jax.kernels.mosaic_gpu.backward_walk import (
    Loops,
    Owned,
    loops_of,
    own_steps,
    run_own_steps,
    slots_that_fit,
)
from dpfa_jax.kernels.mosaic_gpu.steps import left_reach, right_reach
from dpfa_jax.kernels.mosaic_gpu.tiles import BackwardTiles
from dpfa_jax.kernels.mosaic_gpu.walk import KeyTiling, Size, Tiling

WINDOWS = (None, (0, 0), (70, 30), (200, 5))
SIZES = ((300, 420), (256, 256), (1, 1), (700, 130))
KINDS = {"queries": Tiling, "keys": KeyTiling}


def tiling(kind, spec, queries, keys, *, step=64, has_lengths=False):
    return KINDS[kind](
        spec, Size(128, step), 2, 3, queries, keys,
        head_bytes=2**20, heads_first=False, has_lengths=has_lengths,
        turns=2 if kind == "keys" else 1,
    )  # fmt: skip


def seen_tiles(call, key_length):
    """[64 rows, step]: whether any pair, and whether each, is seen."""
    row, key = np.arange(1024)[:, None], np.arange(1024)[None, :]
    seen = (key < key_length) & (row < 1024)
    right, left = right_reach(call.spec), left_reach(call.spec)
    if right is not None:
        seen = seen & (key <= row + right)
    if left is not None:
        seen = seen & (key >= row - left)
    exists = np.ones((1024, 1024), bool)
    if isinstance(call, KeyTiling):  # rows past the queries are told by their log-sum-exp
        exists[call.queries :] = False
        seen, exists = seen.T, exists.T
    step = call.tile.block_kv
    blocks = seen.reshape(16, 64, 1024 // step, step)
    return (seen & exists).reshape(blocks.shape).any((1, 3)), blocks.all((1, 3))


def turns(loops, steps, own):
    """What a warpgroup does with each step of a tile."""
    done = []

    def loop(begin, end):
        return lambda run: [run(step) for step in range(int(begin), int(end))]

    with mock.patch("jax.experimental.pallas.loop", loop):
        run_own_steps(
            loops, steps, own,
            lambda step, masked: done.append((step, "masked" if masked else "plain")),
            lambda step: done.append((step, "skipped")),
        )  # fmt: skip
    return done


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_each_step_is_done_masked_or_skipped(kind, window, is_causal):
    """V7: in order; skipped only where all is hidden, unmasked only where nothing is."""
    spec = AttentionSpec(1.0, is_causal=is_causal, local_window=window)
    for (queries, keys), step, has_lengths in (
        (size, step, has_lengths)
        for size in SIZES for step in (64, 128) for has_lengths in (False, True)
    ):  # fmt: skip
        call = tiling(kind, spec, queries, keys, step=step, has_lengths=has_lengths)
        loops = loops_of(call)
        used = set()
        lengths = {0, 1, 64, keys - 70, keys - 1, keys} if has_lengths else {keys}
        for key_length in {min(max(0, length), keys) for length in lengths}:
            any_seen, all_seen = seen_tiles(call, key_length)
            for block in range(call.blocks):
                steps = call.steps(block, key_length, None)
                assert steps.begin < steps.end
                for part in range(2):
                    own = own_steps(call, steps, block * 128 + part * 64, key_length)
                    done = turns(loops, steps, own)
                    assert [step for step, _ in done] == list(range(steps.begin, steps.end))
                    for index, what in done:
                        used.add(what)
                        row = block * 2 + part
                        assert what != "skipped" or not any_seen[row, index]
                        assert what != "plain" or all_seen[row, index]
        if not has_lengths:  # no loop is compiled for nothing
            assert ("skipped" in used) == (loops.skips_first or loops.skips_last)
            assert ("masked" in used) == (loops.masks_first or loops.masks_last)


def test_loops_of_usual_calls():
    """Full: one loop. Causal: the half of a tile whose keys come later has a step less."""
    full, causal = AttentionSpec(1.0), AttentionSpec(1.0, is_causal=True)
    for kind in KINDS:
        assert not any(loops_of(tiling(kind, full, 256, 256)))
    assert loops_of(tiling("keys", causal, 256, 256)) == Loops(True, True, False, False)
    assert loops_of(tiling("queries", causal, 256, 256)) == Loops(False, False, True, True)
    assert loops_of(tiling("queries", causal, 256, 256, step=128)) == Loops(
        False, False, True, False
    )


def test_a_loop_that_is_missing_is_caught():
    """Negative control: without the loops of a causal call, steps are not done."""
    call = tiling("queries", AttentionSpec(1.0, is_causal=True), 256, 256)
    steps = call.steps(0, 256, None)
    own = own_steps(call, steps, 0, 256)
    assert len(turns(loops_of(call), steps, own)) == 2
    assert len(turns(Loops(False, False, False, False), steps, own)) < 2


@pytest.mark.parametrize(
    ("size", "bias_bytes", "slots"),
    [(64, 0, 2), (128, 0, 2), (128, 256, 2), (128, 272, 1), (128, 512, 1)],
)
def test_slots_of_what_a_tile_owns(size, bias_bytes, slots):
    """Two beside a bfloat16 bias, one beside a mask as well or a float32 bias."""

    def operands(first):
        return {x: jax.ShapeDtypeStruct((first, 64, size), jnp.bfloat16) for x in "ab"}

    others = operands(2)
    others |= {x: jax.ShapeDtypeStruct((2, 64), jnp.float32) for x in ("lse2", "delta")}
    others["pairs"] = jax.ShapeDtypeStruct((2, 64, bias_bytes), jnp.int8)
    assert slots_that_fit(lambda slots: operands(slots * 2), others) == slots
    owned = Owned({}, {}, slots)
    places = {int(owned.place(index, part)) for index in range(4) for part in range(2)}
    assert places == set(range(2 * slots))


# (B, T, S, N, K, H), options, tile, processors.
CASES = {
    "causal, GQA, one program": ((1, 300, 270, 2, 1, 40), {"is_causal": True}, 128, 1),
    "window, cap, key lengths": (
        (3, 200, 290, 1, 1, 64),
        {"local_window": (40, 70), "logits_soft_cap": 4.0, "key_lengths": (290, 60, 129)},
        64,
        2,
    ),
    "one slot beside a bias": (
        (2, 140, 150, 2, 1, 128),
        {"bias": (1, 2, 140, 150), "mask": (2, 1, 140, 150)},
        64,
        2,
    ),
}


def errors(case, change=lambda x: x):
    sizes, options, step, processors = CASES[case]
    with mock.patch.object(device, "processors", lambda: processors):
        return backward_simulation.errors(sizes, options, BackwardTiles(block_kv_dq=step), change)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_a_walk_over_several_tiles(case):
    """V7, V8: against float64, where a program has many tiles, some of them without a key."""
    found = backward_simulation.in_a_process(__file__, case)
    assert len(found) == 3
    assert max(found) < 6e-3  # bf16 rounds to 2^-9


@pytest.mark.slow
def test_a_lost_row_is_caught():
    """Negative control: one row of cotangents set to zero."""
    assert min(backward_simulation.in_a_process(__file__, next(iter(CASES)), "hurt")) > 1e-2


if __name__ == "__main__":
    hurt = (lambda x: x.at[0, 130, 1].set(0)) if sys.argv[2:] else (lambda x: x)
    print(*errors(sys.argv[1], hurt))
