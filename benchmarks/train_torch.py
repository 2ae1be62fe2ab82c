"""Steps of peers in torch on the models of `torch_models`: run in passes, and timed."""

import gc
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from largest_batch import largest
from timing import measured
from torch import nn
from torch_models import MODELS, examples_of

CLIP, NOISE_MULTIPLIER = 1.0, 0.7
PHYSICAL_BATCHES = (64, 32, 16, 8, 4, 2)
PEERS = {"opacus_ghost": "torch_opacus", "fastdp": "torch_fastdp"}


def peer_of(method: str) -> Any:
    """Its module; the first call imports the peer."""
    return importlib.import_module(PEERS[method])


def step_on(
    method: str,
    model: nn.Module,
    examples: tuple[Any, Any],
    physical: int,
    noise_multiplier: float = NOISE_MULTIPLIER,
    **options: Any,
) -> tuple[Callable[[], None], Any]:
    """A step on all examples in passes of `physical`, gradients added up, and its optimizer."""
    inputs, targets = examples
    batch, fused = len(inputs), inputs.device.type == "cuda"
    one_pass, optimizer = peer_of(method).attached(
        model.train(),
        lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=fused),
        batch, CLIP, noise_multiplier, **options,
    )  # fmt: skip

    def step() -> None:
        for start in range(0, batch, physical):
            end = start + physical
            one_pass(inputs[start:end], targets[start:end], end >= batch)

    return step, optimizer


def timed(
    method: str, name: str, length: int, batch: int, seconds: float, device: str
) -> dict[str, Any]:
    """The fastest physical batch, and the milliseconds, or the failure, of each one tried.

    From the largest down, until one is slower than the best by more than a fifth.
    """
    sizes = [size for size in PHYSICAL_BATCHES if size <= batch and batch % size == 0] or [batch]
    found, tried = [], {}
    for size in sizes:
        try:
            row = _measured_afresh(method, name, length, batch, size, seconds / len(sizes), device)
        except torch.OutOfMemoryError:
            tried[str(size)] = "out of memory"
            continue
        found.append(row | {"micro_batch": size})
        tried[str(size)] = row["milliseconds"]
        if row["milliseconds"] > 1.2 * min(x["milliseconds"] for x in found):
            break
    if not found:
        raise MemoryError("no physical batch fits")
    return min(found, key=lambda row: row["milliseconds"]) | {"tried": tried}


def _measured_afresh(
    method: str, name: str, length: int, batch: int, size: int, seconds: float, device: str
) -> dict[str, Any]:
    _forget(device)
    step = _step_afresh(method, name, length, batch, size, device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    row = measured(step, lambda _: wait(), seconds)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return row | {"peak_bytes": peak}


def largest_batch(
    method: str, name: str, length: int, batch: int, limit: int, seconds: float
) -> int | None:
    """The largest batch of one pass whose step stays within the limit, by running steps.

    TimeoutError where it takes more than `seconds`.
    """

    def needed(size: int) -> float:
        _forget("cuda")
        try:
            _step_afresh(method, name, length, size, size, "cuda")()
        except torch.OutOfMemoryError:
            return math.inf
        return torch.cuda.max_memory_allocated()

    return largest(needed, batch, limit, seconds=seconds)


def _step_afresh(
    method: str, name: str, length: int, batch: int, physical: int, device: str
) -> Callable[[], None]:
    with torch.device(device):
        model = MODELS[name]()
    step, _ = step_on(method, model, examples_of(model, batch, length, device), physical)
    return step


def _forget(device: str) -> None:
    if device == "cuda":
        gc.collect()  # the engines' hooks hold cycles
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
