"""Attention, private and not, against its peers, in one run on one GPU.

    python benchmarks/attention.py --output benchmarks/results/h100/<date>-attention.json

Every time is a median over queued calls on iid normal bf16 inputs, in milliseconds; compare times
of one run only. Peers: cuDNN through jax.nn, tokamax's Mosaic kernel and the best of torch's SDPA
backends where they are installed, and cuDNN followed by a clip and `jax.random.normal`.

`dpfa_bound` and `dpfa_example_bound` state a bound of the logits, which spares the running maximum;
`dpfa_example_clipped` clips query and key rows instead, in a pass of its own that is part of its
time (a model's compiler makes one pass of it and of what makes queries and keys).
`dpfa_memory` is the sum form over a private memory with 16 bits a value. `dpfa_any_order` allows
gradients whose last bits differ between runs, as those of the peers may; `dpfa` does not. Masks
"array" (B, 1, T, S) and "bias" (1, N, T, S) are arguments, for those that take them.
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax import ExampleRelease, RecordRelease, dot_product_attention, dp_attention
from dpfa_jax.noise import new_noise_key

TOKENS, WIDTH = 16384, 2048  # of a call: B T, and H D
LENGTHS = (2048, 1024, 4096, 512, 16384, 32768, 8192)
HEAD_SIZES = (128, 64, 256)
# B, T, query heads, key heads, head size; of each head size one call with grouped heads.
SHAPES = tuple(
    shape
    for size in HEAD_SIZES
    for heads in (WIDTH // size,)
    for shape in (
        *((max(1, TOKENS // length), length, heads, heads, size) for length in LENGTHS),
        (4, 4096, 2 * heads, heads // 2, size),
    )
)
INPUT_SETS = 4  # rotated, so that no call finds its inputs in the cache
CLIP = 1.0
BOUND = 12.0  # of logits, public; those of iid normal inputs have a standard deviation of 1


def inputs(shape: tuple[int, ...], sets: int) -> list[tuple[jax.Array, ...]]:
    batch, length, heads, kv_heads, size = shape
    drawn = []
    for index in range(sets):
        keys = jax.random.split(jax.random.key(index), 3)
        drawn.append(
            tuple(
                jax.random.normal(key, (batch, length, n, size), jnp.bfloat16)
                for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
            )
        )
    return drawn


def forward_and_backward(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    def run(query: jax.Array, key: jax.Array, value: jax.Array, *more: jax.Array) -> Any:
        output, pull = jax.vjp(lambda q, k, v: function(q, k, v, *more), query, key, value)
        return output, pull(query)  # a cotangent like any other: iid normal

    return run


def pairs_of(shape: tuple[int, ...], mask: str) -> tuple[jax.Array, ...]:
    """The array that goes with a call: nothing, a boolean mask or an additive bias."""
    batch, length, heads, *_ = shape
    if mask == "array":
        return (jax.random.uniform(jax.random.key(7), (batch, 1, length, length)) < 0.8,)
    if mask == "bias":
        return (jax.random.normal(jax.random.key(7), (1, heads, length, length), jnp.bfloat16),)
    return ()


def implementations(
    shape: tuple[int, ...], mask: str
) -> dict[str, tuple[Callable[..., jax.Array], bool]]:
    """Name -> (function of query, key, value and, where the flag says so, a noise key)."""
    if mask in ("array", "bias"):
        name = "mask" if mask == "array" else "bias"

        def with_pairs(attention: Callable[..., jax.Array]) -> Any:
            return lambda q, k, v, pairs: attention(q, k, v, **{name: pairs}), False

        cudnn_of = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
        return {"cudnn": with_pairs(cudnn_of), "dpfa": with_pairs(dot_product_attention)}
    is_causal = mask == "causal"
    _, length, heads, _, size = shape
    release = ExampleRelease(CLIP, 1.0, query_length=length, num_heads=heads, head_dim=size)
    stddev = release.noise_stddevs[0]
    # No logit exceeds sqrt(size), which is below BOUND. The clip is a pass of its own over q and k.
    clipped = dataclasses.replace(release, query_key_clip_norm=math.sqrt(size))
    memory = RecordRelease(
        logit_bound=10.0,
        value_clip_norm=CLIP,
        noise_multiplier=1.0,
        num_queries=length,
        num_heads=heads,
        head_dim=size,
    )

    def cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=is_causal, implementation="cudnn"
        )

    def posthoc(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        answer = cudnn(query, key, value).astype(jnp.float32)
        norm = jnp.linalg.norm(answer, axis=-1, keepdims=True)
        answer = answer * jnp.minimum(1.0, CLIP / jnp.maximum(norm, 1e-30))
        noise = jax.random.normal(jax.random.key(0), answer.shape)
        return (answer + stddev * noise).astype(query.dtype)

    def dpfa(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return dot_product_attention(query, key, value, is_causal=is_causal)

    def any_order(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return dot_product_attention(query, key, value, is_causal=is_causal, deterministic=False)

    def dpfa_bound(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return dot_product_attention(query, key, value, is_causal=is_causal, logits_bound=BOUND)

    def private(release: Any, bound: float | None = None) -> Callable[..., jax.Array]:
        def run(query: jax.Array, key: jax.Array, value: jax.Array, noise_key: Any) -> Any:
            return dp_attention(
                query, key, value, release=release, noise_key=noise_key, is_causal=is_causal,
                logits_bound=bound,
            )  # fmt: skip

        return run

    found: dict[str, tuple[Callable[..., jax.Array], bool]] = {
        "cudnn": (cudnn, False),
        "dpfa": (dpfa, False),
        "dpfa_any_order": (any_order, False),
        "dpfa_bound": (dpfa_bound, False),
        "dpfa_example": (private(release), True),
        "dpfa_example_bound": (private(release, BOUND), True),
        "dpfa_example_clipped": (private(clipped), True),
        "cudnn_posthoc": (posthoc, False),
    }
    if not is_causal:  # a memory has no order
        found["dpfa_memory"] = (private(memory), True)
    if importlib.util.find_spec("tokamax") is not None:
        import tokamax

        found["tokamax"] = (
            functools.partial(
                tokamax.dot_product_attention, is_causal=is_causal, implementation="mosaic_gpu"
            ),
            False,
        )
    return found


def compiled(function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> tuple[Any, int]:
    """A program that calls once for each set, and the bytes of one call beside its inputs."""
    once = jax.jit(function)

    def together(sets: list[tuple[Any, ...]]) -> list[Any]:
        return [once(*x) for x in sets]

    program = jax.jit(together).lower(sets).compile()
    found = program.memory_analysis()
    if found is None:
        return program, 0
    return program, found.temp_size_in_bytes + found.output_size_in_bytes // len(sets)


def measure(
    together: Callable[..., Any], sets: list[tuple[Any, ...]], seconds: float
) -> tuple[float, float]:
    """Median milliseconds a call and the range over the repetitions."""
    jax.block_until_ready(together(sets))
    start = time.perf_counter()
    jax.block_until_ready(together(sets))
    calls = max(2, math.ceil(seconds / 5 / (time.perf_counter() - start)))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            result = together(sets)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / calls / len(sets) * 1e3)
    return statistics.median(times), max(times) - min(times)


def measure_torch(
    shape: tuple[int, ...], is_causal: bool, is_backward: bool, seconds: float
) -> tuple[float, float, int] | None:
    """The same for the fastest of torch's SDPA backends; None without torch."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return None
    batch, length, heads, kv_heads, size = shape
    best = None
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        arrays = [
            torch.randn(
                batch, n, length, size, device="cuda", dtype=torch.bfloat16,
                requires_grad=is_backward,
            )
            for n in (heads, kv_heads, kv_heads)
        ]  # fmt: skip
        cotangent = torch.randn_like(arrays[0])

        def call(arrays: Any = arrays, cotangent: Any = cotangent) -> None:
            output = torch.nn.functional.scaled_dot_product_attention(
                *arrays, is_causal=is_causal, enable_gqa=heads != kv_heads
            )
            if is_backward:
                torch.autograd.grad(output, arrays, cotangent)

        try:
            with sdpa_kernel(backend):
                call()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before, start = torch.cuda.memory_allocated(), time.perf_counter()
                for _ in range(5):
                    call()
                torch.cuda.synchronize()
                calls = max(5, math.ceil(seconds / (time.perf_counter() - start)))
                peak = torch.cuda.max_memory_allocated() - before
                times = []
                for _ in range(5):
                    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    begin.record()
                    for _ in range(calls):
                        call()
                    end.record()
                    torch.cuda.synchronize()
                    times.append(begin.elapsed_time(end) / calls)
        except RuntimeError as error:
            print(f"torch {backend.name}: {error}", file=sys.stderr)
            continue
        found = (statistics.median(times), max(times) - min(times), peak)
        best = found if best is None or found[0] < best[0] else best
    return best


