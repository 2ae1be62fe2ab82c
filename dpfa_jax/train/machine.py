"""What a run ran on: versions, device, peak memory."""

import importlib.metadata
import platform
import sys

import jax

_PACKAGES = ("dp-flash-attention", "jax", "jaxlib", "flax", "optax", "dp-accounting", "jax-privacy")


def versions() -> dict[str, str]:
    """Version of Python and of each package that shapes the result."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def device() -> str:
    """The default device in words: kind, how many, operating system."""
    devices = jax.devices()
    return f"{devices[0].device_kind} x {len(devices)}, {platform.system()} {platform.machine()}"


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far, plus the accelerator's where it tells."""
    on_device = 0
    for each in jax.local_devices():
        statistics = each.memory_stats() if each.platform != "cpu" else None
        on_device += (statistics or {}).get("peak_bytes_in_use", 0)
    return _peak_resident_bytes() + on_device


def _peak_resident_bytes() -> int:
    if sys.platform == "win32":
        return _peak_working_set_bytes()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def _peak_working_set_bytes() -> int:
    import ctypes
    from ctypes import wintypes

    class Counters(ctypes.Structure):
        # PROCESS_MEMORY_COUNTERS of the Windows API.
        _fields_ = [
            ("size", wintypes.DWORD),
            ("page_faults", wintypes.DWORD),
            ("peak_working_set", ctypes.c_size_t),
            ("rest", ctypes.c_size_t * 7),
        ]

    counters = Counters(size=ctypes.sizeof(Counters))
    windows = ctypes.windll  # type: ignore[attr-defined]  # Windows only
    process = wintypes.HANDLE(windows.kernel32.GetCurrentProcess())
    windows.psapi.GetProcessMemoryInfo(process, ctypes.byref(counters), counters.size)
    return int(counters.peak_working_set)
