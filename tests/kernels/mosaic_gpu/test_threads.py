"""Threads of every kernel, recorded and replayed: no hang, no race, each visible pair once.

What a GPU runs, where the simulator's path differs, and in milliseconds: `helpers.kernel_threads`.
"""

import pytest
from helpers.kernel_threads.cases import KINDS, Case, random_case
from helpers.kernel_threads.checks import replay
from helpers.kernel_threads.pieces import Fault
from helpers.kernel_threads.references import Dims

from dpfa_jax.kernels.mosaic_gpu import backward_fused, backward_wide_queries, steps
from dpfa_jax.kernels.mosaic_gpu.backward_steps import Ring
from dpfa_jax.kernels.mosaic_gpu.pairs import PairReader
from dpfa_jax.kernels.mosaic_gpu.producer import Producer
from dpfa_jax.kernels.mosaic_gpu.walk import Tile, Tiling, Walk

# Rows whose window lies behind the last key that exists, beside rows with keys.
BEHIND = Case("wide", 256, 256, size=192, window=(5, 3), key_lengths=(60,))
CAUSAL = {"is_causal": True, "processors": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_random_calls(kind):
    """V7: lengths, windows, groups, masks, any number of processors; one call of each kind."""
    assert replay(random_case(kind, 0), 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_more_random_calls(kind):
    for seed in range(1, 41):
        case = random_case(kind, seed)
        try:
            replay(case, seed)
        except AssertionError as error:
            raise AssertionError(case) from error


def test_a_window_behind_the_last_key():
    """A warpgroup without steps, whose own begin past the end of its program's."""
    assert replay(BEHIND, 0)


@pytest.mark.parametrize("choice", [4, 9, 3, 8])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_more_heads_side_by_side_than_there_are(size, is_causal, choice):
    """8 or 32 of six pairs of example and key head, of two query heads each, in both orders."""
    sizes = {"batch": 3, "key_heads": 2, "group": 2, "size": size}
    lengths = {"key_lengths": (193, 300, 0)}
    case = Case("fused", 193, 300, **sizes, **lengths, is_causal=is_causal, choice=choice)
    assert replay(case, choice)


def do_nothing(*_):
    return None


# What is changed, and by what; a call that it breaks; how.
FAULTS = {
    "steps outside of the program's": (
        (backward_wide_queries, "_own_range", lambda own, program: own), BEHIND, "hang",
    ),
    "a turn too late": (
        (backward_fused, "first_program", lambda *_: 0),
        Case("fused", 300, 300, window=(3, 3), choice=1), "hang",
    ),
    "a skipped step that is not freed": (
        (PairReader, "skip", do_nothing),
        Case("two, pairs", 300, 300, bias=(1, 1, 300, 300), **CAUSAL), "hang",
    ),
    "a slot filled too early": (
        (Ring, "await_free", do_nothing),
        Case("two", 300, 300, **CAUSAL), "needed by|twice at once",
    ),
    "an arrival that nobody sees": (
        (Producer, "drain", do_nothing), Case("forward", 300, 300, **CAUSAL), "unseen phase",
    ),
    "a step without its mask": (
        (Tiling, "is_whole", True), Case("forward", 300, 300, **CAUSAL), "forward.*value.*row, key",
    ),
    "the noise of another tile": (
        (Walk, "first", lambda walk: walk.beyond(0)),
        Case("forward, noise", 300, 300, choice=1), "weights.*noise",
    ),
    "a step left out": (
        (steps, "left_reach", lambda spec: spec.local_window[0] - 140),
        Case("memory", 300, 300, window=(140, 10)), "memory.*value.*row, key",
    ),
    "the same part of the columns twice": (
        (Tile, "value_columns", lambda _, count: Dims(0, count)),
        Case("memory, parts", 200, 300, size=256), "noise.*columns=range.128, 136",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault, monkeypatch):
    """Negative control: each of these runs without its change, and is caught with it."""
    (owner, name, change), case, message = FAULTS[fault]
    replay(case, 0)
    monkeypatch.setattr(owner, name, change)
    with pytest.raises(Fault, match=message):
        replay(case, 0)
