"""Which of two implementations serves a call: the Hopper kernel or XLA."""

from collections.abc import Callable

from dpfa_jax.core import ArgumentError, UnsupportedBackendError

NAMES = ("mosaic_gpu", "xla")


def uses_kernel(implementation: str | None, cannot: Callable[[], str | None]) -> bool:
    """Whether the kernel runs: `implementation` forces one, None takes the first that can.

    `cannot`: None if the kernel serves the call, else why not. Errors: ArgumentError for an unknown
    implementation; UnsupportedBackendError with the reason where the kernel is forced and cannot.
    """
    if implementation not in (None, *NAMES):
        raise ArgumentError(
            "implementation",
            implementation,
            "no such implementation",
            f"Pass None or one of {', '.join(NAMES)}.",
        )
    if implementation == "xla":
        return False
    reason = cannot()
    if reason is not None and implementation is not None:
        raise UnsupportedBackendError(f"{implementation}: {reason}")
    return reason is None
