"""The Hopper kernels on the device: V6 to V10, V12 for what they serve.

python -m pytest -m gpu tests/kernels/mosaic_gpu    (-n 8 where pytest-xdist is installed)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import special, stats

from dpfa_jax.attention import core
from dpfa_jax.kernels import epilogue
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout, NoiseInputs
from dpfa_jax.kernels.mosaic_gpu import backend as backend_module
from dpfa_jax.kernels.mosaic_gpu import gradient_chunks
from dpfa_jax.kernels.mosaic_gpu.backend import MosaicGpuBackend
from dpfa_jax.kernels.mosaic_gpu.tiles import (
    MAX_HEAD_SIZE_ONE_WARPGROUP,
    BackwardTiles,
    ForwardTiles,
    FusedTiles,
    backward_tiles,
)
from dpfa_jax.kernels.public_maximum import has_public_maximum
from dpfa_jax.noise.fields import attention_noise

pytestmark = pytest.mark.gpu
BACKEND = MosaicGpuBackend()
# Names of their own keep the traces of the backward kernels apart.
TWO = MosaicGpuBackend(name="mosaic_gpu, two kernels")
FUSED = MosaicGpuBackend(name="mosaic_gpu, fused")
# Where the noise of an example release is made; above head size 128 after the kernel only.
PLACES = {
    "inside": MosaicGpuBackend(noise_pass=False),
    "after": MosaicGpuBackend(noise_pass=True),
}
PLACES_OF_SIZES = [(128, "inside"), (128, "after"), (256, "after")]

CASES = {
    "full, GQA": ((2, 512, 512, 4, 2, 64), {}, jnp.bfloat16),
    "wide key tiles": ((1, 260, 1100, 2, 1, 64), {}, jnp.bfloat16),
    "causal, MQA, ragged": ((2, 333, 259, 4, 1, 128), {"is_causal": True}, jnp.float16),
    "window, cap, lengths": (
        (3, 400, 410, 2, 2, 128),
        {"local_window": (130, 17), "logits_soft_cap": 8.0, "lengths": True},
        jnp.bfloat16,
    ),
    "one row, one key, head size 80": ((2, 1, 1, 2, 2, 80), {}, jnp.bfloat16),
    "head size 256": ((1, 130, 300, 2, 2, 256), {"is_causal": True}, jnp.bfloat16),
    "head size 256, full, GQA": ((2, 512, 512, 4, 2, 256), {}, jnp.bfloat16),
    "head size 256, causal, MQA, ragged": (
        (2, 333, 259, 4, 1, 256),
        {"is_causal": True},
        jnp.float16,
    ),
    "head size 192, window, cap, lengths": (
        (3, 400, 410, 2, 2, 192),
        {"local_window": (130, 17), "logits_soft_cap": 8.0, "lengths": True},
        jnp.bfloat16,
    ),
    "one row, one key, head size 200": ((2, 1, 1, 2, 2, 200), {}, jnp.bfloat16),
    "head size 192, causal": ((1, 1000, 1000, 2, 2, 192), {"is_causal": True}, jnp.bfloat16),
    # A warpgroup whose window lies behind the last key, beside one that sees keys.
    "head size 192, window behind the last key": (
        (1, 256, 256, 1, 1, 192),
        {"local_window": (5, 3), "lengths": ([256], [60])},
        jnp.bfloat16,
    ),
    "window to the left of the diagonal": (
        (1, 300, 300, 2, 2, 64),
        {"local_window": (100, -3)},
        jnp.bfloat16,
    ),
    "head size 192, window to the right of the diagonal": (
        (1, 300, 310, 2, 1, 192),
        {"local_window": (-5, 40)},
        jnp.float16,
    ),
    # Without a running maximum; logits here have a standard deviation of 1, at most 5.3.
    "bound": ((2, 512, 512, 4, 2, 128), {"largest_logit": 6.0}, jnp.bfloat16),
    "bound, wide key tiles": ((1, 260, 1100, 2, 1, 64), {"largest_logit": 8.0}, jnp.bfloat16),
    "bound, causal, float16": (
        (2, 333, 259, 4, 1, 128),
        {"is_causal": True, "largest_logit": 10.0},
        jnp.float16,
    ),
    "cap, window, lengths": (
        (3, 400, 410, 2, 2, 64),
        {"local_window": (130, 17), "logits_soft_cap": 2.0, "lengths": True},
        jnp.bfloat16,
    ),
    "bound, head size 256": (
        (1, 130, 300, 2, 2, 256),
        {"is_causal": True, "largest_logit": 60.0},
        jnp.bfloat16,
    ),
    "bound that logits exceed by 4": (
        (1, 300, 300, 2, 2, 128),
        {"largest_logit": 1.0},
        jnp.bfloat16,
    ),
    "bound that needs a running maximum": (
        (1, 300, 300, 2, 2, 128),
        {"largest_logit": 80.0},
        jnp.bfloat16,
    ),
}


def draw(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def noise_inputs(batch, seed=0):
    words = np.random.default_rng(seed).integers(0, 2**32, (batch, 2), dtype=np.uint32)
    return NoiseInputs(
        jnp.asarray(words), jnp.arange(batch, dtype=jnp.uint32), jnp.full(batch, 3, jnp.uint32)
    )


def value_and_gradients(spec, inputs, cotangent, backend=BACKEND):
    """(output, lse, dq, dk, dv) by one compiled program."""

    def run(inputs, cotangent):
        def answer(query, key, value):
            arrays = inputs._replace(query=query, key=key, value=value)
            return core.attend(backend, spec, arrays)

        (output, lse), pull = jax.vjp(answer, inputs.query, inputs.key, inputs.value)
        return output, lse, *pull((cotangent, jnp.zeros_like(lse)))

    return jax.jit(run)(inputs, cotangent)


def naive(spec, lengths, query, key, value):
    """Attention as a textbook writes it, products and weights in the inputs' precision."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    logits = logits * spec.scale
    if spec.logits_soft_cap is not None:
        logits = spec.logits_soft_cap * jnp.tanh(logits / spec.logits_soft_cap)
    seen = jnp.asarray(
        oracle.visibility(
            logits.shape, is_causal=spec.is_causal, window=spec.local_window, **lengths
        )
    )
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
    weights = jnp.where(seen, weights, 0).astype(value.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def distance(x, y):
    return np.linalg.norm(np.asarray(x, np.float64) - y)


def two_kernels(spec, head_size, keys, **_):
    if head_size > MAX_HEAD_SIZE_ONE_WARPGROUP:  # one way serves there
        return backward_tiles(spec, head_size, keys)
    return BackwardTiles(block_kv_dq=128 if head_size == 64 else 64)


def fused(spec, head_size, keys, **_):
    return FusedTiles()


def use_tiles(monkeypatch, tiles_of):
    """Backward passes by the kernels whose tiles these are, on a backend of its own name."""
    monkeypatch.setattr(backend_module, "backward_tiles", tiles_of)


BACKWARD = {
    "two kernels": (TWO, two_kernels, True),
    "fused, in order": (FUSED, fused, True),
    "fused, any order": (FUSED, fused, False),
}


@pytest.mark.parametrize("kernels", BACKWARD)
@pytest.mark.parametrize("case", CASES)
def test_error_is_within_twice_the_naive_one(case, kernels, monkeypatch):
    """V7, V8: output and gradients against float64; hidden slots hold NaN."""
    backend, tiles_of, deterministic = BACKWARD[kernels]
    use_tiles(monkeypatch, tiles_of)
    (batch, rows, keys, heads, kv_heads, size), options, dtype = CASES[case]
    if backend is FUSED and size > MAX_HEAD_SIZE_ONE_WARPGROUP:
        pytest.skip("one backward pass serves this head size")
    options = dict(options)
    rng = np.random.default_rng(1)
    query, cotangent = (draw(rng, (batch, rows, heads, size), dtype) for _ in range(2))
    key, value = (draw(rng, (batch, keys, kv_heads, size), dtype) for _ in range(2))
    lengths = {}
    if (given := options.pop("lengths", False)) is not False:
        drawn = (rng.integers(0, rows, batch), rng.integers(1, keys, batch))
        lengths = {
            "query_lengths": drawn[0] if given is True else np.asarray(given[0]),
            "key_lengths": drawn[1] if given is True else np.asarray(given[1]),
        }
    spec = AttentionSpec(size**-0.5, deterministic=deterministic, **options)
    clean = AttentionInputs(query, key, value)
    inputs = clean._replace(**{name: jnp.asarray(x, jnp.int32) for name, x in lengths.items()})
    if lengths:
        is_row = jnp.arange(rows)[None, :] < inputs.query_lengths[:, None]
        is_key = jnp.arange(keys)[None, :] < inputs.key_lengths[:, None]
        inputs = inputs._replace(
            query=jnp.where(is_row[..., None, None], query, jnp.nan),
            key=jnp.where(is_key[..., None, None], key, jnp.nan),
            value=jnp.where(is_key[..., None, None], value, jnp.nan),
        )
    assert BACKEND.cannot(spec, inputs, "gpu") is None
    output, lse, *gradients = value_and_gradients(spec, inputs, cotangent, backend)
    expected = oracle.attention(
        *clean[:3],
        cotangent,
        scale=spec.scale,
        soft_cap=spec.logits_soft_cap,
        is_causal=spec.is_causal,
        window=spec.local_window,
        **lengths,
    )
    theirs, pull = jax.vjp(lambda *x: naive(spec, lengths, *x), query, key, value)
    # Where a gradient cancels to nothing, float32 leaves 2^-24 of each product in the sum.
    largest = [np.abs(np.asarray(x, np.float64)).max() for x in clean]
    products = size * spec.scale * np.linalg.norm(np.asarray(cotangent, np.float64))
    floor = 2.0**-24 * products * largest[2] * max(largest[:2])
    for mine, other, exact in zip(
        (output, *gradients), (theirs, *pull(cotangent)), expected[:4], strict=True
    ):
        assert distance(mine, exact) <= 2 * distance(other, exact) + floor
    seen = oracle.visibility(
        (batch, heads, rows, keys), is_causal=spec.is_causal, window=spec.local_window, **lengths
    )
    is_empty = ~seen.any(-1).swapaxes(1, 2)
    assert np.array_equal(np.isneginf(np.asarray(lse)), is_empty)
    assert not np.any(np.asarray(output, np.float32)[is_empty])


# Logits as far as a statement may lie, and beyond it up to where the docstring promises a softmax.
@pytest.mark.parametrize(
    ("logit", "dtype"),
    [(x, jnp.bfloat16) for x in (-69.0, -62.0, 62.0, 78.0)]
    + [(x, jnp.float16) for x in (-10.3, -10.0, 10.0, 10.3)],
)
def test_every_logit_at_the_bound(logit, dtype):
    """V7: all weights as small, or as large, as they get: their sum is neither 0 nor infinite."""
    rows, keys, size = 200, 3000, 128
    rng = np.random.default_rng(6)
    query = jnp.full((1, rows, 2, size), 1.0, dtype)
    key = jnp.full((1, keys, 2, size), 1.0, dtype)
    value = jnp.clip(draw(rng, (1, keys, 2, size), dtype), -2, 2)
    bound = 62.0 if dtype == jnp.bfloat16 else 10.0
    spec = AttentionSpec(abs(logit) / size, largest_logit=bound)
    key = key if logit > 0 else -key
    inputs = AttentionInputs(query, key, value)
    assert has_public_maximum(spec, inputs)
    outputs = jax.jit(lambda *x: BACKEND.forward(spec, AttentionInputs(*x)))(*inputs[:3])
    mean = np.asarray(value, np.float64).mean(axis=1, keepdims=True)
    assert np.abs(np.asarray(outputs.output, np.float64) - mean).max() < 1e-3
    assert np.abs(np.asarray(outputs.lse) - (logit + np.log(keys))).max() < 1e-4


@pytest.mark.parametrize(("size", "place"), PLACES_OF_SIZES)
@pytest.mark.parametrize("logit", [95.0, 200.0])
def test_a_false_bound_costs_no_privacy(logit, size, place):
    """V4, V5: rows that leave float32 are released as noise, the others within clip and noise."""
    clip, grid, rows = 0.5, 2.0**-4, 256
    readout = ExampleReadout(clip, (1.0, 1.0), (grid, grid))
    spec = AttentionSpec(logit / size, largest_logit=5.0, readout=readout)
    rng = np.random.default_rng(9)
    query = jnp.ones((2, rows, 2, size), jnp.bfloat16).at[1].set(0.0)
    value = draw(rng, (2, rows, 2, size), jnp.bfloat16)
    inputs = AttentionInputs(query, jnp.ones_like(query), value, noise=noise_inputs(2))
    assert has_public_maximum(spec, inputs)
    outputs = jax.jit(lambda inputs: PLACES[place].forward(spec, inputs))(inputs)
    inside = np.asarray(outputs.unclipped, np.float32)
    assert not np.any(np.isfinite(inside[0]) & (inside[0] != 0))  # the bound is false there
    drawn = np.asarray(
        attention_noise(*inputs.noise, heads=2, row_start=0, rows=rows, columns=size), np.float64
    )
    moved = np.asarray(outputs.output, np.float64) - drawn
    slack = grid / 2 + np.abs(drawn) * 2.0**-7 + 1e-3  # grid, bfloat16
    assert np.all(np.abs(moved[0]) <= slack[0])
    assert np.all(np.linalg.norm(moved[1], axis=-1) <= clip + np.linalg.norm(slack[1], axis=-1))
    assert np.abs(moved[1]).max() > grid


@pytest.mark.parametrize("place", PLACES)
def test_noise_under_a_public_maximum(place):
    """V10, V12: the same noise, element by element, as under a running maximum; NaN stays local."""
    heads, size, rows = 4, 128, 300
    readout = ExampleReadout(0.3, (0.5,) * heads, (2.0**-5,) * heads)
    rng = np.random.default_rng(7)
    query, key, value = (draw(rng, (3, rows, heads, size), jnp.bfloat16) for _ in range(3))
    value = value.at[1, 7].set(jnp.nan)
    lengths = jnp.asarray([rows, rows, 200], jnp.int32)
    key = key.at[2, 200:].set(jnp.nan)
    inputs = AttentionInputs(query, key, value, key_lengths=lengths, noise=noise_inputs(3))
    for is_causal in (False, True):
        spec = AttentionSpec(size**-0.5, is_causal=is_causal, readout=readout)
        released = {}
        for bound in (None, 12.0):
            bounded = dataclasses.replace(spec, largest_logit=bound)
            run = jax.jit(functools.partial(PLACES[place].forward, bounded, residuals=False))
            released[bound] = np.asarray(run(inputs).output, np.float64)
        cells = released[12.0] / 2.0**-5
        assert np.array_equal(cells, np.round(cells))
        # The two softmaxes differ in their last bits: a value at a cell's edge may change cells.
        away = np.abs(released[12.0] - released[None])
        assert away.max() <= 2.0**-5 + 2.0**-7 * np.abs(released[None]).max()
        assert np.mean(away > 0) < 0.03
        drawn = 0.5 * np.asarray(
            attention_noise(*inputs.noise, heads=heads, row_start=0, rows=rows, columns=size)
        )
        hurt = slice(7, None) if is_causal else slice(None)  # rows that see the NaN: noise alone
        off = np.abs(released[12.0][1, hurt] - drawn[1, hurt])
        assert np.all(off <= 2.0**-6 + 2.0**-8 * np.abs(drawn[1, hurt]) + 1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_sharded_jit_gathers_nothing(place):
    """V10: on the devices that are there (one: through the same path) the bits do not change."""
    devices = jax.devices()
    count = 2 if len(devices) > 1 else 1
    mesh = Mesh(np.asarray(devices[:count]), ("heads",))
    readout = ExampleReadout(0.3, (0.5,) * 4, (2.0**-5,) * 4)
    spec = AttentionSpec(0.1, is_causal=True, readout=readout)
    rng = np.random.default_rng(8)
    arrays = [draw(rng, (2, 300, n, 128), jnp.bfloat16) for n in (4, 2, 2, 4)]
    noise = noise_inputs(2)

    def run(query, key, value, cotangent, noise):
        inputs = AttentionInputs(query, key, value, noise=noise)
        return value_and_gradients(spec, inputs, cotangent, PLACES[place])

    expected = jax.jit(run)(*arrays, noise)
    split = [
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, None, "heads"))) for x in arrays
    ]
    noise = jax.device_put(noise, NamedSharding(mesh, PartitionSpec()))
    compiled = jax.jit(run).lower(*split, noise).compile()
    assert "all-gather" not in compiled.as_text()
    for one, other in zip(compiled(*split, noise), expected, strict=True):
        assert np.array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))


