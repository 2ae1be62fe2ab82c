"""Whether a call that dispatches by itself may run one of these kernels, and on what."""

import functools

import jax

from dpfa_jax.kernels.base import static_platform
from dpfa_jax.kernels.compute_capability import reason_without


@functools.cache
def reason_without_hopper() -> str | None:
    """None where the default GPU is Hopper."""
    return reason_without(lambda capability: capability == 9.0, "9.0 (H100, H200)")


@functools.cache
def processors() -> int:
    """Multiprocessors of the default GPU; those of an H100 where none is visible."""
    try:
        return int(getattr(jax.devices("gpu")[0], "core_count", 132))
    except RuntimeError:
        return 132


def cannot(array: jax.Array) -> str | None:
    """None if a kernel may read `array` whole on one Hopper GPU, else why not."""
    reason = cannot_pieces(array)
    if reason is not None or jax.sharding.get_abstract_mesh().manual_axes:
        return reason
    is_traced = isinstance(array, jax.core.Tracer)
    pieces = jax.device_count() if is_traced else len(array.devices())
    if pieces > 1:
        return f"the array may be in pieces on {pieces} devices; inside shard_map it is not"
    return None


def cannot_pieces(array: jax.Array) -> str | None:
    """None if a kernel may read each piece of `array` on its own Hopper GPU, else why not."""
    platform = static_platform(array)
    if platform != "gpu":
        return f"needs a Hopper GPU, the call is on {platform}"
    reason = reason_without_hopper()
    if reason is not None:
        return reason
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes and set(mesh.manual_axes) != set(mesh.axis_names):
        return "some axes of the mesh are not manual, so the array may be in pieces"
    return None
