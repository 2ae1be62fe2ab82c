"""What becomes of a private answer before it leaves a kernel: clip, noise, public grid.

The noise of an element is a function of its key and its global (batch, head, row, column), so no
tile size, sharding or recomputation changes it. Without noise inputs nothing private is answered.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpfa_jax.clipping.rows import clip_rows
from dpfa_jax.kernels import compensated, noise_inputs
from dpfa_jax.kernels.base import (
    AttentionInputs,
    AttentionOutputs,
    AttentionSpec,
    ExampleReadout,
    MemoryReadout,
    NoiseInputs,
    SoftmaxRows,
)
from dpfa_jax.kernels.compensated import TwoFloat
from dpfa_jax.kernels.partitioning import by_batch_and_heads
from dpfa_jax.noise import attention_noise
from dpfa_jax.noise.grid import snap_once


def clipped(
    readout: ExampleReadout, normalised: Float[Array, "B T N H"]
) -> Float[Array, "B T N H"]:
    """Rows of each head, or each example whole, clipped to the readout's norm in float32."""
    normalised = normalised.astype(jnp.float32)
    if readout.clip == "row":
        return clip_rows(normalised, readout.l2_clip_norm)
    # Heads come first among what is made one axis: there JAX lets them stay in pieces.
    by_head = jnp.swapaxes(normalised, 1, 2)
    whole = clip_rows(by_head.reshape(by_head.shape[0], -1), readout.l2_clip_norm)
    return jnp.swapaxes(whole.reshape(by_head.shape), 1, 2)


def clip_cotangent(
    readout: ExampleReadout,
    normalised: Float[Array, "B T N H"],
    cotangent: Float[Array, "B T N H"],
) -> Float[Array, "B T N H"]:
    """The cotangent pulled back through `clipped` at `normalised`, in float32."""
    _, pull_back = jax.vjp(lambda x: clipped(readout, x), normalised.astype(jnp.float32))
    return pull_back(cotangent.astype(jnp.float32))[0]


def of_softmax(
    spec: AttentionSpec,
    inputs: AttentionInputs,
    normalised: Float[Array, "B T N H"],
    lse: Float[Array, "B T N"],
    weights: Float[Array, "..."] | None = None,
    rows: SoftmaxRows | None = None,
) -> AttentionOutputs:
    """What a backend returns for a normalised output: the readout, and what it keeps beside it."""
    dtype = inputs.query.dtype
    if isinstance(spec.readout, ExampleReadout):
        released = example(spec.readout, normalised, inputs.noise)
        return AttentionOutputs(released.astype(dtype), normalised, lse, weights, rows)
    # The backward pass by blocks takes each row's product of output and cotangent: from an output
    # rounded to 16 bits, every gradient of a row would share that error.
    finer = None if weights is not None or normalised.dtype == dtype else normalised
    return AttentionOutputs(normalised.astype(dtype), finer, lse, weights, rows)


def of_memory(readout: MemoryReadout, inputs: AttentionInputs, sums: TwoFloat) -> AttentionOutputs:
    """What a backend returns for a private memory: the noised answer alone."""
    released = memory(readout, sums, inputs.noise)
    return AttentionOutputs(released.astype(inputs.query.dtype), None, None)


def example(
    readout: ExampleReadout, normalised: Float[Array, "B T N H"], noise: NoiseInputs | None
) -> Float[Array, "B T N H"]:
    """Clipped, noised and snapped output in float32."""
    drawn = _scaled_noise(readout, normalised, noise)
    return snap_once(clipped(readout, normalised) + drawn, _per_head(readout.grids))


def memory(
    readout: MemoryReadout, sums: TwoFloat, noise: NoiseInputs | None
) -> Float[Array, "B T N H"]:
    """The answer of a private memory, in float32, from its un-noised (N, Z).

    The exact two-float sums meet the noise before anything is rounded to float32; all that
    follows the snap is post-processing.
    """
    columns = sums.high.shape[-1] - 1
    if readout.form == "ratio":
        answer = ratio(sums)
        drawn = _scaled_noise(readout, answer.high, noise)
        return compensated.snap_once(compensated.add(answer, drawn), _per_head(readout.grids))
    drawn = _scaled_noise(readout, sums.high, noise)
    released = compensated.snap_once(compensated.add(sums, drawn), _per_head(readout.grids))
    numerator, normaliser = released[..., :columns], released[..., columns:]
    return numerator / jnp.maximum(normaliser / readout.weight_scale, readout.floor)


def ratio(sums: TwoFloat) -> TwoFloat:
    """N / Z in two floats; (B, T, N, H + 1) -> (B, T, N, H)."""
    numerator = TwoFloat(sums.high[..., :-1], sums.low[..., :-1])
    normaliser = TwoFloat(sums.high[..., -1:], sums.low[..., -1:])
    return compensated.divide(numerator, normaliser)


def _scaled_noise(
    readout: ExampleReadout | MemoryReadout,
    like: Float[Array, "B T N h"],
    noise: NoiseInputs | None,
) -> Float[Array, "B T N h"]:
    """The noise of an answer: where types name its sharding, each device draws its own piece."""

    def draw(like: jax.Array, *given: jax.Array) -> tuple[jax.Array, ...]:
        key_words, batch_index, head_index, stddevs = given
        drawn = attention_noise(
            key_words,
            batch_index,
            head_index[:, 0],
            heads=like.shape[2],
            row_start=0,
            rows=like.shape[1],
            columns=like.shape[3],
        )
        return (drawn * stddevs[:, None],)

    operands, results = ["btnh", "bw", "b", "bn", "n"], ["btnh"]
    run = by_batch_and_heads(draw, operands, results, key_heads=like.shape[2], is_opaque=False)
    stddevs = jnp.asarray(readout.noise_stddevs, jnp.float32)
    return run(like, *noise_inputs.placed(readout, noise, like.shape), stddevs)[0]


def _per_head(numbers: tuple[float, ...]) -> Float[Array, "N 1"]:
    return jnp.asarray(numbers, jnp.float32)[:, None]
