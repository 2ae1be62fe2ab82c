"""What takes the place of JAX, Pallas and the kernels' arithmetic while a body is recorded."""

import contextlib
from types import SimpleNamespace
from unittest import mock

import jax.numpy as jnp
import numpy as np
from helpers.kernel_threads.references import Dims, Numbers, Ref, integer

from dpfa_jax.kernels.mosaic_gpu import (
    axes,
    backward,
    backward_fused,
    backward_keys,
    backward_steps,
    backward_walk,
    backward_wide,
    backward_wide_queries,
    bias_gradient,
    forward,
    memory,
    noise_stage,
    pairs,
    producer,
    steps,
    walk,
)

MODULES = (
    backward, backward_fused, backward_keys, backward_wide_queries, backward_steps, backward_walk,
    backward_wide, bias_gradient, forward, memory, noise_stage, pairs, producer, steps, walk,
)  # fmt: skip


def _is_number(x):
    return not isinstance(x, Numbers)


def _shape_of(arguments):
    return next((x.shape for x in arguments if isinstance(x, Numbers)), None)


def _scalars(function):
    """`function` of scalars; of anything else, numbers."""

    def call(*arguments, **_):
        if all(map(_is_number, arguments)):
            return function(*arguments)
        return Numbers(_shape_of(arguments))

    return call


def _numbers(*arguments, **_):
    return Numbers(_shape_of(arguments))


def _barrier(ref):
    return (ref.name, *(int(x) for part in ref.index for x in part))


class _Namespace(SimpleNamespace):
    """Of `jnp`: whatever is not given makes numbers."""

    def __getattr__(self, name):
        return _numbers


def _fori(begin, end, body, carry):
    for index in range(int(begin), int(end)):
        carry = body(integer(index), carry)
    return carry


def _loop(begin, end):
    return lambda body: _fori(begin, end, lambda index, _: body(index), None)


def _when(condition):
    return lambda body: body() if condition else None


def _pallas(recording):
    def make(kind):
        return Ref(recording, "accumulator", "", kind)

    def run_state(body):
        def run(start):
            body(make(start))
            recording.op("multiplied", 0)
            return Numbers(start)

        return run

    return SimpleNamespace(
        when=_when, loop=_loop, ds=Dims, run_state=run_state,
        run_scoped=lambda body, *kinds: body(*map(make, kinds)),
        get_global=lambda _: Ref(recording, "barrier", "turns", ()),
    )  # fmt: skip


def _mosaic(recording):
    op = recording.op

    def accumulator(shape, dtype):
        return shape

    accumulator.init = lambda array: array.shape

    def wgmma(acc, left, right):
        refs = tuple((x.key, x.name) for x in (left, right) if isinstance(x, Ref))
        op("multiply", refs, len(refs) == 1)

    def accumulator_load(acc, wait_n):
        op("multiplied", wait_n)
        return Numbers(acc.shape)

    def load(ref, **_):
        if ref.space == "shared":
            return ref[...]
        for x, size in zip(ref.index[0], ref.shape, strict=False):
            part = x.range if isinstance(x, Dims) else range(int(x), int(x) + 1)
            assert part.start >= 0 and part.stop <= size, f"load outside of {ref.name}: {part}"
        return Numbers()

    return SimpleNamespace(
        ACC=accumulator, wgmma=wgmma, wgmma_accumulator_load=accumulator_load, load=load,
        wgmma_wait=lambda left: op("multiplied", left),
        barrier_wait=lambda ref: op("wait", _barrier(ref)),
        barrier_arrive=lambda ref: op("arrive", _barrier(ref)),
        semaphore_wait=lambda ref, value, **_: op("wait for turn", _barrier(ref), int(value)),
        semaphore_signal=lambda ref, **_: op("count turn", _barrier(ref)),
        copy_gmem_to_smem=lambda source, target, barrier: op(
            "load", target.key, source.name, source.index[0], _barrier(barrier)
        ),
        copy_smem_to_gmem=lambda source, target, reduction_op=None: op(
            "store", source.key, target.name, target.index[0], reduction_op
        ),
        wait_smem_to_gmem=lambda left, **_: op("stored", left),
        warp_map=recording.map_warps, layout_cast=lambda x, _: x,
        commit_smem=lambda: None, set_max_registers=lambda *_, **__: None,
        broadcasted_iota=lambda _, shape, *__, **___: Numbers(shape),
        SemaphoreType=SimpleNamespace(REGULAR=lambda shape: shape),
    )  # fmt: skip


