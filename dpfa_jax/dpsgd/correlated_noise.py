"""Noise that partly cancels over the next steps: banded matrix factorisation.

Step t releases its sum plus x_t, where c_0 x_t + .. + c_{b-1} x_{t-b+1} = z_t and the z_t are
independent. Later steps take back part of what earlier ones added, so that the sum of many steps,
which is where the parameters stand, is less noisy than under independent noise. An example may
take part once in b steps, which cyclic batches make sure.

Source: Choquette-Choo et al., "(Amplified) banded matrix factorization: a unified approach to
private training" (2023).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, PyTree

from dpfa_jax.core import ArgumentError, checks


@functools.lru_cache(maxsize=64)
def banded_strategy(steps: int, bands: int) -> tuple[float, ...]:
    """c_0 .. c_{b-1} that make the parameters' mean squared noise over `steps` steps least.

    For `TrainingRelease.noise_strategy`. The optimisation takes seconds and is kept for the
    process; the numbers are plain, to be stored with a run.

    Args:
      steps: steps of the run.
      bands: b, how many steps share noise, and in how many steps an example takes part once. The
        memory of b - 1 times the parameters is due for past noise.

    Errors: ArgumentError for bands outside 1 .. steps.
    Source: jax_privacy.matrix_factorization (Google DeepMind, 2025) optimises.
    """
    checks.count("steps", steps)
    if checks.count("bands", bands) > steps:
        raise ArgumentError("bands", bands, f"more than steps = {steps}", "Pass fewer bands.")
    if bands == 1:
        return (1.0,)
    from jax_privacy.matrix_factorization import toeplitz  # heavy: only where it is asked for

    found = toeplitz.optimize_banded_toeplitz(n=steps, bands=bands)
    return tuple(np.asarray(found, np.float32).tolist())


def empty_memory(params: PyTree, strategy: tuple[float, ...]) -> PyTree:
    """Room for the noise of the last b - 1 steps, zeros: a leaf for each parameter, or nothing."""
    depth = len(strategy) - 1
    if depth == 0:
        return ()
    return jax.tree.map(lambda leaf: jnp.zeros((depth, *leaf.shape), jnp.float32), params)


def correlated(
    independent: Float32[Array, "..."],
    memory: Float32[Array, "past ..."],
    step: Int[Array, ""],
    strategy: tuple[float, ...],
) -> tuple[Float32[Array, "..."], Float32[Array, "past ..."]]:
    """(noise of this step, memory with it in the place of the oldest).

    Args:
      independent: z_t, fresh noise.
      memory: the noise of the last b - 1 steps; that of step u lies in place u mod (b - 1).
      step: t.
      strategy: c_0 .. c_{b-1}.
    """
    depth = len(strategy) - 1
    places = jnp.arange(depth)
    ages = (step - 1 - places) % depth + 1
    weights = jnp.asarray(strategy, jnp.float32)[ages]
    # One by one and not as a product of matrices, which may round to fewer bits on a GPU.
    for place in range(depth):
        independent = independent - weights[place] * memory[place]
    # One value: what later steps take back is what this one adds.
    noise = jax.lax.optimization_barrier(independent * jnp.float32(1.0 / strategy[0]))
    return noise, memory.at[step % depth].set(noise)
