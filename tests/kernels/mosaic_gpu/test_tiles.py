"""Tiles that are chosen fit, and say where the noise of an example release is made."""

import dataclasses

import pytest

from dpfa_jax.kernels.base import AttentionSpec, ExampleReadout
from dpfa_jax.kernels.mosaic_gpu import tiles


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