_LAX = {
    "fori_loop": _fori,
    "div": _scalars(lambda x, y: integer(np.trunc(int(x) / int(y)))),
    "rem": _scalars(lambda x, y: integer(np.fmod(int(x), int(y)))),
    "optimization_barrier": lambda x: x,
    "broadcast_in_dim": lambda x, shape, _: Numbers(shape),
    "bitcast_convert_type": _numbers,
}
_JNP = _Namespace(
    float32=jnp.float32, bfloat16=jnp.bfloat16, float16=jnp.float16, dtype=jnp.dtype, inf=jnp.inf,
    int32=_scalars(integer), uint32=_numbers,
    zeros=lambda shape, *_: Numbers(shape),
    concatenate=_numbers,
    where=_scalars(lambda condition, x, y: x if condition else y),
    minimum=_scalars(lambda x, y: integer(min(int(x), int(y)))),
    maximum=_scalars(lambda x, y: integer(max(int(x), int(y)))),
    clip=_scalars(lambda x, least, most: integer(min(max(int(x), int(least)), int(most)))),
)  # fmt: skip


class _Softmax:
    """In the place of those of `softmax`."""

    def __init__(self, recording):
        self._recording = recording

    def start(self, rows):
        return ()

    def step(self, s, factor, acc, sums, dtype):
        self._recording.op("weights")
        return Numbers(s.shape), acc, sums

    def finish(self, sums):
        return Numbers(), Numbers()


def _functions(recording):
    """What takes the place of the kernels' own functions that make numbers."""

    def visible(spec, shape, row, column, key_length, query_length, *, transposed=False, **_):
        size = shape[::-1] if transposed else shape
        begins = (int(row), int(column))
        rows, keys = (range(x, x + n) for x, n in zip(begins, size, strict=True))
        query_length = None if query_length is None else int(query_length)
        recording.op("mask", rows, keys, int(key_length), query_length)
        return Numbers(shape)

    def weights(*given, **_):
        recording.op("weights")
        return given[0] if isinstance(given[0], Numbers) else (Numbers(), None)

    def products(_, right, *__, **___):
        recording.op("multiply", ((right.key, right.name),), True)
        return Numbers()

    def stream_of(_, batch, head):
        recording.op("stream", int(batch), int(head))
        return Numbers()

    def tile_normals(_, *begins_and_shape, **__):
        *begins, shape = begins_and_shape
        begins = (int(x) for x in begins)
        recording.op("normals", *(range(x, x + n) for x, n in zip(begins, shape, strict=True)))
        return Numbers(shape)

    def softmax(*_):
        return _Softmax(recording)

    return {
        "visible": visible, "weights_of": weights, "clamped": weights,
        "KeptMaximum": softmax, "RunningMaximum": softmax, "PublicMaximum": softmax,
        "begin_block": products, "begin_row_sums": products,
        "multiply": lambda acc, _, right, spare: products(_, right),
        "clip_rows": _numbers, "snap_noised": _numbers, "logit_gradient": _numbers,
        "stream_of": stream_of, "tile_normals": tile_normals, "_unpacked": _numbers,
        "settled": _numbers, "_add_block": _numbers, "_multiples": _numbers,
        "_order_copies": _numbers,
    }  # fmt: skip


@contextlib.contextmanager
def substituted(recording):
    launch = recording.launch

    def axis_index(name):
        return integer(recording.warpgroup if name == axes.WARPGROUP else recording.place[name])

    def axis_size(name):
        return launch.grid[launch.names.index(name)]

    lax = SimpleNamespace(axis_index=axis_index, axis_size=axis_size, **_LAX)
    fakes = {"jnp": _JNP, "lax": lax, "pl": _pallas(recording), "plgpu": _mosaic(recording)}
    fakes |= _functions(recording)
    with contextlib.ExitStack() as stack:
        for name, fake in fakes.items():
            there = [module for module in MODULES if hasattr(module, name)]
            assert there, name
            for module in there:
                stack.enter_context(mock.patch.object(module, name, fake))
        yield
