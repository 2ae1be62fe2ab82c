"""The first backend that can serve a call, else every reason why none can."""

import importlib

from dpfa_jax.core import ArgumentError, UnsupportedBackendError
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, Backend, static_platform

# Name -> (module that holds BACKEND, platform it is for); tried in this order, imported when tried.
BACKENDS: dict[str, tuple[str, str | None]] = {
    "mosaic_gpu": ("dpfa_jax.kernels.mosaic_gpu.backend", "gpu"),
    "triton": ("dpfa_jax.kernels.triton.backend", "gpu"),
    "blocked": ("dpfa_jax.kernels.blocked", None),
    "reference": ("dpfa_jax.kernels.reference", None),
}


def choose(
    spec: AttentionSpec, inputs: AttentionInputs, implementation: str | None = None
) -> Backend:
    """The backend for this call; `implementation` forces one by name.

    Errors: UnsupportedBackendError with the reason where the forced one cannot; an ExceptionGroup
    of one such error a backend where none can; ArgumentError for an unknown name.
    """
    platform = static_platform(inputs.query)
    if implementation is not None:
        if implementation not in BACKENDS:
            raise ArgumentError(
                "implementation",
                implementation,
                "no such backend",
                f"Pass None or one of {', '.join(BACKENDS)}.",
            )
        backend = _load(implementation)
        reason = backend.cannot(spec, inputs, platform)
        if reason is not None:
            raise UnsupportedBackendError(f"{implementation}: {reason}")
        return backend
    reasons: list[UnsupportedBackendError] = []
    for name, (_, needed) in BACKENDS.items():
        if needed is not None and needed != platform:
            reasons.append(UnsupportedBackendError(f"{name}: needs platform {needed}"))
            continue
        try:
            backend = _load(name)
        except UnsupportedBackendError as error:
            reasons.append(error)
            continue
        reason = backend.cannot(spec, inputs, platform)
        if reason is None:
            return backend
        reasons.append(UnsupportedBackendError(f"{name}: {reason}"))
    raise ExceptionGroup(f"no attention backend can serve this call on {platform}", reasons)


def _load(name: str) -> Backend:
    module, _ = BACKENDS[name]
    try:
        return importlib.import_module(module).BACKEND
    except ImportError as error:
        raise UnsupportedBackendError(f"{name}: cannot be imported here ({error})") from error
