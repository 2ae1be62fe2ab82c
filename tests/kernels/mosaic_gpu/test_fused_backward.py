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
def test_deterministic_is_two_kernels(head_size):
    """V6: the fused kernel serves where any order of additions is allowed, and only there."""
    inputs = shapes(head_size=head_size)
    spec = AttentionSpec(0.1, is_causal=head_size == 64)
    for deterministic in (False, True):
        asked = dataclasses.replace(spec, deterministic=deterministic)
        text = lower(jax.grad(functools.partial(loss, asked)), inputs.query, inputs)
        assert text.count("custom_call @mosaic_gpu") == 2 + deterministic
        assert ("reduce.async.bulk" in text) != deterministic


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


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.slow
def test_sharded_and_mapped_gradients_lower(deterministic, monkeypatch):
    """The mutable sum of dQ, and its counters, are no obstacle to shard_map and vmap."""
    monkeypatch.setattr(backend, "backward_tiles", lambda *_, **__: FusedTiles())
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
        return attention_backward(AttentionSpec(0.1), *arrays, None, FusedTiles())

    assert not jax.make_jaxpr(gradients)(*[wide] * 4, rows, rows).effects


@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_fused_kernel_serves_where_it_is_faster(head_size, is_causal):
    """As timed: in any order, and in one order where waiting for turns costs less than it saves."""
    spec = AttentionSpec(0.1, is_causal=is_causal)
    free = dataclasses.replace(spec, deterministic=False)
    for keys in (512, 2048):
        in_order = isinstance(tiles.backward_tiles(spec, head_size, keys), FusedTiles)
        assert in_order == (head_size == 128 and not is_causal and keys == 2048)
        is_fused = isinstance(tiles.backward_tiles(free, head_size, keys), FusedTiles)
        assert is_fused == (head_size == 64 or not is_causal)
        assert isinstance(tiles.backward_tiles(free, head_size, keys, pair_bytes=0), BackwardTiles)


if __name__ == "__main__":
    print(*errors(sys.argv[1], sys.argv[2:] == ["hurt"]))
