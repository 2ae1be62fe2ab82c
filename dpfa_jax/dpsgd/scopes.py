"""Where each value of a program is cut: one scope a jaxpr, one body a loop or recomputed block."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import jax
from jax.extend import core as jex
from jaxtyping import Array, PyTree

from dpfa_jax.clipping import trees
from dpfa_jax.dpsgd.deferred import Deferred, Make, tail_of
from dpfa_jax.dpsgd.equations import (
    after_first_output,
    apply,
    apply_to,
    bytes_of,
    dtype_of,
    inlined,
    loop_varies,
    shape_of,
    value_of,
    varying_vars,
)
from dpfa_jax.dpsgd.forms import Product, Rows, form_of, in_slices, with_rows
from dpfa_jax.dpsgd.narrowing import narrowed
from dpfa_jax.dpsgd.split import Finish, Tail

# A gradient stays in the head where its cut would be this many times larger than itself: biases,
# norm scales and low-rank factors are small, the inputs they come from are not.
KEEP_RATIO = 16

_PRODUCTS = {"dot_general", "scatter-add", "conv_general_dilated"}
_CHEAP = _PRODUCTS | {
    "add",
    "add_any",
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "copy",
    "copy_p",
    "dynamic_update_slice",
    "mul",
    "neg",
    "pad",
    "reduce_sum",
    "reshape",
    "rev",
    "select_n",
    "slice",
    "squeeze",
    "stack",
    "sub",
    "transpose",
}

# What recomputes an operand in one pass over memory, at no more than that.
_ELEMENTWISE = {"add", "broadcast_in_dim", "convert_element_type", "mul", "neg", "reshape", "sub"}

# What moves numbers and makes none.
_ORDERS = {"reshape", "transpose"}

# Additions whose order a GPU may choose anew in every run.
_UNORDERED = {"scatter-add", "conv_general_dilated"}


class Scope:
    """One jaxpr: who makes each variable, what depends on the example, what its loops must emit.

    `has_loss`: its first output is the loss, and what comes after that one the backward pass.
    """

    def __init__(
        self,
        jaxpr: jex.Jaxpr,
        consts: Sequence[Array],
        varies: Sequence[bool],
        *,
        has_loss: bool = False,
        recompute: bool = False,
    ) -> None:
        self.jaxpr, self.consts, self._recompute = jaxpr, consts, recompute
        after = after_first_output(jaxpr) if has_loss else []
        self._backward = {x for eqn in after for x in eqn.invars if isinstance(x, jex.Var)}
        self._cotangents = {out for eqn in after for out in eqn.outvars}
        self.maker = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
        self._varying = varying_vars(jaxpr, varies)
        self._known: dict[tuple[jex.Var, bool], Deferred] = {}
        self._bodies: dict[int, Body] = {}
        self.finishing: list[Body] = []

    def varies(self, var: jex.Var) -> bool:
        """Whether it can differ from example to example."""
        return var in self._varying

    def tails_of(
        self, outs: Mapping[int, jex.Var | jex.Literal], divided: Set[int] = frozenset()
    ) -> tuple[list[jex.Var], tuple[Tail, ...]]:
        """(what the tails need, a tail for each of `outs`, by their places)."""
        cut: dict[jex.Var, int] = {}
        found = []
        for place, out in outs.items():
            whole = place in divided
            narrow, finish = narrowed(self.maker, out, pads=not whole)
            item = self.cheapest(narrow, product_allowed=True)
            item = dataclasses.replace(item, form=None) if whole else item
            for var in item.cut:
                cut.setdefault(var, len(cut))
            found.append((narrow, item, finish))
        at = {out: i for i, eqn in enumerate(self.jaxpr.eqns) for out in self.made_by(eqn)}
        ready = [max((at.get(var, 0) for var in item.cut), default=0) for _, item, _ in found]
        tails = (tail_of(*each, order, cut) for each, order in zip(found, ready, strict=True))
        return list(cut), tuple(tails)

    def finish_in_loop(self, column: Sequence[int]) -> None:
        """Has these outputs finished in the loop that makes a slice of each a round, if any."""
        outs = [narrowed(self.maker, self.jaxpr.outvars[i], pads=False)[0] for i in column]
        made = [out for out in outs if isinstance(out, jex.Var)]
        eqn = self.maker.get(made[0]) if made else None
        if eqn is None or eqn.primitive.name != "scan" or not set(outs) <= set(eqn.outvars):
            return
        if self._cotangents.isdisjoint(eqn.outvars):
            return  # before the loss, which says whether an example counts
        body = self._bodies.setdefault(id(eqn), Body(self, eqn))
        places = [eqn.outvars.index(out) for out in made]
        if min(places) < body.carries:
            return
        if body not in self.finishing:
            self.finishing.append(body)
        body.finish(dict(zip(column, places, strict=True)))

    def cheapest(self, atom: jex.Var | jex.Literal, *, product_allowed: bool) -> Deferred:
        """`atom` made from the cut that keeps the fewest bytes; past one product where allowed."""
        if isinstance(atom, jex.Literal):
            constant = atom.val
            return Deferred((), 0, False, True, lambda env: constant)
        key = (atom, product_allowed)
        if key not in self._known:
            self._known[key] = self._cheapest(atom, product_allowed)
        return self._known[key]

    def _cheapest(self, var: jex.Var, product_allowed: bool) -> Deferred:
        size = bytes_of(var) if self.varies(var) else 0
        kept = Deferred((var,), size, False, True, lambda env: env[var])
        eqn = self.maker.get(var)
        if eqn is None:
            return kept
        name = eqn.primitive.name
        if size == 0:  # the same for all examples: kept once, unless it is a mere constant
            constant = name == "broadcast_in_dim" and isinstance(eqn.invars[0], jex.Literal)
            return self._through(eqn, False) if constant else kept
        found = None
        if name in _CHEAP and (product_allowed or name not in _PRODUCTS):
            found = self._through(eqn, product_allowed and name not in _PRODUCTS)
        elif name in ("scan", "remat2", "remat", "checkpoint") and product_allowed:
            found = self._out_of(eqn, eqn.outvars.index(var))
        if found is None:
            return kept
        if self._recompute and not product_allowed and self._is_kept_anyway(var, found, size):
            return dataclasses.replace(found, recomputes=True)
        return found if found.cost < size * (KEEP_RATIO if found.product else 1) else kept

    def _through(self, eqn: jex.JaxprEqn, product_allowed: bool) -> Deferred:
        parts = [self.cheapest(atom, product_allowed=product_allowed) for atom in eqn.invars]
        cut = tuple(dict.fromkeys(var for part in parts for var in part.cut))

        def applied(env: dict[jex.Var, Array]) -> Array:
            return apply_to(eqn, [part.make(env) for part in parts])

        name = eqn.primitive.name
        onto = self._onto(eqn, parts) if name in ("add", "add_any") else None
        repeatable = onto is not None or (
            name not in _UNORDERED and all(part.repeatable for part in parts)
        )
        cost = sum(bytes_of(var) for var in cut if self.varies(var))
        product = name in _PRODUCTS or any(part.product for part in parts)
        form = form_of(eqn, parts, self.maker)
        again = any(part.recomputes for part in parts)
        return Deferred(cut, cost, product, repeatable, onto or applied, form, again)

    def _is_kept_anyway(self, var: jex.Var, found: Deferred, size: int) -> bool:
        """Whether `found` makes `var`, elementwise, from what the backward pass reads, or reads
        what lies between. At most a sixteenth more than `var` itself would be kept then.

        Not where `found` reshapes and does no more: the head reads `var` itself (a cotangent, for
        the layer below), and what is made anew is another array to XLA.
        """
        if found.cost > size + size // KEEP_RATIO:
            return False
        between: set[jex.Var] = set()
        todo, names = [var], set()
        while todo:
            eqn = self.maker[todo.pop()]
            names.add(eqn.primitive.name)
            if eqn.primitive.name not in _ELEMENTWISE:
                return False
            above = {atom for atom in eqn.invars if isinstance(atom, jex.Var)} - between
            between |= above
            todo += [atom for atom in above if atom not in found.cut and self.varies(atom)]
        wide = {atom for atom in between if self.varies(atom) and bytes_of(atom) >= size}
        return names != {"reshape"} and not wide.isdisjoint(self._backward)

    def _onto(self, eqn: jex.JaxprEqn, parts: list[Deferred]) -> Make | None:
        """A table's rows are added to the other gradient of that table (a tied head) in place."""
        shape = shape_of(eqn.outvars[0])
        if any(shape_of(atom) != shape for atom in eqn.invars):
            return None
        forms = [part.form for part in parts]
        if isinstance(forms[0], Rows) == isinstance(forms[1], Rows):
            return None
        table, other = parts if isinstance(forms[0], Rows) else parts[::-1]
        assert isinstance(table.form, Rows)
        entries = table.form.entries

        def make(env: dict[jex.Var, Array]) -> Array:
            # Each place once: the order of additions in one place is not left to the device.
            places, rows = (x[None] for x in entries(env))
            found = trees.table_rows(places, rows, shape[0])
            base, chosen = other.make(env), found.places[0]
            added = base.at[chosen].get(mode="fill", fill_value=0) + found.values[0]
            # Read before it is written over, so that no copy of the table is needed.
            rows, base = jax.lax.optimization_barrier((added.astype(base.dtype), base))
            return with_rows(base, chosen, rows)

        return make

    def _out_of(self, eqn: jex.JaxprEqn, place: int) -> Deferred | None:
        """A value made inside a loop or a recomputed block: the cut leaves it, the product stays
        out. A gradient that the loop carries is made inside."""
        body = self._bodies.setdefault(id(eqn), Body(self, eqn))
        if place < body.carries:
            return None
        inner = body.scope.cheapest(body.jaxpr.outvars[place], product_allowed=True)
        if inner.cut == (body.jaxpr.outvars[place],):
            return None
        outer = [body.outside(var) for var in inner.cut]  # (outer variable, stacked by the loop)
        axes = [0 if is_stacked else None for _, is_stacked in outer]

        def mapped(function: Callable[..., Any], env: dict[jex.Var, Array]) -> Any:
            def of_values(*values: Array) -> Any:
                return function(dict(zip(inner.cut, values, strict=True)))

            values = [env[var] for var, _ in outer]
            if not body.loops:
                return of_values(*values)
            return jax.vmap(of_values, in_axes=axes, axis_size=eqn.params["length"])(*values)

        cut = tuple(dict.fromkeys(var for var, _ in outer))
        cost = sum(bytes_of(var) for var in cut if self.varies(var))
        form = inner.form if isinstance(inner.form, Product) else None
        if form is not None:
            form = (
                in_slices(form, mapped, eqn.params["length"])
                if body.loops
                else dataclasses.replace(form, operands=functools.partial(mapped, form.operands))
            )
        make = functools.partial(mapped, inner.make)
        again = inner.recomputes
        return Deferred(cut, cost, inner.product, inner.repeatable, make, form, again)

    def add_variable(self, var: jex.Var, varies: bool) -> None:
        """A variable that a body returns beside its own outputs."""
        if varies:
            self._varying.add(var)

    def values(
        self,
        inputs: Sequence[Array],
        wanted: Sequence[jex.Var | jex.Literal],
        work: Sequence[tuple[Finish, PyTree]] = (),
    ) -> list[Array]:
        """`wanted` at `inputs`; loops and blocks also return what was cut or finished inside."""
        env = dict(zip(self.jaxpr.constvars, self.consts, strict=True))
        env.update(zip(self.jaxpr.invars, inputs, strict=True))
        shared = self._cotangents & {atom for atom in wanted if isinstance(atom, jex.Var)}
        needed = [*wanted, *(self.jaxpr.outvars[:1] if self.finishing else ())]
        for eqn in self._needed(needed):
            body = self._bodies.get(id(eqn))
            operands = [value_of(env, atom) for atom in eqn.invars]
            if body is not None and body in self.finishing:
                finish, slices = work[self.finishing.index(body)]
                finish = functools.partial(finish, value_of(env, self.jaxpr.outvars[0]))
                env.update(body.run(operands, finish, slices))
            elif body is not None and body.emitted:
                env.update(body.run(operands))
            else:
                made = apply(eqn, env)
                # A cotangent in a new order, which a tail reads as well: written once, for both.
                if eqn.primitive.name in _ORDERS and not shared.isdisjoint(eqn.outvars):
                    made = jax.lax.optimization_barrier(made)
                env.update(zip(eqn.outvars, made, strict=True))
        return [value_of(env, atom) for atom in wanted]

    def made_by(self, eqn: jex.JaxprEqn) -> list[jex.Var]:
        """Its outputs, and what it returns beside them of what was cut or finished inside."""
        body = self._bodies.get(id(eqn))
        return [*eqn.outvars, *(body.beside() if body is not None else ())]

    def _needed(self, wanted: Sequence[jex.Var | jex.Literal]) -> list[jex.JaxprEqn]:
        used = {atom for atom in wanted if isinstance(atom, jex.Var)}
        needed = []
        for eqn in reversed(self.jaxpr.eqns):
            if eqn.effects or not used.isdisjoint(self.made_by(eqn)):
                needed.append(eqn)
                used.update(atom for atom in eqn.invars if isinstance(atom, jex.Var))
        return needed[::-1]


