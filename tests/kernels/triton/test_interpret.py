"""The Triton kernels as plain JAX on a CPU: values, and the promises on noise and hidden bytes.

What only a GPU shows (layouts, approximate functions, tensor cores) is in test_gpu.py.
"""

import functools
import itertools

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle
from helpers import hidden_bytes, padding_cases, triton_cases
from jax.sharding import Mesh, PartitionSpec

from dpfa_jax.attention import core
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout, MemoryReadout
from dpfa_jax.kernels.blocked import BACKEND as BLOCKED
from dpfa_jax.kernels.triton.backend import TritonBackend
from dpfa_jax.kernels.triton.noise import Stream
from dpfa_jax.noise import attention_noise

pytestmark = pytest.mark.quickly_compiled

BACKEND = TritonBackend(interpret=True)
NOISE, GRIDS = (0.5, 0.25, 0.5, 1.0), (2.0**-5, 2.0**-6, 2.0**-5, 2.0**-4)
EXAMPLE = ExampleReadout(0.3, NOISE, GRIDS)
MEMORY = MemoryReadout("sum", 1.0, 1.0, 0.75, 0.1, NOISE, GRIDS)
QUICK = {("cap, lengths", "bfloat16")}


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product(triton_cases.OPTIONS, ("float32", "bfloat16", "float16"))
]


@pytest.mark.parametrize(("options", "dtype"), CASES)
def test_error_is_within_twice_the_naive_one(options, dtype):
    """V6, V7, V8: several ragged tiles, GQA, a head size that is padded."""
    shape = (2, 70, 90, 4, 2, 24) if dtype == "float32" else (2, 140, 150, 2, 1, 24)
    triton_cases.check(BACKEND, shape, dtype, triton_cases.OPTIONS[options])


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 64, 96, 128, 200, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_head_sizes(size, dtype):
    """V8: every tiling that is shipped."""
    triton_cases.check(BACKEND, (1, 150, 140, 2, 2, size), dtype, {"is_causal": True})


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 300), (300, 1), (129, 64)])
def test_least_sizes(rows, keys):
    """V7: m = 1, n = 1."""
    triton_cases.check(BACKEND, (8, rows, keys, 2, 2, 16), "float32", {})


@pytest.mark.parametrize("lowest", [-1e8, -1e9, -1e10, -1e37, float(np.finfo(np.float32).min)])
def test_padding_by_a_bias_is_padding_by_a_mask(lowest):
    """V6, V7: in 16 bits. Rows that see padding alone give 0 and no gradient, nor has its bias."""
    spec, by_bias, by_mask, cotangent = padding_cases.calls(
        "bfloat16", lowest, keys=160, padding=100, size=16
    )
    found, expected = (
        triton_cases.value_and_gradients(BACKEND, spec, inputs, cotangent)
        for inputs in (by_bias, by_mask)
    )
    padding_cases.assert_alike(found, expected, 100)


@pytest.mark.parametrize(
    ("dtype", "lowest", "slack"),
    # A logit of -65504 is rounded by up to 2^-9 in base e, a log-sum-exp in base 2 too.
    [("float16", float(np.finfo(np.float16).min), 8e-3), ("float32", -(2.0**70), 1e-5)],
)
def test_what_a_bias_does_not_hide_has_the_gradient_of_its_softmax(dtype, lowest, slack):
    """V6: float16's least number; in float32 numbers at which the logits of a row are one."""
    spec, inputs, _, cotangent = padding_cases.calls(dtype, lowest, keys=160, padding=100, size=16)
    found = triton_cases.value_and_gradients(BACKEND, spec, inputs, cotangent)
    arrays = [np.asarray(x, np.float64) for x in (*inputs[:3], cotangent)]
    exact = oracle.attention(*arrays, bias=inputs.bias, scale=spec.scale, is_causal=True)
    exact = (*exact[:4], oracle.reduced_like(exact[4], inputs.bias.shape))
    for mine, theirs in zip((found[0], *found[2:]), exact, strict=True):
        away = np.linalg.norm(np.asarray(mine, np.float64) - theirs)
        assert away <= slack * np.linalg.norm(theirs)


