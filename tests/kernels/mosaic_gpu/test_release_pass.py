"""The pass that releases the plain kernel's answer, in the simulator: values, noise, transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.kernels import epilogue
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout, NoiseInputs
from dpfa_jax.kernels.mosaic_gpu import backend, release_pass
from dpfa_jax.noise import attention_noise

pytestmark = pytest.mark.quickly_compiled

SIMULATE = plgpu.InterpretGPUParams()
AFTER = backend.MosaicGpuBackend(name="after", interpret=SIMULATE, noise_pass=True)
INSIDE = backend.MosaicGpuBackend(name="inside", interpret=SIMULATE, noise_pass=False)
GRID = 2.0**-5


def draw(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def noise_inputs(batch):
    """Words, batch rows and first heads that no index inside a call happens to equal."""
    words = np.random.default_rng(9).integers(0, 2**32, (batch, 2), dtype=np.uint32)
    rows = 1000 + 7 * np.arange(batch, dtype=np.uint32)
    return NoiseInputs(jnp.asarray(words), jnp.asarray(rows), jnp.full(batch, 3, jnp.uint32))


def relative(x, y):
    x = np.asarray(x, np.float64)
    return np.linalg.norm(x - y) / np.linalg.norm(y)


def noise_arrays(noise, readout):
    batch = noise.batch_index.shape[0]
    per_head = (readout.noise_stddevs, readout.grids)
    stddevs, grids = (jnp.tile(jnp.asarray(x, jnp.float32), (batch, 1)) for x in per_head)
    ones = jnp.ones(batch, jnp.uint32)
    return release_pass.NoiseArrays(*noise, stddevs, grids, ones)


_field = jax.jit(attention_noise, static_argnames=("heads", "rows", "columns"))


def cells_away(readout, found, answer, noise):
    """Grid cells between what was released and clip, noise and grid in float64 of the field."""
    found, answer = (np.asarray(x, np.float64) for x in (found, answer))
    stddevs, grids = (np.asarray(x)[:, None] for x in (readout.noise_stddevs, readout.grids))
    drawn = stddevs * np.asarray(
        _field(
            *noise, heads=found.shape[2], row_start=0, rows=found.shape[1], columns=found.shape[3]
        ),
        np.float64,
    )
    is_finite = np.isfinite(answer).all(axis=-1, keepdims=True)
    answer = np.where(is_finite, answer, 0.0)
    norm = np.linalg.norm(answer, axis=-1, keepdims=True)
    clipped = answer * np.minimum(1.0, readout.l2_clip_norm / np.maximum(norm, 1e-30))
    return (found - (clipped + drawn)) / grids


# Head sizes whose rows lie in 8 or 16 lanes, 1 to 3 accesses; T: one program and less, several
# that overlap. Every second row is clipped, one is not finite, one is 0.
@pytest.mark.parametrize(
    ("rows", "heads", "size", "dtype"),
    [
        (72, 2, 64, jnp.bfloat16),
        pytest.param(8, 1, 64, jnp.float16, marks=pytest.mark.slow),
        (40, 1, 128, jnp.float16),
        (8, 2, 192, jnp.bfloat16),
        pytest.param(56, 1, 256, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(200, 3, 64, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_every_number_is_clip_noise_and_grid(rows, heads, size, dtype):
    """V4, V10, V12: against float64, with the field's noise at each place, in every layout."""
    clip = 0.3
    stddevs, grids = (tuple(x * 2.0**-n for n in range(heads)) for x in (0.5, GRID))
    readout = ExampleReadout(clip, stddevs, grids)
    answer = draw(2, rows, heads, size, dtype=dtype) * (clip / size**0.5)
    answer = answer.at[:, ::2].multiply(8.0).at[0, 1].set(jnp.nan).at[1, 3].set(0.0)
    noise = noise_inputs(2)
    released = release_pass.released(
        readout, answer, noise_arrays(noise, readout), interpret=SIMULATE
    )
    assert released.shape == answer.shape
    assert released.dtype == dtype
    values = np.asarray(released, np.float64)
    assert np.all(values % np.asarray(grids)[:, None] == 0)
    away = cells_away(readout, released, answer, noise)
    # Half a cell, rounding of the answer to its type, float32 at a cell's edge.
    digits = 8 if dtype == jnp.bfloat16 else 11
    slack = 0.5 + np.abs(values) * 2.0**-digits / np.asarray(grids)[:, None] + 1e-3
    assert np.all(np.abs(away) <= slack)
    # Negative controls: noise of the head, the batch row or the row beside.
    for name, wrong in (("head_start", 4), ("batch_index", 1001), ("key_words", 5)):
        other = noise._replace(**{name: jnp.full_like(getattr(noise, name), wrong)})
        assert np.mean(np.abs(cells_away(readout, released, answer, other)) > slack) > 0.5
    assert np.mean(np.abs(np.roll(away, 1, axis=1)) > slack) < 0.01


