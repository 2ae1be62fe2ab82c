"""Self-test of the attention backends of this machine against float64, gradients and noise too."""

import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax.attention import core
from dpfa_jax.cli import attention_oracle
from dpfa_jax.cli.attention_cases import FOR_ALL, Case, cases
from dpfa_jax.core import UnsupportedBackendError
from dpfa_jax.kernels import dispatch
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, Backend, Plain


def serving() -> list[tuple[str, str, str]]:
    """For each case: the backend that serves it, and why the ones before it do not."""
    rows = []
    for case, (spec, inputs) in cases().items():
        chosen = dispatch.choose(spec, inputs).name
        passed_over = []
        for name in dispatch.BACKENDS:
            if name == chosen:
                break
            try:
                dispatch.choose(spec, inputs, name)
            except UnsupportedBackendError as error:
                passed_over.append(str(error))
        rows.append((case, chosen, "; ".join(passed_over) or "first choice"))
    return rows


def check() -> str:
    """Every backend here against numpy in float64: on the cases for all, and where it is chosen.

    Forward, and of plain calls backward, as `attention_oracle.answers` allows. Private answers of
    two backends may differ as much as either from the right one.

    Errors: AssertionError that names backend, case, result, error and bound.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # nearly all of the time, XLA compiles
        names = [name for served in pool.map(_check_case, cases().items()) for name in served]
    tested = (name for name in dispatch.BACKENDS if name in names)
    return ", ".join(f"{name} in {names.count(name)} cases" for name in tested)


def _check_case(named: tuple[str, Case]) -> list[str]:
    """The backends that served a case, each within its bounds."""
    case, (spec, inputs) = named
    rng = np.random.default_rng(2)
    cotangent = jnp.asarray(rng.standard_normal(inputs.query.shape), inputs.query.dtype)
    right = attention_oracle.answers(spec, inputs, cotangent)
    first: np.ndarray | None = None
    for_all = case.startswith(FOR_ALL)
    backends = _backends(spec, inputs) if for_all else [dispatch.choose(spec, inputs)]
    for backend in backends:
        found = results(backend, spec, inputs, cotangent)
        for name, got in found.items():
            want, allowed = right[name]
            _require(got, want, allowed, f"{backend.name}, {case}, {name}")
        if inputs.noise is not None:
            first = found["output"] if first is None else first
            what = f"{backend.name} against another backend, {case}"
            _require(found["output"], first, right["output"][1], what)
    return [backend.name for backend in backends]


def results(
    backend: Backend, spec: AttentionSpec, inputs: AttentionInputs, cotangent: jax.Array
) -> dict[str, np.ndarray]:
    """ "output", and of a plain call the gradients by name, as a caller would get them."""

    def output(inputs: AttentionInputs) -> jax.Array:
        return core.attend(backend, spec, inputs)[0]

    def all_of(inputs: AttentionInputs, cotangent: jax.Array) -> dict[str, jax.Array]:
        if not isinstance(spec.readout, Plain) or backend.name == "reference":
            return {"output": output(inputs)}
        parts = attention_oracle.differentiated(inputs)
        answer, pull_back = jax.vjp(lambda parts: output(inputs._replace(**parts)), parts)
        return {"output": answer, **pull_back(cotangent)[0]}

    # Without tuning, which takes XLA seconds a product on a GPU.
    found = jax.jit(all_of, compiler_options={"xla_gpu_autotune_level": "0"})(inputs, cotangent)
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def _require(got: np.ndarray, want: np.ndarray, allowed: np.ndarray, what: str) -> None:
    excess = np.abs(got - want) - allowed
    if not (excess <= 0.0).all():  # also for NaN
        worst = np.unravel_index(np.argmax(np.nan_to_num(excess, nan=np.inf)), excess.shape)
        bound = np.broadcast_to(allowed, excess.shape)[worst]
        raise AssertionError(
            f"{what}: {got[worst]:.6g} where {want[worst]:.6g} is right; {bound:.1e} is allowed"
        )


def _backends(spec: AttentionSpec, inputs: AttentionInputs) -> list[Backend]:
    found = []
    for name in dispatch.BACKENDS:
        try:
            found.append(dispatch.choose(spec, inputs, name))
        except UnsupportedBackendError:
            continue
    return found
