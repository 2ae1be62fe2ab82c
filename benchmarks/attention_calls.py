"""One case of the attention benchmark: all implementations of one shape and mask, on one GPU.

In a process of its own: traces and compiles all of them, waits for its turn, and times them in
turns, so that all meet the same clocks.
"""

import dataclasses
import functools
import importlib.util
import math
import statistics
from collections.abc import Callable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
from row_processes import Turn, stage
from timing import in_turns

from dpfa_jax import ExampleRelease, RecordRelease, dot_product_attention, dp_attention
from dpfa_jax.attention.core import attend
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout, NoiseInputs
from dpfa_jax.kernels.mosaic_gpu.backend import MosaicGpuBackend
from dpfa_jax.noise import new_noise_key

INPUT_SETS = 4  # rotated, so that no call finds its inputs in the cache
CLIP = 1.0
# Timed where asked for by name: the noise of an example release made in the kernel or in a pass of
# its own after it, whatever the tiles say, without and with a bound; the backward pass as well.
PLACES = {
    f"dpfa_example_{place}{bounded}": (place == "after", bounded != "")
    for place in ("inside", "after")
    for bounded in ("", "_bound")
}
BIASES = ("bias", "learned_bias")  # the second has a gradient
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


def forward_and_backward(
    function: Callable[..., jax.Array], differentiated: int = 3
) -> Callable[..., Any]:
    """The call, and gradients of so many of its first arguments: query, key, value, bias."""

    def run(query: jax.Array, *others: jax.Array) -> Any:
        own, rest = others[: differentiated - 1], others[differentiated - 1 :]
        output, pull = jax.vjp(lambda *first: function(*first, *rest), query, *own)
        return output, pull(query)  # a cotangent like any other: iid normal

    return run


def pairs_of(shape: tuple[int, ...], mask: str) -> tuple[jax.Array, ...]:
    """The array that goes with a call: nothing, a boolean mask or an additive bias."""
    batch, length, heads, *_ = shape
    if mask == "boolean":
        return (jax.random.uniform(jax.random.key(7), (batch, 1, length, length)) < 0.8,)
    if mask in BIASES:
        return (jax.random.normal(jax.random.key(7), (1, heads, length, length), jnp.bfloat16),)
    return ()


