"""Tables of measured tiles: looked up, checked, and never more than an order of sums (V10)."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import triton_cases

from dpfa_jax.core import TileTableError
from dpfa_jax.kernels import tile_tables
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout
from dpfa_jax.kernels.mosaic_gpu import tile_choice, tiles
from dpfa_jax.kernels.mosaic_gpu.tiles import BackwardTiles, ForwardTiles, FusedTiles
from dpfa_jax.kernels.triton import tile_choice as triton_choice
from dpfa_jax.kernels.triton import tiles as triton_tiles
from dpfa_jax.kernels.triton.backend import TritonBackend

pytestmark = pytest.mark.quickly_compiled

FULL, CAUSAL = AttentionSpec(1.0), AttentionSpec(1.0, is_causal=True)
FREE = AttentionSpec(1.0, deterministic=False)
NOISY = AttentionSpec(1.0, readout=ExampleReadout(0.3, (0.5,) * 2, (2.0**-5,) * 2))
SHIPPED = sorted(Path(tile_tables.__file__).parent.glob("tile_data/*.json"))


def content_of(found, device="a GPU"):
    return json.dumps({"device": device, "date": "2026-11-28", "tiles": found}).encode()


@pytest.fixture
def table(monkeypatch):
    """Puts a table in use, written and read as a file is."""

    def put(found):
        parsed = tile_tables.parsed(content_of(found), "a-gpu.json")
        monkeypatch.setattr(tile_tables, "of_device", lambda _: parsed)

    return put


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_tables(file):
    """Each is its device's; each entry is a tile that fits, under a key that a call can have."""
    found = tile_tables.parsed(file.read_bytes(), file.name)
    assert tile_tables.file_name(found.device) == file.name
    assert tile_tables.of_device(found.device) == found
    for key, fields in found.tiles.items():
        backend, kernel, size, *rest = key.split("/")
        size = int(size)
        spec = AttentionSpec(1.0, is_causal=rest[0] == "causal")
        if backend == "triton":
            itemsize = int(rest[0].split()[0]) // 8
            assert triton_choice.key_of(kernel, size, itemsize) == key
            tile = triton_choice.tile_of(fields)
            assert triton_choice.fits(kernel, tile, head_size=size, itemsize=itemsize)
        elif kernel == "forward":
            is_noisy = rest[2] == "example"
            spec = dataclasses.replace(spec, readout=(NOISY if is_noisy else FULL).readout)
            keys = {"long": 2048, "short": 512}[rest[1]]
            assert tile_choice.forward_key(spec, size, keys) == key
            tile = tile_choice.forward_tile(fields, is_noisy=is_noisy)
            assert tile_choice.fits_forward(tile, size)
        else:
            spec = dataclasses.replace(spec, deterministic=rest[2] == "same bits")
            keys = {"long": 2048, "short": 512}[rest[1]]
            assert tile_choice.backward_key(spec, size, keys) == key
            assert tile_choice.fits_backward(tile_choice.backward_tile(fields), size)


def test_a_table_is_shipped():
    assert SHIPPED


def test_a_table_decides(table):
    wanted = {"block_kv": 192, "ahead": False, "stages": 3}
    table({
        "mosaic_gpu/forward/64/full/long/plain": wanted,
        "mosaic_gpu/forward/64/full/long/example": {"noise_warpgroup": False},
        "mosaic_gpu/backward/128/full/long/any order": {"kernels": "two", "block_kv_dq": 128},
        "mosaic_gpu/backward/128/causal/long/same bits": {"kernels": "two", "stages": 3},
        "triton/forward/64/16 bits": {"block_q": 128, "block_kv": 32, "warps": 8},
        "triton/memory/64/16 bits": {"block_q": 128, "block_kv": 64},
    })  # fmt: skip
    assert tile_choice.forward_tiles(FULL, 64, 4096) == ForwardTiles(**wanted)
    assert not tile_choice.forward_tiles(NOISY, 64, 4096).noise_warpgroup
    assert tile_choice.backward_tiles(FREE, 128, 4096) == BackwardTiles(block_kv_dq=128)
    assert tile_choice.backward_tiles(CAUSAL, 128, 4096) == BackwardTiles(stages=3)
    found = triton_choice.kernel_tiles(64, 2)
    heuristic = triton_tiles.kernel_tiles(64, 2)
    # The step of a memory readout is part of its sensitivity bound.
    assert found == heuristic._replace(forward=triton_tiles.Tiles(128, 32, 8))
    assert tile_tables.in_use() == "measured on a GPU, 2026-11-28"
    # What is in no table: other sizes, lengths, masks, windows, arrays of pairs.
    for spec, size, keys, pairs in (
        (FULL, 128, 4096, None), (FULL, 64, 512, None), (CAUSAL, 64, 4096, None),
        (AttentionSpec(1.0, local_window=(9, 9)), 64, 4096, None), (FULL, 64, 4096, 16),
    ):  # fmt: skip
        chosen = tile_choice.forward_tiles(spec, size, keys, pair_bytes=pairs)
        assert chosen == tiles.forward_tiles(spec, size, keys, pair_bytes=pairs)


