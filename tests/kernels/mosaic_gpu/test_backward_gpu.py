"""Backward kernels of many programs on the device: memory, chunks, the same bits.

python -m pytest -m gpu tests/kernels/mosaic_gpu    (-n 8 where pytest-xdist is installed)
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle
from helpers.hopper_cases import (
    FUSED,
    TWO,
    distance,
    draw,
    fused,
    two_kernels,
    use_tiles,
    value_and_gradients,
)
from scipy import special

from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec
from dpfa_jax.kernels.mosaic_gpu import gradient_chunks
from dpfa_jax.kernels.mosaic_gpu.backend import MosaicGpuBackend
from dpfa_jax.kernels.mosaic_gpu.tiles import FusedTiles

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("deterministic", [True, False])
def test_131072_keys_in_linear_memory(deterministic):
    """Both passes hold a few arrays like the inputs; some rows and keys against float64."""
    rows, size, scale = 131072, 128, 128**-0.5
    rng = np.random.default_rng(11)
    arrays = [draw(rng, (1, rows, 1, size), jnp.bfloat16) for _ in range(4)]
    spec = AttentionSpec(scale, deterministic=deterministic)

    def run(query, key, value, cotangent):
        return value_and_gradients(spec, AttentionInputs(query, key, value), cotangent)

    program = jax.jit(run).lower(*arrays).compile()
    figures = program.memory_analysis()
    one = 2 * rows * size  # bytes of one bf16 array
    assert figures.temp_size_in_bytes + figures.output_size_in_bytes < 12 * one
    output, lse, d_query, d_key, d_value = (
        np.asarray(x, np.float64)[0, :, 0] for x in program(*arrays)
    )
    query, key, value, cotangent = (np.asarray(x, np.float64)[0, :, 0] for x in arrays)
    delta = (output * cotangent).sum(axis=1)
    some = np.asarray([0, 1, 70_000, rows - 1])
    logits = scale * query[some] @ key.T
    expected_lse = special.logsumexp(logits, axis=1)
    np.testing.assert_allclose(lse[some], expected_lse, atol=1e-3)
    weights = np.exp(logits - expected_lse[:, None])

    def close(found, exact):
        assert distance(found, exact) <= 0.02 * np.linalg.norm(exact)

    close(output[some], weights @ value)
    slopes = weights * (cotangent[some] @ value.T - delta[some, None])
    close(d_query[some], scale * slopes @ key)
    weights = np.exp(scale * query @ key[some].T - lse[:, None])  # (rows, keys)
    close(d_value[some], weights.T @ cotangent)
    slopes = weights * (cotangent @ value[some].T - delta[:, None])
    close(d_key[some], scale * slopes.T @ query)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [192, 256])
def test_wide_backward_of_many_programs(size, is_causal):
    """V6, V7: a grid that outnumbers the processors; the same bits each time, whatever is asked."""
    rng = np.random.default_rng(12)
    arrays = [draw(rng, (4, 1000, n, size), jnp.bfloat16) for n in (8, 4, 4, 8)]
    inputs = AttentionInputs(*arrays[:3])
    for deterministic in (True, False):
        spec = AttentionSpec(size**-0.5, is_causal=is_causal, deterministic=deterministic)
        runs = [value_and_gradients(spec, inputs, arrays[3]) for _ in range(4)]
        for run in runs[1:]:
            for one, other in zip(run, runs[0], strict=True):
                assert np.array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
    exact = oracle.attention(*arrays[:3], arrays[3], scale=size**-0.5, is_causal=is_causal)
    for mine, theirs in zip(runs[0][2:], exact[1:4], strict=True):
        assert distance(mine, theirs) <= 8e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize("programs", [64, 20, 3])
def test_wide_backward_in_chunks(programs, monkeypatch):
    """V7: batch rows, heads, then keys one after the other: the gradients of one launch.

    Where keys are cut, a query's gradient is added up in another order.
    """
    rng = np.random.default_rng(13)
    size, rows = 256, 600
    arrays = [draw(rng, (4, rows, n, size), jnp.bfloat16) for n in (4, 2, 2, 4)]
    inputs, spec = AttentionInputs(*arrays[:3]), AttentionSpec(size**-0.5, is_causal=True)
    whole = value_and_gradients(spec, inputs, arrays[3])
    block_bytes = 640 * 2 * 64 * 2
    monkeypatch.setattr(gradient_chunks, "LOGIT_GRADIENT_BYTES", programs * block_bytes)
    monkeypatch.setattr(gradient_chunks, "WAVES", 0)
    # A name of its own keeps its traces apart from those of one launch.
    own = MosaicGpuBackend(name=f"mosaic_gpu, {programs} programs")
    cut = value_and_gradients(spec, inputs, arrays[3], own)
    same = range(len(cut)) if programs > 10 else (0, 1, 3, 4)
    for index, (one, other) in enumerate(zip(cut, whole, strict=True)):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        if index in same:
            assert np.array_equal(one, other)
        else:
            assert distance(one, other) <= 2.0**-8 * np.linalg.norm(other)


# (B, T, S, N, K, H), options; a program owns 128 keys of one of the B K key heads.
MANY = {
    "full": ((4, 1024, 1024, 8, 4, 128), {}),
    "more programs than processors": ((2, 4096, 4096, 8, 8, 128), {}),
    "head size 64": ((2, 4096, 4096, 8, 8, 64), {}),
    "causal": ((4, 2048, 2048, 8, 8, 128), {"is_causal": True}),
    "causal, one head": ((1, 2048, 2048, 1, 1, 128), {"is_causal": True}),
    "causal, GQA, ragged": ((3, 1001, 999, 10, 5, 64), {"is_causal": True}),
    "causal, few heads, long": ((1, 16384, 16384, 4, 2, 64), {"is_causal": True}),
    "MQA, a short last chunk": ((21, 700, 900, 4, 1, 128), {}),
    "window": ((3, 1500, 1500, 6, 2, 64), {"local_window": (300, 70)}),
    "lengths": ((5, 1300, 1300, 4, 4, 128), {"lengths": True}),
    "lengths, GQA, head size 64": ((5, 1300, 1300, 6, 2, 64), {"lengths": True}),
    "more keys than rows": ((4, 40, 3000, 8, 8, 64), {}),
}


def many(case, deterministic):
    (batch, rows, keys, heads, kv_heads, size), options = MANY[case]
    options = dict(options)
    rng = np.random.default_rng(10)
    query, cotangent = (draw(rng, (batch, rows, heads, size), jnp.bfloat16) for _ in range(2))
    key, value = (draw(rng, (batch, keys, kv_heads, size), jnp.bfloat16) for _ in range(2))
    inputs = AttentionInputs(query, key, value)
    if options.pop("lengths", False):
        lengths = jnp.asarray(rng.integers(0, keys + 1, batch), jnp.int32)
        inputs = inputs._replace(key_lengths=lengths.at[0].set(0))
    return AttentionSpec(size**-0.5, deterministic=deterministic, **options), inputs, cotangent


@pytest.mark.parametrize("case", MANY)
def test_fused_backward_has_the_same_bits(case, monkeypatch):
    """V6: five runs, and programs launched in other company; values against the two kernels."""
    spec, inputs, cotangent = many(case, deterministic=True)
    use_tiles(monkeypatch, two_kernels)
    expected = value_and_gradients(spec, inputs, cotangent, TWO)[2:]
    use_tiles(monkeypatch, fused)
    runs = [value_and_gradients(spec, inputs, cotangent, FUSED)[2:] for _ in range(5)]
    for heads in (5, 32):
        use_tiles(monkeypatch, lambda *_, heads=heads, **__: FusedTiles(heads=heads))
        backend = MosaicGpuBackend(name=f"mosaic_gpu, fused, {heads} heads")
        runs.append(value_and_gradients(spec, inputs, cotangent, backend)[2:])
    for run in runs:
        for mine, first in zip(run, runs[0], strict=True):
            assert np.array_equal(np.asarray(mine, np.float32), np.asarray(first, np.float32))
    for mine, theirs in zip(runs[0], expected, strict=True):
        theirs = np.asarray(theirs, np.float64)
        # Each is the float32 gradient rounded to bf16 of nearly the same weights.
        assert distance(mine, theirs) <= 2.0**-8 * np.linalg.norm(theirs)
        assert np.abs(np.asarray(mine, np.float64) - theirs).max() <= 2.0**-6 * np.abs(theirs).max()


@pytest.mark.parametrize("case", MANY)
def test_any_order_changes_dq_alone(case, monkeypatch):
    """V6, V7: dK and dV have the bits of the ordered kernel, dQ its values."""
    use_tiles(monkeypatch, fused)
    in_order, free = (
        value_and_gradients(*many(case, deterministic=deterministic), FUSED)[2:]
        for deterministic in (True, False)
    )
    theirs = np.asarray(in_order[0], np.float64)
    assert distance(free[0], theirs) <= 2.0**-8 * np.linalg.norm(theirs)
    for mine, other in zip(free[1:], in_order[1:], strict=True):
        assert np.array_equal(np.asarray(mine, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize("case", ["full", "lengths"])
def test_gradients_of_an_example_do_not_depend_on_the_others(case, monkeypatch):
    """V6: others have other values and lengths, so that their programs end at other times."""
    use_tiles(monkeypatch, fused)
    spec, inputs, cotangent = many(case, deterministic=True)
    batch, keys = inputs.key.shape[:2]
    if inputs.key_lengths is None:
        inputs = inputs._replace(key_lengths=jnp.full(batch, keys, jnp.int32))
    inputs = inputs._replace(key_lengths=inputs.key_lengths.at[2].set(keys - 9))
    first = value_and_gradients(spec, inputs, cotangent, FUSED)[2:]
    other = [x[::-1].at[2].set(x[2]) for x in inputs[:3]]
    lengths = jnp.zeros(batch, jnp.int32).at[2].set(keys - 9)
    moved = AttentionInputs(*other, key_lengths=lengths)
    second = value_and_gradients(spec, moved, cotangent[::-1].at[2].set(cotangent[2]), FUSED)[2:]
    for one, two in zip(first, second, strict=True):
        one, two = (np.asarray(x, np.float32) for x in (one, two))
        assert np.array_equal(one[2], two[2])
        assert not np.array_equal(one[1], two[1])


@pytest.mark.parametrize("cases", [("full", "more programs than processors"), ("head size 64",)])
def test_fused_backward_in_any_order(cases, monkeypatch):
    """V7: dK and dV have one order; dQ none, the negative control of the test of its bits."""
    use_tiles(monkeypatch, fused)
    differ = False
    for case in cases:
        spec, inputs, cotangent = many(case, deterministic=False)
        runs = [value_and_gradients(spec, inputs, cotangent, FUSED)[2:] for _ in range(5)]
        for run in runs[1:]:
            dq, dk, dv = (
                np.array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
                for x, y in zip(run, runs[0], strict=True)
            )
            assert dk
            assert dv
            differ |= not dq
    assert differ
