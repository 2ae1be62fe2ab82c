"""The memory kernel's numbers, sums and lowering: what needs neither a GPU nor the simulator."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.kernels import dispatch
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, MemoryReadout, NoiseInputs
from dpfa_jax.kernels.mosaic_gpu import backend, memory, memory_call, memory_numbers, tiles
from dpfa_jax.kernels.mosaic_gpu.memory_numbers import MAX_KEYS, SUM_BLOCK
from dpfa_jax.release import sensitivity

BACKEND = backend.MosaicGpuBackend()
ETA = sensitivity.ACCUMULATION_SLACK
READOUT = MemoryReadout("sum", 1.0, 1.0, 1.0, 1.0, (1.0, 1.0), (2.0**-4, 2.0**-4))


def numbers_of(readout=READOUT, head_size=128, keys=MAX_KEYS, dtype="bfloat16"):
    return memory_numbers.memory_numbers(readout, head_size, keys, jnp.dtype(dtype))


def structs(rows=100, keys=93, head_size=64, dtype=jnp.bfloat16, **more):
    struct = jax.ShapeDtypeStruct
    words = lambda *shape: struct(shape, jnp.uint32)  # noqa: E731
    kv = struct((2, keys, 1, head_size), dtype)
    noise = NoiseInputs(words(2, 2), words(2), words(2))
    return AttentionInputs(struct((2, rows, 2, head_size), dtype), kv, kv, noise=noise, **more)


@pytest.mark.parametrize("clip", [1.0, 1.001, 1.999, 0.3, 1e-4, 1e4])
@pytest.mark.parametrize("ratio", [1.0, 0.01, 1.7, 5.0])
@pytest.mark.parametrize("head_size", [1, 64, 128, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_bound_holds_for_the_numbers(clip, ratio, head_size, dtype):
    """V3 on paper: own change, additions and rounding stay within (1 + eta) Delta; no overflow."""
    kappa = clip * ratio
    if dtype == "float16" and not 1e-3 < kappa < 6e4:
        pytest.skip("kappa is no normal float16")
    readout = dataclasses.replace(
        READOUT, value_clip_norm=clip, weight_scale=kappa,
        noise_stddevs=(2.0**20 * clip,), grids=(2.0**16 * 2.0 ** math.ceil(math.log2(clip)),),
    )  # fmt: skip
    n = numbers_of(readout, head_size, dtype=dtype)
    assert n.value_clip_norm <= clip
    assert 0 < n.weight_scale <= kappa
    assert n.weight_scale > kappa * (1 - 2.0**-7 - 3e-3)
    assert math.log2(n.unit).is_integer()
    own = math.hypot(n.value_clip_norm, n.weight_scale)
    additions = memory_numbers.product_slack() * own
    rounding = n.unit * math.sqrt(head_size + 1)
    for relation, change in (
        ("mask", own),
        ("substitute", max(2 * n.value_clip_norm, own)),
    ):
        delta = sensitivity.memory_sum(clip, kappa, 1, 1, relation)
        assert change + additions + rounding <= (1 + ETA) * delta * (1 + 1e-12)
    # A block's sum, its errors included, keeps its last bit at one unit; all blocks fit 32 bits.
    for block in (SUM_BLOCK, SUM_BLOCK // 2):
        assert memory_numbers.product_slack(block) <= memory_numbers.product_slack()
        most = block * max(n.value_clip_norm, n.weight_scale)
        most *= 1 + memory_numbers.product_slack(block) / 2  # of one neighbour
        assert most <= 2**22 * n.unit
        assert (most / n.unit + 1) * (MAX_KEYS // block) < 2**31


@pytest.mark.parametrize("head_size", [64, 128, 192, 256])
def test_tiles_fit_and_their_steps_are_blocks_of_the_bound(head_size):
    tile, columns = tiles.memory_tiles(head_size), tiles.value_columns(head_size)
    # Normalisers of a step and noise of Z begin at an alignment of their own.
    more = 2 * tiles.SHARED_MEMORY_ALIGNMENT - tile.rows * 4
    assert tile.shared_bytes(head_size, columns=columns) + more <= tiles.SHARED_MEMORY_BYTES
    assert tile.block_kv == (SUM_BLOCK if head_size <= 128 else SUM_BLOCK // 2)
    assert columns == min(head_size, 128)


def test_the_additions_bound_by_hand():
    """17 numbers, one unit in the last place of all sums so far each, 8 groups, two neighbours."""
    by_hand = 2 * 17 * 2.0**-23 * sum(16 * g for g in range(1, 9))
    assert by_hand <= memory_numbers.product_slack() <= 1.02 * by_hand
    assert ETA == memory_numbers.ACCUMULATION_SLACK
    # Negative control: without the smaller clip norm this block would break the bound.
    assert by_hand > ETA


@pytest.mark.parametrize(
    ("change", "keys", "words"),
    [
        ({}, MAX_KEYS + 1, "keys"),
        ({"grids": (0.1, 0.1)}, 64, "powers of two"),
        ({"grids": (2.0**-20,) * 2}, 64, "finer"),
        ({"noise_stddevs": (2.0**20,) * 2}, 64, "grid steps"),
    ],
)
def test_numbers_out_of_range_are_named(change, keys, words):
    """V23: the kernel says why it cannot keep its bound."""
    assert words in numbers_of(dataclasses.replace(READOUT, **change), keys=keys)


def summed(values, weights, numbers):
    """The kernel's sums from float32 block sums, in units."""
    count = len(weights) // SUM_BLOCK
    blocks = jnp.einsum(
        "cb,cbh->ch",
        weights.reshape(count, SUM_BLOCK),
        values.reshape(count, SUM_BLOCK, -1),
        precision=jax.lax.Precision.HIGHEST,
    )
    start = jnp.zeros(values.shape[1:], jnp.int32)
    return jax.lax.scan(lambda s, b: (memory._add_block(s, b, numbers), None), start, blocks)[0]


