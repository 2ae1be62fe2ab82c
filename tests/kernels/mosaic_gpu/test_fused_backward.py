"""The fused backward kernel: values in the Mosaic GPU simulator, lowering for CUDA."""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import backward_simulation
from jax.sharding import Mesh, PartitionSpec

from dpfa_jax.attention import core
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import backend, tiles
from dpfa_jax.kernels.mosaic_gpu.backward import attention_backward
from dpfa_jax.kernels.mosaic_gpu.tiles import BackwardTiles, FusedTiles

# (B, T, S, N, K, H), options. Steps are 64 rows, programs 128 keys; two pairs of example and key
# head lie side by side, so that the last chunk of three is short.
CASES = {
    "causal, ragged, GQA": ((1, 137, 130, 2, 1, 40), {"is_causal": True}),
    "window, cap, key lengths": (
        (3, 70, 150, 1, 1, 64),
        {"local_window": (40, 70), "logits_soft_cap": 4.0, "key_lengths": (150, 60, 129)},
    ),
    "head size 128": ((1, 130, 130, 1, 1, 128), {}),
}


def errors(case, hurt=False):
    """Relative errors of dq, dk, dv; `hurt`: one row of cotangents is lost."""
    change = (lambda x: x.at[0, 130, 1].set(0)) if hurt else (lambda x: x)
    return backward_simulation.errors(*CASES[case], FusedTiles(heads=2), change)


def simulated_errors(*arguments):
    return backward_simulation.in_a_process(__file__, *arguments)


QUICK = "causal, ragged, GQA"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.slow
def test_fused_gradients(case):
    """V7, V8: against float64; programs of the simulator add to sums of their own."""
    found = simulated_errors(case)
    assert len(found) == 3
    assert max(found) < 6e-3  # bf16 rounds to 2^-9


@pytest.mark.slow
def test_a_lost_row_is_caught():
    """Negative control: one row of cotangents set to zero."""
    assert min(simulated_errors(QUICK, "hurt")) > 1e-2


def shapes(rows=100, keys=93, head_size=64):
    struct = jax.ShapeDtypeStruct
    kv = struct((2, keys, 1, head_size), jnp.bfloat16)
    return AttentionInputs(struct((2, rows, 2, head_size), jnp.bfloat16), kv, kv)


# A name of its own keeps its traces apart from those of the two kernels.
FUSED = backend.MosaicGpuBackend(name="mosaic_gpu, fused")


def loss(spec, query, inputs):
    answer, _ = core.attend(FUSED, spec, inputs._replace(query=query))
    return answer.astype(jnp.float32).sum()


