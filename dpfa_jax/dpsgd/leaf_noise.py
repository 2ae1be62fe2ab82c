"""How each leaf leaves with its noise: as a sum, with others of its kind, or while it is added."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Key, UInt32

from dpfa_jax.dpsgd.released import Released
from dpfa_jax.kernels import parameter_noise, released_rows

# A standard deviation or grid: the release's, or that of the clip norms at hand; of a leaf, or of
# each of its slices, (slices, 1, ..).
Number = float | Float32[Array, "..."]


class Means(NamedTuple):
    """Two jitted functions.

    Attributes:
      of_sum: (sum, step key, leaf keys, leaf, standard deviation, grid) -> its released mean.
      of_rows: (rows, what each is multiplied by, the same) -> the same of their sum.
    """

    of_sum: Callable[..., Float32[Array, "..."]]
    of_rows: Callable[..., Float32[Array, "..."]]


def means_over(divisor: float) -> Means:
    """For sums that are divided by `divisor`. Once a plan: what is traced is kept with it."""

    # Jitted, so that leaves of one shape are one function of the step's program: each time anew,
    # a kernel takes half a second to lower and the generator's rounds a twentieth to trace.
    @jax.jit
    def of_sum(
        total: Array, step_key: Key[Array, ""], leaf_keys: UInt32[Array, "leaves 2"],
        leaf: Array, stddev: Number, cell: Number,
    ) -> Float32[Array, "..."]:  # fmt: skip
        return parameter_noise.released_mean(
            total, step_key, leaf, stddev=stddev, grid=cell, divisor=divisor, leaf_keys=leaf_keys
        )

    @jax.jit
    def of_rows(
        rows: Array, scales: Array, step_key: Key[Array, ""], leaf_keys: UInt32[Array, "leaves 2"],
        leaf: Array, stddev: Number, cell: Number,
    ) -> Float32[Array, "..."]:  # fmt: skip
        return released_rows.released_mean_of_rows(
            rows, scales, step_key, leaf,
            stddev=stddev, grid=cell, divisor=divisor, leaf_keys=leaf_keys,
        )  # fmt: skip

    return Means(of_sum, of_rows)


@dataclasses.dataclass(frozen=True, eq=False)
class LeafNoise:
    """The independent noise of one step.

    Attributes:
      step_key: the noise key, bound to the step.
      leaf_keys: that key, bound to each leaf.
      scales: standard deviation and grid of each leaf's sum.
      means: what is done with it.
    """

    step_key: Key[Array, ""]
    leaf_keys: UInt32[Array, "leaves 2"]
    scales: Sequence[tuple[Number, Number]]
    means: Means

    def of_rows(self, leaf: int, rows: Array, scales: Float32[Array, " batch"]) -> Released | None:
        """The leaf, from ALL examples' gradients, in its shape, and what each is multiplied by.

        None where that is not one pass: then a sum is due.
        """
        stddev, cell = self.scales[leaf]
        if not released_rows.chosen(rows, stddev):
            return None
        # Flat, so that leaves of one size share a kernel.
        mean = self.means.of_rows(
            rows.reshape(rows.shape[0], -1), scales, self.step_key, self.leaf_keys,
            np.uint32(leaf), jnp.float32(stddev), jnp.float32(cell),
        )  # fmt: skip
        return Released(leaf, mean.reshape(rows.shape[1:]))

    def of_sums(self, sums: Mapping[int, Array]) -> dict[int, Float32[Array, "..."]]:
        """Means of leaves by their places. Small ones of one type are done at once: compiling the
        generator's rounds takes a third of a second each time, and a launch what the pass does."""
        alike: dict[object, list[int]] = {}
        for index, leaf in sums.items():
            alone = leaf.size >= parameter_noise.FEWEST or np.ndim(self.scales[index][0]) > 0
            alike.setdefault(index if alone else jax.typeof(leaf), []).append(index)
        means: dict[int, Array] = {}
        shared = self.step_key, self.leaf_keys
        for members in alike.values():
            numbers = [
                jnp.asarray([self.scales[i][part] for i in members], jnp.float32) for part in (0, 1)
            ]
            places = np.asarray(members, np.uint32)
            if len(members) == 1:
                only = members[0]
                scale = (x[0] for x in numbers)
                means[only] = self.means.of_sum(sums[only], *shared, places[0], *scale)
            else:
                stacked = jnp.stack([sums[i] for i in members])
                found = jax.vmap(self.means.of_sum, in_axes=(0, None, None, 0, 0, 0))(
                    stacked, *shared, places, *numbers
                )
                means.update(zip(members, found, strict=True))
        return means
