"""A program in two parts: a head that runs for a whole batch, and tails that make its outputs.

What a loop of the head makes a slice a round can be finished there: the loop then gives what its
rounds need to a function of the caller, and stacks what that returns.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
from jaxtyping import Array, PyTree

from dpfa_jax.dpsgd.forms import Product, Rows


@dataclasses.dataclass(frozen=True)
class Tail:
    """How one gradient is made from values of the head.

    Attributes:
      cut: which outputs of the head it needs.
      make: those outputs, in the same order -> the gradient of one example, not yet widened to
        the parameter's dtype where a narrower one holds the same numbers, nor to its shape where
        all beyond is zero.
      made: shape and dtype of what is made; of the rows where the form is `Rows`.
      kept: whether the head makes the gradient itself.
      repeatable: whether making it twice gives the same bits on every device.
      form: what more is known of it, as functions of the same values.
      finish: a sum of such gradients, float32 -> the same in the parameter's shape.
      ready: how far the head has come when all of the cut is there.
      recomputes: whether it makes anew what the forward pass has made.
    """

    cut: tuple[int, ...]
    make: Callable[..., Array]
    made: jax.ShapeDtypeStruct
    kept: bool
    repeatable: bool
    form: Rows | Product | None
    finish: Callable[[Array], Array]
    ready: int
    recomputes: bool = False

    @property
    def example_bytes(self) -> int:
        """Memory of one example's gradient."""
        return self.made.size * self.made.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Loop:
    """Outputs of the program that one loop makes, a slice a round, and that are finished there.

    Attributes:
      outputs: their places.
      tails: make the slice of one round from values of that round.
      results: where the head has what its `Finish` returned: an array for each output, one more.
    """

    outputs: tuple[int, ...]
    tails: tuple[Tail, ...]
    results: tuple[int, ...]


# (the program's first output, slices of what is given with this function, the values that the
# loop's tails need in this round) -> an array for each of the loop's outputs and one more, none of
# which differs from example to example.
Finish = Callable[[Array, PyTree, list[Array]], list[Array]]


@dataclasses.dataclass(frozen=True)
class Split:
    """A program in two parts.

    Attributes:
      head: (the program's inputs; for each of `loops` what finishes a round, and arrays of which
        each round takes a slice along the leading axis) -> values that the tails need, results of
        the loops.
      mapped: for each of these values, whether it can differ from example to example.
      outputs: the places of the outputs that tails make; the first one's is 0.
      tails: one for each of them.
      loops: what makes the other outputs.
    """

    head: Callable[[Sequence[Array], Sequence[tuple[Finish, PyTree]]], list[Array]]
    mapped: tuple[bool, ...]
    outputs: tuple[int, ...]
    tails: tuple[Tail, ...]
    loops: tuple[Loop, ...]
