"""What is known of a gradient that is made late: a matrix product, or rows of a table."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jaxtyping import Array

from dpfa_jax.dpsgd.equations import apply, dtype_of, shape_of


@dataclasses.dataclass(frozen=True)
class Rows:
    """A gradient that is a sum of rows at some places of an otherwise zero table: an embedding.

    Attributes:
      entries: values of the cut -> (row numbers (entries,), rows (entries, ...)).
      size: rows of the table.
    """

    entries: Callable[..., tuple[Array, Array]]
    size: int


@dataclasses.dataclass(frozen=True)
class Product:
    """A gradient that is a matrix product, or one for each of G groups, put in another shape.

    Attributes:
      operands: values of the cut -> (left (G, T, I), right (G, T, O)).
      finish: (G, I, O) -> the gradient. Linear, and it keeps norms.
      axes: how many axes of the gradient G, I and O are; None where it has been reshaped since.
      in_order: whether `finish` is a mere reshape: element e stays element e.
    """

    operands: Callable[..., tuple[Array, Array]]
    finish: Callable[[Array], Array]
    axes: tuple[int, int, int] | None = None
    in_order: bool = False


class Part(Protocol):
    """An operand of an equation: how it is made, and what is known of it."""

    @property
    def make(self) -> Callable[[dict[jex.Var, Array]], Array]:
        """Its value, from an environment that holds the cut."""
        ...

    @property
    def form(self) -> "Rows | Product | None":
        """What is known of it, as functions of that environment."""
        ...


Makers = Mapping[jex.Var, jex.JaxprEqn]


def form_of(eqn: jex.JaxprEqn, parts: Sequence[Part], makers: Makers) -> Rows | Product | None:
    """The form of what `eqn` makes of `parts`; `makers` tells which equation makes a variable."""
    name = eqn.primitive.name
    if name == "dot_general":
        return _product(eqn, parts)
    if name == "scatter-add":
        return _rows(eqn, parts, makers)
    form = parts[0].form if len(parts) == 1 else None
    if name == "convert_element_type":
        return form if _widens(eqn) else None
    if not isinstance(form, Product):
        return None
    if name == "transpose" and eqn.params["permutation"] == _swap(form.axes):
        return _swapped(form, shape_of(eqn.outvars[0]))
    if name in ("copy", "copy_p", "neg", "reshape", "squeeze", "transpose"):
        finish, operand = form.finish, eqn.invars[0]
        assert isinstance(operand, jex.Var)
        moves = name in ("neg", "transpose") or eqn.params.get("dimensions") is not None
        in_order = form.in_order and not moves
        axes = form.axes if name in ("copy", "copy_p") else None

        def after(made: Array) -> Array:
            return apply(eqn, {operand: finish(made)})[0]

        return Product(form.operands, after, axes, in_order)
    return None


def _widens(eqn: jex.JaxprEqn) -> bool:
    """Whether a cast keeps every number: what is rounded must be measured and added rounded."""
    (operand,), (out,) = eqn.invars, eqn.outvars
    return jnp.promote_types(dtype_of(operand), dtype_of(out)) == dtype_of(out)


def _swap(axes: tuple[int, int, int] | None) -> tuple[int, ...] | None:
    """The permutation that swaps the axes of I and O."""
    if axes is None:
        return None
    groups, left, right = axes
    middle = groups + left
    return (*range(groups), *range(middle, middle + right), *range(groups, middle))


def _swapped(form: Product, shape: tuple[int, ...]) -> Product:
    """The transposed product, of `shape`: the operands change places, and nothing is transposed.

    `jax.grad` makes the gradient of a weight matrix (O, I), and transposes it.
    """
    assert form.axes is not None
    groups, left, right = form.axes

    def operands(*values: Any) -> tuple[Array, Array]:
        first, second = form.operands(*values)
        return second, first

    return Product(operands, lambda made: made.reshape(shape), (groups, right, left), True)


def _product(eqn: jex.JaxprEqn, parts: Sequence[Part]) -> Product | None:
    (left_contracted, right_contracted), (left_groups, right_groups) = eqn.params[
        "dimension_numbers"
    ]
    out = eqn.outvars[0]
    if any(dtype_of(atom) != dtype_of(out) for atom in eqn.invars):
        return None  # an operand of another precision

    def matrix(operand: Array, groups: tuple[int, ...], contracted: tuple[int, ...]) -> Array:
        free = [axis for axis in range(operand.ndim) if axis not in (*groups, *contracted)]
        sizes = [math.prod(operand.shape[axis] for axis in axes) for axes in (groups, contracted)]
        return operand.transpose(*groups, *contracted, *free).reshape(*sizes, -1)

    def operands(env: dict[jex.Var, Array]) -> tuple[Array, Array]:
        left, right = (part.make(env) for part in parts)
        return (
            matrix(left, left_groups, left_contracted),
            matrix(right, right_groups, right_contracted),
        )

    groups = len(left_groups)
    left, right = (
        len(shape_of(atom)) - groups - len(contracted)
        for atom, contracted in zip(eqn.invars, (left_contracted, right_contracted), strict=True)
    )
    shape = shape_of(out)
    return Product(operands, lambda made: made.reshape(shape), (groups, left, right), True)


def in_slices(form: Product, mapped: Callable[..., Any], rounds: int) -> Product:
    """The same for a gradient that a loop makes in slices: its rounds are more groups."""

    def operands(env: dict[jex.Var, Array]) -> tuple[Array, Array]:
        left, right = mapped(form.operands, env)
        return left.reshape(-1, *left.shape[2:]), right.reshape(-1, *right.shape[2:])

    def finish(made: Array) -> Array:
        return jax.vmap(form.finish)(made.reshape(rounds, -1, *made.shape[1:]))

    return Product(operands, finish, in_order=form.in_order)


def _rows(eqn: jex.JaxprEqn, parts: Sequence[Part], makers: Makers) -> Rows | None:
    """Whole rows that are added to a table of zeros."""
    drops = (jax.lax.GatherScatterMode.FILL_OR_DROP, jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    if not is_zeros(makers, eqn.invars[0]) or eqn.params["mode"] not in drops:
        return None
    numbers = eqn.params["dimension_numbers"]
    table, updates = shape_of(eqn.invars[0]), shape_of(eqn.invars[2])
    window = tuple(range(len(updates) - (len(table) - 1), len(updates)))
    whole_rows = (
        numbers.inserted_window_dims == (0,)
        and numbers.scatter_dims_to_operand_dims == (0,)
        and not numbers.operand_batching_dims
        and numbers.update_window_dims == window
        and updates[len(updates) - len(window) :] == table[1:]
    )
    if not whole_rows:
        return None

    def entries(env: dict[jex.Var, Array]) -> tuple[Array, Array]:
        places, values = parts[1].make(env), parts[2].make(env)
        return places.reshape(-1), values.reshape(-1, *table[1:])

    return Rows(entries, table[0])


def with_rows(table: Array, places: Array, rows: Array) -> Array:
    """`table` with these rows. As bits: a GPU scatters 16-bit floats by way of float32 tables."""
    unsigned = jnp.dtype(f"uint{8 * table.dtype.itemsize}")
    bits, new = (jax.lax.bitcast_convert_type(x, unsigned) for x in (table, rows))
    return jax.lax.bitcast_convert_type(bits.at[places].set(new, mode="drop"), table.dtype)


# In `shard_map` constants are marked as varying over the mesh.
_KEEP_ZERO = {"broadcast_in_dim", "pcast", "pvary"}


def is_zeros(makers: Makers, atom: jex.Var | jex.Literal) -> bool:
    """Whether the program says that `atom` is zero everywhere."""
    if isinstance(atom, jex.Literal):
        return bool(np.all(np.asarray(atom.val) == 0))
    eqn = makers.get(atom)
    return eqn is not None and eqn.primitive.name in _KEEP_ZERO and is_zeros(makers, eqn.invars[0])
