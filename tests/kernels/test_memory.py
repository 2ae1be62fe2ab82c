"""A private memory's sums: sensitivity of the kernel's own output, hidden bytes, odd logits."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.kernels import compensated, epilogue, memory_loop, reference, softmax_loop
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, MemoryReadout
from dpfa_jax.release import sensitivity

pytestmark = pytest.mark.quickly_compiled

C, SIZE = 1.0, 8
ETA = sensitivity.ACCUMULATION_SLACK


def readout(form, bound):
    return MemoryReadout(form, bound, C, C, 1.0, (1.0,), (2.0**-10,))


def neighbours(n, bound, dtype):
    """Two memories that differ in one record, at the maximum of the first only.

    All other logits are one number near -B, whose exp(. - B) bfloat16 rounds by as much as it can;
    a running maximum would move from it to B and re-round every weight. Values lean one way, so
    that such a shift cannot cancel; the record's own value is turned around.
    """
    rng = np.random.default_rng(n)
    candidates = np.asarray(
        jnp.linspace(-bound, -0.8 * bound, 400).astype(jnp.bfloat16), np.float64
    )
    exact_weights = np.exp(candidates - bound)
    rounded = np.asarray(jnp.asarray(exact_weights, jnp.bfloat16), np.float64)
    others = candidates[np.argmax(np.abs(rounded / exact_weights - 1))]
    query = np.zeros((1, 1, 1, SIZE))
    query[..., 0] = 1.0
    key = np.zeros((1, n, 1, SIZE))
    key[..., 0] = others
    value = 0.02 * rng.standard_normal((1, n, 1, SIZE)) + 1.0
    value /= np.linalg.norm(value, axis=-1, keepdims=True)
    place = n // 3
    other_key, other_value = key.copy(), value.copy()
    key[0, place, 0, 0] = bound
    value[0, place] = -value[0, place]
    cast = [jnp.asarray(x, dtype) for x in (query, key, value, other_key, other_value)]
    return AttentionInputs(*cast[:3]), AttentionInputs(cast[0], *cast[3:]), place


def exact(two):
    return np.asarray(two.high, np.float64) + np.asarray(two.low, np.float64)


@functools.cache
def sums_by(spec):
    return jax.jit(functools.partial(memory_loop.sums, spec, spec.readout))


ratio = jax.jit(epilogue.ratio)


def change_of(form, one, other, spec):
    pair = [sums_by(spec)(x) for x in (one, other)]
    if form == "ratio":
        pair = [ratio(x) for x in pair]
    return np.linalg.norm(exact(pair[0]) - exact(pair[1]))


def ordinary(inputs, block=512):
    """Flash attention as published: running maximum, probabilities in the value's dtype."""
    _, key, value = (np.asarray(x, np.float32)[0, :, 0] for x in inputs[:3])
    values = jnp.asarray(value)
    logits, top, total, acc = jnp.asarray(key[:, 0]), -jnp.inf, 0.0, jnp.zeros(SIZE)
    for start in range(0, len(key), block):
        part = logits[start : start + block]
        new = jnp.maximum(top, part.max())
        p = jnp.exp(part - new)
        total = total * jnp.exp(top - new) + p.sum()
        p = p.astype(inputs.value.dtype).astype(jnp.float32)
        acc = acc * jnp.exp(top - new) + p @ values[start : start + block]
        top = new
    return np.asarray(acc / total, np.float64)


QUICK = {(512, 2.0, "float32"), (65536, 0.5, "bfloat16")}
CASES = tuple(
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in itertools.product((512, 4096, 65536), (0.3, 0.5, 1.0, 2.0), ("bfloat16", "float32"))
)
ORDINARY_FAILS = ((4096, 0.3), (65536, 0.3), (65536, 0.5))


