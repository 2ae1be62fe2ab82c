"""DP-SGD steps, private and not, against peers: whole steps, one process a row, one GPU.

    python benchmarks/train.py --output benchmarks/results/<device>/<date>-train.json

A step is forward, backward, clipping, noise and AdamW. Times are medians over windows of queued
steps, in milliseconds; compare times of one run only. `peak_bytes` is the allocator's peak over
the run, model and optimizer included. `largest_batch` (with --largest-batch) is the largest batch
of one pass, without micro-batches, whose compiled step fits the device: read from the compiler's
memory figures, nothing is run for it. `left_out` names what is missing and why: a row beyond
--row-limit-seconds, one that does not fit, a peer that is not installed.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

METHODS = ("nonprivate", "per_layer", "flat", "jax_privacy", "opacus_ghost")
CASES = (
    ("gpt2-small", 1024, 32),
    ("gpt2-small", 512, 64),
    ("gpt2-small", 4096, 8),
    ("gpt2-medium", 1024, 16),
    ("vit-b", 512, 64),
    ("llama-1b-lora", 1024, 8),
    ("llama-1b", 1024, 8),
)
WINDOWS, CLIP, NOISE_MULTIPLIER, PER_EXAMPLE_BYTES = 5, 1.0, 0.7, 2**35
PEER_MICRO_BATCHES = (4, 8)
GRANULE, MOST_BATCH = 4, 4096


def measured(step: Callable[[], Any], wait: Callable[[Any], Any], seconds: float) -> dict[str, Any]:
    for _ in range(2):
        wait(step())
    start = time.perf_counter()
    wait(step())
    queued = max(2, math.ceil(seconds / WINDOWS / (time.perf_counter() - start)))
    times = []
    for _ in range(WINDOWS):
        start = time.perf_counter()
        for _ in range(queued):
            last = step()
        wait(last)
        times.append((time.perf_counter() - start) / queued * 1e3)
    return {
        "milliseconds": round(statistics.median(times), 3),
        "spread": round(max(times) - min(times), 3),
    }


def in_jax(name: str, length: int, batch: int, method: str, seconds: float) -> dict[str, Any]:
    import jax
    from train_models import MODELS

    model = MODELS[name]
    examples = jax.jit(model.batch, static_argnums=(1, 2))(jax.random.key(1), batch, length)
    sizes = [batch]
    if method == "jax_privacy":
        sizes = [size for size in PEER_MICRO_BATCHES if batch % size == 0]
    found = []
    for size in sizes:
        program = lowered(name, length, batch, method, micro_batch=size).compile()
        params, frozen = jax.jit(model.init)(jax.random.key(0))
        begin, _ = _begin_and_update(model, params, batch, method, size)
        row = _timed(program, begin(params), frozen, examples, seconds / len(sizes))
        found.append(row | ({"micro_batch": size} if method == "jax_privacy" else {}))
    return min(found, key=lambda row: row["milliseconds"])


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
    import jax
    from train_models import MODELS

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


def largest(needed: Callable[[int], int], start: int, limit: int, most: int) -> int | None:
    """The largest multiple of `GRANULE` up to `most` with needed(batch) <= limit; None without one.

    Memory grows about linearly with the batch, so a line through the last two figures finds it in a
    few compilations; each step is checked, and halved where the line misleads.
    """
    known: dict[int, int] = {}

    def fits(units: int) -> bool:
        if units not in known:
            known[units] = needed(units * GRANULE)
        return known[units] <= limit

    low, high = 0, most // GRANULE + 1  # fits, or is nothing; does not fit, or is too many
    guess = max(1, min(start // GRANULE, high - 1))
    for turn in range(40):
        low, high = (guess, high) if fits(guess) else (low, guess)
        if high - low <= 1:
            return low * GRANULE or None
        guess = (low + high) // 2
        if turn % 3 != 2:
            line = _on_line(sorted(known.items()), limit, 2 * max(low, 1))
            guess = min(max(line, low + 1), high - 1)
    return low * GRANULE or None


def _on_line(known: list[tuple[int, int]], limit: int, otherwise: int) -> int:
    """Where the line through the two largest batches meets the limit."""
    if len(known) < 2 or known[-1][1] <= known[-2][1]:
        return otherwise
    (x0, y0), (x1, y1) = known[-2:]
    return math.floor(x0 + (limit - y0) * (x1 - x0) / (y1 - y0))


def largest_batch(
    name: str, length: int, batch: int, method: str, memory_bytes: int | None = None
) -> int | None:
    """The largest batch of one pass whose compiled step fits the device, a multiple of GRANULE."""
    import jax

    statistics_of = jax.local_devices()[0].memory_stats() or {}
    limit = memory_bytes or statistics_of["bytes_limit"]
    return largest(lambda size: step_bytes(name, length, size, method), batch, limit, MOST_BATCH)


def _timed(step: Any, state: Any, frozen: Any, examples: Any, seconds: float) -> dict[str, Any]:
    import jax

    held = [state]
    del state

    def once() -> Any:
        held[0] = step(held[0], frozen, examples)
        return held[0]

    row = measured(once, jax.block_until_ready, seconds)
    statistics_of = jax.local_devices()[0].memory_stats() or {}
    return row | {"peak_bytes": statistics_of.get("peak_bytes_in_use", 0)}


def _begin_and_update(model: Any, params: Any, batch: int, method: str, micro_batch: int) -> Any:
    """(params -> state, (state, frozen, examples) -> state) with AdamW."""
    import optax

    optimizer = optax.adamw(1e-4)
    if method == "nonprivate":
        return _ordinary(model, optimizer)
    if method == "jax_privacy":
        return _jax_privacy(model, optimizer, batch, micro_batch)
    return _private(model, optimizer, _plan(params, batch, per_layer=method == "per_layer"))


def _ordinary(model: Any, optimizer: Any) -> tuple[Any, Any]:
    import jax
    import optax

    def update(state: Any, frozen: Any, examples: Any) -> Any:
        params, memory = state
        gradient = jax.grad(lambda p: model.loss(p, frozen, examples).mean())(params)
        updates, memory = optimizer.update(gradient, memory, params)
        return optax.apply_updates(params, updates), memory

    return lambda params: (params, optimizer.init(params)), update


def _private(model: Any, optimizer: Any, plan: Any) -> tuple[Any, Any]:
    """One noise key serves all steps: what is released here is a time."""
    import jax
    import jax.numpy as jnp

    from dpfa_jax import dpsgd
    from dpfa_jax.noise import new_noise_key

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


def _plan(params: Any, batch: int, *, per_layer: bool) -> Any:
    """The batch as capacity, all of it in one pass; per layer: weights and bias of one together."""
    import jax

    from dpfa_jax import TrainingRelease, dpsgd

    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    layers = sorted({path.rsplit("/", 1)[0] if "/" in path else path for path in paths})
    release = TrainingRelease(
        l2_clip_norm=(CLIP / math.sqrt(len(layers)),) * len(layers) if per_layer else CLIP,
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
        groups=tuple((layer,) for layer in layers) if per_layer else None,
        per_example_bytes=PER_EXAMPLE_BYTES,
    )


def _jax_privacy(model: Any, optimizer: Any, batch: int, micro_batch: int) -> tuple[Any, Any]:
    import jax
    import jax_privacy
    import optax

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


def opacus_ghost(name: str, length: int, batch: int, seconds: float) -> dict[str, Any]:
    """GPT-2 of transformers with an untied head (ghost clipping refuses tied weights)."""
    import torch
    from opacus import PrivacyEngine
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"gpt2-small": (12, 768, 12), "gpt2-medium": (24, 1024, 16)}
    if name not in sizes:
        raise ImportError(f"no torch model for {name}")
    layers, width, heads = sizes[name]
    config = GPT2Config(
        vocab_size=50304, n_layer=layers, n_embd=width, n_head=heads, n_positions=max(1024, length),
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
        attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).cuda().train()
    tokens = torch.randint(0, 50304, (batch, length + 1), device="cuda")
    places = torch.arange(length, device="cuda").expand(batch, length).contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens), batch_size=batch)
    per_token = torch.nn.CrossEntropyLoss(reduction="mean")
    engine = PrivacyEngine()
    model, optimizer, criterion, _ = engine.make_private(
        module=model, optimizer=optimizer, criterion=per_token, data_loader=loader,
        noise_multiplier=NOISE_MULTIPLIER, max_grad_norm=CLIP, grad_sample_mode="ghost",
        poisson_sampling=False,
    )  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(input_ids=tokens[:, :-1].contiguous(), position_ids=places).logits
        loss = criterion(
            logits.float().reshape(-1, logits.shape[-1]),
            tokens[:, 1:].reshape(-1),
            shape=logits.shape,
        )
        loss.backward()
        optimizer.step()

    row = measured(step, lambda _: torch.cuda.synchronize(), seconds)
    return row | {"peak_bytes": torch.cuda.max_memory_allocated()}


def one_row(name: str, length: int, batch: int, method: str, seconds: float) -> dict[str, Any]:
    if method == "opacus_ghost":
        return opacus_ghost(name, length, batch, seconds)
    return in_jax(name, length, batch, method, seconds)


def in_its_own_process(
    words: list[str], cache: str, limit_seconds: float
) -> tuple[dict[str, Any] | None, str]:
    """(what the process printed, "") or (None, why not). Fresh: no row sees another's memory."""
    environment = {"JAX_COMPILATION_CACHE_DIR": cache} | os.environ
    environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = "0.93"
    try:
        done = subprocess.run(
            [sys.executable, __file__, *words],
            capture_output=True, text=True, env=environment, check=False,
            timeout=None if math.isinf(limit_seconds) else limit_seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return None, f"more than {limit_seconds:g} seconds"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return None, lines[-1].strip()[:300] if lines else f"exit code {done.returncode}"
    return json.loads(done.stdout.splitlines()[-1]), ""


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    began, cases = time.perf_counter(), [_case(text) for text in arguments.cases or ()] or CASES
    result = {
        "device": _device(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/train.py " + " ".join(sys.argv[1:]),
        "versions": _versions(),
        "rows": [],
        "left_out": [],
    }

    def one(words: list[str], case: Any, method: str) -> dict[str, Any] | None:
        left = arguments.limit_seconds - (time.perf_counter() - began)
        limit = min(arguments.row_limit_seconds, left)
        found, why = (None, "the time limit of the run")
        if left > 0.0:
            words = [*words, *map(str, case), method]
            found, why = in_its_own_process(words, cache, limit)
        if found is None:
            what = dict(zip(("model", "T", "batch"), case, strict=True))
            what |= {"method": method, "what": words[0].strip("-"), "why": why}
            result["left_out"].append(what)
            print(f"left out: {what}", flush=True)
        return found

    # Rows of one run share compiled programs and, on a GPU, what autotuning found.
    with tempfile.TemporaryDirectory() as cache:
        for case, method in itertools.product(cases, arguments.methods):
            found = one(["--row", str(arguments.seconds)], case, method)
            if found is None:
                continue
            name, length, batch = case
            tokens = round(batch * length / found["milliseconds"] * 1e3)
            row = {"model": name, "T": length, "batch": batch, "method": method} | found
            row |= {"tokens_per_second": tokens, "largest_batch": None}
            result["rows"].append(row)
            print(case, method, found, flush=True)
            _write(arguments.output, result)
        # Compilations only, and last: what was timed is on the disk by then.
        for row in result["rows"] if arguments.largest_batch else ():
            if row["method"] == "opacus_ghost":  # no program whose memory could be read
                continue
            case = (row["model"], row["T"], row["batch"])
            memory = str(arguments.memory_bytes or 0)
            found = one(["--largest", memory], case, row["method"])
            if found is not None:
                row["largest_batch"] = found["largest_batch"]
                print(case, row["method"], found, flush=True)
                _write(arguments.output, result)
    return result


def _case(text: str) -> tuple[str, int, int]:
    name, length, batch = text.split(":")
    return name, int(length), int(batch)


def _write(path: str | None, result: dict[str, Any]) -> None:
    if path:
        with open(path, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


def _device() -> str:
    code = "import jax; print(jax.devices()[0].device_kind)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    import importlib.metadata
    import importlib.util

    names = ("jax", "jax-privacy", "torch", "opacus", "transformers")
    versions = {"python": platform.python_version()}
    for name in names:
        if importlib.util.find_spec(name.replace("-", "_")) is not None:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "unknown"
    return versions


def main() -> None:
    if sys.argv[1:2] == ["--row"]:
        seconds, name, length, batch, method = sys.argv[2:]
        print(json.dumps(one_row(name, int(length), int(batch), method, float(seconds))))
        return
    if sys.argv[1:2] == ["--largest"]:
        memory, name, length, batch, method = sys.argv[2:]
        found = largest_batch(name, int(length), int(batch), method, int(memory) or None)
        print(json.dumps({"largest_batch": found}))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file to write, after each row")
    parser.add_argument("--cases", nargs="*", help="MODEL:T:BATCH; the list in this file if none")
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, for each row")
    parser.add_argument("--limit-seconds", type=float, default=math.inf, help="of the whole run")
    parser.add_argument(
        "--row-limit-seconds", type=float, default=math.inf, help="of one row's process"
    )
    parser.add_argument(
        "--largest-batch", action="store_true", help="also find the largest batch that fits"
    )
    parser.add_argument(
        "--memory-bytes", type=int, help="for --largest-batch; what the device tells if none"
    )
    arguments = parser.parse_args()
    _write(arguments.output, run(arguments))


if __name__ == "__main__":
    main()
