"""What an example release is on the device: noise, bits, places, sharding.

python -m pytest -m gpu tests/kernels/mosaic_gpu    (-n 8 where pytest-xdist is installed)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle
from helpers.hopper_cases import (
    BACKEND,
    PLACES,
    PLACES_OF_SIZES,
    distance,
    draw,
    noise_inputs,
    value_and_gradients,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import special, stats

from dpfa_jax.kernels import epilogue
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout
from dpfa_jax.kernels.mosaic_gpu.tiles import (
    ForwardTiles,
)
from dpfa_jax.noise.fields import attention_noise

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("length", [700, 2100])  # from 8 steps on a row's maximum is kept
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("size", "place"), [(64, "inside"), (64, "after"), (192, "after"), *PLACES_OF_SIZES]
)
def test_residuals_change_no_bit_of_a_release(size, place, is_causal, length):
    """V10: a gradient asks for the answer again, under the same noise: another rounding of it would
    be a difference that no noise hides."""
    readout = ExampleReadout(0.5, (1.0, 1.0), (2.0**-4,) * 2)
    spec = AttentionSpec(size**-0.5, is_causal=is_causal, readout=readout)
    rng = np.random.default_rng(15)
    query, key, value = (draw(rng, (3, length, 2, size), jnp.bfloat16) for _ in range(3))
    inputs = AttentionInputs(query, key, value, noise=noise_inputs(3))
    kept, alone = (
        jax.jit(lambda x, r=r: PLACES[place].forward(spec, x, residuals=r).output)(inputs)
        for r in (True, False)
    )
    kept, alone = (np.asarray(x.astype(jnp.float32)) for x in (kept, alone))
    np.testing.assert_array_equal(kept, alone)


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
