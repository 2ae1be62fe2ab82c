"""Kernels of DP-SGD against cuBLAS and torch, in one run on one Hopper GPU.

    python benchmarks/gradient_kernels.py --output results.json

Medians over queued calls on iid normal inputs, in milliseconds; torch by events.
"""

import argparse
import concurrent.futures
import datetime
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax.clipping import weighted_sum
from dpfa_jax.kernels.gradient_products import (
    gradient_product_squares,
    gradient_products,
    weighted_product_sum,
)
from dpfa_jax.kernels.mosaic_gpu import parameter_noise as noise_kernel
from dpfa_jax.kernels.parameter_noise import released_mean
from dpfa_jax.kernels.released_rows import released_mean_of_rows
from dpfa_jax.noise import insecure_test_key

# B, T, I, O: the layers of GPT-2-small
SHAPES = (
    (32, 1024, 768, 2304),
    (32, 1024, 768, 768),
    (32, 1024, 768, 3072),
    (32, 1024, 3072, 768),
    (32, 1024, 768, 50304),
)
PARAMETERS = 124_475_904
NUMBERS, EXAMPLES = 16_777_216, (8, 16, 32)  # of one leaf whose rows are added and noised
ROUNDS = 5


def products() -> dict[str, Callable[..., Any]]:
    def half(lhs: jax.Array) -> jax.Array:
        return jnp.full(lhs.shape[:1], 0.5, jnp.float32)

    def each(name: str, function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        return {
            f"{name} {kind}": lambda lhs, rhs, kind=kind: function(lhs, rhs, implementation=kind)
            for kind in ("mosaic_gpu", "xla")
        }

    return {
        "cublas products": lambda lhs, rhs: jnp.einsum("bti,bto->bio", lhs, rhs),
        "cublas sum of products": lambda lhs, rhs: jnp.einsum(
            "bti,bto->io", lhs, rhs, preferred_element_type=jnp.float32
        ),
        **each("products and squares", gradient_products),
        "squares mosaic_gpu": lambda lhs, rhs: gradient_product_squares(
            lhs, rhs, implementation="mosaic_gpu"
        ),
        "weighted sum mosaic_gpu": lambda lhs, rhs: weighted_product_sum(
            lhs, rhs, half(lhs), implementation="mosaic_gpu"
        ),
    }


def noises() -> dict[str, Callable[..., Any]]:
    def mean(total: jax.Array, kind: str) -> jax.Array:
        numbers = {"stddev": 1.5, "grid": 2.0**-10, "divisor": 250.0}
        return released_mean(total, insecure_test_key(3), 0, implementation=kind, **numbers)

    return {
        "copy": lambda total: total * 2.0,
        "jax.random.normal and add": lambda total: (
            total + 1.5 * jax.random.normal(jax.random.key(0), total.shape)
        ),
        "released mean mosaic_gpu": lambda total: mean(total, "mosaic_gpu"),
        "released mean xla": lambda total: mean(total, "xla"),
    }


def rows_and_noise() -> dict[str, Callable[..., Any]]:
    """What a step does between products and optimizer: two passes, one, and the floor of one."""
    numbers = {"stddev": 1.5, "grid": 2.0**-10, "divisor": 250.0}

    def mean(rows: jax.Array, scales: jax.Array, kind: str) -> jax.Array:
        key = insecure_test_key(3)
        return released_mean_of_rows(rows, scales, key, 0, implementation=kind, **numbers)

    def two_passes(rows: jax.Array, scales: jax.Array) -> jax.Array:
        total = jax.lax.optimization_barrier(weighted_sum(rows, scales))
        key = insecure_test_key(3)
        return released_mean(total, key, 0, implementation="mosaic_gpu", **numbers)

    def kernel(rows: jax.Array, scales: jax.Array, **options: int) -> jax.Array:
        table = jnp.zeros((1, 2), jnp.uint32)
        return noise_kernel.released_mean(
            rows,
            scales,
            table,
            jnp.zeros(1, jnp.int32),
            jnp.asarray([*numbers.values()]),
            **options,
        )

    tried = {"1024 numbers": {"block": 1024}, "8 rows": {"together": 8}, "2 rows": {"together": 2}}
    return {
        # The pass reads 2 B bytes a number and writes 4: half of them, there and back.
        "copy of as many bytes": lambda rows, _: rows[: rows.shape[0] // 2 + 1] * 2.0,
        "weighted sum by xla": weighted_sum,
        "weighted sum by xla, then noise kernel": two_passes,
        "released mean of rows mosaic_gpu": lambda rows, scales: mean(rows, scales, "mosaic_gpu"),
        "released mean of rows xla": lambda rows, scales: mean(rows, scales, "xla"),
        **{
            f"released mean of rows mosaic_gpu, {name}": functools.partial(kernel, **options)
            for name, options in tried.items()
        },
    }


def timed(functions: dict[str, Callable[..., Any]], arguments: tuple, calls: int) -> list[dict]:
    """One row a function; rounds alternate between them."""
    jitted = {name: jax.jit(function) for name, function in functions.items()}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda f: jax.block_until_ready(f(*arguments)), jitted.values()))
    seen: dict[str, list[float]] = {name: [] for name in jitted}
    for _ in range(ROUNDS):
        for name, function in jitted.items():
            start = time.perf_counter()
            for _ in range(calls):
                result = function(*arguments)
            jax.block_until_ready(result)
            seen[name].append((time.perf_counter() - start) / calls * 1e3)
            del result
    return [row(name, times) for name, times in seen.items()]


