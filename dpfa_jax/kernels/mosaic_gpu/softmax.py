"""The softmax of a warpgroup's rows, step by step along the keys: two ways to keep its range."""

import dataclasses

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.mosaic_gpu.layouts import ROW

# Start of the running maximum: finite, so that a row with no key yet gives exp2(-inf) = 0, no NaN.
LOWEST = -1e38


class RunningMaximum:
    """Weights relative to the largest logit so far; sums are (maximum in base 2, total weight)."""

    def start(self, rows: int) -> tuple[jax.Array, ...]:
        """Sums of rows that have seen no key."""
        largest = plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), ROW)
        return largest, plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), ROW)

    def step(
        self, s: jax.Array, factor: float, acc: jax.Array, sums: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """Weights of the logits s factor (base 2); `acc` and `sums` under the new maximum."""
        previous, total = sums
        largest = jnp.maximum(previous, s.max(axis=1) * factor)
        decay = jnp.exp2(previous - largest)
        p = jnp.exp2(s * factor - lax.broadcast_in_dim(largest, s.shape, [0]))
        acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
        return p, acc, (largest, total * decay + p.sum(axis=1))

    def finish(self, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        """(maximum in base 2, total weight) of each row."""
        largest, total = sums
        return largest, total


@dataclasses.dataclass(frozen=True)
class PublicMaximum:
    """Weights 2^shift exp(logit), which arguments say to be normal numbers; nothing is rescaled.

    Attributes:
      shift: what the weights' dtype wants.
    """

    shift: float

    def start(self, rows: int) -> tuple[jax.Array, ...]:
        """As `RunningMaximum`, less the maximum."""
        return (plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), ROW),)

    def step(
        self, s: jax.Array, factor: float, acc: jax.Array, sums: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """As `RunningMaximum`; `acc` as it is."""
        exponent = s * factor
        p = jnp.exp2(exponent + self.shift if self.shift else exponent)
        # The sum's shuffles keep ptxas from moving the exponentials past the wait for the turn.
        return p, acc, (sums[0] + p.sum(axis=1),)

    def finish(self, sums: tuple[jax.Array, ...]) -> tuple[float, jax.Array]:
        """As `RunningMaximum`."""
        return -self.shift, sums[0]
