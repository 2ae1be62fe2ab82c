"""The calls whose kernels a profiler counts, each made once, warm, in one process.

Several processes build at the same time; one after the other has the device and is counted.

The profiler counts only between `cuProfilerStart` and `cuProfilerStop`. A kernel of no use, whose
name says which case follows, runs before each case: so a report of many cases can be told apart.
"""

import ctypes
import fcntl
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any

import attention_calls
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from counter_cases import MARK, Case

from dpfa_jax.noise import new_noise_key

WARM_CALLS = 3


def prepared(case: Case) -> tuple[Any, Callable[[], tuple[Any, ...]]]:
    """A compiled program of one call, and what makes its arguments."""
    function, is_noisy = attention_calls.implementations(case.shape, case.mask)[case.implementation]
    if case.is_backward:
        function = attention_calls.forward_and_backward(function)

    def arguments() -> tuple[Any, ...]:
        drawn = attention_calls.inputs(case.shape, 1)[0]
        return (*drawn, new_noise_key()) if is_noisy else drawn

    return jax.jit(function).lower(*arguments()).compile(), arguments


def marking(index: int) -> Callable[[], jax.Array]:
    """The kernel that tells a case in a report by its name."""

    def body(out_ref: Any) -> None:
        layout = plgpu.Layout.WG_STRIDED((128,), vec_size=1)
        out_ref[...] = plgpu.layout_cast(jnp.full((128,), 1.0, jnp.float32), layout)

    return plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((128,), jnp.float32), kernel_name=MARK.format(index)
    )


class Profiler:
    """Starts and stops the counting, by the driver."""

    def __init__(self) -> None:
        self._driver = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", 0)
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def __enter__(self) -> None:
        self._call("cuProfilerStart")

    def __exit__(self, *_: object) -> None:
        self._call("cuProfilerStop")

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code != 0:
            raise RuntimeError(f"{name} returned {code}")


def count(cases: list[Case], lock: str) -> list[dict[str, Any]]:
    """Runs all, counted, while it holds the lock file; returns those that failed, with reasons."""
    with futures.ThreadPoolExecutor() as pool:
        building = [pool.submit(prepared, case) for case in cases]
        marks = [
            pool.submit(lambda i=i: jax.jit(marking(i)).lower().compile())
            for i in range(len(cases))
        ]
    profiler = Profiler()
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return _counted(profiler, zip(cases, building, marks, strict=True))


def _counted(profiler: Profiler, prepared: Iterable[tuple[Case, Any, Any]]) -> list[dict[str, Any]]:
    failed = []
    for case, built, mark in prepared:
        try:
            (program, arguments), begin = built.result(), mark.result()
            own = arguments()
            for _ in range(WARM_CALLS):
                jax.block_until_ready((begin(), program(*own)))
            with profiler:
                jax.block_until_ready(begin())
                jax.block_until_ready(program(*own))
            print("counted", case, flush=True)
        except Exception as error:  # the others are counted all the same
            failed.append(case.fields() | {"why": f"{error!r:.300}"})
    return failed