def row(name: str, times: list[float]) -> dict[str, Any]:
    spread = max(times) - min(times)
    return {
        "implementation": name,
        "milliseconds": round(statistics.median(times), 4),
        "spread": round(spread, 4),
    }


def torch_rows() -> list[dict]:
    try:
        import torch
    except ImportError:
        return []
    total, noise = (torch.randn(PARAMETERS, device="cuda") for _ in range(2))
    calls = {
        "torch normal_": lambda: noise.normal_(),
        "torch normal_ and add": lambda: torch.add(total, noise.normal_(), alpha=1.5),
    }
    rows = []
    for name, call in calls.items():
        times = []
        for _ in range(ROUNDS + 1):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(10):
                call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 10)
        rows.append(row(name, times[1:]))
    return rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--output")
    made.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    made.add_argument("--noise-only", action="store_true", help="leave the products out")
    return made


def main() -> None:
    options = parser().parse_args()
    rows = []
    for shape in () if options.noise_only else SHAPES:
        batch, tokens, *sizes = shape
        keys = jax.random.split(jax.random.key(0))
        operands = tuple(
            jax.random.normal(key, (batch, tokens, size), options.dtype)
            for key, size in zip(keys, sizes, strict=True)
        )
        about = dict(zip(("B", "T", "I", "O"), shape, strict=True)) | {"dtype": options.dtype}
        calls = 4 if max(sizes) > 10_000 else 10
        rows += [about | one for one in timed(products(), operands, calls)]
    for count in EXAMPLES:
        drawn = jax.random.normal(jax.random.key(2), (count, NUMBERS), options.dtype)
        scales = jnp.linspace(0.2, 1.0, count, dtype=jnp.float32)
        about = {"B": count, "numbers": NUMBERS, "dtype": options.dtype}
        rows += [about | one for one in timed(rows_and_noise(), (drawn, scales), 10)]
        del drawn
    total = jax.random.normal(jax.random.key(1), (PARAMETERS,))
    rows += [{"numbers": PARAMETERS} | one for one in timed(noises(), (total,), 10) + torch_rows()]
    for one in rows:
        print(*one.values())
    if options.output:
        report = {
            "device": jax.devices()[0].device_kind,
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "versions": {"python": sys.version.split()[0], "jax": jax.__version__},
            "rows": rows,
        }
        with open(options.output, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
