"""The memory readout on a Hopper GPU: V3, V5 to V7, V10, V12, and attempts to refute its bound.

python -m pytest -m gpu tests/kernels/mosaic_gpu/test_memory_gpu.py
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.kernels import memory_loop
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, MemoryReadout, NoiseInputs
from dpfa_jax.kernels.mosaic_gpu import memory_call, tiles
from dpfa_jax.kernels.mosaic_gpu.backend import MosaicGpuBackend
from dpfa_jax.kernels.mosaic_gpu.memory_numbers import product_slack
from dpfa_jax.noise.fields import attention_noise
from dpfa_jax.release import sensitivity

pytestmark = pytest.mark.gpu
BACKEND = MosaicGpuBackend()
ETA = sensitivity.ACCUMULATION_SLACK
C = 1.0


def readout(heads=1, bound=1.0, stddev=1.0, grid=2.0**-4):
    return MemoryReadout("sum", bound, C, C, 1.0, (stddev,) * heads, (grid,) * heads)


def noise_inputs(batch, seed=0):
    words = np.random.default_rng(seed).integers(0, 2**32, (batch, 2), dtype=np.uint32)
    return NoiseInputs(
        jnp.asarray(words), jnp.arange(batch, dtype=jnp.uint32), jnp.full(batch, 3, jnp.uint32)
    )


def inputs_of(query, key, value, **more):
    return AttentionInputs(query, key, value, noise=noise_inputs(query.shape[0]), **more)


@functools.cache
def _with_sums(spec):
    return jax.jit(lambda x: memory_call.answer(spec, x, keep_sums=True))


def sums_of(spec, inputs):
    """The kernel's un-noised (N, Z) in float64, (B, T, N, H + 1)."""
    numbers = memory_call._numbers(spec.readout, inputs)
    results = _with_sums(spec)(inputs)
    normalisers = np.asarray(results.normalisers, np.float64).swapaxes(1, 2)[..., None]
    both = np.concatenate([np.asarray(results.numerators, np.float64), normalisers], axis=-1)
    return both * numbers.unit


def oracle(spec, inputs, seen=None):
    """(N, Z) in float64 of weights rounded once from float64, values and kappa as the kernel's."""
    arrays = memory_call._arrays(spec.readout, memory_call._numbers(spec.readout, inputs), inputs)
    groups = inputs.query.shape[2] // inputs.key.shape[2]
    query, key, value = (
        np.asarray(x.astype(jnp.float32), np.float64)
        for x in (inputs.query, inputs.key, arrays.value)
    )
    key, value = (np.repeat(x, groups, axis=2) for x in (key, value))
    s = spec.scale * np.einsum("btnh,bsnh->bnts", query, key)
    if spec.logits_soft_cap is not None:
        s = spec.logits_soft_cap * np.tanh(s / spec.logits_soft_cap)
    bound = spec.readout.logit_bound
    e = jnp.asarray(np.exp(np.minimum(s, bound) - bound), inputs.value.dtype)
    e = np.asarray(e.astype(jnp.float32), np.float64)
    if seen is not None:
        e = e * seen
    kappa = np.asarray(arrays.normaliser.astype(jnp.float32), np.float64)
    n = np.einsum("bnts,bsnh->btnh", e, value)
    z = np.einsum("bnts,bs->btn", e, kappa)
    return np.concatenate([n, z[..., None]], axis=-1)


def draw(rng, shape, dtype=jnp.bfloat16, scale=1.0):
    return jnp.asarray(scale * rng.standard_normal(shape), dtype)


@pytest.mark.parametrize("size", [64, 128, 40, 192, 256, 141])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (130, 127), (333, 1000)])
def test_sums_are_those_of_float64(size, dtype, rows, keys):
    """V7, V8: numerator and normaliser; ragged sizes, GQA, lengths, soft cap, causal."""
    rng = np.random.default_rng(1)
    query, key, value = (
        draw(rng, (2, n, heads, size), dtype) for n, heads in ((rows, 4), (keys, 2), (keys, 2))
    )
    lengths = jnp.asarray([keys, max(1, keys - 5)], jnp.int32)
    soft_cap = 3.0 if size == 40 else None
    spec = AttentionSpec(size**-0.5, is_causal=True, logits_soft_cap=soft_cap, readout=readout(4))
    inputs = inputs_of(query, key, value, key_lengths=lengths)
    found = sums_of(spec, inputs)
    seen = np.arange(rows)[:, None] >= np.arange(keys)[None, :]
    exact = oracle(spec, inputs, seen)
    # The hardware's tanh errs by 5e-4 of the cap.
    assert np.linalg.norm(found - exact) <= (4e-3 if soft_cap else 1e-3) * np.linalg.norm(exact)
    if soft_cap is None:
        # A weight next to a tie of its rounding may go the other way: 2^-8 of it, of a few a row.
        assert np.abs(found - exact).max() <= 2.0**-8 * (np.sqrt(keys) + 1)


