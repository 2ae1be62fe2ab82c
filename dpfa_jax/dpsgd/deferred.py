"""A value of a program as a function of a cut through it, and the tail that this makes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend import core as jex
from jaxtyping import Array

from dpfa_jax.dpsgd.equations import dtype_of, shape_of
from dpfa_jax.dpsgd.forms import Product, Rows
from dpfa_jax.dpsgd.split import Tail

Make = Callable[[dict[jex.Var, Array]], Array]


@dataclasses.dataclass(frozen=True)
class Deferred:
    """A value as a function of the variables of a cut.

    Attributes:
      cost: bytes of the cut, per example.
      product: whether a product lies between the cut and the value.
      repeatable: whether making it twice gives the same bits.
      make, form: as `Tail`, of an environment that holds the cut.
    """

    cut: tuple[jex.Var, ...]
    cost: int
    product: bool
    repeatable: bool
    make: Make
    form: Rows | Product | None = None
    recomputes: bool = False


def tail_of(
    out: jex.Var | jex.Literal,
    item: Deferred,
    finish: Callable[[Array], Array],
    ready: int,
    order: Mapping[jex.Var, int],
) -> Tail:
    """The tail that makes `out` as `item` says.

    Args:
      finish: a sum of what is made -> the same in the parameter's shape.
      ready: how far the head has come when all of the cut is there.
      order: the place of each variable among what the head returns.
    """

    def of_values(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *values: function(dict(zip(item.cut, values, strict=True)))

    make, form = of_values(item.make), item.form
    shapes = [jax.ShapeDtypeStruct(shape_of(var), dtype_of(var)) for var in item.cut]
    made = jax.eval_shape(make, *shapes)
    if isinstance(form, Rows):
        form = Rows(of_values(form.entries), form.size)
        made = jax.eval_shape(form.entries, *shapes)[1]
    if isinstance(form, Product):
        form = dataclasses.replace(form, operands=of_values(form.operands))
    places = tuple(order[var] for var in item.cut)
    kept = item.cut == (out,)
    repeatable = (item.repeatable or isinstance(form, Rows)) and not item.recomputes
    return Tail(places, make, made, kept, repeatable, form, finish, ready, item.recomputes)