def implementations(
    shape: tuple[int, ...], mask: str
) -> dict[str, tuple[Callable[..., jax.Array], bool]]:
    """Name -> (function of query, key, value and, where the flag says so, a noise key)."""
    if mask == "boolean" or mask in BIASES:
        name = "mask" if mask == "boolean" else "bias"

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

    def placed(is_after: bool, is_bounded: bool) -> Callable[..., jax.Array]:
        backend = MosaicGpuBackend(noise_pass=is_after)
        readout = ExampleReadout(CLIP, release.noise_stddevs, release.grids)
        spec = AttentionSpec(
            size**-0.5, is_causal, largest_logit=BOUND if is_bounded else None, readout=readout
        )

        def run(query: jax.Array, key: jax.Array, value: jax.Array, noise_key: Any) -> Any:
            batch = query.shape[0]
            words = jnp.broadcast_to(jax.random.key_data(noise_key), (batch, 2))
            noise = NoiseInputs(
                words, jnp.arange(batch, dtype=jnp.uint32), jnp.zeros(batch, jnp.uint32)
            )
            return attend(backend, spec, AttentionInputs(query, key, value, noise=noise))[0]

        return run

    found: dict[str, tuple[Callable[..., jax.Array], bool]] = {
        **{name: (placed(*where), True) for name, where in PLACES.items()},
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


def torch_calls(
    shape: tuple[int, ...], is_causal: bool, is_backward: bool
) -> dict[str, tuple[Callable[[], Any], int]]:
    """Of each of torch's SDPA backends that serves: a call for each set, and a call's peak bytes.

    Raises ImportError without torch, RuntimeError where none serves.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, length, heads, kv_heads, size = shape
    sets = [
        [
            torch.randn(
                batch, n, length, size, device="cuda", dtype=torch.bfloat16,
                requires_grad=is_backward,
            )
            for n in (heads, kv_heads, kv_heads)
        ]
        for _ in range(INPUT_SETS)
    ]  # fmt: skip
    cotangent = torch.randn_like(sets[0][0])
    found, refused = {}, None
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):

        def once(arrays: Any, backend: Any = backend) -> None:
            with sdpa_kernel(backend):
                output = torch.nn.functional.scaled_dot_product_attention(
                    *arrays, is_causal=is_causal, enable_gqa=heads != kv_heads
                )
            if is_backward:
                torch.autograd.grad(output, arrays, cotangent)

        try:
            once(sets[0])
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            once(sets[0])
            torch.cuda.synchronize()
        except RuntimeError as error:
            refused = error
            continue
        peak = torch.cuda.max_memory_allocated() - before
        found[backend.name] = (lambda once=once: [once(arrays) for arrays in sets], peak)
    if not found:
        raise RuntimeError("no backend of torch's SDPA serves this call") from refused
    return found


def _await_torch(_: Any) -> None:
    import torch

    torch.cuda.synchronize()


def programs_of(
    shape: tuple[int, ...], mask: str, chosen: list[str] | None
) -> dict[tuple[str, str], tuple[Callable[..., Any], list[tuple[Any, ...]]]]:
    """(direction, implementation) -> (function, sets of its arguments)."""
    sets = [(*x, *pairs_of(shape, mask)) for x in inputs(shape, INPUT_SETS)]
    keys = list(jax.random.split(new_noise_key(), INPUT_SETS))
    with_keys = [(*x, k) for x, k in zip(sets, keys, strict=True)]
    found: dict[tuple[str, str], Any] = {}
    for name, (function, is_noisy) in implementations(shape, mask).items():
        if name not in chosen if chosen else name in PLACES:
            continue
        if name != "dpfa_any_order":  # whose forward pass is that of `dpfa`
            found["forward", name] = (function, with_keys if is_noisy else sets)
        # A private one's backward pass is the plain one after the clip's.
        if name in PLACES:
            found["forward_backward", name] = (forward_and_backward(function), with_keys)
        elif not is_noisy and name != "cudnn_posthoc":
            learned = 4 if mask == "learned_bias" else 3
            found["forward_backward", name] = (forward_and_backward(function, learned), sets)
    return dict(sorted(found.items(), key=lambda item: item[0][0]))  # by direction


def prepared(
    shape: tuple[int, ...], mask: str, chosen: list[str] | None
) -> tuple[Callable[[float], list[dict[str, Any]]], list[dict[str, str]]]:
    """What times all (seconds each) and gives their rows, and what is left out, with reasons."""
    programs = programs_of(shape, mask, chosen)
    stage("compiling")
    with futures.ThreadPoolExecutor() as pool:
        started = {which: pool.submit(compiled, *x) for which, x in programs.items()}
    ready: dict[tuple[str, str], tuple[Any, int]] = {}
    left_out: list[dict[str, str]] = []

    def leave_out(direction: str, name: str, error: BaseException) -> None:
        left_out.append({"direction": direction, "implementation": name, "why": f"{error!r:.300}"})

    for which, building in started.items():
        if (error := building.exception()) is None:
            ready[which] = building.result()
        else:  # what a peer does not serve
            leave_out(*which, error)
    wants_torch = mask in ("full", "causal") and (not chosen or "torch_sdpa" in chosen)
    calls: dict[tuple[str, str, str], tuple[Callable[[], Any], Callable[[Any], Any]]] = {}
    peaks = {}
    for which, (program, peak) in ready.items():
        sets = programs[which][1]
        calls[*which, ""] = (functools.partial(program, sets), jax.block_until_ready)
        peaks[*which, ""] = peak
    for direction in ("forward", "forward_backward") if wants_torch else ():
        try:
            found = torch_calls(shape, mask == "causal", direction == "forward_backward")
        except (ImportError, RuntimeError) as error:
            leave_out(direction, "torch_sdpa", error)
            continue
        for backend, (call, peak) in found.items():
            calls[direction, "torch_sdpa", backend] = (call, _await_torch)
            peaks[direction, "torch_sdpa", backend] = peak

    def timed(seconds: float) -> list[dict[str, Any]]:
        batch, length, heads, kv_heads, size = shape
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for (direction, name, backend), times in in_turns(calls, seconds).items():
            each = [milliseconds / INPUT_SETS for milliseconds in times]
            row = {"B": batch, "T": length, "S": length, "H": heads, "K": kv_heads, "D": size,
                   "mask": mask, "direction": direction, "implementation": name,
                   "milliseconds": round(statistics.median(each), 4),
                   "spread": round(max(each) - min(each), 4),
                   "peak_bytes": peaks[direction, name, backend]}  # fmt: skip
            known = rows.get((direction, name))
            if known is None or row["milliseconds"] < known["milliseconds"]:
                rows[direction, name] = row  # the best of torch's backends
        return sorted(rows.values(), key=lambda row: row["direction"])

    return timed, left_out


def case(
    shape: tuple[int, ...], mask: str, chosen: list[str] | None, seconds: float
) -> dict[str, Any]:
    """The child's whole life: its rows, and what is left out of them."""
    turn = Turn()
    stage("tracing")
    timed, left_out = prepared(shape, mask, chosen)
    turn.wait()
    return {"rows": timed(seconds), "left_out": left_out}


def ceiling(size: int, seconds: float) -> dict[str, Any]:
    """The child that times a product of square matrices: what the tensor cores give at best."""
    turn = Turn()
    keys = jax.random.split(jax.random.key(0), 2)
    sets = [tuple(jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)]
    program, _ = compiled(jnp.matmul, sets)
    turn.wait()
    calls = {"product": (functools.partial(program, sets), jax.block_until_ready)}
    milliseconds = statistics.median(in_turns(calls, seconds)["product"])
    return {
        "what": f"bf16 product, {size} cubed",
        "tflops": round(2e-9 * size**3 / milliseconds, 3),
    }
