"""Which parameters are covered, how the gradient of each is made, and what one example costs."""

from typing import Literal, NamedTuple

import jax
from jaxtyping import PyTree

from dpfa_jax.dpsgd.clipped_sum import PerExampleLoss, split_gradient
from dpfa_jax.dpsgd.forms import Rows
from dpfa_jax.dpsgd.parameters import Groups, leaf_groups, leaf_paths
from dpfa_jax.dpsgd.split import Tail

How = Literal["late", "rows", "in the backward pass", "in its round"]


class Covered(NamedTuple):
    """One parameter.

    Attributes:
      path: its name, "encoder/0/kernel".
      shape: its shape.
      how: "late": made from the layer's inputs and cotangents for as many examples at a time as the
        plan's memory allows; "rows": the same, as rows of a table; "in the backward pass": made
        for all examples of a micro-batch, either because it is small or because no cheaper way
        was found; "in its round": of stacked layers whose slices are clip groups, in the round of
        the loop that makes a slice, where it is clipped and added.
      example_bytes: memory of one example's gradient, of one slice where it is made in its round.
    """

    path: str
    shape: tuple[int, ...]
    how: How
    example_bytes: int


def coverage(
    loss_fn: PerExampleLoss, params: PyTree, batch: PyTree, groups: Groups | None = None
) -> tuple[Covered, ...]:
    """How the clipped sum serves each parameter, in `jax.tree.leaves` order. Nothing is computed.

    Args:
      loss_fn: (params, batch) -> one loss an example, shape (B,).
      params: pytree of arrays or of `jax.ShapeDtypeStruct`.
      batch: the same, with a leading axis B.
      groups: the plan's clip groups. None: each parameter is in one.

    Errors: ArgumentError for a loss that is not one number an example; as `DPSGDPlan` for groups.
    """
    example = jax.eval_shape(lambda rows: jax.tree.map(lambda x: x[0], rows), batch)
    split = split_gradient(loss_fn, params, example, leaf_groups(params, groups))
    found: dict[int, tuple[How, Tail]] = {
        place: (_how(tail), tail) for place, tail in zip(split.outputs, split.tails, strict=True)
    }
    for loop in split.loops:
        rounds = zip(loop.outputs, loop.tails, strict=True)
        found.update({place: ("in its round", tail) for place, tail in rounds})
    named = enumerate(zip(leaf_paths(params), jax.tree.leaves(params), strict=True), start=1)
    return tuple(
        Covered(path, leaf.shape, found[place][0], found[place][1].example_bytes)
        for place, (path, leaf) in named
    )


def _how(tail: Tail) -> How:
    if tail.kept:
        return "in the backward pass"
    return "rows" if isinstance(tail.form, Rows) else "late"