@pytest.mark.parametrize(("size", "place"), PLACES_OF_SIZES)
def test_example_release(size, place):
    """V4, V10, V12: words of the oracle, clipped rows, every value on the grid, right gradients."""
    batch, rows, heads, clip = 2, 300, 4, 0.3
    readout = ExampleReadout(clip, (0.5, 0.25, 0.5, 1.0), (2.0**-5, 2.0**-6, 2.0**-5, 2.0**-4))
    spec = AttentionSpec(size**-0.5, is_causal=True, readout=readout)
    rng = np.random.default_rng(2)
    query, cotangent = (draw(rng, (batch, rows, heads, size), jnp.bfloat16) for _ in range(2))
    key, value = (draw(rng, (batch, rows, 2, size), jnp.bfloat16) for _ in range(2))
    noise = noise_inputs(batch)
    inputs = AttentionInputs(query, key, value, noise=noise)
    output, _, *gradients = value_and_gradients(spec, inputs, cotangent, PLACES[place])
    released = np.asarray(output, np.float64)
    grids = np.asarray(readout.grids)[None, None, :, None]
    assert np.all(released % grids == 0)
    drawn = np.asarray(
        attention_noise(*noise, heads=heads, row_start=0, rows=rows, columns=size), np.float64
    )
    drawn *= np.asarray(readout.noise_stddevs)[None, None, :, None]
    options = {"scale": spec.scale, "is_causal": True}
    exact = oracle.attention(query, key, value, **options)
    norm = np.linalg.norm(exact, axis=-1, keepdims=True)
    clipped = exact * np.minimum(1, clip / norm)
    # Half a grid step, the bf16 rounding of a released value, and the bf16 weights' error.
    slack = 0.5 * grids + np.abs(released) * 2.0**-8 + 4e-3 * clip + 2e-5
    assert np.all(np.abs(released - clipped - drawn) <= slack)
    pulled = epilogue.clip_cotangent(readout, jnp.asarray(exact), cotangent)
    theirs = oracle.attention(query, key, value, pulled, **options)[1:4]
    for mine, other in zip(gradients, theirs, strict=True):
        assert distance(mine, other) <= 8e-3 * np.linalg.norm(other)


