"""Candidate tiles of the Triton kernels, for `tiles.py --backends triton`."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from tile_tasks import Task, arrays, by_blocks, fields_of, spec_of

from dpfa_jax.kernels.base import AttentionInputs
from dpfa_jax.kernels.triton import backend as triton
from dpfa_jax.kernels.triton import backward as triton_backward
from dpfa_jax.kernels.triton import forward as triton_forward
from dpfa_jax.kernels.triton import logits
from dpfa_jax.kernels.triton import tile_choice as triton_choice
from dpfa_jax.kernels.triton import tiles as triton_tiles


def tasks(head_sizes: list[int]) -> Iterator[Callable[[], Task]]:
    for size, kernel in itertools.product(head_sizes, triton_choice.MEASURED):
        yield lambda size=size, kernel=kernel: triton_task(kernel, size)


def triton_task(kernel: str, head_size: int) -> Task:
    """One Triton kernel, without a mask, 16 bits; the others keep their tiles."""
    spec = spec_of("full", head_size)
    first = triton_tiles.kernel_tiles(head_size, 2)
    query, key, value, cotangent = arrays(head_size, "long")
    found = [fields_of(getattr(first, kernel))]
    for rows, keys, warps, stages in itertools.product(
        (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
    ):
        tile = triton_tiles.Tiles(rows, keys, warps, stages)
        is_there = triton_choice.fits(kernel, tile, head_size=head_size, itemsize=2)
        if is_there and rows * keys * warps >= 16384 and fields_of(tile) not in found:
            found.append(fields_of(tile))

    def run(fields: dict[str, Any]) -> Callable[..., Any]:
        tile = triton_choice.tile_of(fields)

        def call(query: Any, key: Any, value: Any, cotangent: Any, *rows: Any) -> Any:
            given = logits.Arrays(query, key, value)
            if kernel == "forward":
                return triton_forward.attention_forward(
                    spec, given, None, tile, dtype=query.dtype, keep_unclipped=False,
                    interpret=False,
                ).output  # fmt: skip
            more = triton_backward.BackwardArrays(cotangent, *rows)
            chosen = first._replace(**{kernel: tile})
            found = triton_backward.input_gradients(spec, given, more, chosen, interpret=False)
            return found[:1] if kernel == "queries" else found[1:]

        return call

    rows: tuple[jax.Array, ...] = ()
    if kernel != "forward":
        inputs = AttentionInputs(query, key, value)
        made = jax.jit(lambda x: triton.BACKEND.forward(spec, x))(inputs)
        answer = made.output.astype(jnp.float32)
        delta = jnp.einsum("btnh,btnh->bnt", answer, cotangent.astype(jnp.float32))
        rows = (jnp.swapaxes(made.lse, 1, 2) * logits.LOG2_E, delta)
    plain = by_blocks(spec)
    parts = {"forward": lambda x: x[0], "queries": lambda x: x[1][:1], "keys": lambda x: x[1][1:]}
    return Task(
        triton_choice.key_of(kernel, head_size, 2), found, run,
        (query, key, value, cotangent, *rows),
        lambda q, k, v, c, *_: parts[kernel](plain(q, k, v, c)),
    )  # fmt: skip
