"""What the default GPU is, for kernels written for some kinds of it."""

from collections.abc import Callable

import jax


def reason_without(serves: Callable[[float], bool], needed: str) -> str | None:
    """None where `serves` takes the compute capability of the default GPU, else why not."""
    try:
        device = jax.devices("gpu")[0]
    except RuntimeError as error:
        return f"no GPU is visible to JAX ({error})"
    capability = str(getattr(device, "compute_capability", "unknown"))
    try:
        is_served = serves(float(capability))
    except ValueError:  # not an NVIDIA GPU
        is_served = False
    if is_served:
        return None
    return f"needs compute capability {needed}, {device.device_kind} has {capability}"
