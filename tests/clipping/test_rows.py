import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.clipping.rows import clip_rows, clip_rows_stored
from dpfa_jax.core import ArgumentError

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def _hostile(rows, columns, dtype, seed=0):
    """Rows of every magnitude; a tenth holds 0, subnormals, 1e38, inf or NaN somewhere."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * 10.0 ** rng.uniform(-44, 37, (rows, 1))
    special = np.array([0.0, 1e-40, -1e-45, 1e38, -3e38, np.inf, -np.inf, np.nan])
    where = rng.integers(0, rows, rows // 10)
    x[where, rng.integers(0, columns, len(where))] = rng.choice(special, len(where))
    x[0], x[1], x[2] = 0.0, 1e-40, 3e38
    with np.errstate(over="ignore"):
        return jnp.asarray(x.astype(np.float32)).astype(dtype)


def _norms(x):
    return np.linalg.norm(np.asarray(x).astype(np.float64), axis=-1)


def _assert_clipped(rows, columns, dtype, bound):
    x = _hostile(rows, columns, dtype)
    y = jax.jit(clip_rows_stored, static_argnums=1)(x, bound)
    assert y.dtype == dtype
    assert _norms(y).max() <= bound
    finite = np.isfinite(np.asarray(x).astype(np.float64)).all(-1)
    assert not finite.all()
    assert (np.asarray(y)[~finite] == 0).all()
    inside = finite & (_norms(x) <= bound * 0.999)
    assert (np.asarray(y)[inside] == np.asarray(x)[inside]).all()
    # The bound is used: clipped rows keep their direction and nearly all of the norm.
    outside = finite & (_norms(x) > bound)
    if dtype == jnp.float32:
        assert _norms(y)[outside].min() >= bound * (1 - 1e-4)
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bound", [1.0, 0.37, 1000.0])
def test_stored_norm_never_passes_the_bound(dtype, bound):
    """V4 (20,000 rows of each kind): stored norm <= C in float64; NaN and inf rows are zero."""
    _assert_clipped(20_000, 33, dtype, bound)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_norm_of_a_million_rows(dtype):
    """V4 at its full size."""
    _assert_clipped(1_000_000, 16, dtype, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_norm_on_a_gpu(dtype):
    """V4: rounding toward zero by a comparison, which a GPU's compiler drops, failed this."""
    _assert_clipped(200_000, 64, dtype, 1.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_no_step_can_be_dropped_by_a_compiler(dtype):
    """V4: nothing is cast to 16 bits and back, which XLA may take for no change at all."""
    program = jax.make_jaxpr(lambda x: clip_rows_stored(x, 1.0))(jnp.zeros((4, 8), dtype))
    jaxpr = program.jaxpr
    casts = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "convert_element_type"]
    widened = [eqn for eqn in casts if eqn.outvars[0].aval.dtype == jnp.float32]
    assert [eqn.invars[0] for eqn in widened] == [jaxpr.invars[0]]