def run(arguments: argparse.Namespace) -> None:
    rows: list[dict[str, Any]] = []
    result = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/attention.py " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "rows": rows,
    }
    began = time.perf_counter()
    shapes = [shape for shape in SHAPES if shape[-1] in arguments.head_sizes]
    for shape in shapes[: arguments.shapes]:
        batch, length, heads, kv_heads, size = shape
        for mask in arguments.masks:
            if time.perf_counter() - began > arguments.limit_seconds:
                print("time limit: the rest is left out", file=sys.stderr)
                break
            more = pairs_of(shape, mask)
            sets = [(*x, *more) for x in inputs(shape, INPUT_SETS)]
            keys = list(jax.random.split(new_noise_key(), INPUT_SETS))
            programs = {}
            for direction in ("forward", "forward_backward"):
                for name, (function, is_noisy) in implementations(shape, mask).items():
                    if name == "dpfa_any_order" and direction == "forward":
                        continue  # the forward pass of `dpfa`
                    if arguments.implementations and name not in arguments.implementations:
                        continue
                    given = [(*x, k) for x, k in zip(sets, keys, strict=True)] if is_noisy else sets
                    if direction == "forward_backward":
                        if is_noisy or name == "cudnn_posthoc":
                            continue  # its backward pass is the plain one after the clip's
                        function = forward_and_backward(function)
                    programs[direction, name] = (function, given)
            with futures.ThreadPoolExecutor() as pool:
                started = {which: pool.submit(compiled, *x) for which, x in programs.items()}
            ready = {}
            for pair, building in started.items():
                if (error := building.exception()) is None:
                    ready[pair] = building.result()
                else:  # what a peer does not serve
                    print(f"{shape} {mask} {pair}: left out: {error!r:.300}", file=sys.stderr)
            for direction in ("forward", "forward_backward"):
                found: dict[str, tuple[float, float, int] | None] = {}
                for (which, name), (program, peak) in ready.items():
                    if which == direction:
                        given = programs[which, name][1]
                        found[name] = (*measure(program, given, arguments.seconds), peak)
                wanted = arguments.implementations or ["torch_sdpa"]
                if not more and "torch_sdpa" in wanted:
                    found["torch_sdpa"] = measure_torch(
                        shape, mask == "causal", direction == "forward_backward", arguments.seconds
                    )
                for name, figures in found.items():
                    if figures is None:
                        continue
                    row = {"B": batch, "T": length, "S": length, "H": heads, "K": kv_heads,
                           "D": size, "mask": mask, "direction": direction,
                           "implementation": name, "milliseconds": round(figures[0], 4),
                           "spread": round(figures[1], 4), "peak_bytes": figures[2]}  # fmt: skip
                    rows.append(row)
                times = {n: round(r[0], 3) for n, r in found.items() if r is not None}
                print(f"{shape} {mask:6} {direction:16} {times}", flush=True)
            write(result, arguments.output)


def write(result: dict[str, Any], path: str | None) -> None:
    """What is there so far: a run that is cut off keeps it."""
    if path:
        with open(path, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many of them")
    parser.add_argument("--head-sizes", nargs="+", type=int, default=HEAD_SIZES)
    parser.add_argument("--implementations", nargs="+", help="some of them; all where left out")
    parser.add_argument(
        "--masks",
        nargs="+",
        default=["full", "causal"],
        choices=("full", "causal", "array", "bias"),
    )
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing, for each figure")
    parser.add_argument(
        "--limit-seconds", type=float, default=math.inf, help="start no shape after"
    )
    arguments = parser.parse_args()
    run(arguments)


if __name__ == "__main__":
    main()