@pytest.mark.parametrize(("n", "bound", "dtype"), CASES)
def test_sensitivity_of_the_kernels_own_output(n, bound, dtype):
    """V3: with the noise off, one record changes the sums by at most (1 + eta) Delta.

    The ordinary running-max kernel fails the same bound (ratio form, bfloat16, large n).
    """
    is_control = dtype == "bfloat16" and (n, bound) in ORDINARY_FAILS
    bound = float(jnp.bfloat16(bound))  # keys must reach B in their own dtype
    one, other, place = neighbours(n, bound, dtype)
    hidden = jnp.arange(n)[None, None, None, :] != place
    for form, pair, delta in (
        ("sum", (one, one._replace(mask=hidden)), sensitivity.memory_sum(C, C, 1, 1, "mask")),
        ("sum", (one, other), sensitivity.memory_sum(C, C, 1, 1, "substitute")),
        ("ratio", (one, other), sensitivity.memory_ratio(C, bound, 1, n, 1)),
    ):
        spec = AttentionSpec(1.0, readout=readout(form, bound))
        found = change_of(form, *pair, spec)
        assert found <= (1 + ETA) * delta, (form, found / delta)
        assert found > 0.2 * delta, "these neighbours hardly differ; the test shows nothing"
    if is_control:
        delta = sensitivity.memory_ratio(C, bound, 1, n, 1)
        assert np.linalg.norm(ordinary(one) - ordinary(other)) > (1 + ETA) * delta


@pytest.mark.parametrize("form", ["sum", pytest.param("ratio", marks=pytest.mark.slow)])
def test_float32_accumulation_would_not_do(form):
    """Negative control of V3: sums of 65536 weights kept in one float32 break the bound."""
    n, bound = 65536, 0.3
    one, other, _ = neighbours(n, bound, "float32")
    spec = AttentionSpec(1.0, readout=readout(form, bound))

    def plain(x):
        sums = sums_by(spec)(x)
        if form == "ratio":
            sums = ratio(sums)
        return np.asarray(sums.high, np.float64)

    two_float = change_of(form, one, other, spec)
    lost = abs(np.linalg.norm(plain(one) - plain(other)) - two_float)
    assert lost > 1e-4 * two_float


def test_sums_agree_with_float64_and_with_the_reference():
    """The sums are those of float64 but for the rounding of one block (64 u), in both backends."""
    one, _, _ = neighbours(3001, 1.0, "float32")
    one = one._replace(value=0.9 * one.value)  # below the clip norm: clipping has its own tests
    rng = np.random.default_rng(1)
    query = jnp.asarray(rng.standard_normal((1, 300, 1, SIZE)), jnp.float32)
    inputs = one._replace(query=query)
    spec = AttentionSpec(1.0, readout=readout("sum", 1.0))
    sums = exact(sums_by(spec)(inputs))
    whole = exact(jax.jit(functools.partial(reference.memory_sums, spec, spec.readout))(inputs))
    np.testing.assert_allclose(sums, whole, atol=1e-4)
    q, k, v = (np.asarray(x, np.float64)[0, :, 0] for x in inputs[:3])
    logits = jnp.asarray(q @ k.T, jnp.float32)[None, None, None]
    e = memory_loop.weights(spec.readout, logits, None, None, jnp.dtype(jnp.float32))
    e = np.asarray(e, np.float64)[0, 0, 0]
    np.testing.assert_allclose(e, np.exp(np.minimum(q @ k.T, 1.0) - 1.0), rtol=3e-6)
    np.testing.assert_allclose(sums[0, :, 0, :-1], e @ v, rtol=memory_loop.SUM_BLOCK * 2**-24)
    np.testing.assert_allclose(sums[0, :, 0, -1], e.sum(-1), rtol=memory_loop.SUM_BLOCK * 2**-24)


