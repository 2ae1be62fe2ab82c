"""Steps of each method in JAX: traced, compiled, timed."""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from largest_batch import largest
from row_processes import stage
from timing import measured
from train_models import MODELS

from dpfa_jax import TrainingRelease, dpsgd
from dpfa_jax.noise import new_noise_key

CLIP, NOISE_MULTIPLIER, PER_EXAMPLE_BYTES = 1.0, 0.7, 2**35
CACHE_HIT = "/jax/compilation_cache/cache_hits"  # compiled by a run before


def prepared(
    name: str,
    length: int,
    batch: int,
    method: str,
    micro_batch: int | None = None,
    tuning: Callable[[Callable[[], int]], Any] | None = None,
) -> Callable[[float], dict[str, Any]]:
    """All compiled, nothing on the device yet: seconds -> the row.

    `tuning(allocations so far)` is entered while the step is compiled.
    """
    model, began = MODELS[name], time.perf_counter()
    step = lowered(name, length, batch, method, micro_batch=micro_batch)
    at_lowered = time.perf_counter()
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    with tuning(_allocations) if tuning else contextlib.nullcontext():
        at_turn = time.perf_counter()
        program = step.compile()
    is_cached = CACHE_HIT in hits
    compiled = time.perf_counter()
    key = jax.random.key(1)
    examples_of = jax.jit(lambda key: model.batch(key, batch, length)).lower(key).compile()
    init = jax.jit(model.init).lower(key).compile()
    shapes, _ = jax.eval_shape(model.init, key)
    begin, _ = _begin_and_update(model, shapes, batch, method, micro_batch or batch)
    begin_of = jax.jit(begin, donate_argnums=0).lower(shapes).compile()

    def timed(seconds: float) -> dict[str, Any]:
        params, frozen = init(jax.random.key(0))
        row = _timed(program, [begin_of(params)], frozen, examples_of(key), seconds)
        return row | {
            "lower_seconds": round(at_lowered - began, 1),
            "compile_seconds": None if is_cached else round(compiled - at_turn, 1),
        }

    return timed


def _statistics() -> dict[str, int]:
    return jax.local_devices()[0].memory_stats() or {}


def _allocations() -> int:
    return _statistics().get("num_allocs", 0)


def _timed(
    step: Any, held: list[Any], frozen: Any, examples: Any, seconds: float
) -> dict[str, Any]:
    """`held` is a state in a list, so that nobody else holds what a step is to take over."""

    def once() -> Any:
        held[0] = step(held[0], frozen, examples)
        return held[0]

    row = measured(once, jax.block_until_ready, seconds)
    return row | {"peak_bytes": _statistics().get("peak_bytes_in_use", 0)}


def lowered(
    name: str,
    length: int,
    batch: int,
    method: str,
    *,
    micro_batch: int | None = None,
    **options: Any,
) -> Any:
    """The step of a method as a `jax.stages.Lowered`, the batch in one pass; nothing is run.

    A step is a function of (state, frozen, examples), whose state is donated.
    """
    model = MODELS[name]
    params, frozen = jax.eval_shape(model.init, jax.random.key(0))
    examples = jax.eval_shape(lambda key: model.batch(key, batch, length), jax.random.key(1))
    begin, update = _begin_and_update(model, params, batch, method, micro_batch or batch)
    step = jax.jit(update, donate_argnums=0)
    return step.trace(jax.eval_shape(begin, params), frozen, examples).lower(**options)


def step_bytes(name: str, length: int, batch: int, method: str) -> int:
    """Device memory of the compiled step: arguments, results and what lies between.

    Compiled without autotuning, which would run kernels and moves memory by a workspace at most.
    """
    program = lowered(name, length, batch, method)
    figures = program.compile(compiler_options={"xla_gpu_autotune_level": 0}).memory_analysis()
    return (
        figures.temp_size_in_bytes
        + figures.argument_size_in_bytes
        + figures.output_size_in_bytes
        - figures.alias_size_in_bytes
    )


def largest_batch(
    name: str, length: int, batch: int, method: str, memory_bytes: int | None = None
) -> int | None:
    """The largest batch of one pass whose compiled step fits the device, a multiple of GRANULE."""
    limit = memory_bytes or _statistics()["bytes_limit"]

    def needed(size: int) -> int:
        found = step_bytes(name, length, size, method)
        stage(f"searching: {size} takes {found} bytes of {limit}")  # if it should be cut off
        return found

    return largest(needed, batch, limit)


