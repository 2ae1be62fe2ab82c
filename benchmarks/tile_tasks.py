"""What the measured kernels of every backend share: a task, its operands, what is expected."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dpfa_jax.kernels import blocked
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, Plain

SHAPES = {"long": (8, 2048), "short": (32, 512)}  # batch, length
WIDTH = 2048  # query heads times head size


class Task(NamedTuple):
    """One key: candidates as a table writes them, the heuristic's first, and how to run one."""

    key: str
    candidates: list[dict[str, Any]]
    run: Callable[[dict[str, Any]], Callable[..., Any]]
    operands: tuple[Any, ...]
    expected: Callable[..., Any] | None  # of the operands, by the blocked backend
    is_noisy: bool = False


def fields_of(tile: Any) -> dict[str, Any]:
    """What differs from the type's defaults; all of it where that is nothing."""
    whole = dataclasses.asdict(tile)
    changed = {
        field.name: whole[field.name]
        for field in dataclasses.fields(tile)
        if field.default is dataclasses.MISSING or whole[field.name] != field.default
    }
    return changed or whole


def arrays(head_size: int, length: str, dtype: Any = jnp.bfloat16) -> list[jax.Array]:
    batch, rows = SHAPES[length]
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (batch, rows, WIDTH // head_size, head_size)
    return [jax.random.normal(key, shape, dtype) for key in keys]


def spec_of(mask: str, head_size: int, readout: Any = Plain(), **more: Any) -> AttentionSpec:  # noqa: B008
    return AttentionSpec(head_size**-0.5, is_causal=mask == "causal", readout=readout, **more)


def by_blocks(spec: AttentionSpec) -> Callable[..., Any]:
    """Output, log-sum-exp and gradients of a few examples, in float32."""

    def run(query: Any, key: Any, value: Any, cotangent: Any) -> Any:
        inputs = AttentionInputs(*(x.astype(jnp.float32) for x in (query, key, value)))
        outputs = blocked.BACKEND.forward(spec, inputs)
        pulled = cotangent.astype(jnp.float32)
        return outputs.output, blocked.BACKEND.backward(spec, inputs, outputs, pulled)[:3]

    return run
