"""The first backend that can, else every reason."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from dpfa_jax import dot_product_attention
from dpfa_jax.core import ArgumentError, UnsupportedBackendError
from dpfa_jax.kernels import dispatch
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, static_platform
from dpfa_jax.kernels.mosaic_gpu import device

INPUTS = AttentionInputs(*(jnp.ones((1, 2, 1, 4)),) * 3)
SPEC = AttentionSpec(1.0)


@dataclasses.dataclass(frozen=True)
class Fake:
    name: str
    reason: str | None

    def cannot(self, spec, inputs, platform):
        return None if self.reason is None else f"{self.reason} on {platform}"


def offer(monkeypatch, **reasons):
    monkeypatch.setattr(dispatch, "BACKENDS", {name: (name, None) for name in reasons})
    monkeypatch.setattr(dispatch, "_load", lambda name: Fake(name, reasons[name]))


def test_the_first_that_can_serves(monkeypatch):
    offer(monkeypatch, one="no tiles", two=None, three=None)
    assert dispatch.choose(SPEC, INPUTS).name == "two"
    assert dispatch.choose(SPEC, INPUTS, "three").name == "three"


def test_all_reasons_are_told_at_once(monkeypatch):
    offer(monkeypatch, one="no tiles", two="too narrow")
    with pytest.raises(ExceptionGroup, match="no attention backend") as caught:
        dispatch.choose(SPEC, INPUTS)
    assert [str(e) for e in caught.value.exceptions] == [
        "one: no tiles on cpu",
        "two: too narrow on cpu",
    ]
    assert all(isinstance(e, UnsupportedBackendError) for e in caught.value.exceptions)


def test_a_forced_backend_gives_its_own_reason(monkeypatch):
    offer(monkeypatch, one="no tiles", two=None)
    with pytest.raises(UnsupportedBackendError, match="one: no tiles on cpu"):
        dispatch.choose(SPEC, INPUTS, "one")


def test_an_unknown_name_is_refused():
    """V23."""
    with pytest.raises(ArgumentError, match=r"implementation = 'flash'.*mosaic_gpu.*, blocked"):
        dispatch.choose(SPEC, INPUTS, "flash")


def test_a_backend_that_cannot_be_imported_is_passed_over(monkeypatch):
    backends = {"absent": ("dpfa_jax.kernels.absent", None), **dispatch.BACKENDS}
    monkeypatch.setattr(dispatch, "BACKENDS", backends)
    assert dispatch.choose(SPEC, INPUTS).name == "blocked"
    with pytest.raises(UnsupportedBackendError, match="absent: cannot be imported"):
        dispatch.choose(SPEC, INPUTS, "absent")


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_float32_is_not_rounded_to_fewer_bits_on_a_gpu(implementation):
    """V8: the default precision of a float32 product on a GPU keeps 10 bits of its operands."""
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.float32)

    def loss(q, k, v):
        return jnp.sum(dot_product_attention(q, k, v, implementation=implementation) ** 2)

    text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("HIGHEST" in line for line in products)


@pytest.fixture
def gpu_machine(monkeypatch):
    """What dispatch asks of JAX on a machine with a Hopper GPU; the first CPU device."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(device, "reason_without_hopper", lambda: None)
    return jax.devices("cpu")[0]


@pytest.mark.parametrize("is_named", [False, True])
def test_the_default_device_decides_under_a_trace(gpu_machine, is_named):
    """Kernels for a GPU in a program for the CPU end in an error of Pallas."""
    x = jnp.ones((1, 64, 2, 64), jnp.bfloat16)

    def loss(x):
        return dot_product_attention(x, x, x).astype(jnp.float32).sum()

    with jax.default_device("cpu" if is_named else gpu_machine):
        assert jnp.isfinite(jax.jit(loss)(x))
        assert jax.grad(loss)(x).shape == x.shape
        assert jax.vmap(loss)(x[None]).shape == (1,)


def test_where_an_array_runs(gpu_machine):
    """A committed one where it lies, others on the default device, where JAX takes them."""
    committed = jax.device_put(jnp.ones(1), gpu_machine)
    assert static_platform(committed) == "cpu"
    assert static_platform(jnp.ones(1)) == "gpu"
    with jax.default_device(gpu_machine):
        assert static_platform(jnp.ones(1)) == "cpu"
    seen = []
    jax.jit(lambda x: seen.append(static_platform(x)) or x)(committed)
    assert seen == ["gpu"]  # a trace does not know: `implementation=` is due
