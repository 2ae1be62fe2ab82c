"""Which parameters are covered, how the gradient of each is made, and what one example costs."""

from typing import Literal, NamedTuple

import jax
from jaxtyping import PyTree

from dpfa_jax.dpsgd.clipped_sum import PerExampleLoss, split_gradient
from dpfa_jax.dpsgd.forms import Rows
from dpfa_jax.dpsgd.parameters import leaf_paths
from dpfa_jax.dpsgd.split import Tail


class Covered(NamedTuple):
    """One parameter.

    Attributes:
      path: its name, "encoder/0/kernel".
      shape: its shape.
      how: "late": made from the layer's inputs and cotangents for as many examples at a time as the
        plan's memory allows; "rows": the same, as rows of a table; "in the backward pass": made
        for all examples of a micro-batch, either because it is small or because no cheaper way
        was found.
      example_bytes: memory of one example's gradient.
    """

    path: str
    shape: tuple[int, ...]
    how: Literal["late", "rows", "in the backward pass"]
    example_bytes: int


def coverage(loss_fn: PerExampleLoss, params: PyTree, batch: PyTree) -> tuple[Covered, ...]:
    """How the clipped sum serves each parameter, in `jax.tree.leaves` order. Nothing is computed.

    Args:
      loss_fn: (params, batch) -> one loss an example, shape (B,).
      params: pytree of arrays or of `jax.ShapeDtypeStruct`.
      batch: the same, with a leading axis B.

    Errors: ArgumentError for a loss that is not one number an example.
    """
    example = jax.eval_shape(lambda rows: jax.tree.map(lambda x: x[0], rows), batch)
    tails = split_gradient(loss_fn, params, example).tails[1:]
    named = zip(leaf_paths(params), jax.tree.leaves(params), tails, strict=True)
    return tuple(
        Covered(path, leaf.shape, _how(tail), tail.example_bytes) for path, leaf, tail in named
    )


def _how(tail: Tail) -> Literal["late", "rows", "in the backward pass"]:
    if tail.kept:
        return "in the backward pass"
    return "rows" if isinstance(tail.form, Rows) else "late"