@pytest.mark.parametrize("n", [512, 4096, 65536])
def test_sums_are_exact_but_for_one_block(n):
    """V3: one record changes the integer sums within the bound; one float32 would not."""
    numbers = numbers_of(head_size=64)
    rng = np.random.default_rng(n)
    values = rng.standard_normal((n, 64)) * 0.02 + 1.0
    values *= numbers.value_clip_norm / np.linalg.norm(values, axis=1, keepdims=True)
    values = jnp.asarray(values, jnp.float32)
    values = jnp.concatenate([values, jnp.full((n, 1), numbers.weight_scale)], axis=1)
    weights = jnp.asarray(rng.uniform(0.9, 1.0, n), jnp.bfloat16).astype(jnp.float32).at[7].set(1)
    total = jax.jit(lambda w: summed(values, w, numbers))
    one, other = (np.asarray(total(w), np.int64) for w in (weights, weights.at[7].set(0)))
    exact = np.asarray(weights, np.float64) @ np.asarray(values, np.float64)
    blocks = n // SUM_BLOCK
    assert np.abs(one * numbers.unit - exact).max() <= blocks * numbers.unit * 1.5
    change = np.linalg.norm((one - other) * numbers.unit)
    delta = sensitivity.memory_sum(1.0, 1.0, 1, 1, "mask")
    assert 0.9 * delta < change <= (1 + ETA) * delta
    own = np.asarray(values[7], np.float64)
    assert np.linalg.norm((one - other) * numbers.unit - own) <= numbers.unit * 65**0.5 + 1e-3
    if n == 65536:  # negative control: one float32 sum of all blocks
        plain = jax.jit(lambda w: jnp.cumsum(w[:, None] * values, axis=0)[-1])
        pair = [np.asarray(plain(w), np.float64) for w in (weights, weights.at[7].set(0))]
        assert np.linalg.norm(pair[0] - pair[1] - own) > 10 * numbers.unit * 65**0.5