def test_noise_is_the_oracles():
    """V10: the kernel's normals equal those of `attention_noise`, bit for bit on one machine."""
    batch, rows, columns, heads = 2, 32, 16, 3
    noise = triton_cases.noise_inputs(batch)

    def body(words, index, start, all_columns, last_column):
        b, head = pl.program_id(0), pl.program_id(1)
        stream = Stream((words[b, 0], words[b, 1]), index[b], start[b] + head.astype(jnp.uint32))
        row = jnp.arange(rows)
        all_columns[b, head] = stream.columns(row, columns)
        last_column[b, head] = stream.column(row, columns - 1)

    found = pl.pallas_call(
        body,
        [
            jax.ShapeDtypeStruct((batch, heads, rows, columns), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, rows), jnp.float32),
        ],
        grid=(batch, heads),
        interpret=True,
    )(*noise)
    draws = triton_cases.quickly(
        lambda n: attention_noise(*n, heads=heads, row_start=0, rows=rows, columns=columns)
    )
    expected = np.asarray(draws(noise)).swapaxes(1, 2)
    np.testing.assert_array_equal(found[0], expected)
    np.testing.assert_array_equal(found[1], expected[..., -1])
    # A counter that would repeat gives no noise at all.
    beyond = noise._replace(batch_index=jnp.asarray([5, 2**20], jnp.uint32))
    assert np.isnan(np.asarray(draws(beyond))[1]).all()


def inputs_of(dtype, size=40, heads=4):
    return AttentionInputs(
        draw(2, 70, heads, size, dtype=dtype),
        draw(2, 50, heads // 2, size, dtype=dtype),
        draw(2, 50, heads // 2, size, seed=1, dtype=dtype),
        noise=triton_cases.noise_inputs(2),
    )


@functools.cache
def output_of(backend, spec):
    return triton_cases.quickly(lambda inputs: backend.forward(spec, inputs).output)


@pytest.mark.parametrize(
    ("clip", "dtype"),
    [
        ("row", "float32"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("example", "float32"), ("row", "bfloat16"), ("example", "float16"))
        ),
    ],
)
def test_example_release_is_the_blocked_one(clip, dtype):
    """V4, V10, V12: the same noise, clip and grid as the blocked backend; NaN leaves noise only."""
    spec = AttentionSpec(0.2, is_causal=True, readout=ExampleReadout(0.3, NOISE, GRIDS, clip=clip))
    inputs = inputs_of(dtype)
    inputs = inputs._replace(value=inputs.value.at[1, 0, 0, 0].set(jnp.inf))
    released, expected = (
        np.asarray(output_of(backend, spec)(inputs), np.float64) for backend in (BACKEND, BLOCKED)
    )
    steps = np.abs(released - expected) / np.asarray(GRIDS)[:, None]
    assert np.isfinite(released).all()
    if dtype == "float32":
        np.testing.assert_array_equal(steps, np.round(steps))
        assert np.all(released / np.asarray(GRIDS)[:, None] % 1 == 0)
        # Rounding differs by 1e-6 before the snap: one in 10^4 numbers may fall to the next cell.
        assert steps.max() <= 1 and (steps > 0).mean() < 1e-3
    else:
        assert np.all(steps <= 1.0 + np.abs(released) * 2.0**-8 / np.asarray(GRIDS)[:, None])
    # The value head 0 of example 1 saw infinity in its first key, and causality shows it to all.
    if clip == "row":
        silent = inputs._replace(value=jnp.zeros_like(inputs.value))
        np.testing.assert_array_equal(
            released[1, :, :2], np.asarray(output_of(BACKEND, spec)(silent), np.float64)[1, :, :2]
        )


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (24, "bfloat16"),
        *(
            pytest.param(s, t, marks=pytest.mark.slow)
            for s, t in ((33, "float32"), (64, "float16"))
        ),
    ],
)
def test_memory_is_the_blocked_one(size, dtype):
    """V6, V7, V10, V12: the blocked backend's answer; hidden slots hold any bytes, bit for bit."""
    base = inputs_of(dtype, size)
    hidden = jnp.asarray(np.random.default_rng(2).random(50) < 0.3)
    base = base._replace(
        mask=~hidden[None, None, None], key_lengths=jnp.asarray([50, 33]),
        query_lengths=jnp.asarray([70, 60]),
    )  # fmt: skip
    spec = AttentionSpec(0.2, readout=MEMORY, logits_soft_cap=4.0)
    run = output_of(BACKEND, spec)
    released = np.asarray(run(base), np.float64)
    expected = np.asarray(output_of(BLOCKED, spec)(base), np.float64)
    # A weight rounds to its neighbour where the logits' last bits differ: a grid step at most.
    away = np.abs(released - expected) / np.maximum(np.abs(expected), 1.0)
    assert away.max() < 0.1 and (away > 2.0**-7).mean() < 2e-3
    assert np.isfinite(released).all()
    for filler in (1e30, jnp.inf, jnp.nan):
        put = lambda x: jnp.where(hidden[None, :, None, None], filler, x).astype(dtype)  # noqa: B023, E731
        again = run(base._replace(key=put(base.key), value=put(base.value)))
        np.testing.assert_array_equal(np.asarray(again, np.float64), released)