@pytest.mark.parametrize("keys", [70, 1100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hidden_slots_hold_any_bytes(keys, dtype):
    """V6: a masked slot equals that slot with any bytes, bit for bit, NaN included."""
    rng = np.random.default_rng(2)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), dtype)  # noqa: E731
    hidden = jnp.asarray(rng.random(keys) < 0.3)
    base = AttentionInputs(draw(1, 300, 2, SIZE), draw(1, keys, 1, SIZE), draw(1, keys, 1, SIZE))
    base = base._replace(mask=~hidden[None, None, None])
    spec = AttentionSpec(0.3, readout=readout("sum", 1.0))
    sums = sums_by(spec)
    first = sums(base)
    for filler in (0.0, 1e30, jnp.inf, jnp.nan):
        put = lambda x: jnp.where(hidden[None, :, None, None], filler, x).astype(dtype)  # noqa: B023, E731
        again = sums(base._replace(key=put(base.key), value=put(base.value)))
        for a, b in zip(first, again, strict=True):
            assert (np.asarray(a) == np.asarray(b)).all()


@pytest.mark.parametrize("form", ["sum", "ratio"])
@pytest.mark.parametrize("odd", [1e4, -1e4, np.inf, -np.inf, np.nan])
def test_odd_logits_are_clamped(form, odd):
    """V5: logits of any size, infinite or NaN, leave a record's weight in [0, 1]."""
    readout_ = readout(form, 0.5)
    logits = jnp.full((1, 1, 1, 1, 3), odd, jnp.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        e = np.asarray(memory_loop.weights(readout_, logits, None, None, dtype))
        least = np.exp(-1.0) if form == "ratio" else 0.0
        assert (least <= e).all() and (e <= 1).all()
    inputs = AttentionInputs(*(jnp.full((1, 4, 1, SIZE), odd, jnp.float32) for _ in range(3)))
    sums = sums_by(AttentionSpec(1.0, readout=readout_))(inputs)
    assert np.isfinite(exact(sums)).all()


def test_least_weight_is_rounded_up():
    """The ratio bound rests on e >= exp(-2 B); rounding to nearest would fall below it."""
    rounded_down = 0
    for bound in np.linspace(0.1, 4.0, 40):
        for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
            assert memory_loop.least_weight(bound, jnp.dtype(dtype)) >= np.exp(-2 * bound)
        rounded_down += float(np.asarray(np.exp(-2 * bound), jnp.bfloat16)) < np.exp(-2 * bound)
    assert rounded_down


def test_two_float_arithmetic_survives_compilation():
    """Sums, products, quotients and snaps are right to 2^-45 after XLA has had its way."""
    rng = np.random.default_rng(3)
    a, b, c = (rng.standard_normal(1000).astype(np.float32) * s for s in (1e4, 1.0, 3.0))
    wide = [x.astype(np.float64) for x in (a, b, c)]

    @jax.jit
    def run(a, b, c, small):
        total = compensated.add(compensated.two_sum(a, b), c)
        product = compensated.two_product(a, b)
        quotient = compensated.divide(total, compensated.two_sum(c, small))
        return total, product, quotient, compensated.snap_once(total, jnp.float32(2.0**-6))

    small = b * np.float32(1e-6)
    total, product, quotient, snapped = run(a, b, c, small)
    np.testing.assert_allclose(exact(total), wide[0] + wide[1] + wide[2], rtol=1e-12, atol=1e-9)
    np.testing.assert_array_equal(exact(product), wide[0] * wide[1])
    divisor = wide[2] + small.astype(np.float64)
    np.testing.assert_allclose(exact(quotient), exact(total) / divisor, rtol=1e-12)
    np.testing.assert_array_equal(np.asarray(snapped), np.round(exact(total) * 64) / 64)


def test_no_keys_no_queries():
    """V7: n = 0 gives sums of zero, m = 0 an empty answer."""
    spec = AttentionSpec(1.0, readout=readout("sum", 1.0))
    for rows, keys in ((3, 0), (0, 3)):
        shapes = ((1, rows, 2, SIZE), (1, keys, 1, SIZE), (1, keys, 1, SIZE))
        inputs = AttentionInputs(*(jnp.ones(s) for s in shapes))
        sums = sums_by(spec)(inputs)
        assert sums.high.shape == (1, rows, 2, SIZE + 1)
        assert not np.any(sums.high)
        output = jax.jit(lambda x: softmax_loop.forward(spec, x)[0])(inputs)
        assert output.shape == (1, rows, 2, SIZE)