@pytest.mark.parametrize("shift", [0, 5, 15, 23, 27])
def test_released_multiples_are_those_of_integers(shift):
    """V12: sum and noise meet exactly; the released number is the nearest multiple of the grid."""
    unit, stddev = numbers_of().unit, 1.3
    grid = unit * 2.0**shift
    numbers = dataclasses.replace(numbers_of(), drops_bits=shift > 23, fits_float32=shift > 10)
    rng = np.random.default_rng(shift)
    sums = rng.integers(-(2**31), 2**31, 20000).astype(np.int32)
    noise = rng.standard_normal(20000).astype(np.float32)
    one = lambda x, dtype: jnp.full((), x, dtype)  # noqa: E731
    scales = memory._Scales(
        noise_steps=one(stddev * 16, jnp.float32),
        grid=one(grid, jnp.float32),
        shift=one(shift, jnp.int32),
        rest_steps=one(2.0 ** -min(shift, 23), jnp.float32),
    )
    multiples = jax.jit(lambda s, z: memory._multiples(s, z, scales, numbers))(sums, noise)
    multiples = np.asarray(multiples, np.float64)
    exact = sums / 2.0**shift + np.float64(np.float32(stddev * 16)) * noise
    assert np.array_equal(multiples, np.round(multiples))
    lost = np.abs(multiples) * 2.0**-24  # of multiples past 2^24, after the rounding
    assert np.all(np.abs(multiples - exact) <= 0.5 + 2e-5 + lost)


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (AttentionSpec(0.1, readout=READOUT), {"head_size": 128}),
        pytest.param(
            AttentionSpec(0.1, readout=READOUT), {"head_size": 256}, marks=pytest.mark.slow
        ),
        pytest.param(
            AttentionSpec(0.1, local_window=(40, 20), readout=READOUT),
            {"head_size": 192, "dtype": jnp.float16},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            AttentionSpec(0.1, is_causal=True, logits_soft_cap=5.0, readout=READOUT),
            {
                "dtype": jnp.float16,
                "mask": jax.ShapeDtypeStruct((2, 1, 1, 93), jnp.bool_),
                "key_lengths": jax.ShapeDtypeStruct((2,), jnp.int32),
                "query_lengths": jax.ShapeDtypeStruct((2,), jnp.int32),
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_private_program_is_one_kernel(spec, options):
    """V24: no callback, no second draw of noise, nothing but the answer among its results."""
    inputs = structs(**options)
    assert memory_call.cannot(spec, inputs) is None
    run = jax.jit(lambda x: BACKEND.forward(spec, x).output)
    text = run.trace(inputs).lower(lowering_platforms=("cuda",)).as_text()
    (kernel,) = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
    assert "dpfa_memory_forward" in text
    assert "callback" not in text
    assert "stablehlo.xor" not in text
    assert kernel.split("->")[-1].count("tensor<") == 1
    (main,) = (line for line in text.splitlines() if "@main" in line)
    assert main.split("->")[-1].count("tensor<") == 1


@pytest.mark.parametrize(
    ("spec", "inputs", "words"),
    [
        (AttentionSpec(1.0, readout=READOUT), structs(head_size=257), "head size 257"),
        (AttentionSpec(1.0, readout=READOUT), structs(keys=MAX_KEYS + 1), "keys"),
        (AttentionSpec(math.nan, readout=READOUT), structs(), "scale"),
        (AttentionSpec(1.0, readout=READOUT), structs(bias=jnp.zeros((1, 1, 1, 1))), "bias"),
        (
            AttentionSpec(1.0, readout=READOUT),
            structs(mask=jax.ShapeDtypeStruct((1, 1, 100, 93), jnp.bool_)),
            "slots",
        ),
        (AttentionSpec(1.0, readout=READOUT), structs(keys=0), "empty"),
    ],
)
def test_cannot_says_why(spec, inputs, words):
    """V23: what is not served is named."""
    assert words in memory_call.cannot(spec, inputs)


def test_a_call_that_names_no_backend_gets_this_one(monkeypatch):
    monkeypatch.setattr(dispatch, "static_platform", lambda _: "gpu")
    name = "dpfa_jax.kernels.mosaic_gpu.device.reason_without_hopper"
    monkeypatch.setattr(name, lambda: None)
    sums = AttentionSpec(1.0, readout=READOUT)
    assert dispatch.choose(sums, structs()).name == "mosaic_gpu"
    ratio = dataclasses.replace(sums, readout=dataclasses.replace(READOUT, form="ratio"))
    assert dispatch.choose(ratio, structs()).name != "mosaic_gpu"