def test_a_table_says_where_noise_is_made(table):
    """Of two entries the example's decides; without one, the plain kernel before the pass has its
    own; what an argument forces passes over an entry that says otherwise."""
    plain = {"mosaic_gpu/forward/64/full/short/plain": {"block_kv": 192}}
    table(plain)
    after = ForwardTiles(block_kv=192)
    assert tile_choice.forward_tiles(NOISY, 64, 512) == after
    inside = tile_choice.forward_tiles(NOISY, 64, 512, noise_pass=False)
    assert inside == tiles.forward_tiles(NOISY, 64, 512, noise_pass=False)
    assert inside.noise_warpgroup
    table(plain | {"mosaic_gpu/forward/64/full/short/example": {"noise_warpgroup": True}})
    assert tile_choice.forward_tiles(NOISY, 64, 512).noise_warpgroup
    assert tile_choice.forward_tiles(NOISY, 64, 512, noise_pass=True) == after
    table({"mosaic_gpu/forward/128/full/long/example": {"noise_warpgroup": False}})
    assert tile_choice.forward_tiles(NOISY, 128, 65536) == ForwardTiles()
    assert tile_choice.forward_tiles(NOISY, 128, 65536, noise_pass=False).noise_warpgroup


def test_an_unknown_device_has_the_heuristic(monkeypatch):
    monkeypatch.setattr(tile_tables, "device_kind", lambda: "NVIDIA H900")
    assert tile_choice.forward_tiles(FULL, 64, 4096) == tiles.forward_tiles(FULL, 64, 4096)
    assert tile_choice.backward_tiles(FREE, 64, 4096) == FusedTiles(heads=8)
    assert triton_choice.kernel_tiles(128, 2) == triton_tiles.kernel_tiles(128, 2)
    assert tile_tables.in_use() == "heuristic"


def test_a_tile_that_does_not_fit_is_passed_over(table):
    table({
        "mosaic_gpu/forward/256/full/long/plain": {"block_kv": 256},
        "mosaic_gpu/backward/64/full/long/same bits": {"kernels": "two", "block_kv_dq": 512},
        "mosaic_gpu/backward/256/full/long/same bits": {"kernels": "two"},
        "mosaic_gpu/backward/128/causal/long/same bits": {"kernels": "two", "block_kv_dq": 256},
        "triton/keys/256/16 bits": {"block_q": 128, "block_kv": 128},
    })  # fmt: skip
    assert tile_choice.forward_tiles(FULL, 256, 4096) == tiles.forward_tiles(FULL, 256, 4096)
    for size in (64, 256):
        chosen = tile_choice.backward_tiles(FULL, size, 4096)
        assert chosen == tiles.backward_tiles(FULL, size, 4096)
    assert tile_choice.backward_tiles(CAUSAL, 128, 4096) == tiles.backward_tiles(CAUSAL, 128, 4096)
    assert triton_choice.kernel_tiles(256, 2) == triton_tiles.kernel_tiles(256, 2)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"{}", content_of({"k": {}}), content_of({"k": 3}),
        content_of({"k": {"block_kv": 1.5}}), content_of({"k": {"block_kv": None}}),
        content_of([]), content_of({}, device=""), content_of({})[:-1],
        content_of({}).replace(b"2026-11-28", b"yesterday"), b"\xff" + content_of({}),
    ],
)  # fmt: skip
def test_a_damaged_table_is_refused(content):
    """V23: by name, with advice."""
    with pytest.raises(TileTableError, match=r"a-gpu\.json.*anew"):
        tile_tables.parsed(content, "a-gpu.json")
    tile_tables.parsed(content_of({"k": {"block_kv": 64}}), "a-gpu.json")  # negative control


@pytest.mark.parametrize("fields", [{"block_kv": 100}, {"block_k": 64}, {"stages": 1}])
def test_fields_that_make_no_tile_are_refused(fields, table):
    table({"mosaic_gpu/forward/64/full/long/plain": fields})
    with pytest.raises(TileTableError, match="mosaic_gpu/forward/64/full/long/plain"):
        tile_choice.forward_tiles(FULL, 64, 4096)


def test_a_table_of_another_device_is_refused(monkeypatch, tmp_path):
    (tmp_path / "tile_data").mkdir()
    (tmp_path / "tile_data" / "nvidia-h200.json").write_bytes(content_of({}, "NVIDIA H100"))
    monkeypatch.setattr(tile_tables.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(TileTableError, match="NVIDIA H100"):
        tile_tables.of_device.__wrapped__("NVIDIA H200")
    assert tile_tables.of_device.__wrapped__("NVIDIA H300") is None


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
    assert triton_choice.kernel_tiles(16, 2).forward == triton_tiles.Tiles(16, 32)
    silent_again, again = released()
    np.testing.assert_array_equal(silent_again, silent)
    assert np.abs(again - spoken).max() <= 2.0**-5 + 2.0**-7 * np.abs(spoken).max()
    assert np.abs(silent).min() < 1 < np.abs(silent - spoken).sum()
