"""Backward kernels above head size 128: values in the simulator, lowering, chunks of the work."""

import functools
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import backward_simulation
from jax.sharding import Mesh, PartitionSpec

from dpfa_jax.attention import core
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import (
    axes,
    backend,
    backward_wide,
    backward_wide_queries,
    device,
    gradient_chunks,
    pairs,
    tiles,
)
from dpfa_jax.kernels.mosaic_gpu.gradient_chunks import chunks_of
from dpfa_jax.kernels.mosaic_gpu.steps import key_steps, query_steps, within_key_length
from dpfa_jax.kernels.mosaic_gpu.tiles import WideTiles

# (B, T, S, N, K, H), options. Tiles are 64 by 64; the kernel of dQ owns 128 rows.
CASES = {
    "causal, ragged, GQA": ((1, 137, 130, 2, 1, 256), {"is_causal": True}),
    "window, cap, key lengths": (
        (2, 70, 150, 1, 1, 192),
        {"local_window": (40, 70), "logits_soft_cap": 4.0, "key_lengths": (150, 60)},
    ),
    "mask and bias, causal": (
        (2, 137, 100, 2, 1, 256),
        {"is_causal": True, "mask": (2, 1, 137, 100), "bias": (1, 2, 137, 100)},
    ),
    "mask of keys, bias of rows": (
        (1, 70, 100, 2, 2, 192),
        {"mask": (1, 1, 1, 100), "bias": (1, 2, 70, 1)},
    ),
    "head size 200, two heads": ((2, 130, 70, 2, 2, 200), {}),
    # A key block that no row sees, rows that see no key.
    "window that leaves keys alone": (
        (1, 70, 200, 1, 1, 256),
        {"local_window": (10, 5), "key_lengths": (40,)},
    ),
    # The last 64 rows of a program have no step, and those they would have lie past its last one.
    "window behind the last key": (
        (1, 256, 256, 1, 1, 192),
        {"local_window": (5, 3), "key_lengths": (60,)},
    ),
}


def errors(case, *words):
    """Relative errors of dq, dk, dv. "hurt": one row of cotangents is lost; "2": chunks of so many
    programs."""
    change = (lambda x: x.at[0, 130, 1].set(0)) if "hurt" in words else (lambda x: x)
    sizes, options = CASES[case]
    if words and words[-1].isdigit():
        group, rows = sizes[3] // sizes[4], -(-sizes[1] // 128) * 128
        gradient_chunks.LOGIT_GRADIENT_BYTES = int(words[-1]) * group * rows * 64 * 2
        gradient_chunks.WAVES = 0
    tile = WideTiles(cotangent_stages=1 if "mask" in options else 2)
    return backward_simulation.errors(sizes, options, tile, change)


def simulated_errors(*arguments):
    return backward_simulation.in_a_process(__file__, *arguments)


QUICK = "causal, ragged, GQA"