@pytest.mark.slow
@pytest.mark.parametrize("odd", [1e4, -1e4, np.inf, -np.inf, np.nan])
def test_odd_logits_are_clamped(odd):
    """V5: no logit gives a weight above 1 or an answer that is not finite."""
    spec = AttentionSpec(1.0, readout=MEMORY)
    inputs = inputs_of("float32")
    for name in ("query", "key", "value"):
        found = output_of(BACKEND, spec)(inputs._replace(**{name: jnp.full_like(inputs[0], odd)}
                                         if name == "query" else
                                         {name: jnp.full_like(inputs.key, odd)}))  # fmt: skip
        assert np.isfinite(np.asarray(found)).all()


@pytest.mark.slow
def test_transformations_change_no_bit():
    """V10: vmap of grad of checkpoint, on the plain and the private kernel, against no vmap."""
    spec = AttentionSpec(0.3, is_causal=True, readout=ExampleReadout(0.3, (0.5,), (2.0**-5,)))
    query, key, value, weight = (draw(4, 20, 1, 16, seed=seed) for seed in range(4))
    noise = triton_cases.noise_inputs(4)

    def loss(query, key, value, weight, noise):
        output, _ = core.attend(BACKEND, spec, AttentionInputs(query, key, value, noise=noise))
        return jnp.sum(output * weight)

    gradient = jax.value_and_grad(jax.checkpoint(loss), argnums=(0, 1, 2))
    arrays = (query, key, value, weight, noise)
    total, whole = triton_cases.quickly(gradient)(*arrays)
    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), arrays)
    totals, parts = triton_cases.quickly(jax.vmap(gradient))(*split)
    np.testing.assert_allclose(totals.sum(), total, rtol=1e-5)
    for one, two in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two).reshape(one.shape))


@pytest.mark.slow
def test_shard_map_changes_no_bit():
    """V10: over batch and heads, with the offsets of each shard; gradients vary as their inputs."""
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "heads"))
    place, rows = PartitionSpec("data", None, "heads"), PartitionSpec("data")
    spec = AttentionSpec(0.3, readout=ExampleReadout(0.3, NOISE[:2], GRIDS[:2]))
    arrays = tuple(draw(2, 20, 2, 16, seed=seed) for seed in range(3))
    noise = triton_cases.noise_inputs(2)

    def run(query, key, value, noise):
        def loss(query):
            inputs = AttentionInputs(query, key, value, noise=noise)
            output, _ = core.attend(BACKEND, spec, inputs)
            return jnp.sum(output), output

        gradient, output = jax.grad(loss, has_aux=True)(query)
        return output, gradient

    in_specs = (place, place, place, jax.tree.map(lambda _: rows, noise))
    # The interpreter's own gathers know nothing of varying axes; test_lowering.py checks these.
    sharded = jax.shard_map(
        run, mesh=mesh, in_specs=in_specs, out_specs=(place, place), check_vma=False
    )
    for one, two in zip(
        jax.jit(run)(*arrays, noise), jax.jit(sharded)(*arrays, noise), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(two))


@pytest.mark.slow
def test_a_visible_nan_reaches_the_rows_that_see_it_and_no_other():
    """V6: value NaN at key 40 under causality, in a tile that rows on both sides share."""
    spec = AttentionSpec(0.3, is_causal=True)
    arrays = [draw(1, 90, 1, 16, seed=seed) for seed in range(3)]
    run = output_of(BACKEND, spec)
    clean = np.asarray(run(AttentionInputs(*arrays)))
    for place in (1, 2):
        hurt = list(arrays)
        hurt[place] = hurt[place].at[0, 40, 0, 3].set(jnp.nan)
        found = np.asarray(run(AttentionInputs(*hurt)))
        np.testing.assert_array_equal(found[:, :40], clean[:, :40])
        assert np.isnan(found[:, 40:]).any(-1).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sensitivity_of_the_kernels_own_output(dtype):
    """V3: with the noise off, masking one of 4096 records moves N by at most (1 + eta) C.

    Values of the first half point one way, those of the second the other: the sums grow to 10^3,
    then come back, so that the released float32 holds the change to the last bit.
    """
    found, delta = triton_cases.masked_change(BACKEND, dtype, keys=4096, bound=0.3)
    assert 0.9 * delta <= found <= (1 + 1e-3) * delta, found / delta


@pytest.mark.slow
@pytest.mark.parametrize("name", hidden_bytes.CASES)
def test_keys_that_no_row_sees_hold_any_bytes(name):
    hidden_bytes.check(BACKEND, name, jnp.nan, dtype=jnp.bfloat16, has_bias=True)
