"""Products of single examples by XLA, and which calls go to the Hopper kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dpfa_jax.core import ArgumentError, UnsupportedBackendError
from dpfa_jax.kernels import gradient_products as products
from dpfa_jax.kernels.mosaic_gpu import device

GOOD = ((32, 1024, 768), (32, 1024, 2304))


def draw(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def struct(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture
def hopper(monkeypatch):
    """Dispatch believes that it is on one Hopper GPU."""
    monkeypatch.setattr(device, "cannot", lambda array: None)
    monkeypatch.setattr(device, "processors", lambda: 132)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_products_and_squares_by_xla(dtype):
    """V8: rounded once; the squares are those of what is stored, the norm within 2^-15."""
    lhs, rhs = draw(3, 40, 17, dtype=dtype), draw(3, 40, 300, seed=1, dtype=dtype)
    made, squares = products.gradient_products(lhs, rhs, unit=0.25)
    exact = np.einsum("bti,bto->bio", np.asarray(lhs, np.float64), np.asarray(rhs, np.float64))
    assert made.dtype == dtype
    # Half a unit of the stored dtype, and what 40 float32 additions may lose.
    terms = np.einsum("bti,bto->bio", *(np.abs(np.asarray(x, np.float64)) for x in (lhs, rhs)))
    slack = 0.5 * float(jnp.finfo(dtype).eps) * np.abs(exact) + 41 * 2.0**-24 * terms
    assert np.all(np.abs(np.asarray(made, np.float64) - exact) <= slack)
    norms = np.linalg.norm(np.asarray(made, np.float64).reshape(3, -1) / 0.25, axis=1)
    assert np.all(np.abs(np.sqrt(np.asarray(squares, np.float64)) / norms - 1) < 2.0**-15)
    # Negative control: the norm before rounding is another number.
    if dtype == jnp.bfloat16:
        unrounded = np.linalg.norm(exact.reshape(3, -1) / 0.25, axis=1)
        assert np.any(np.abs(unrounded / norms - 1) > 2.0**-15)
    again = products.gradient_product_squares(lhs, rhs, unit=0.25)
    assert np.allclose(np.asarray(again), np.asarray(squares), rtol=2.0**-15)


def test_weighted_sum_by_xla():
    """V4: scale zero leaves an example out, whatever it holds."""
    lhs, rhs = draw(3, 16, 24), draw(3, 16, 8, seed=1)
    scales = jnp.asarray([0.3, 0.0, 1.0])
    made, _ = products.gradient_products(lhs, rhs)
    exact = np.einsum("b,bio->io", np.asarray(scales, np.float64), np.asarray(made, np.float64))
    total = products.weighted_product_sum(lhs.at[1].set(jnp.nan), rhs, scales)
    assert np.abs(np.asarray(total) - exact).max() <= 2.0**-22 * np.abs(exact).max()


def test_non_finite_examples_show_in_their_square_only():
    """V4: the caller can leave out what is NaN or infinite."""
    lhs, rhs = draw(4, 16, 24), draw(4, 16, 8, seed=1)
    lhs = lhs.at[1, 3, 2].set(jnp.nan).at[2, 0, 0].set(jnp.inf)
    _, squares = products.gradient_products(lhs, rhs)
    assert np.array_equal(np.isfinite(np.asarray(squares)), [True, False, False, True])


def test_partial_sums_are_added_to_within_the_margin():
    """Two hundred thousand equal parts: a running float32 sum would lose more."""
    parts = jnp.full((1, 201_216), 0.1, jnp.float32)
    total = float(products.add_in_runs(parts)[0])
    exact = 201_216 * float(np.float32(0.1))
    assert abs(total / exact - 1) < 3 * 128 * 2.0**-24
    running = np.cumsum(np.asarray(parts[0]), dtype=np.float32)[-1]
    assert abs(running / exact - 1) > 2.0**-15


@pytest.mark.parametrize(
    ("lhs", "rhs", "dtype", "words"),
    [
        (*GOOD, jnp.bfloat16, None),
        (*GOOD, jnp.float16, None),
        ((32, 1024, 768), (32, 1024, 50304), jnp.bfloat16, None),
        ((32, 1000, 3072), (32, 1000, 768), jnp.bfloat16, None),
        (*GOOD, jnp.float32, "float32"),
        ((32, 1020, 768), (32, 1020, 768), jnp.bfloat16, "T=1020"),
        ((32, 1024, 768), (32, 1024, 770), jnp.bfloat16, "O=770"),
        ((32, 1024, 64), (32, 1024, 768), jnp.bfloat16, "empty"),
        ((0, 1024, 768), (0, 1024, 768), jnp.bfloat16, "an axis is empty"),
        ((1, 1024, 768), (1, 1024, 768), jnp.bfloat16, "do not fill"),
    ],
)
def test_cannot_says_why(lhs, rhs, dtype, words, hopper):
    """V23: what is not served is named, and falls to XLA unless a kernel is forced."""
    reason = products.cannot(struct(lhs, dtype), struct(rhs, dtype))
    assert reason is None if words is None else words in reason


def test_cannot_on_other_devices(monkeypatch):
    here = jnp.zeros((2, 8, 64), jnp.bfloat16)
    if jax.default_backend() == "cpu":
        assert "cpu" in products.cannot(here, here)
    monkeypatch.setattr(device, "static_platform", lambda array: "gpu")
    if jax.default_backend() == "cpu":
        assert "GPU" in device.cannot(here)
    monkeypatch.setattr(device, "reason_without_hopper", lambda: None)
    assert device.cannot(here) is None
    reasons = []
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    jax.eval_shape(lambda x: reasons.append(device.cannot(x)), here)
    assert "4 devices" in reasons[0]
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    for axes, words in (({"data", "model"}, None), ({"data"}, "not manual")):
        spec = PartitionSpec("data")
        shard = functools.partial(jax.shard_map, mesh=mesh, axis_names=axes, check_vma=False)
        body = shard(lambda x: reasons.append(device.cannot(x)) or x, in_specs=spec, out_specs=spec)
        jax.eval_shape(body, here)
        assert reasons[-1] is None if words is None else words in reasons[-1]


def test_wrong_calls_are_refused():
    """V23."""
    lhs = draw(2, 8, 16)
    run = products.gradient_products
    with pytest.raises(ArgumentError, match=r"rhs = \(2, 9, 4\)"):
        run(lhs, draw(2, 9, 4))
    with pytest.raises(ArgumentError, match="lhs is bfloat16"):
        run(lhs, draw(2, 8, 4, dtype=jnp.float32))
    with pytest.raises(ArgumentError, match=r"unit = 0\.0"):
        run(lhs, lhs, unit=0.0)
    with pytest.raises(ArgumentError, match="implementation = 'reference'"):
        run(lhs, lhs, implementation="reference")
    with pytest.raises(ArgumentError, match=r"scales = \(3,\)"):
        products.weighted_product_sum(lhs, lhs, jnp.ones(3))
    if jax.default_backend() == "cpu":
        with pytest.raises(UnsupportedBackendError, match="mosaic_gpu: needs a Hopper GPU"):
            run(lhs, lhs, implementation="mosaic_gpu")
