"""The noise inputs of one private call, as any piece of batch and heads reads them."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, UInt32

from dpfa_jax.core import ArgumentError
from dpfa_jax.kernels.base import ExampleReadout, MemoryReadout, NoiseInputs
from dpfa_jax.noise import check_attention_ranges


class PlacedNoise(NamedTuple):
    """`NoiseInputs` with the global index of each head, of which a piece of them has its own."""

    key_words: UInt32[Array, "B 2"]
    batch_index: UInt32[Array, " B"]
    head_index: UInt32[Array, "B N"]


def placed(
    readout: ExampleReadout | MemoryReadout,
    noise: NoiseInputs | None,
    shape: tuple[int, ...],
) -> PlacedNoise:
    """The noise inputs of an answer of `shape` (B, T, N, columns).

    Errors: ArgumentError where there are none, where the readout is for another number of heads,
    or where the shape is beyond the counters' range.
    """
    if noise is None:
        raise ArgumentError(
            "noise", None, "a private readout has no noise inputs", "Pass NoiseInputs."
        )
    batch, rows, heads, columns = shape
    if len(readout.noise_stddevs) != heads:
        raise ArgumentError(
            "noise_stddevs",
            readout.noise_stddevs,
            f"{heads} heads",
            "Pass one standard deviation a head.",
        )
    check_attention_ranges(batches=batch, heads=heads, rows=rows, columns=columns)
    start = noise.head_start.astype(jnp.uint32)[:, None]
    return PlacedNoise(
        noise.key_words,
        noise.batch_index.astype(jnp.uint32),
        start + jnp.arange(heads, dtype=jnp.uint32),
    )