def test_stored_rows_are_clipped():
    """V4: without noise to speak of, each released row's norm is within the bound."""
    clip, tiny = 0.3, 2.0**-30
    readout = ExampleReadout(clip, (tiny,), (2.0**-20,))
    answer = draw(1, 16, 1, 64) * jnp.asarray(
        10.0 ** np.linspace(-8, 30, 16), jnp.bfloat16
    ).reshape(1, 16, 1, 1)
    released = release_pass.released(
        readout, answer, noise_arrays(noise_inputs(1), readout), interpret=SIMULATE
    )
    norms = np.linalg.norm(np.asarray(released, np.float64), axis=-1)
    # A cell of the grid and, as the answer is stored, bfloat16's rounding to nearest.
    assert norms.max() <= clip * (1 + 2.0**-8) + 8 * 2.0**-20
    assert norms.max() > 0.99 * clip


RAGGED = {
    "causal, window, lengths": (
        (2, 70, 90, 2, 1, 64),
        {"is_causal": True, "local_window": (40, 3)},
        {"query_lengths": (55, 70), "key_lengths": (60, 0)},
    ),
    "ragged, GQA, padded head size": ((2, 77, 90, 4, 2, 40), {}, {}),
    "one row": ((1, 1, 9, 2, 1, 128), {}, {}),
    "bound": ((1, 50, 40, 1, 1, 64), {"largest_logit": 9.0}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RAGGED)
def test_both_ways_release_the_same(case):
    """V7, V8, V10, V12: against noise made inside, float64, and the gradient through the clip."""
    (batch, rows, keys, heads, kv_heads, size), options, lengths = RAGGED[case]
    readout = ExampleReadout(0.3, (0.5,) * heads, (GRID,) * heads)
    spec = AttentionSpec(size**-0.5, readout=readout, **options)
    query, key, value, cotangent = (
        draw(batch, n, h, size, seed=seed)
        for seed, (n, h) in enumerate(
            ((rows, heads), (keys, kv_heads), (keys, kv_heads), (rows, heads))
        )
    )
    noise = noise_inputs(batch)
    inputs = AttentionInputs(
        query, key, value, noise=noise,
        **{name: jnp.asarray(x, jnp.int32) for name, x in lengths.items()},
    )  # fmt: skip
    after, inside = (way.forward(spec, inputs) for way in (AFTER, INSIDE))
    # The plain answer and the un-noised one of the kernel that makes noise: the same numbers.
    for one, other in ((after.unclipped, inside.unclipped), (after.lse, inside.lse)):
        np.testing.assert_allclose(
            *(np.nan_to_num(np.asarray(x, np.float64), neginf=-9.0) for x in (one, other)),
            atol=2e-3, rtol=2.0**-7,
        )  # fmt: skip
    ends = lengths.get("query_lengths")
    if ends is not None:  # rows past their length, or without a key: noise alone
        is_past = np.arange(rows)[None] >= np.asarray(ends)[:, None]
        is_past |= np.asarray(lengths["key_lengths"])[:, None] == 0
        assert not np.any(np.asarray(after.unclipped, np.float32)[is_past])
    released = np.asarray(after.output, np.float64)
    away = cells_away(readout, after.output, after.unclipped, noise)
    slack = 0.5 + np.abs(released) * 2.0**-8 / GRID + 1e-3
    assert np.all(np.abs(away) <= slack)
    # One cell where the two round differently, and the cast of a value to bfloat16.
    differ = np.abs(released - np.asarray(inside.output, np.float64))
    assert np.all(differ <= GRID + np.abs(released) * 2.0**-7)
    assert np.mean(differ > 0) < 0.03
    exact = oracle.attention(
        query, key, value, scale=spec.scale, is_causal=spec.is_causal, window=spec.local_window,
        **{name: np.asarray(x) for name, x in lengths.items()},
    )  # fmt: skip
    assert relative(after.unclipped, exact) <= 4e-3  # bfloat16
    pulled = epilogue.clip_cotangent(readout, jnp.asarray(exact), cotangent)
    theirs = oracle.attention(
        query, key, value, pulled, scale=spec.scale, is_causal=spec.is_causal,
        window=spec.local_window, **{name: np.asarray(x) for name, x in lengths.items()},
    )[1:4]  # fmt: skip

    # What a gradient needs changes no bit: two roundings of one answer under one noise would tell
    # of it.
    alone = AFTER.forward(spec, inputs, residuals=False)
    assert alone.unclipped is None
    assert np.array_equal(*(np.asarray(x.output, np.float32) for x in (alone, after)))
    pulled = epilogue.clip_cotangent(readout, after.unclipped, cotangent)
    gradients = AFTER.backward(spec, inputs, after, pulled)
    for mine, other in zip(gradients[:3], theirs, strict=True):
        assert relative(mine, other) <= 8e-3


@pytest.mark.slow
def test_vmap_changes_no_bit():
    """V10: a folded axis; each member has its own words."""
    readout = ExampleReadout(0.3, (0.5, 0.25), (GRID, GRID / 2))
    spec = AttentionSpec(0.125, readout=readout)
    inputs = AttentionInputs(
        *(draw(2, 40, n, 64, seed=n) for n in (2, 1, 1)), noise=noise_inputs(2)
    )
    whole = AFTER.forward(spec, inputs).output
    single = jax.tree.map(lambda x: x[:, None], inputs)
    mapped = jax.vmap(lambda x: AFTER.forward(spec, x).output)(single)
    assert np.array_equal(np.asarray(mapped[:, 0], np.float32), np.asarray(whole, np.float32))


def test_rows_lie_evenly_in_lanes():
    """A tile has whole rows; lanes times numbers of an access divide a row."""
    for size in (64, 128, 192, 256):
        lanes = release_pass.lanes_of(size)
        assert size % (lanes * release_pass.VECTOR) == 0
        assert release_pass.tile_rows(size) * lanes == release_pass.WARPS * 32


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (64, jnp.bfloat16),
        (128, jnp.float16),
        (192, jnp.bfloat16),
        (256, jnp.float16),
        *(
            pytest.param(size, dtype, marks=pytest.mark.slow)
            for sizes, dtype in (((64, 192), jnp.float16), ((128, 256), jnp.bfloat16))
            for size in sizes
        ),
    ],
)
def test_every_layout_lowers(size, dtype):
    """For CUDA: layouts, and both ends of the range of rows that a program begins at."""
    readout = ExampleReadout(1.0, (0.5,) * 3, (GRID,) * 3)
    noise = noise_arrays(noise_inputs(2), readout)
    for rows in (8, 1000):
        answer = jax.ShapeDtypeStruct((2, rows, 3, size), dtype)
        traced = jax.jit(lambda x: release_pass.released(readout, x, noise)).trace(answer)
        assert "dpfa_example_release" in traced.lower(lowering_platforms=("cuda",)).as_text()