# One chunk; then two programs a launch, which cuts heads, batch or keys.
@pytest.mark.parametrize("words", [(), ("2",)], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_wide_gradients(case, words):
    """V7, V8: against float64."""
    found = simulated_errors(case, *words)
    assert len(found) == 3
    assert max(found) < 6e-3  # bf16 rounds to 2^-9


@pytest.mark.slow
def test_a_lost_row_is_caught():
    """Negative control: one row of cotangents set to zero."""
    assert min(simulated_errors(QUICK, "hurt")) > 1e-2


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, (0, 0), (3, 1), (40, 7), (5, 100)])
def test_dq_reads_what_the_other_kernel_wrote(is_causal, window):
    """Tile by tile: logit gradients that nobody wrote are never read."""
    spec = AttentionSpec(1.0, is_causal=is_causal, local_window=window)
    block, read = 8, 0
    for rows, keys in itertools.product((45, 8, 100), (37, 64)):
        for key_length in (0, 1, 20, keys):
            written = set()
            for begin in range(0, keys, block):
                steps = query_steps(spec, begin, block, block, rows)
                steps = within_key_length(steps, begin, block, key_length)
                written |= {(row, begin // block) for row in range(steps.begin, steps.end)}
            for row in range(-(-rows // block)):
                steps = key_steps(spec, row * block, block, block, key_length, None)
                tiles_read = {(row, step) for step in range(steps.begin, steps.end)}
                assert tiles_read <= written
                read += len(tiles_read)
                # The range of a program, two such rows, holds that of each, empty or not: a step
                # outside would wait for what nobody loads.
                both = key_steps(spec, row // 2 * 2 * block, 2 * block, block, key_length, None)
                program, own = (both.begin, both.end), (steps.begin, steps.end)
                begin, end = backward_wide_queries._own_range(own, program)
                assert both.begin <= begin <= end <= both.end
                assert {(row, step) for step in range(begin, end)} == tiles_read
    assert read


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("heads", [1, 6, 32])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("rows", [128, 2048, 16384, 1 << 20])
@pytest.mark.parametrize("is_even", [False, True])
def test_chunks_cover_the_work_in_linear_memory(batch, heads, group, rows, is_even):
    """Each block of keys of each head in exactly one chunk; more than a wave of uneven programs."""
    blocks, processors = rows // 64, 132
    chunks = chunks_of(
        batch, heads, blocks, rows=rows, group=group, block=64, processors=processors,
        is_even=is_even,
    )  # fmt: skip
    seen = np.zeros((batch, heads, blocks + chunks.key_blocks), int)
    sizes = (chunks.batch, chunks.heads, chunks.key_blocks)
    for index in itertools.product(*(range(count) for count in chunks.counts)):
        seen[tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, sizes, strict=True))] += 1
    assert np.all(seen[..., :blocks] == 1)
    programs = chunks.batch * chunks.heads * chunks.key_blocks
    waves = 2 if group == 1 or not is_even else 1
    assert 2 * programs * rows * group * 64 <= max(
        gradient_chunks.LOGIT_GRADIENT_BYTES, 2 * waves * processors * group * rows * 64
    )
    if chunks.total > 1:
        assert is_even or programs > processors
        assert chunks.cuts_keys == (blocks > programs)


def test_even_work_cut_along_keys_takes_one_wave():
    """Half the memory of two, in as many waves."""
    sizes = {"rows": 32768, "group": 1, "block": 64, "processors": 132}
    even, uneven = (chunks_of(1, 8, 512, is_even=is_even, **sizes) for is_even in (True, False))
    assert (even.key_blocks, even.counts) == (128, (1, 8, 4))
    assert (uneven.key_blocks, uneven.counts) == (256, (1, 8, 2))


@pytest.mark.parametrize(
    ("options", "slowest"),
    [({}, axes.HEADS), ({"is_causal": True}, axes.KEYS), ({"local_window": (9, 9)}, axes.KEYS)],
)
def test_the_longest_programs_go_first(options, slowest, monkeypatch):
    """The last axis of a grid runs fastest: uneven programs by keys, even ones head by head."""
    grids = {}

    def launch(body, arrays, out_type, shared, barriers, grid, names, name, *_, **__):
        grids[name] = dict(zip(names, grid, strict=True))
        return [jnp.zeros(x.shape, x.dtype) for x in out_type]

    monkeypatch.setattr(backward_wide, "launch", launch)
    monkeypatch.setattr(backward_wide_queries, "launch", launch)
    monkeypatch.setattr(device, "processors", lambda: 132)
    x, rows = jnp.zeros((2, 256, 3, 256), jnp.bfloat16), jnp.zeros((2, 3, 256))
    operands = backward_wide.BackwardArrays(x, x, x, x, rows, rows)
    backward_wide.wide_backward(AttentionSpec(1.0, **options), operands, WideTiles(), keys=256)
    grid = grids["dpfa_attention_backward_wide_kv"]
    assert grid == {axes.HEADS: 3, axes.KEYS: 4, axes.BATCH: 2}
    assert next(iter(grid)) == slowest
    assert [*grid][-1] == axes.BATCH  # which share a bias


def shapes(rows=100, keys=93, head_size=256, **more):
    struct = jax.ShapeDtypeStruct
    kv = struct((2, keys, 1, head_size), jnp.bfloat16)
    return AttentionInputs(struct((2, rows, 2, head_size), jnp.bfloat16), kv, kv, **more)


# A name of its own keeps its traces apart from those of other tests.
BACKEND = backend.MosaicGpuBackend(name="mosaic_gpu, wide")


def loss(spec, query, inputs):
    answer, _ = core.attend(BACKEND, spec, inputs._replace(query=query))
    return answer.astype(jnp.float32).sum()


def lower(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("head_size", "deterministic"),
    [(256, True), pytest.param(192, False, marks=pytest.mark.slow)],
)
def test_two_kernels_and_no_atomics(head_size, deterministic):
    """V6: whatever is asked for, sums have one order."""
    spec = AttentionSpec(0.1, is_causal=True, deterministic=deterministic)
    inputs = shapes(head_size=head_size, key_lengths=jax.ShapeDtypeStruct((2,), jnp.int32))
    text = lower(jax.grad(functools.partial(loss, spec)), inputs.query, inputs)
    assert text.count("custom_call @mosaic_gpu") == 3  # with the forward
    for kernel in ("wide_kv", "wide_q"):
        assert f"dpfa_attention_backward_{kernel}" in text
    assert "reduce.async.bulk" not in text


@pytest.mark.parametrize("programs", [4, 1])
@pytest.mark.slow
def test_chunks_lower(programs, monkeypatch):
    """Whole heads a launch, then parts of their keys; under vmap and shard_map as well."""
    monkeypatch.setattr(gradient_chunks, "LOGIT_GRADIENT_BYTES", programs * 2 * 128 * 64 * 2)
    monkeypatch.setattr(gradient_chunks, "WAVES", 0)
    own = backend.MosaicGpuBackend(name=f"mosaic_gpu, wide, {programs}")
    inputs = shapes(keys=200)

    def gradient(query, inputs):
        def loss(query):
            answer, _ = core.attend(own, AttentionSpec(0.1), inputs._replace(query=query))
            return answer.astype(jnp.float32).sum()

        return jax.grad(loss)(query)

    text = lower(gradient, inputs.query, inputs)
    assert "stablehlo.while" in text
    assert ("tensor<2x128x2x256xf32>" in text) == (programs == 1)  # the sum of dQ
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    split = PartitionSpec("data")
    lower(
        jax.shard_map(gradient, mesh=mesh, in_specs=(split, split), out_specs=split),
        inputs.query,
        inputs,
    )
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), inputs)
    lower(jax.vmap(gradient), stacked.query, stacked)


@pytest.mark.parametrize(
    ("head_size", "mask", "bias", "dtype"),
    [
        (256, (1, 2, 100, 93), (2, 1, 100, 93), jnp.float32),
        (192, (2, 1, 1, 93), (1, 1, 1, 93), jnp.bfloat16),
        (256, None, (2, 2, 100, 1), jnp.bfloat16),
    ],
)
@pytest.mark.slow
def test_masks_and_biases_lower(head_size, mask, bias, dtype):
    """The largest arrays of pairs have their place beside one slot of cotangents."""
    struct = jax.ShapeDtypeStruct
    inputs = shapes(
        head_size=head_size,
        mask=None if mask is None else struct(mask, bool),
        bias=struct(bias, dtype),
    )
    text = lower(jax.grad(functools.partial(loss, AttentionSpec(0.1))), inputs.query, inputs)
    assert text.count("custom_call @mosaic_gpu") == 3
    pair_bytes = pairs.bytes_per_column(inputs.mask, inputs.bias)
    tile = tiles.backward_tiles(AttentionSpec(1.0), head_size, 512, pair_bytes=pair_bytes)
    assert max(tile.shared_bytes(head_size, pair_bytes)) <= tiles.SHARED_MEMORY_BYTES


@pytest.mark.parametrize("head_size", [192, 256])
def test_tiles_fit_shared_memory(head_size):
    tile = tiles.backward_tiles(AttentionSpec(1.0), head_size, 512)
    assert isinstance(tile, WideTiles)
    assert max(tile.shared_bytes(head_size)) <= tiles.SHARED_MEMORY_BYTES
    more = WideTiles(stages=5, key_stages=6)
    assert min(more.shared_bytes(head_size)) > tiles.SHARED_MEMORY_BYTES


if __name__ == "__main__":
    print(*errors(*sys.argv[1:]))
