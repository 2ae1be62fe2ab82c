"""What a private model covers, as a table; and whether its loss couples the rows of a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from dpfa_jax import dpsgd
from dpfa_jax.core import CoverageError
from dpfa_jax.dpsgd.clipped_sum import PerExampleLoss, checked_losses
from dpfa_jax.dpsgd.parameters import Groups
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
    loss_fn: PerExampleLoss,
    params: dict[str, Array],
    frozen: list[Leaf],
    batch: PyTree,
    groups: Groups | None = None,
) -> Coverage:
    """The coverage of `params` under `loss_fn`; refuses one that couples examples."""
    check_uncoupled(loss_fn, params, batch)
    return Coverage(
        dpsgd.coverage(loss_fn, params, batch, groups),
        tuple((leaf.path, leaf.kind, np.shape(leaf.value)) for leaf in frozen),
    )


def check_uncoupled(loss_fn: PerExampleLoss, params: PyTree, batch: PyTree) -> None:
    """Changes one of two examples: the loss of the other must stay the same, bit for bit.

    Each of the two places is changed, since a loss may look at earlier rows alone. Both examples
    are tried as the batch has them and with every number changed: beside zeros, or for an example
    of zeros, much couples that does not show.

    Errors: CoverageError where it does not; ArgumentError for a loss that is not one number an
    example.
    """

    def losses(*rows: PyTree) -> Array:
        # Rows in one program of one shape, so that only what they hold can make a difference.
        pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        return checked_losses(loss_fn(params, pair), len(rows))

    first, last = (jax.tree.map(lambda x, i=i: x[i], batch) for i in (0, -1))
    run, changed = jax.jit(losses), jax.tree.map(_changed, first)
    blank = jax.tree.map(lambda x: x if _is_key(x) else jnp.zeros_like(x), first)
    for one in (first, changed):
        others = (one, last, first, changed, blank)
        _check_equal([np.asarray(run(one, other)[0]) for other in others])
        _check_equal([np.asarray(run(other, one)[1]) for other in others])


def _changed(x: Array) -> Array:
    """Another value for every number: of its size, not alike all over, and for a token near by."""
    if _is_key(x):
        return x
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        steps = 1.0 + (jnp.arange(x.size).reshape(x.shape) % 7) / 8.0
        return 2.0 * x + jnp.where(x.real < 0, -steps, steps).astype(x.dtype)
    return ~x if x.dtype == jnp.bool_ else x ^ 1


def _is_key(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _check_equal(losses: list[np.ndarray]) -> None:
    different = [x for x in losses if not np.array_equal(x, losses[0], equal_nan=True)]
    if different:
        raise CoverageError(
            f"the loss of one example depends on the others of its batch: {losses[0]:.6g} beside a "
            f"copy of itself, {different[0]:.6g} beside another. No gradient belongs to one of "
            "them then. Replace layers and losses that mix rows (batch statistics, in-batch "
            "negatives, means over the batch) by ones that work on each example."
        )


def _table(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, [*widths, 0], strict=True))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in padded)
