"""The softmax of a warpgroup's rows, step by step along the keys: ways to keep its range."""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dpfa_jax.kernels.mosaic_gpu import dialect
from dpfa_jax.kernels.mosaic_gpu.layouts import ROW, WGMMA

# Start of the running maximum: finite, so that a row with no key yet gives exp2(-inf) = 0, no NaN.
# And no lower: a weight is made by one multiply-add, its row's maximum is rounded. Here they differ
# by at most 4; under a bias of -1e10 alone they would by 440, and an infinite weight makes NaN.
LOWEST = -(2.0**26)
# Sums of weights, of every eighth column of a step, up to which a maximum is kept: no weight is
# infinite in float16. In either type, and in the float32 of sums, relative errors stay as they are.
KEPT = 2.0**15


@dataclasses.dataclass(frozen=True)
class KeptMaximum:
    """Weights relative to the row's largest logit as of some step, kept while no weight is large.

    A step makes its weights with the maximum that it finds, and their sums tell whether that did:
    where one exceeds `KEPT`, infinite ones included, the rows it happened to take their new
    maximum, what they have summed so far is rescaled and the step's weights are made again. The
    other rows of the warp go the same way, with what they had: a row depends on no other.
    In a step where no row needs it, nothing is compared and nothing is rescaled.

    Sums are (maximum in base 2, total weight by column modulo 8).

    Attributes:
      simulate: for the simulator, which has no vote.
    """

    simulate: bool

    def start(self, rows: int) -> tuple[jax.Array, ...]:
        """Sums of rows that have seen no key."""
        largest = plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), ROW)
        return largest, plgpu.layout_cast(jnp.zeros((rows, 8), jnp.float32), WGMMA)

    def step(
        self, s: jax.Array, factor: float, acc: jax.Array, sums: tuple[jax.Array, ...], dtype: Any
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """Weights of the logits s factor (base 2) in `dtype`; `acc` and `sums` as they need it."""
        largest, total = sums

        def weights(largest: jax.Array) -> tuple[jax.Array, jax.Array]:
            p = jnp.exp2(s * factor - lax.broadcast_in_dim(largest, s.shape, [0]))
            return p.astype(dtype), _by_lane(p)

        def renewed(p, some, acc, largest, total):
            is_kept = some.max(axis=1) <= KEPT  # a NaN is not
            found = jnp.maximum(largest, s.max(axis=1) * factor)
            found = jnp.where(is_kept, largest, found)
            decay = jnp.exp2(largest - found)
            p, some = weights(found)
            acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
            return p, some, acc, found, total * lax.broadcast_in_dim(decay, total.shape, [0])

        p, some = weights(largest)
        state = (p, some, acc, largest, total)
        p, some, acc, largest, total = lax.cond(
            self._exceeds(some), renewed, lambda *state: state, *state
        )
        return p, acc, (largest, total + some)

    def _exceeds(self, some: jax.Array) -> jax.Array:
        """Whether some number of the warp (simulator: of all) exceeds `KEPT`, or is NaN."""
        if self.simulate:
            return ~jnp.all(some <= KEPT)

        @plgpu.inline_mgpu(
            arg_types=(WGMMA,),
            return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT),
        )
        def vote(_, some):
            return dialect.any_above(some, KEPT)

        return vote(some) != 0

    def finish(self, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        """(maximum in base 2, total weight) of each row."""
        largest, total = sums
        return largest, total.sum(axis=1)


def _by_lane(p: jax.Array) -> jax.Array:
    """Sums (rows, 8) of every eighth column: a lane adds up what it holds."""
    return functools.reduce(lambda x, y: x + y, (p[:, i : i + 8] for i in range(0, p.shape[1], 8)))


class RunningMaximum:
    """Weights relative to the largest logit so far; sums are (maximum in base 2, total weight)."""

    def start(self, rows: int) -> tuple[jax.Array, ...]:
        """Sums of rows that have seen no key."""
        largest = plgpu.layout_cast(jnp.full((rows,), LOWEST, jnp.float32), ROW)
        return largest, plgpu.layout_cast(jnp.zeros((rows,), jnp.float32), ROW)

    def step(
        self, s: jax.Array, factor: float, acc: jax.Array, sums: tuple[jax.Array, ...], dtype: Any
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """As `KeptMaximum`; `acc` and `sums` under the new maximum."""
        previous, total = sums
        largest = jnp.maximum(previous, s.max(axis=1) * factor)
        decay = jnp.exp2(previous - largest)
        p = jnp.exp2(s * factor - lax.broadcast_in_dim(largest, s.shape, [0]))
        acc *= lax.broadcast_in_dim(decay, acc.shape, [0])
        return p.astype(dtype), acc, (largest, total * decay + p.sum(axis=1))

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
        self, s: jax.Array, factor: float, acc: jax.Array, sums: tuple[jax.Array, ...], dtype: Any
    ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
        """As `RunningMaximum`; `acc` as it is."""
        exponent = s * factor
        p = jnp.exp2(exponent + self.shift if self.shift else exponent)
        # The sum's shuffles keep ptxas from moving the exponentials past the wait for the turn.
        return p.astype(dtype), acc, (sums[0] + p.sum(axis=1),)

    def finish(self, sums: tuple[jax.Array, ...]) -> tuple[float, jax.Array]:
        """As `RunningMaximum`."""
        return -self.shift, sums[0]


Softmax = KeptMaximum | RunningMaximum | PublicMaximum