class Body:
    """The jaxpr inside a scan or a checkpoint, and what it returns beside its own outputs.

    Which inputs of a scan are constants, carried or sliced is read off the shapes: the loop adds an
    axis to what it slices and stacks.
    """

    def __init__(self, parent: Scope, eqn: jex.JaxprEqn) -> None:
        self.parent, self.eqn = parent, eqn
        self.loops = eqn.primitive.name == "scan"
        inner = eqn.params["jaxpr"]
        self.jaxpr = inlined(getattr(inner, "jaxpr", inner))
        varies = [isinstance(atom, jex.Var) and parent.varies(atom) for atom in eqn.invars]
        self.carries = self.consts = 0
        if self.loops:
            ins = zip(eqn.invars, self.jaxpr.invars, strict=True)
            outs = zip(eqn.outvars, self.jaxpr.outvars, strict=True)
            self.carries = sum(shape_of(out) == shape_of(within) for out, within in outs)
            whole = sum(shape_of(atom) == shape_of(var) for atom, var in ins)
            self.consts = whole - self.carries
            varies = loop_varies(self.jaxpr, varies, self.consts, self.carries)
        self.scope = Scope(self.jaxpr, getattr(inner, "consts", ()), varies)
        self.emitted: dict[jex.Var, jex.Var] = {}
        # Outputs of the whole program that are finished here, and the loop's outputs that they are.
        self.finished: dict[int, int] = {}
        self.cut: list[jex.Var] = []
        self.tails: tuple[Tail, ...] = ()
        self.results: list[jex.Var] = []

    def outside(self, var: jex.Var) -> tuple[jex.Var, bool]:
        """The variable around the body that holds `var`, and whether the loop stacks it."""
        invars = list(self.jaxpr.invars)
        if var in invars:
            place = invars.index(var)
            atom = self.eqn.invars[place]
            carried = self.loops and self.consts <= place < self.consts + self.carries
            if isinstance(atom, jex.Var) and not carried:
                return atom, self.loops and place >= self.consts + self.carries
        if var not in self.emitted:
            shape = (self.eqn.params["length"], *shape_of(var)) if self.loops else shape_of(var)
            self.emitted[var] = jex.Var(jax.core.ShapedArray(shape, dtype_of(var)))
            self.parent.add_variable(self.emitted[var], self.scope.varies(var))
        return self.emitted[var], self.loops

    def finish(self, outputs: Mapping[int, int]) -> None:
        """Has more outputs finished in each round: {place in the program: place in the loop}."""
        self.finished.update(outputs)
        inner = {place: self.jaxpr.outvars[own] for place, own in self.finished.items()}
        self.cut, self.tails = self.scope.tails_of(inner)
        shapes = [self.eqn.outvars[own].aval for own in self.finished.values()]
        self.results = [jex.Var(shape) for shape in [*shapes, jax.core.ShapedArray((), "float32")]]

    def beside(self) -> list[jex.Var]:
        """What `run` returns beside the outputs of the loop or block."""
        return [*self.emitted.values(), *self.results]

    def run(
        self,
        inputs: list[Array],
        finish: Callable[[PyTree, list[Array]], list[Array]] | None = None,
        given: PyTree = None,
    ) -> dict[jex.Var, Array]:
        """Its outputs and what is `beside`; each round calls `finish` with its slice of `given`."""
        wanted = [*self.jaxpr.outvars, *self.emitted]
        names = [*self.eqn.outvars, *self.beside()]
        if not self.loops:
            inner = jax.make_jaxpr(lambda *values: self.scope.values(values, wanted))(*inputs)
            params = self.eqn.params | {"jaxpr": inner}
            return dict(zip(names, self.eqn.primitive.bind(*inputs, **params), strict=True))
        first = self.consts + self.carries
        consts, carry, slices = inputs[: self.consts], inputs[self.consts : first], inputs[first:]

        def body(
            carry: list[Array], xs: tuple[list[Array], PyTree]
        ) -> tuple[list[Array], list[Array]]:
            slices, given = xs
            found = self.scope.values([*consts, *carry, *slices], [*wanted, *self.cut])
            stacked = found[self.carries : len(wanted)]
            if finish is not None:
                stacked += finish(given, found[len(wanted) :])
            return found[: self.carries], stacked

        params = {name: self.eqn.params[name] for name in ("length", "reverse", "unroll")}
        carry, stacked = jax.lax.scan(body, carry, (slices, given), **params)
        return dict(zip(names, [*carry, *stacked], strict=True))