def _begin_and_update(model: Any, params: Any, batch: int, method: str, micro_batch: int) -> Any:
    """(params -> state, (state, frozen, examples) -> state) with AdamW."""
    optimizer = optax.adamw(1e-4)
    if method == "nonprivate":
        return _ordinary(model, optimizer)
    if method == "jax_privacy":
        return _jax_privacy(model, optimizer, batch, micro_batch)
    return _private(model, optimizer, _plan(model, params, batch, per_layer=method == "per_layer"))


def _ordinary(model: Any, optimizer: Any) -> tuple[Any, Any]:
    def update(state: Any, frozen: Any, examples: Any) -> Any:
        params, memory = state
        gradient = jax.grad(lambda p: model.loss(p, frozen, examples).mean())(params)
        updates, memory = optimizer.update(gradient, memory, params)
        return optax.apply_updates(params, updates), memory

    return lambda params: (params, optimizer.init(params)), update


def _private(model: Any, optimizer: Any, plan: Any) -> tuple[Any, Any]:
    """One noise key serves all steps: what is released here is a time."""

    def loss(frozen: Any, params: Any, examples: Any) -> Any:
        return model.loss(params, frozen, examples)

    def step_of(frozen: Any) -> Any:
        return dpsgd.make_dp_step(jax.tree_util.Partial(loss, frozen), optimizer, plan)

    def update(state: Any, frozen: Any, examples: Any) -> Any:
        held, key = state
        everyone = jnp.ones(plan.capacity, bool)
        return step_of(frozen).step(held, examples, everyone, key), key

    key = new_noise_key()
    return lambda params: (step_of(None).init(params), key), update


def _plan(model: Any, params: Any, batch: int, *, per_layer: bool) -> Any:
    """The batch as capacity, all of it in one pass."""
    groups, norms = _layers(model, params) if per_layer else (None, CLIP)
    release = TrainingRelease(
        l2_clip_norm=norms,
        noise_multiplier=NOISE_MULTIPLIER,
        dataset_size=100_000,
        expected_batch_size=max(1, batch // 2),
        num_parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        truncated_batch_size=batch,
    )
    return dpsgd.DPSGDPlan(
        release,
        steps=1_000_000,
        delta=1e-6,
        micro_batch_size=batch,
        groups=groups,
        per_example_bytes=PER_EXAMPLE_BYTES,
    )


def _layers(model: Any, params: Any) -> Any:
    """Clip groups and their norms: weights and bias of one layer together."""
    if model.stacked:
        return dpsgd.per_layer_groups(params, CLIP, depth=2, stacked=model.stacked)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    layers = sorted({path.rsplit("/", 1)[0] if "/" in path else path for path in paths})
    return tuple((layer,) for layer in layers), (CLIP / math.sqrt(len(layers)),) * len(layers)


def _jax_privacy(model: Any, optimizer: Any, batch: int, micro_batch: int) -> tuple[Any, Any]:
    import jax_privacy  # a peer, which may be missing

    def loss(params: Any, frozen: Any, examples: Any) -> Any:
        return model.loss(params, frozen, examples).mean()

    gradient_of = jax_privacy.clipped_grad(
        loss, argnums=0, l2_clip_norm=CLIP, batch_argnums=2, microbatch_size=micro_batch
    )

    def update(state: Any, frozen: Any, examples: Any) -> Any:
        params, memory, key = state
        total = gradient_of(params, frozen, examples)
        key, *keys = jax.random.split(key, 1 + len(jax.tree.leaves(params)))
        leaves, structure = jax.tree.flatten(total)
        noised = [
            (leaf + NOISE_MULTIPLIER * CLIP * jax.random.normal(k, leaf.shape)) / batch
            for leaf, k in zip(leaves, keys, strict=True)
        ]
        updates, memory = optimizer.update(jax.tree.unflatten(structure, noised), memory, params)
        return optax.apply_updates(params, updates), memory, key

    def begin(params: Any) -> Any:
        return params, optimizer.init(params), jax.random.key(0)

    return begin, update
