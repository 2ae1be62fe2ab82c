"""Tiles of a measured table, and what they may change: an order of sums (V10)."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import triton_cases

from dpfa_jax.kernels import tile_tables
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout
from dpfa_jax.kernels.triton import tile_choice, tiles
from dpfa_jax.kernels.triton.backend import TritonBackend

pytestmark = pytest.mark.quickly_compiled

NOISY = AttentionSpec(1.0, readout=ExampleReadout(0.3, (0.5,) * 2, (2.0**-5,) * 2))


@pytest.fixture
def table(monkeypatch):
    """Puts a table of these tiles in use."""

    def put(found):
        made = tile_tables.TileTable("a GPU", None, found)
        monkeypatch.setattr(tile_tables, "of_device", lambda _: made)

    return put


def test_a_table_decides(table):
    table({
        "triton/forward/64/16 bits": {"block_q": 128, "block_kv": 32, "warps": 8},
        "triton/memory/64/16 bits": {"block_q": 128, "block_kv": 64},
    })  # fmt: skip
    # The step of a memory readout is part of its sensitivity bound.
    wanted = tiles.kernel_tiles(64, 2)._replace(forward=tiles.Tiles(128, 32, 8))
    assert tile_choice.kernel_tiles(64, 2) == wanted
    assert tile_choice.key_of("forward", 64, 2) == "triton/forward/64/16 bits"


def test_what_is_in_no_table_or_does_not_fit_has_the_heuristic(table, monkeypatch):
    table({"triton/keys/256/16 bits": {"block_q": 128, "block_kv": 128}})
    for size in (64, 256):
        assert tile_choice.kernel_tiles(size, 2) == tiles.kernel_tiles(size, 2)
    monkeypatch.undo()
    monkeypatch.setattr(tile_tables, "device_kind", lambda: "NVIDIA H900")
    assert tile_choice.kernel_tiles(128, 2) == tiles.kernel_tiles(128, 2)


def test_tiles_change_no_release(table):
    """V10: the noise alone, bit for bit; with values, to a cell of the grid. Mosaic's likewise."""
    backend = TritonBackend(interpret=True)
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((2, 40, 2, 16)), jnp.bfloat16) for _ in range(3)
    )
    noise = triton_cases.noise_inputs(2)

    def released():
        """Without values and with them, by one program."""
        run = triton_cases.quickly(lambda x: backend.forward(NOISY, x).output)
        inputs = AttentionInputs(query, key, value, noise=noise)
        calls = (inputs._replace(value=jnp.zeros_like(value)), inputs)
        return (np.asarray(run(x), np.float32) for x in calls)

    silent, spoken = released()
    table({"triton/forward/16/16 bits": {"block_q": 16, "block_kv": 32}})
    assert tile_choice.kernel_tiles(16, 2).forward == tiles.Tiles(16, 32)
    silent_again, again = released()
    np.testing.assert_array_equal(silent_again, silent)
    assert np.abs(again - spoken).max() <= 2.0**-5 + 2.0**-7 * np.abs(spoken).max()
    assert np.abs(silent).min() < 1 < np.abs(silent - spoken).sum()
