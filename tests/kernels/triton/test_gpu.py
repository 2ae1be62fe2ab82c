"""The Triton kernels on a device (an H100 stands in for Ampere and Ada): V3 to V10, V12.

python -m pytest -m gpu tests/kernels/triton
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle
from helpers import padding_cases, triton_cases
from jax.sharding import Mesh, PartitionSpec

from dpfa_jax.kernels import epilogue
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout, MemoryReadout
from dpfa_jax.kernels.blocked import BACKEND as BLOCKED
from dpfa_jax.kernels.triton.backend import BACKEND
from dpfa_jax.noise import attention_noise

# A kernel that an earlier test has traced is lowered anew, under this test's own filters.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]

CASES = {
    "full, GQA": ((2, 512, 384, 4, 2, 64), "bfloat16", "none"),
    "causal, MQA, ragged": ((2, 333, 259, 4, 1, 128), "float16", "causal"),
    "everything": ((2, 300, 310, 2, 2, 72), "bfloat16", "all"),
    "everything, float32": ((2, 130, 150, 2, 1, 40), "float32", "all"),
    "bias by key": ((2, 130, 150, 4, 2, 16), "bfloat16", "bias by key"),
    "lengths, head size 256": ((2, 200, 300, 2, 1, 256), "bfloat16", "lengths, causal"),
    "window, float32, head size 128": ((1, 200, 210, 2, 2, 128), "float32", "window"),
    "float32, head size 256": ((1, 70, 90, 2, 2, 256), "float32", "none"),
}


@pytest.mark.parametrize("case", CASES)
def test_error_is_within_twice_the_naive_one(case):
    """V6, V7, V8: output and gradients against float64; hidden slots hold NaN."""
    shape, dtype, options = CASES[case]
    triton_cases.check(BACKEND, shape, dtype, triton_cases.OPTIONS[options], draws=3)


@pytest.mark.parametrize("keys", [512, 2048])
@pytest.mark.parametrize(
    ("dtype", "lowest", "options"),
    [
        ("bfloat16", -1e10, {}),
        ("float16", -1e9, {"is_masked": True}),
        ("bfloat16", float(np.finfo(np.float32).min), {"cap": 20.0, "size": 128}),
    ],
)
def test_padding_by_a_bias_is_padding_by_a_mask(keys, dtype, lowest, options):
    """V6, V7: no compiler may give a weight's logit and its row's maximum different roundings."""
    spec, by_bias, by_mask, cotangent = padding_cases.calls(
        dtype, lowest, keys=keys, padding=256, **options
    )
    found, expected = (
        triton_cases.value_and_gradients(BACKEND, spec, inputs, cotangent)
        for inputs in (by_bias, by_mask)
    )
    padding_cases.assert_alike(found, expected, 256)


def draw(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 64), ("bfloat16", 128), ("bfloat16", 256)])
def test_example_release(dtype, size):
    """V4, V10, V12: words of the oracle, clipped rows, every value on the grid, right gradients."""
    batch, rows, heads, clip = 2, 300, 4, 0.3
    readout = ExampleReadout(clip, (0.5, 0.25, 0.5, 1.0), (2.0**-5, 2.0**-6, 2.0**-5, 2.0**-4))
    spec = AttentionSpec(size**-0.5, is_causal=True, readout=readout)
    query, cotangent = (draw(batch, rows, heads, size, seed=s, dtype=dtype) for s in (0, 1))
    key, value = (draw(batch, rows, 2, size, seed=s, dtype=dtype) for s in (2, 3))
    noise = triton_cases.noise_inputs(batch)
    inputs = AttentionInputs(query, key, value, noise=noise)
    output, _, *gradients = triton_cases.value_and_gradients(BACKEND, spec, inputs, cotangent)
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
    # Half a grid step, the rounding of a released value, and the weights' own rounding.
    slack = 0.5 * grids + np.abs(released) * 2.0**-8 + 4e-3 * clip + 2e-5
    if dtype == "float32":
        slack = 0.5 * grids + 2e-5
    assert np.all(np.abs(released - clipped - drawn) <= slack)
    pulled = epilogue.clip_cotangent(readout, jnp.asarray(exact), cotangent)
    theirs = oracle.attention(query, key, value, pulled, **options)[1:4]
    for mine, other in zip(gradients[:3], theirs, strict=True):
        away = np.linalg.norm(np.asarray(mine, np.float64) - other)
        assert away <= (1e-5 if dtype == "float32" else 8e-3) * np.linalg.norm(other)


def test_noise_of_many_programs():
    """V9, V10: every element of 8 x 32 heads x 512 rows x 128 columns equals the oracle's noise.

    Three keys, 50 million numbers. A released value is the multiple of the grid nearest the noise;
    where the two lie within 2^-14 of the border of two cells, either will do.
    """
    batch, rows, heads, size, steps = 8, 512, 32, 128, 16
    readout = ExampleReadout(1.0, (1.0,) * heads, (1.0 / steps,) * heads)
    zeros = jnp.zeros((batch, rows, heads, size), jnp.bfloat16)
    small = jnp.zeros((batch, 8, heads, size), jnp.bfloat16)

    @jax.jit
    def compare(noise):
        inputs = AttentionInputs(zeros, small, small, noise=noise)
        released = BACKEND.forward(AttentionSpec(0.1, readout=readout), inputs).output
        drawn = attention_noise(*noise, heads=heads, row_start=0, rows=rows, columns=size)
        away = jnp.abs(released.astype(jnp.float32) - drawn) * steps
        return away.max(), jnp.mean(away > 0.5), jnp.abs(released).max()

    largest = 0.0
    for seed in range(3):
        away, beyond, top = compare(triton_cases.noise_inputs(batch, seed))
        assert away <= 0.5 + 2.0**-10, seed
        assert beyond < 1e-4
        largest = max(largest, float(top))
    assert largest > 5.0  # 5e7 draws go beyond 5 but for a chance of e^-29


@pytest.mark.parametrize(("dtype", "size"), [("float32", 40), ("bfloat16", 128), ("bfloat16", 256)])
def test_memory_readout(dtype, size):
    """V6, V10: the blocked backend's answer to a grid step; hidden slots hold any bytes."""
    readout = MemoryReadout("sum", 1.0, 1.0, 0.75, 0.1, (0.5, 1.0), (2.0**-5, 2.0**-4))
    spec = AttentionSpec(size**-0.5, readout=readout)
    hidden = jnp.asarray(np.random.default_rng(2).random(500) < 0.3)
    inputs = AttentionInputs(
        draw(2, 130, 2, size, dtype=dtype),
        draw(2, 500, 1, size, seed=1, dtype=dtype),
        draw(2, 500, 1, size, seed=2, dtype=dtype),
        mask=~hidden[None, None, None],
        noise=triton_cases.noise_inputs(2),
    )
    run = jax.jit(lambda inputs: BACKEND.forward(spec, inputs).output)
    released = np.asarray(run(inputs), np.float64)
    expected = jax.jit(lambda inputs: BLOCKED.forward(spec, inputs).output)(inputs)
    # Z is near 100, N at most that: a step of the grid in each, and the cast.
    away = np.abs(released - np.asarray(expected, np.float64))
    assert away.max() <= 4 * 2.0**-4 / 60 + 2.0**-8 * np.abs(released).max()
    for filler in (1e30, jnp.inf, jnp.nan):
        put = lambda x: jnp.where(hidden[None, :, None, None], filler, x).astype(dtype)  # noqa: B023, E731
        again = run(inputs._replace(key=put(inputs.key), value=put(inputs.value)))
        np.testing.assert_array_equal(np.asarray(again, np.float64), released)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("keys", "bound"), [(4096, 2.0), (65536, 0.3)])