@pytest.mark.parametrize("place", PLACES)
def test_rows_that_are_not_finite_release_noise_only(place):
    """V4: NaN, infinity and 1e38 in one example; the other examples keep their bits (V6)."""
    readout = ExampleReadout(0.5, (1.0,), (2.0**-4,))
    spec = AttentionSpec(0.1, readout=readout)
    rng = np.random.default_rng(3)
    query, key, value = (draw(rng, (4, 128, 1, 64), jnp.bfloat16) for _ in range(3))
    run = jax.jit(lambda inputs: PLACES[place].forward(spec, inputs))
    inputs = AttentionInputs(query, key, value, noise=noise_inputs(4))
    clean = run(inputs).output
    bad = value
    for example, number in enumerate((jnp.nan, jnp.inf, 1e38)):
        bad = bad.at[example, 5].set(number)
    hurt = run(inputs._replace(value=bad))
    zero = run(inputs._replace(value=jnp.zeros_like(value))).output
    for example in (0, 1):
        assert np.array_equal(np.asarray(hurt.output[example]), np.asarray(zero[example]))
    assert np.array_equal(np.asarray(hurt.output[3]), np.asarray(clean[3]))
    moved = np.asarray(hurt.output[2], np.float64) - np.asarray(zero[2], np.float64)
    # Each of the two is rounded to the grid and to bf16.
    assert np.all(np.linalg.norm(moved, axis=-1) <= 0.5 + 8 * (2.0**-4 + 2.0**-7))