def lower(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 128])
def test_one_kernel_of_long_calls(head_size):
    """V6: dQ is added up in memory there alone, and in any order only where that is allowed."""
    long = tiles.LONG_BACKWARD
    for rows, keys, is_one in ((130, long, False), (long, 93, False), (long, long, True)):
        inputs = shapes(rows=rows, keys=keys, head_size=head_size)
        for deterministic in (False, True):
            spec = AttentionSpec(0.1, deterministic=deterministic)
            text = lower(jax.grad(functools.partial(loss, spec)), inputs.query, inputs)
            kernels = [x for x in text.splitlines() if "custom_call @mosaic_gpu" in x]
            assert len(kernels) == (2 if is_one else 3)
            assert ("reduce.async.bulk" in text) == is_one
            # Counters: batch, query heads, tiles of 64 rows.
            counters = 2 * 2 * -(-rows // 64)
            has_turns = any(f"tensor<{counters}xi32>" in x.split(" : ")[-1] for x in kernels)
            assert has_turns == (is_one and deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("heads", [pytest.param(16, marks=pytest.mark.slow), 2])
def test_turns_are_counted_where_the_same_bits_are_asked_for(deterministic, heads):
    """V6: a counter for each tile of dQ and query head, zeroed by XLA; none where it is not due."""
    struct = jax.ShapeDtypeStruct
    query, key = (struct((3, 200, n, 64), jnp.bfloat16) for n in (4, 1))
    rows = struct((3, 4, 200), jnp.float32)
    spec = AttentionSpec(0.1, deterministic=deterministic)

    def gradients(*arrays):
        return attention_backward(spec, *arrays, None, FusedTiles(heads=heads))

    text = lower(gradients, query, key, key, query, rows, rows)
    (kernel,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
    assert "reduce.async.bulk" in kernel
    counters = 3 * 4 * 4  # batch, query heads, tiles of 64 rows
    assert (f"tensor<{counters}xi32>" in kernel.split(" : ")[-1]) == deterministic


def test_warps_and_places_of_dq():
    """Dealt evenly to the warps that add and to two warpgroups, as many as shared memory holds."""
    assert tiles.adders_and_places(64) == (3, 6)
    assert tiles.adders_and_places(128) == (2, 2)
    with pytest.raises(ValueError, match="head_size=192"):
        tiles.adders_and_places(192)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.slow
def test_sharded_and_mapped_gradients_lower(deterministic, monkeypatch):
    """The mutable sum of dQ, and its counters, are no obstacle to shard_map and vmap."""
    monkeypatch.setattr(backend, "backward_tiles", lambda *_, **__: FusedTiles(heads=16))
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    split = PartitionSpec("data")
    spec = AttentionSpec(0.1, deterministic=deterministic)
    # A name of its own keeps its traces apart from those of the two kernels.
    own = backend.MosaicGpuBackend(name=f"mosaic_gpu, fused, {deterministic}")

    def fused_loss(query, inputs):
        answer, _ = core.attend(own, spec, inputs._replace(query=query))
        return answer.astype(jnp.float32).sum()

    gradient = jax.grad(fused_loss)
    inputs = shapes(rows=64, keys=64)
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(split, split), out_specs=split)
    assert "reduce.async.bulk" in lower(sharded, inputs.query, inputs)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), inputs)
    text = lower(jax.vmap(gradient), stacked.query, stacked)
    assert text.count("custom_call @mosaic_gpu") == 2
    assert "tensor<6x64x2x64xf32>" in text  # the mapped axis is folded into the batch


def test_no_effect_reaches_the_partitioner():
    """custom_partitioning refuses a program with effects: the mutable sum must end inside."""
    struct = jax.ShapeDtypeStruct
    wide, rows = struct((1, 64, 1, 64), jnp.bfloat16), struct((1, 1, 64), jnp.float32)

    def gradients(*arrays):
        return attention_backward(AttentionSpec(0.1), *arrays, None, FusedTiles(heads=16))

    assert not jax.make_jaxpr(gradients)(*[wide] * 4, rows, rows).effects


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_size", [64, 128])
def test_the_fused_kernel_serves_where_it_is_faster(head_size, deterministic):
    """As timed, in one order and in any: long calls, longer ones with causality, no window."""
    spec = AttentionSpec(0.1, deterministic=deterministic)
    causal = dataclasses.replace(spec, is_causal=True)
    window = dataclasses.replace(spec, local_window=(100_000, 9))

    def heads(spec, keys, **given):
        tile = tiles.backward_tiles(spec, head_size, keys, **given)
        return tile.heads if isinstance(tile, FusedTiles) else None

    assert [heads(spec, keys) for keys in (2047, 2048, 100_000)] == [None, 8, 8]
    long, many = {64: (8192, 32), 128: (16384, 16)}[head_size]
    assert [heads(causal, keys) for keys in (long - 1, long, 100_000)] == [None, many, many]
    assert heads(window, 100_000) is None
    assert heads(dataclasses.replace(window, is_causal=True), 100_000) is None
    assert heads(spec, 4096, pair_bytes=0) is None
    assert isinstance(tiles.backward_tiles(spec, head_size, 4096, pair_bytes=0), BackwardTiles)


if __name__ == "__main__":
    print(*errors(sys.argv[1], sys.argv[2:] == ["hurt"]))
