"""DP-SGD steps, private and not, against peers: whole steps, one process a row, one GPU.

    python benchmarks/train.py --output benchmarks/results/<device>/<date>-train.json

A step is forward, backward, clipping, noise and AdamW. Times are medians over windows of queued
steps, in milliseconds; compare times of one run only. `peak_bytes` is the allocator's peak over
the run, model and optimizer included. `largest_batch` (with --largest-batch) is the largest batch
of one pass whose compiled step fits the device. Peers are left out where they are not installed,
and the run says so.
"""

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
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
    import optax
    from train_models import MODELS

    model, optimizer = MODELS[name], optax.adamw(1e-4)
    params, frozen = jax.jit(model.init)(jax.random.key(0))
    examples = jax.jit(model.batch, static_argnums=(1, 2))(jax.random.key(1), batch, length)
    if method == "jax_privacy":
        found = [
            _timed(_jax_privacy_step(model, optimizer, batch, size), params, frozen, examples,
                   seconds / 3) | {"micro_batch": size}
            for size in (4, 8) if batch % size == 0
        ]  # fmt: skip
        return min(found, key=lambda row: row["milliseconds"])
    if method == "nonprivate":
        step = _plain_step(model, optimizer)
    else:
        step = _private_step(model, optimizer, params, batch, per_layer=method == "per_layer")
    return _timed(step, params, frozen, examples, seconds)


def _timed(make: Any, params: Any, frozen: Any, examples: Any, seconds: float) -> dict[str, Any]:
    import jax

    begin, step = make
    state = [begin(jax.tree.map(lambda leaf: leaf.copy(), params))]

    def once() -> Any:
        state[0] = step(state[0], frozen, examples)
        return state[0]

    row = measured(once, jax.block_until_ready, seconds)
    statistics_of = jax.local_devices()[0].memory_stats() or {}
    return row | {"peak_bytes": statistics_of.get("peak_bytes_in_use", 0)}


def _plain_step(model: Any, optimizer: Any) -> tuple[Any, Any]:
    import jax
    import optax

    def update(state: Any, frozen: Any, examples: Any) -> Any:
        params, memory = state
        gradient = jax.grad(lambda p: model.loss(p, frozen, examples).mean())(params)
        updates, memory = optimizer.update(gradient, memory, params)
        return optax.apply_updates(params, updates), memory

    return lambda params: (params, optimizer.init(params)), jax.jit(update, donate_argnums=0)


def _private_step(
    model: Any, optimizer: Any, params: Any, batch: int, *, per_layer: bool
) -> tuple[Any, Any]:
    import jax
    import numpy as np

    from dpfa_jax import TrainingRelease, dpsgd
    from dpfa_jax.noise import new_noise_key

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
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        truncated_batch_size=batch,
    )
    plan = dpsgd.DPSGDPlan(
        release,
        steps=10_000,
        delta=1e-6,
        micro_batch_size=batch,
        groups=tuple((layer,) for layer in layers) if per_layer else None,
        per_example_bytes=PER_EXAMPLE_BYTES,
    )
    everyone, key = np.ones(batch, bool), new_noise_key()

    def begin(params: Any) -> Any:
        return params

    made: dict[str, Any] = {}

    def step(state: Any, frozen: Any, examples: Any) -> Any:
        if not made:
            made["step"] = dpsgd.make_dp_step(
                lambda p, b: model.loss(p, frozen, b), optimizer, plan, donate_state=True
            )
            state = made["step"].init(state)
        return made["step"].step(state, examples, everyone, key)

    return begin, step


def _jax_privacy_step(model: Any, optimizer: Any, batch: int, micro_batch: int) -> tuple[Any, Any]:
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

    return begin, jax.jit(update, donate_argnums=0)


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


def in_its_own_process(case: tuple[str, int, int], method: str, seconds: float) -> dict[str, Any]:
    """A fresh process, so that no row sees another's memory."""
    command = [sys.executable, __file__, "--row", *map(str, case), method, str(seconds)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        print(f"{case} {method}: left out: {lines[-1][:300] if lines else 'no word'}", flush=True)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for case in CASES:
        if arguments.cases and "{}:{}:{}".format(*case) not in arguments.cases:
            continue
        for method in arguments.methods:
            if time.perf_counter() - began > arguments.limit_seconds:
                print(f"{case} {method}: left out: the time limit", flush=True)
                continue
            found = in_its_own_process(case, method, arguments.seconds)
            if found:
                name, length, batch = case
                tokens = round(batch * length / found["milliseconds"] * 1e3)
                row = {"model": name, "T": length, "batch": batch, "method": method} | found
                rows.append(row | {"tokens_per_second": tokens, "largest_batch": None})
                print(case, method, found, flush=True)
    return {
        "device": _device(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/train.py " + " ".join(sys.argv[1:]),
        "versions": _versions(),
        "rows": rows,
    }


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
    if "--row" in sys.argv:
        name, length, batch, method, seconds = sys.argv[2:]
        print(json.dumps(one_row(name, int(length), int(batch), method, float(seconds))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="JSON file to write")
    parser.add_argument("--cases", nargs="*", help="MODEL:T:BATCH, some of the list in this file")
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, for each row")
    parser.add_argument("--limit-seconds", type=float, default=math.inf, help="start no row after")
    arguments = parser.parse_args()
    result = run(arguments)
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
