"""Per-example gradients that are not made yet: what they will be made from, and how."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float, Float32

from dpfa_jax.clipping import trees
from dpfa_jax.dpsgd.forms import Product, Rows
from dpfa_jax.dpsgd.released import Release, Released
from dpfa_jax.dpsgd.split import Tail
from dpfa_jax.kernels import gradient_products

# A clip norm: the plan's, or one that follows what was released.
ClipNorm = float | Float32[Array, ""]


@dataclasses.dataclass(frozen=True)
class LateGradient:
    """The per-example gradients of one parameter, not made yet.

    Attributes:
      path: the parameter's name.
      tail: makes the gradient of one example.
      values: what it is made from; with a leading axis of `rows` examples where `mapped`.
      parameter: the parameter itself.
      release: has the sum of all examples leave with its noise, if that is wanted.
    """

    path: str
    tail: Tail
    values: tuple[Array, ...]
    mapped: tuple[bool, ...]
    rows: int
    parameter: Array
    release: Release | None = None

    def chunks(self, most: int) -> list[Array]:
        """The mapped values in pieces of equal size, `most` examples or fewer each."""
        size = largest_divisor(self.rows, most)
        held = zip(self.values, self.mapped, strict=True)
        shape = self.rows // size, size
        return [value.reshape(*shape, *value.shape[1:]) for value, mapped in held if mapped]

    def holding(self, values: list[Array], rows: int) -> "LateGradient":
        """The same for other examples: one piece of `chunks`, whose sum is not the batch's."""
        new = iter(values)
        held = zip(self.values, self.mapped, strict=True)
        chosen = tuple(next(new) if mapped else value for value, mapped in held)
        return dataclasses.replace(self, values=chosen, rows=rows, release=None)

    def made(self, l2_clip_norm: ClipNorm | None) -> trees.PerExample:
        """The gradients. The barrier keeps what is measured the same numbers as what is added."""
        operands = self._operands(l2_clip_norm)
        if operands is not None:
            assert isinstance(l2_clip_norm, float)
            left, right = (x.reshape(-1, *x.shape[2:]) for x in operands)
            products, squares = gradient_products.gradient_products(left, right, unit=l2_clip_norm)
            values = products.reshape(self.rows, -1, *products.shape[1:])
            return trees.Measured(values, squares.reshape(self.rows, -1).sum(axis=1))
        if not isinstance(self.tail.form, Rows):
            return jax.lax.optimization_barrier(self._mapped(self.tail.make))
        places, rows = self._mapped(self.tail.form.entries)
        places, values, size = trees.table_rows(places, rows, self.tail.form.size)
        return trees.TableRows(places, jax.lax.optimization_barrier(values), size)

    def summed(
        self,
        made: trees.PerExample,
        scales: Float32[Array, " rows"] | Float32[Array, "rows slices"],
    ) -> Float32[Array, "..."] | Released:
        """Weighted sum of what was made, in the parameter's shape; or what is released of it."""
        rows = self._rows(made)
        if self.release is not None and rows is not None and scales.ndim == 1:
            released = self.release(rows, scales)
            if released is not None:
                return released
        total = trees.weighted_sum(made, scales)
        if isinstance(made, trees.Measured):
            assert isinstance(self.tail.form, Product)
            total = self.tail.form.finish(total)
        return self.tail.finish(total)

    def _rows(self, made: trees.PerExample) -> Float[Array, "rows ..."] | None:
        """What was made, where its elements are the parameter's in their order."""
        if isinstance(made, trees.TableRows) or self.tail.made.shape != self.parameter.shape:
            return None  # of one shape `tail.finish` changes nothing: it puts zeros around
        if not isinstance(made, trees.Measured):
            return made
        assert isinstance(self.tail.form, Product)
        shape = (self.rows, *self.parameter.shape)
        return made.values.reshape(shape) if self.tail.form.in_order else None

    def _operands(self, l2_clip_norm: ClipNorm | None) -> tuple[Array, Array] | None:
        """Operands of the matrix product that this gradient is, where a kernel makes it."""
        # The kernel squares in units of a number that is known to the compiler.
        if not isinstance(self.tail.form, Product) or not isinstance(l2_clip_norm, float):
            return None
        left, right = self._mapped(self.tail.form.operands)
        one = left.reshape(-1, *left.shape[2:]), right.reshape(-1, *right.shape[2:])
        return (left, right) if gradient_products.chosen(*one) else None

    def unclipped(self) -> Array:
        """What `tail` makes, as it is."""
        return self._mapped(self.tail.make)

    def _mapped(self, make: Callable[..., Any]) -> Any:
        axes = tuple(0 if mapped else None for mapped in self.mapped)
        # The barrier keeps what is recomputed from being what the forward pass has made, kept.
        again = self.tail.recomputes
        values = jax.lax.optimization_barrier(self.values) if again else self.values
        return jax.vmap(make, in_axes=axes, axis_size=self.rows)(*values)


def late_gradients(
    tails: Sequence[Tail],
    values: Sequence[Array],
    mapped: Sequence[bool],
    rows: int,
    paths: Sequence[str],
    parameters: Sequence[Array],
    releases: Sequence[Release | None] | None = None,
) -> list[LateGradient]:
    """What each of `tails` makes, of the parameters with these paths, of `rows` examples.

    `values`: what the head or the round made, with an axis of examples where `mapped`. `releases`:
    for each what its sum is to leave by, where these are all examples of the batch.
    """
    releases = [None] * len(tails) if releases is None else releases
    return [
        LateGradient(
            path,
            tail,
            tuple(values[i] for i in tail.cut),
            tuple(mapped[i] for i in tail.cut),
            rows,
            parameter,
            release,
        )
        for tail, path, parameter, release in zip(tails, paths, parameters, releases, strict=True)
    ]


def after(first: list[Array], parts: list[LateGradient]) -> list[LateGradient]:
    """`parts`, none of which is made before all of `first` is there.

    What several are made from stays one array. Where `first` is empty nothing is changed: a barrier
    would have all that `parts` are made from wait for the last of it.
    """
    if not first:
        return parts
    held = [*{id(value): value for part in parts for value in part.values}.items()]
    _, late = jax.lax.optimization_barrier((first, [value for _, value in held]))
    known = dict(zip((name for name, _ in held), late, strict=True))
    return [
        dataclasses.replace(part, values=tuple(known[id(value)] for value in part.values))
        for part in parts
    ]


def source_bytes(parts: list[LateGradient]) -> int:
    """Memory of what the gradients not made yet are made from, for all examples."""
    late = [part for part in parts if not part.tail.kept]
    pairs = [pair for part in late for pair in zip(part.values, part.mapped, strict=True)]
    held = {id(value): value for value, mapped in pairs if mapped}
    return sum(value.size * value.dtype.itemsize for value in held.values())


def largest_divisor(rows: int, most: int) -> int:
    """The largest piece of at most `most` rows (one at least) into which `rows` can be cut."""
    most = min(rows, max(most, 1))  # gradients that exist already may be larger than what is left
    return max(size for size in range(1, most + 1) if rows % size == 0)