def block_of(size):
    """Keys of one block."""
    return tiles.memory_tiles(-(-size // 64) * 64).block_kv


def worst_records(rng, n, size, kind):
    """Values that make float32 sums lose as much as they can."""
    value = rng.standard_normal((n, size)) * 0.02 + 1.0
    if kind == "one column":
        value = np.zeros((n, size))
        value[:, size // 2] = rng.uniform(0.99, 1.0, n)
        return value  # of slightly different norms: equal numbers would add up exactly
    if kind == "alternating":
        value *= np.where(np.arange(n) % 2, -1.0, 1.0)[:, None]
    elif kind == "large then small":
        block = block_of(size)
        small = np.arange(n) % block >= block // 2
        value *= np.where(small, 2.0**-14, 1.0)[:, None]
        return value / np.sqrt(size)
    return value / np.linalg.norm(value, axis=1, keepdims=True)


KINDS = ("aligned", "one column", "alternating", "large then small")


NEIGHBOURS = [
    *((64, n, bound) for n in (512, 4096, 65536) for bound in (0.3, 0.5, 1.0, 2.0)),
    *((128, n, bound) for n, bound in ((512, 2.0), (4096, 0.5), (65536, 1.0))),
    *((256, n, bound) for n, bound in ((512, 1.0), (4096, 0.3), (65536, 0.5))),
]


@pytest.mark.parametrize(("size", "n", "bound"), NEIGHBOURS)
def test_sensitivity_of_the_kernels_own_output(size, n, bound):
    """V3: neighbours built to move the maximum; the change is within (1 + eta) Delta."""
    rng = np.random.default_rng(n)
    bound = float(jnp.bfloat16(bound))
    spec = AttentionSpec(1.0, readout=readout(bound=bound))
    query = np.zeros((1, 8, 1, size))
    query[..., 0] = 1.0
    masked = sensitivity.memory_sum(C, C, 1, 1, "mask")
    replaced = sensitivity.memory_sum(C, C, 1, 1, "substitute")
    for kind in KINDS:
        key = np.zeros((1, n, 1, size))
        key[..., 0] = -0.9 * bound
        value = worst_records(rng, n, size, kind)[None, :, None]
        for place in (0, n // 3, n - 1):
            other_key, other_value = key.copy(), value.copy()
            key[0, place, 0, 0] = bound
            other_value[0, place] *= -1
            other_key[0, place, 0, 0] = bound
            cast = lambda *xs: [jnp.asarray(x, jnp.bfloat16) for x in xs]  # noqa: E731
            one = inputs_of(*cast(query, key, value))
            hidden = jnp.arange(n)[None, None, None, :] != place
            for other, delta in (
                (one._replace(mask=hidden), masked),
                (inputs_of(*cast(query, other_key, other_value)), replaced),
            ):
                change = sums_of(spec, one) - sums_of(spec, other)
                found = np.linalg.norm(change, axis=-1).max()
                assert found <= (1 + ETA) * delta, (kind, place, found / delta)
            key[0, place, 0, 0] = -0.9 * bound


@pytest.mark.parametrize("size", [64, 128, 256])
def test_too_long_records_break_the_bound(size):
    """Negative control of V3: values clipped at twice the norm move the kernel's sums by more."""
    n, place = 512, 170
    query, key = np.zeros((1, 8, 1, size)), np.zeros((1, n, 1, size))
    query[..., 0], key[0, :, 0, 0], key[0, place, 0, 0] = 1.0, -0.9, 1.0
    value = 2 * worst_records(np.random.default_rng(n), n, size, "aligned")[None, :, None]
    one = inputs_of(*(jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)))
    other = one._replace(mask=jnp.arange(n)[None, None, None, :] != place)
    delta = sensitivity.memory_sum(C, C, 1, 1, "mask")
    for norm, breaks in ((C, False), (2 * C, True)):
        spec = AttentionSpec(1.0, readout=dataclasses.replace(readout(), value_clip_norm=norm))
        change = np.linalg.norm(sums_of(spec, one) - sums_of(spec, other), axis=-1).max()
        assert (change > (1 + ETA) * delta) == breaks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("size", [128, 256])
def test_refute_the_additions_bound(kind, dtype, size):
    """The tensor core's additions: many blocks of adversarial records, each neighbour in one key.

    All weights are 1, so that sums in float64 are exact; what the kernel's sums are away from them
    is the additions' error and the rounding to the unit. Half of `product_slack` bounds one
    neighbour; the device should stay at a quarter of that, or its additions are not understood.
    """
    n, batch = block_of(size), 64
    slack = product_slack(n)
    rng = np.random.default_rng([7, KINDS.index(kind)])
    spec = AttentionSpec(1.0, readout=readout(bound=0.5))
    numbers = memory_call._numbers(
        spec.readout, inputs_of(*(jnp.zeros((1, n, 1, size), dtype),) * 3)
    )
    worst = 0.0
    for _ in range(4):
        values = np.stack([worst_records(rng, n, size, kind) for _ in range(batch)])
        values *= rng.uniform(0.2, 1.0, (batch, 1, 1)) * numbers.value_clip_norm * 0.99
        key = np.zeros((batch, n, 1, size))
        key[..., 0] = 8.0  # every logit is clamped to the bound: weight 1
        query = np.zeros((batch, 8, 1, size))
        query[..., 0] = 1.0
        inputs = inputs_of(*(jnp.asarray(x, dtype) for x in (query, key, values[:, :, None])))
        found, exact = sums_of(spec, inputs), oracle(spec, inputs)
        error = np.linalg.norm(found - exact, axis=-1).max()
        rounding = 0.5 * numbers.unit * np.sqrt(size + 1)
        worst = max(worst, error - rounding)
    print(kind, dtype.__name__, "error", worst, "bound", slack / 2)
    assert worst <= slack / 2 / 4
    if kind != "alternating":  # whose sums are small
        # Negative control: sums rounded to the 16 bits of their inputs break the bound.
        coarse = np.asarray(jnp.asarray(exact, dtype).astype(jnp.float32), np.float64)
        assert np.linalg.norm(coarse - exact, axis=-1).max() > slack


@pytest.mark.parametrize("size", [128, 256])
def test_blocks_do_not_touch_each_other(size):
    """The sum of many blocks is, unit for unit, that of each block alone."""
    rng = np.random.default_rng(11)
    blocks, block = 40, block_of(size)
    query, key = draw(rng, (1, 64, 2, size)), draw(rng, (1, blocks * block, 1, size))
    value = draw(rng, key.shape)
    spec = AttentionSpec(size**-0.5, readout=readout(2))
    whole = inputs_of(query, key, value)
    total = sums_of(spec, whole)
    column = np.arange(blocks * block) // block
    parts = sum(
        sums_of(spec, whole._replace(mask=jnp.asarray(column == b)[None, None, None]))
        for b in range(blocks)
    )
    assert np.array_equal(total, parts)


@pytest.mark.parametrize("is_causal", [False, True])
def test_parts_of_the_columns_have_the_same_weights(is_causal):
    """V3: equal columns have equal sums, unit for unit, whichever tile makes them."""
    rng = np.random.default_rng(12)
    query, key = draw(rng, (2, 1500, 8, 256)), draw(rng, (2, 1100, 4, 256))
    value = draw(rng, (2, 1100, 4, 128))
    value = jnp.concatenate([value, value[..., ::-1]], axis=-1)
    spec = AttentionSpec(256**-0.5, is_causal=is_causal, readout=readout(8))
    first, second = np.split(sums_of(spec, inputs_of(query, key, value))[..., :-1], 2, axis=-1)
    assert np.array_equal(first, second[..., ::-1])
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("size", [128, 256])
def test_hidden_slots_hold_any_bytes(size):
    """V6: sums and answer are bit-identical whatever a masked slot holds, NaN included."""
    rng = np.random.default_rng(2)
    shape = (2, 700, 2, size)
    query, key, value = draw(rng, (2, 200, 4, size)), draw(rng, shape), draw(rng, shape)
    hidden = jnp.asarray(rng.random((2, 700)) < 0.3)
    spec = AttentionSpec(0.1, readout=readout(4))
    base = inputs_of(query, key, value, mask=~hidden[:, None, None])
    first, answer = sums_of(spec, base), BACKEND.forward(spec, base).output
    for filler in (0.0, -0.0, 1e30, jnp.inf, -jnp.inf, jnp.nan):
        put = lambda x: jnp.where(hidden[..., None, None], filler, x).astype(x.dtype)  # noqa: B023, E731
        again = base._replace(key=put(key), value=put(value))
        assert np.array_equal(first, sums_of(spec, again))
        assert np.array_equal(
            np.asarray(answer.astype(jnp.float32)),
            np.asarray(BACKEND.forward(spec, again).output.astype(jnp.float32)),
        )


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("odd", [1e4, -1e4, np.inf, -np.inf, np.nan])
def test_odd_logits_are_clamped(size, odd):
    """V5: a weight stays in [0, 1] whatever its logit; NaN counts as the smallest."""
    n = 300
    query = jnp.zeros((1, 8, 1, size), jnp.bfloat16).at[..., 0].set(1.0)
    key = jnp.zeros((1, n, 1, size), jnp.bfloat16).at[..., 0].set(odd)
    value = jnp.full((1, n, 1, size), 0.0625, jnp.bfloat16)
    spec = AttentionSpec(1.0, readout=readout())
    kappa = memory_call._numbers(spec.readout, inputs_of(query, key, value)).weight_scale
    weight = sums_of(spec, inputs_of(query, key, value))[..., -1] / kappa / n
    np.testing.assert_allclose(weight, 1.0 if odd > 0 else 0.0, atol=1e-4)


@pytest.mark.parametrize("size", [64, 128, 41, 256, 141])
def test_noise_is_the_field(size):
    """V10, V12: the released answer is N / max(Z / kappa, floor) of snapped sums, XLA's noise."""
    batch, rows, heads = 2, 300, 4
    rng = np.random.default_rng(3)
    query = draw(rng, (batch, rows, heads, size))
    key, value = (draw(rng, (batch, 700, 2, size)) for _ in range(2))
    stddevs, grids = (4.0, 2.0, 4.0, 8.0), (2.0**-2, 2.0**-3, 2.0**-2, 2.0**-1)
    spec = AttentionSpec(
        size**-0.5, readout=dataclasses.replace(readout(4), noise_stddevs=stddevs, grids=grids)
    )
    inputs = inputs_of(query, key, value)
    released = np.asarray(BACKEND.forward(spec, inputs).output.astype(jnp.float32), np.float64)
    kappa = memory_call._numbers(spec.readout, inputs).weight_scale
    drawn = attention_noise(*inputs.noise, heads=heads, row_start=0, rows=rows, columns=size + 1)
    drawn = np.asarray(drawn, np.float64) * np.asarray(stddevs)[:, None]
    steps = (sums_of(spec, inputs) + drawn) / np.asarray(grids)[:, None]
    snapped = np.round(steps) * np.asarray(grids)[:, None]
    expected = snapped[..., :-1] / np.maximum(snapped[..., -1:] / kappa, 1.0)
    # The hardware's logarithm and sine differ by 1e-6: next to a tie the snap goes the other way.
    is_tie = np.abs(np.abs(steps - np.round(steps)) - 0.5) < 1e-3
    is_tie = is_tie[..., :-1] | is_tie[..., -1:]
    assert is_tie.mean() < 0.02
    error = np.abs(released - expected)
    assert np.all(error[~is_tie] <= np.abs(expected[~is_tie]) * 2.0**-8 + 1e-6)


@pytest.mark.parametrize("size", [128, 256])
def test_same_answer_as_the_blocked_backend(size):
    """V10: the answer of another backend, within bfloat16's rounding and a step of the grid."""
    from dpfa_jax.kernels.blocked import BACKEND as BLOCKED

    rng = np.random.default_rng(4)
    query, key, value = (
        draw(rng, (2, n, heads, size)) for n, heads in ((200, 4), (900, 2), (900, 2))
    )
    spec = AttentionSpec(size**-0.5, readout=readout(4, stddev=2.0, grid=2.0**-3))
    inputs = inputs_of(query, key, value)
    mine, theirs = (
        np.asarray(jax.jit(lambda x, b=b: b.forward(spec, x).output)(inputs), np.float64)
        for b in (BACKEND, BLOCKED)
    )
    total = np.asarray(memory_loop.sums(spec, spec.readout, inputs).high, np.float64)[..., -1:]
    slack = 2.0**-8 * np.abs(theirs) + (2.0**-3 + 4e-3 * np.sqrt(900)) / np.maximum(total, 1.0)
    assert np.all(np.abs(mine - theirs) <= 3 * slack)


@pytest.mark.parametrize("size", [128, 256])
def test_same_bits_each_time_and_under_vmap(size):
    """V6, V10: no atomics; example i is bitwise unchanged when j changes; vmap folds."""
    rng = np.random.default_rng(5)
    query, key, value = (draw(rng, (4, n, 2, size)) for n in (200, 600, 600))
    spec = AttentionSpec(0.1, readout=readout(2))
    inputs = inputs_of(query, key, value)
    run = jax.jit(lambda x: BACKEND.forward(spec, x).output.astype(jnp.float32))
    first = np.asarray(run(inputs))
    assert np.array_equal(first, np.asarray(run(inputs)))
    changed = np.asarray(run(inputs._replace(value=value.at[2].set(jnp.nan))))
    assert np.array_equal(np.delete(first, 2, axis=0), np.delete(changed, 2, axis=0))
    split = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), inputs)
    assert np.array_equal(first, np.asarray(jax.vmap(run)(split)).reshape(first.shape))
