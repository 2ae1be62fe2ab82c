"""The Triton kernels against cuDNN and the blocked backend, in one run on one GPU.

    python benchmarks/triton_attention.py --output benchmarks/results/<device>/<date>-triton.json

Times as in `attention.py`: medians over queued calls on iid normal inputs, in milliseconds. With
`--tiles`, other tile sizes of each kernel beside those shipped.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax.attention import core
from dpfa_jax.kernels import blocked
from dpfa_jax.kernels.base import (
    AttentionInputs,
    AttentionSpec,
    ExampleReadout,
    MemoryReadout,
    NoiseInputs,
    Plain,
)
from dpfa_jax.kernels.triton import backend as triton
from dpfa_jax.kernels.triton.tiles import KernelTiles, Tiles, kernel_tiles

# B, T, query heads, key heads, head size, dtype
SHAPES = (
    (8, 2048, 16, 16, 128, "bfloat16"),
    (8, 2048, 32, 32, 64, "bfloat16"),
    (4, 4096, 32, 8, 128, "bfloat16"),
    (4, 1024, 8, 8, 64, "float32"),
)
INPUT_SETS = 3  # rotated, so that no call finds its inputs in the cache
# Other tiles, by head size: kernel, tiles.
VARIANTS = {
    128: (
        ("forward", Tiles(128, 64, 8, 3)),
        ("forward", Tiles(128, 64, 4, 2)),
        ("forward", Tiles(64, 64, 4, 2)),
        ("forward", Tiles(128, 128, 8, 2)),
        ("queries", Tiles(128, 64, 8, 2)),
        ("queries", Tiles(64, 64, 8, 2)),
        ("keys", Tiles(64, 64, 8, 2)),
        ("keys", Tiles(64, 128, 8, 2)),
        ("keys", Tiles(32, 128, 8, 2)),
    ),
    64: (
        ("forward", Tiles(128, 64, 8, 3)),
        ("forward", Tiles(128, 128, 8, 2)),
        ("forward", Tiles(64, 64, 4, 3)),
        ("queries", Tiles(64, 64, 4, 2)),
        ("queries", Tiles(128, 128, 8, 2)),
        ("keys", Tiles(64, 128, 8, 2)),
        ("keys", Tiles(32, 128, 4, 2)),
        ("keys", Tiles(128, 64, 4, 2)),
    ),
}


@dataclasses.dataclass
class Job:
    """One figure: what is called, with what, and how it is told apart in the results."""

    row: dict[str, Any]
    function: Callable[..., Any]
    sets: list[tuple[Any, ...]]
    compiled: Any = None
    peak_bytes: int = 0


def given(shape: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    batch, length, heads, kv_heads, size, dtype = shape
    rng = np.random.default_rng(0)
    sets = []
    for index in range(INPUT_SETS):
        keys = jax.random.split(jax.random.key(index), 3)
        arrays = tuple(
            jax.random.normal(key, (batch, length, n, size), jnp.dtype(dtype))
            for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
        )
        words = rng.integers(0, 2**32, (batch, 2), dtype=np.uint32)
        noise = NoiseInputs(
            jnp.asarray(words),
            jnp.arange(batch, dtype=jnp.uint32),
            jnp.zeros(batch, jnp.uint32),
        )
        sets.append((*arrays, noise))
    return sets


def ours(backend: Any, spec: AttentionSpec) -> Callable[..., jax.Array]:
    def run(query: jax.Array, key: jax.Array, value: jax.Array, noise: Any) -> jax.Array:
        given = None if isinstance(spec.readout, Plain) else noise
        return core.attend(backend, spec, AttentionInputs(query, key, value, noise=given))[0]

    return run


def peer(name: str, is_causal: bool) -> Callable[..., jax.Array]:
    def run(query: jax.Array, key: jax.Array, value: jax.Array, noise: Any) -> jax.Array:
        del noise
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=is_causal, implementation=name
        )

    return run


def with_backward(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    def run(query: jax.Array, key: jax.Array, value: jax.Array, noise: Any) -> Any:
        output, pull = jax.vjp(lambda *x: function(*x, noise), query, key, value)
        return output, pull(query)

    return run


def with_tiles(function: Callable[..., Any], chosen: KernelTiles) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with mock.patch.object(triton.tile_choice, "kernel_tiles", lambda *_: chosen):
            return function(*arguments)

    return run


def jobs(shape: tuple[Any, ...], is_causal: bool, with_variants: bool) -> list[Job]:
    batch, length, heads, kv_heads, size, dtype = shape
    sets = given(shape)
    plain = AttentionSpec(size**-0.5, is_causal)
    noise = ((1.0,) * heads, (1 / 16,) * heads)
    example = dataclasses.replace(plain, readout=ExampleReadout(1.0, *noise))
    memory = dataclasses.replace(plain, readout=MemoryReadout("sum", 1.0, 1.0, 1.0, 1.0, *noise))
    backend = triton.BACKEND
    forward = {
        "triton": ours(backend, plain),
        "triton_example": ours(backend, example),
        "triton_memory": ours(backend, memory),
        "blocked": ours(blocked.BACKEND, plain),
    }
    peer_name = "xla" if dtype == "float32" else "cudnn"
    forward[peer_name] = peer(peer_name, is_causal)
    found = []

    def add(name: str, direction: str, function: Callable[..., Any], tiles: Any = None) -> None:
        row = {"B": batch, "T": length, "S": length, "H": heads, "K": kv_heads, "D": size,
               "dtype": dtype, "mask": "causal" if is_causal else "full",
               "direction": direction, "implementation": name}  # fmt: skip
        if tiles is not None:
            row["tiles"] = tiles
        found.append(Job(row, function, sets))

    for name, function in forward.items():
        if name == "blocked" and (length > 2048 or (size == 64 and dtype != "float32")):
            continue
        if name == "triton_memory" and is_causal:
            continue
        add(name, "forward", function)
        if name in ("triton", "blocked", peer_name):
            add(name, "forward_backward", with_backward(function))
    if with_variants and length == 2048 and is_causal:
        base = kernel_tiles(size, 2)
        for kernel, tile in VARIANTS[size]:
            chosen = base._replace(**{kernel: tile})
            function = (
                forward["triton"] if kernel == "forward" else with_backward(forward["triton"])
            )
            direction = "forward" if kernel == "forward" else "forward_backward"
            add("triton", direction, with_tiles(function, chosen), f"{kernel} {tile}")
    return found


def measure(job: Job, seconds: float) -> tuple[float, float]:
    """Median milliseconds a call, and the range over the repetitions."""

    def once(count: int) -> float:
        start = time.perf_counter()
        for index in range(count):
            result = job.compiled(*job.sets[index % len(job.sets)])
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / count * 1e3

    once(2)
    count = max(4, math.ceil(seconds / 5 / (once(2) / 1e3)))
    times = [once(count) for _ in range(5)]
    return statistics.median(times), max(times) - min(times)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--output", help="JSON file to write")
    made.add_argument("--seconds", type=float, default=0.1, help="of timing, for each figure")
    made.add_argument("--tiles", action="store_true", help="other tile sizes too")
    return made


def main() -> None:
    arguments = parser().parse_args()
    started = time.perf_counter()
    todo = [
        job
        for shape in SHAPES
        for mask in (False, True)
        for job in jobs(shape, mask, arguments.tiles)
    ]
    # Tracing patches module state, so it is one at a time; compiling is not.
    lowered = []
    for job in todo:
        try:
            lowered.append((job, lower(job)))
        except Exception as error:
            job.row["error"] = f"{type(error).__name__}: {error}"[:300]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        futures = [(job, pool.submit(low.compile)) for job, low in lowered]
        for job, future in futures:
            try:
                job.compiled = future.result()
                memory = job.compiled.memory_analysis()
                job.peak_bytes = memory.temp_size_in_bytes + memory.output_size_in_bytes
            except Exception as error:
                job.row["error"] = f"{type(error).__name__}: {error}"[:300]
    print(f"compiled after {time.perf_counter() - started:.0f} s", flush=True)
    for job in todo:
        if job.compiled is not None:
            middle, spread = measure(job, arguments.seconds)
            job.row |= {"milliseconds": round(middle, 4), "spread": round(spread, 4),
                        "peak_bytes": job.peak_bytes}  # fmt: skip
        shown = [
            str(job.row.get(n, "")) for n in ("T", "H", "K", "D", "dtype", "mask", "direction")
        ]
        what = (job.row.get("tiles", ""), job.row.get("milliseconds", job.row.get("error")))
        print(*shown, job.row["implementation"], *what, flush=True)
        write(arguments.output, [job.row for job in todo if "milliseconds" in job.row])


def lower(job: Job) -> Any:
    """Lowered under its own tiles: the jit inside `attend` would hand one variant's to another."""
    with mock.patch.object(core, "_softmax", core._differentiable_softmax):
        return jax.jit(lambda *x: job.function(*x)).lower(*job.sets[0])


def write(path: str | None, rows: list[dict[str, Any]]) -> None:
    if path is None:
        return
    result = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/triton_attention.py " + " ".join(sys.argv[1:]),
        "versions": {"jax": jax.__version__},
        "rows": rows,
    }
    with open(path, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
