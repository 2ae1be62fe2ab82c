"""What a private model covers, as a table; and whether its loss couples the rows of a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from dpfa_jax import dpsgd
from dpfa_jax.core import CoverageError
from dpfa_jax.dpsgd.clipped_sum import PerExampleLoss
from dpfa_jax.nn.parts import Leaf


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Every array of a model: how it is trained privately, or that it stays as it is.

    Attributes:
      trained: as `dpsgd.coverage` gives it: path, shape, how one example's gradient is made, bytes.
      frozen: (path, kind, shape) of what is not trained: frozen parameters, state, constants.
    """

    trained: tuple[dpsgd.Covered, ...]
    frozen: tuple[tuple[str, str, tuple[int, ...]], ...]

    def __str__(self) -> str:
        head = ("parameter", "shape", "gradient of one example", "bytes")
        lines = [
            *(
                (row.path, str(row.shape), row.how, f"{row.example_bytes:,}")
                for row in self.trained
            ),
            *((path, str(shape), f"none: frozen {kind}", "") for path, kind, shape in self.frozen),
        ]
        return _table([head, *lines])


def covered(
    loss_fn: PerExampleLoss, params: dict[str, Array], frozen: list[Leaf], batch: PyTree
) -> Coverage:
    """The coverage of `params` under `loss_fn`; refuses one that couples examples."""
    check_uncoupled(loss_fn, params, batch)
    return Coverage(
        dpsgd.coverage(loss_fn, params, batch),
        tuple((leaf.path, leaf.kind, np.shape(leaf.value)) for leaf in frozen),
    )


def check_uncoupled(loss_fn: PerExampleLoss, params: PyTree, batch: PyTree) -> None:
    """Changes the second of two examples: the loss of the first must stay the same, bit for bit.

    Errors: CoverageError where it does not.
    """

    def beside(other: Array) -> Array:
        # Rows in one program of one shape, so that only what they hold can make a difference.
        pair = jax.tree.map(lambda x, y: jnp.stack([x[0], y]), batch, other)
        return loss_fn(params, pair)[0]

    def blank(x: Array) -> Array:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return x[0] if is_key else jnp.zeros_like(x[0])

    others = [jax.tree.map(lambda x, i=i: x[i], batch) for i in (0, -1)]
    others.append(jax.tree.map(blank, batch))
    losses = [np.asarray(loss) for loss in map(jax.jit(beside), others)]
    if any(not np.array_equal(loss, losses[0], equal_nan=True) for loss in losses):
        raise CoverageError(
            f"the loss of one example depends on the others of its batch: {losses[0]:.6g} beside a "
            f"copy of itself, {losses[-1]:.6g} beside zeros. No gradient belongs to one example "
            "then. Replace layers and losses that mix rows (batch statistics, in-batch negatives, "
            "means over the batch) by ones that work on each example."
        )


def _table(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in padded)