@pytest.mark.parametrize("place", PLACES)
def test_same_bits_each_time_and_under_vmap(place):
    """V6, V10: as asked for; folding a vmapped axis changes no bit, of the noise neither."""
    readout = ExampleReadout(0.5, (1.0, 1.0), (2.0**-4,) * 2)
    spec = AttentionSpec(0.1, is_causal=True, readout=readout)
    rng = np.random.default_rng(4)
    query, key, value, cotangent = (draw(rng, (4, 200, 2, 64), jnp.bfloat16) for _ in range(4))
    inputs = AttentionInputs(query, key, value, noise=noise_inputs(4))
    first = value_and_gradients(spec, inputs, cotangent, PLACES[place])
    again = value_and_gradients(spec, inputs, cotangent, PLACES[place])
    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (inputs, cotangent))
    mapped = jax.vmap(lambda i, c: value_and_gradients(spec, i, c, PLACES[place]))(*split)
    for one, two, three in zip(first, again, mapped, strict=True):
        one = np.asarray(one.astype(jnp.float32))
        assert np.array_equal(one, np.asarray(two.astype(jnp.float32)))
        assert np.array_equal(one, np.asarray(three.astype(jnp.float32)).reshape(one.shape))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("size", "place"), [(64, "inside"), (64, "after"), (192, "after"), *PLACES_OF_SIZES]
)
def test_residuals_change_no_bit_of_a_release(size, place, is_causal):
    """V10: a gradient asks for the answer again, under the same noise: another rounding of it would
    be a difference that no noise hides."""
    readout = ExampleReadout(0.5, (1.0, 1.0), (2.0**-4,) * 2)
    spec = AttentionSpec(size**-0.5, is_causal=is_causal, readout=readout)
    rng = np.random.default_rng(15)
    query, key, value = (draw(rng, (3, 700, 2, size), jnp.bfloat16) for _ in range(3))
    inputs = AttentionInputs(query, key, value, noise=noise_inputs(3))
    kept, alone = (
        jax.jit(lambda x, r=r: PLACES[place].forward(spec, x, residuals=r).output)(inputs)
        for r in (True, False)
    )
    kept, alone = (np.asarray(x.astype(jnp.float32)) for x in (kept, alone))
    np.testing.assert_array_equal(kept, alone)


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
    "causal, GQA, ragged": ((3, 1001, 999, 10, 5, 64), {"is_causal": True}),
    "MQA, a short last chunk": ((21, 700, 900, 4, 1, 128), {}),
    "window": ((3, 1500, 1500, 6, 2, 64), {"local_window": (300, 70)}),
    "lengths": ((5, 1300, 1300, 4, 4, 128), {"lengths": True}),
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
    use_tiles(monkeypatch, lambda *_, **__: FusedTiles(heads=5))
    runs.append(value_and_gradients(spec, inputs, cotangent, MosaicGpuBackend(name="five"))[2:])
    for run in runs:
        for mine, first in zip(run, runs[0], strict=True):
            assert np.array_equal(np.asarray(mine, np.float32), np.asarray(first, np.float32))
    for mine, theirs in zip(runs[0], expected, strict=True):
        theirs = np.asarray(theirs, np.float64)
        # Each is the float32 gradient rounded to bf16 of nearly the same weights.
        assert distance(mine, theirs) <= 2.0**-8 * np.linalg.norm(theirs)
        assert np.abs(np.asarray(mine, np.float64) - theirs).max() <= 2.0**-6 * np.abs(theirs).max()


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