def test_sensitivity_of_the_kernels_own_output(dtype, keys, bound):
    """V3: with the noise off, masking one record moves N by at most (1 + eta) C."""
    found, delta = triton_cases.masked_change(BACKEND, dtype, keys=keys, bound=bound)
    assert 0.9 * delta <= found <= (1 + 1e-3) * delta, found / delta


def test_same_bits_each_time_and_under_transformations():
    """V6, V10: no atomics; vmap and shard_map change no bit of a release."""
    readout = ExampleReadout(0.5, (1.0, 1.0), (2.0**-4,) * 2)
    spec = AttentionSpec(0.1, is_causal=True, readout=readout)
    arrays = [draw(4, 200, 2, 64, seed=seed) for seed in range(4)]
    inputs = AttentionInputs(*arrays[:3], noise=triton_cases.noise_inputs(4))
    run = lambda i, c: triton_cases.value_and_gradients(BACKEND, spec, i, c)[:5]  # noqa: E731
    first = run(inputs, arrays[3])
    again = run(inputs, arrays[3])
    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), (inputs, arrays[3]))
    mapped = jax.vmap(run)(*split)
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    place = PartitionSpec("data")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(place, place), out_specs=place)
    sharded = sharded(inputs, arrays[3])
    for index, (one, *others) in enumerate(zip(first, again, mapped, sharded, strict=True)):
        one = np.asarray(one.astype(jnp.float32))
        again, *others = (np.asarray(x.astype(jnp.float32)).reshape(one.shape) for x in others)
        assert np.array_equal(one, again)
        for other in others:
            if index < 2:
                assert np.array_equal(one, other)
            else:  # XLA sums output times cotangent in another order
                assert np.linalg.norm(one - other) <= 2.0**-9 * np.linalg.norm(one)