def _reductions_in_series(function, x):
    """How many reductions along the rows wait for the result of another one."""
    late, found = set(), 0

    def walk(jaxpr):
        nonlocal found
        for eqn in jaxpr.eqns:
            inner = [v for v in eqn.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
            for sub in inner:
                sub = getattr(sub, "jaxpr", sub)
                late.update(
                    i for i, o in zip(sub.invars, eqn.invars, strict=True)
                    if not hasattr(o, "val") and o in late
                )  # fmt: skip
                walk(sub)
                late.update(
                    o for o, i in zip(eqn.outvars, sub.outvars, strict=True)
                    if not hasattr(i, "val") and i in late
                )  # fmt: skip
            is_late = any(not hasattr(v, "val") and v in late for v in eqn.invars)
            is_reduction = eqn.primitive.name.startswith("reduce_")
            found += is_reduction and is_late
            if is_reduction or is_late:
                late.update(eqn.outvars)

    walk(jax.make_jaxpr(function)(x).jaxpr)
    return found


def test_rows_are_read_twice():
    """All reductions fit one pass, then rows are scaled: XLA reads once for each in series."""
    x = jnp.ones((4, 8))
    assert _reductions_in_series(lambda x: clip_rows(x, 1.0), x) == 0
    # Negative control: a scale by the largest entry.
    assert _reductions_in_series(lambda x: (x / x.max(-1, keepdims=True)).sum(-1), x) == 1


@pytest.mark.parametrize("exponent", [-126, -66, -65, 4, 5, 74, 75, 126])
def test_scales_meet_without_a_step(exponent):
    """V4: rows on both sides of where the scale of the squares changes."""
    rng = np.random.default_rng(exponent + 200)
    x = rng.uniform(0.5, 2.0, (2000, 64)) * 2.0**exponent
    x[:, 1:] *= 2.0 ** -rng.integers(0, 12, (2000, 63))
    x = jnp.asarray(np.minimum(x, 3e38), jnp.float32)
    norms = _norms(x)
    for bound in (1e-18, 1.0, 1e18):
        y = _norms(clip_rows(x, bound))
        assert y.max() <= bound
        assert np.all(y >= np.minimum(norms, bound) * (1 - 1e-4) - 1e-37)


def test_a_cast_scale_factor_would_be_caught():
    """V4, negative control: scaling by a factor cast to bfloat16 overshoots the bound."""
    x = _hostile(20_000, 33, jnp.bfloat16)
    x = x[np.isfinite(_norms(x)) & (_norms(x) > 1) & (_norms(x) < 1e10)]
    factor = (1.0 / _norms(x)).astype(jnp.bfloat16)
    assert _norms(x * jnp.asarray(factor)[:, None]).max() > 1.001


def test_derivative_is_that_of_the_projection():
    """V8 for rows: d clip(x) against a float64 finite difference; no NaN from a bad row."""
    x = np.random.default_rng(1).standard_normal((5, 8)).astype(np.float32) * 3
    direction = np.random.default_rng(2).standard_normal(x.shape).astype(np.float32)

    def project(x):
        return x * np.minimum(1.0, 2.0 / np.linalg.norm(x, axis=-1, keepdims=True))

    step = 1e-6
    x64, d64 = x.astype(np.float64), direction.astype(np.float64)
    slope = (project(x64 + step * d64) - project(x64 - step * d64)) / (2 * step)
    derive = jax.jit(lambda x, d: jax.jvp(lambda x: clip_rows(x, 2.0), (x,), (d,))[1])
    tangent = derive(x, direction)
    np.testing.assert_allclose(tangent, slope, atol=2e-5)
    bad = jnp.asarray([[np.nan, 1.0], [np.inf, 2.0], [0.0, 0.0]])
    gradient = jax.jit(jax.grad(lambda x: clip_rows(x, 1.0).sum()))(bad)
    assert np.isfinite(gradient).all()
    assert (gradient[:2] == 0).all()


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf"), 1e30, "1", True])
def test_bad_bounds_are_refused(bound):
    """V23."""
    with pytest.raises(ArgumentError, match="l2_clip_norm"):
        clip_rows(jnp.ones((2, 3)), bound)


def test_integers_are_no_storage_type():
    """V23."""
    with pytest.raises(ArgumentError, match="x"):
        clip_rows_stored(jnp.ones((2, 3), jnp.int32), 1.0)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_derivative_at_every_magnitude(direction):
    """V8: against the closed form in float64, from subnormal rows to the largest."""
    rng = np.random.default_rng(5)
    row, tangent = rng.standard_normal((2, 9))
    exponents = np.arange(-126, 119, 3)
    x = jnp.asarray(row * 2.0 ** exponents[:, None], jnp.float32)
    tangents = jnp.broadcast_to(jnp.asarray(tangent, jnp.float32), x.shape)
    exact = np.asarray(x, np.float64)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    units = exact / norms
    for bound in (1e-6, 1.0, 1e6):
        clip = functools.partial(clip_rows, l2_clip_norm=bound)
        if direction == "forward":
            _, found = jax.jvp(clip, (x,), (tangents,))
        else:
            (found,) = jax.vjp(clip, x)[1](tangents)
        shrunk = (tangent - units * (units @ tangent)[:, None]) * (bound / norms)
        expected = np.where(norms > bound, shrunk, tangent)
        away = np.linalg.norm(np.asarray(found, np.float64) - expected, axis=1)
        # The bound is kept with a margin; below 2^-126 float32 has nothing.
        allowed = 1e-5 * np.linalg.norm(expected, axis=1) + 2.0**-126 * 9
        assert np.all(away <= allowed), (exponents[away > allowed], bound)