def test_fused_backward_in_any_order():
    """V7: dK and dV have one order; dQ none, the negative control of the test of its bits."""
    differ = False
    for case in ("full", "more programs than processors"):
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


# (B, T, S, N, K, H), options; what the two places have in common, and where rows end. Above head
# size 128 the two are one.
RELEASES = {
    "ragged, GQA, padded head size": ((2, 333, 259, 4, 2, 40), {}),
    "one row": ((3, 1, 77, 2, 1, 64), {}),
    "many programs, head size 64": ((8, 1000, 200, 32, 32, 64), {"is_causal": True}),
    "head size 192, window, lengths": (
        (3, 400, 410, 2, 2, 192),
        {"local_window": (130, 17), "lengths": True},
    ),
    "head size 256, bound, lengths": (
        (3, 400, 410, 2, 1, 256),
        {"largest_logit": 12.0, "lengths": True},
    ),
    "float16": ((2, 300, 300, 2, 2, 128), {"is_causal": True, "dtype": jnp.float16}),
}


@pytest.mark.parametrize("case", RELEASES)
def test_both_places_release_the_same(case):
    """V8, V10, V12: rows past a length are noise; a gradient changes no bit of the release."""
    (batch, rows, keys, heads, kv_heads, size), options = RELEASES[case]
    options = dict(options)
    dtype = options.pop("dtype", jnp.bfloat16)
    rng = np.random.default_rng(14)
    query = draw(rng, (batch, rows, heads, size), dtype)
    key, value = (draw(rng, (batch, keys, kv_heads, size), dtype) for _ in range(2))
    inputs = AttentionInputs(query, key, value, noise=noise_inputs(batch))
    if options.pop("lengths", False):
        lengths = {"query_lengths": rows, "key_lengths": keys}
        inputs = inputs._replace(
            **{name: jnp.asarray([0, n // 2, n], jnp.int32) for name, n in lengths.items()}
        )
    stddevs = tuple(0.5 / (1 + head % 3) for head in range(heads))
    readout = ExampleReadout(0.3, stddevs, (2.0**-5,) * heads)
    spec = AttentionSpec(size**-0.5, readout=readout, **options)
    found = {}
    for place, backend in PLACES.items():
        alone, whole = (
            jax.jit(functools.partial(backend.forward, spec, residuals=residuals))(inputs)
            for residuals in (False, True)
        )
        found[place] = whole
        assert np.array_equal(*(np.asarray(x.output, np.float32) for x in (alone, whole)))
        released = np.asarray(whole.output, np.float64)
        assert np.all(released % 2.0**-5 == 0)
        expected = np.asarray(epilogue.example(readout, whole.unclipped, inputs.noise), np.float64)
        assert np.all(np.abs(released - expected) <= 2.0**-5 + np.abs(released) * 2.0**-8)
    for field in ("unclipped", "lse"):
        one, other = (
            np.nan_to_num(np.asarray(getattr(x, field), np.float64), neginf=0.0)
            for x in found.values()
        )
        # Both round weights and answers to 16 bits.
        assert np.linalg.norm(one - other) <= 2.0**-7 * np.linalg.norm(one)
    one, other = (np.asarray(x.output, np.float64) for x in found.values())
    assert np.all(np.abs(one - other) <= 2.0**-5 + 2.0**-7 * np.abs(one))
    assert np.mean(one != other) < 0.03


@pytest.mark.parametrize(
    "tile",
    [
        ForwardTiles(noise_warpgroup=True),
        ForwardTiles(noise_warpgroup=True, noise_columns=8),
        ForwardTiles(),
    ],
    ids=["warpgroup", "warpgroup, 8 columns", "after"],
)
def test_noise_of_many_programs(tile, monkeypatch):
    """V10: every element of a grid that outnumbers the processors many times, under eight keys."""
    monkeypatch.setattr("dpfa_jax.kernels.mosaic_gpu.backend.forward_tiles", lambda *_, **__: tile)
    batch, rows, heads, size, steps = 8, 1024, 32, 128, 16
    readout = ExampleReadout(1.0, (1.0,) * heads, (1.0 / steps,) * heads)
    zeros = jnp.zeros((batch, rows, heads, size), jnp.bfloat16)
    small = jnp.zeros((batch, 8, heads, size), jnp.bfloat16)

    @jax.jit
    def compare(noise):
        inputs = AttentionInputs(zeros, small, small, noise=noise)
        released = BACKEND.forward(AttentionSpec(0.1, readout=readout), inputs).output
        drawn = attention_noise(*noise, heads=heads, row_start=0, rows=rows, columns=size)
        away = jnp.abs(released.astype(jnp.float32) - drawn) * steps
        return away.max(), jnp.unravel_index(away.argmax(), away.shape)

    for seed in range(8):
        away, place = compare(noise_inputs(batch, seed))
        assert away <= 0.51, (seed, [int(x) for x in place])


def cell_p_value(counts, stddev_in_steps, edge):
    """Chi-square of counts of released multiples -edge..edge (tails pooled) against the normal."""
    borders = (np.arange(-edge, edge) + 0.5) / stddev_in_steps
    below = np.concatenate([[0.0], special.ndtr(borders), [1.0]])
    upper = np.concatenate([[1.0], special.ndtr(-borders), [0.0]])
    # The difference of the smaller tails keeps its digits on both sides.
    expected = np.where(np.arange(2 * edge + 1) <= edge, np.diff(below), -np.diff(upper))
    return stats.chisquare(counts, counts.sum() * expected).pvalue


@pytest.mark.parametrize("place", PLACES)
def test_a_billion_draws(place):
    """V9: cells of the public grid out to 5.5 standard deviations; the extreme draws are there."""
    batch, rows, heads, size = 8, 1024, 32, 128
    steps, edge = 16, 88  # bf16 holds every multiple up to 256 exactly
    readout = ExampleReadout(1.0, (1.0,) * heads, (1.0 / steps,) * heads)
    spec = AttentionSpec(0.1, readout=readout)
    zeros = jnp.zeros((batch, rows, heads, size), jnp.bfloat16)
    small = jnp.zeros((batch, 8, heads, size), jnp.bfloat16)

    @jax.jit
    def count(words):
        noise = noise_inputs(batch)._replace(key_words=words)
        released = (
            PLACES[place].forward(spec, AttentionInputs(zeros, small, small, noise=noise)).output
        )
        multiples = (released.astype(jnp.float32) * steps).astype(jnp.int32)
        clipped = jnp.clip(multiples, -edge, edge) + edge
        # Counts by sorted search: scattered additions to 177 cells would queue up.
        ordered = jnp.sort(clipped.reshape(64, -1), axis=1)
        cells = jax.vmap(lambda x: jnp.searchsorted(x, jnp.arange(2 * edge + 2)))(ordered)
        return jnp.diff(cells.sum(0)), multiples.min(), multiples.max()

    rng = np.random.default_rng(5)
    counts, least, largest = np.zeros(2 * edge + 1), 0, 0
    for _ in range(30):
        cells, bottom, top = count(jnp.asarray(rng.integers(0, 2**32, (batch, 2), dtype=np.uint32)))
        counts += np.asarray(cells, np.float64)
        least, largest = min(least, int(bottom)), max(largest, int(top))
    assert counts.sum() == 30 * zeros.size > 1e9
    p_value = cell_p_value(counts, steps, edge)
    assert p_value > 1e-4
    # In float64 these keys and counters give -6.09, -6.07, -5.82, -5.81 and at most 5.76.
    assert least / steps < -5.8, (least, largest, p_value)
    assert largest / steps > 5.7, (least, largest, p_value)
    # Negative controls: a standard deviation off by 4e-4, and tails cut at 5 deviations.
    assert cell_p_value(counts, steps * 1.0004, edge) < 1e-4
    cut = counts.copy()
    cut[:9], cut[-9:] = 0, 0
    assert cell_p_value(cut, steps, edge) < 1e-4
