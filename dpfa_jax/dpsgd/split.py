"""A program in two parts: a head that runs for a whole batch, and tails that make its outputs."""

import dataclasses
from collections.abc import Callable

import jax
from jaxtyping import Array

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
class Split:
    """A program in two parts.

    Attributes:
      head: the program's inputs -> values that the tails need, a list.
      mapped: for each of these values, whether it can differ from example to example.
      tails: one for each output of the program.
    """

    head: Callable[..., list[Array]]
    mapped: tuple[bool, ...]
    tails: tuple[Tail, ...]
