"""Where a value stands in the programs that JAX is tracing, and what those have drawn so far.

The only file of this room that reads parts private to JAX; the tests pin them.
"""

from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal
from jaxtyping import Array

from dpfa_jax.noise import origins, reuse
from dpfa_jax.noise.keys import is_key_array
from dpfa_jax.noise.repeats import Value
from dpfa_jax.noise.varying import varying_axes

# Transformations that do not stage a program: tracers of theirs wrap a value of the same scope.
_WRAPPED_IN = {"BatchTracer": "val", "JVPTracer": "primal", "LinearizeTracer": "primal"}
_SEE_THROUGH = {"BatchTrace", "JVPTrace", "LinearizeTrace"}


class Program:
    """A program that is being traced: where its values come from, and the uses of its keys."""

    def __init__(self) -> None:
        self._reader = reuse.Reader()
        self._known: dict[object, Value] = {}
        self._held: list[object] = []  # so that no other value gets the id of one known by it
        self._drawn: list[origins.Use] = []

    def draw(self, use: origins.Use, names: tuple[str, ...]) -> None:
        """Notes a use. Errors: KeyReuseError where it may draw the noise of an earlier one."""
        reuse.require_different(self._reader.values, use, self._drawn, names)
        self._drawn.append(use)

    def origin(self, value: object) -> Value:
        """What is known of `value`, which is a constant or belongs to this program."""
        value = staged(value)
        if not isinstance(value, jax.core.Tracer):
            return self._constant(value)
        todo: list[Any] = [value]
        while todo:  # not by recursion: a chain of keys may be long
            tracer = todo[-1]
            equation = getattr(tracer, "parent", None)
            sources = () if equation is None else equation.in_tracers
            missing = [] if self._find(tracer) else [x for x in sources if not self._find(x)]
            todo += missing
            if missing:
                continue
            todo.pop()
            if self._find(tracer) or equation is None:
                self._known.setdefault(self._name(tracer), self._leaf(tracer))
                continue
            operands = [self._known[self._name(x)] for x in sources]
            results = self._reader.equation(equation, operands)
            self._known.update(zip(equation.outvars, results, strict=True))
        return self._known[self._name(value)]

    def _find(self, tracer: Any) -> bool:
        return self._name(tracer) in self._known

    def _name(self, tracer: Any) -> object:
        held = getattr(tracer, "val", tracer)
        if hasattr(tracer, "parent") and not isinstance(held, Literal):
            return held  # the variable
        self._held.append(held)
        return id(held)

    def _leaf(self, tracer: Any) -> Value:
        held = getattr(tracer, "val", tracer)
        if isinstance(held, Literal):
            return origins.constant(held.val, held.aval)
        frame = getattr(tracer._trace, "frame", None)
        if hasattr(tracer, "parent") and frame is not None and held in frame.constvar_to_val:
            return self._constant(frame.constvar_to_val[held])
        return Value(self._reader.values.fresh(), varying_axes(tracer))

    def _constant(self, value: object) -> Value:
        if isinstance(staged(value), jax.core.Tracer):  # closed over, from a program around
            return self.origin(value)
        if is_key_array(value):
            self._held.append(value)
            return Value(("key", id(value)))
        return origins.constant(np.asarray(value))


def staged(value: object) -> object:
    """The value below vmap and differentiation."""
    while type(value).__name__ in _WRAPPED_IN:
        value = getattr(value, _WRAPPED_IN[type(value).__name__])
    return value


def concrete(value: object) -> Array | np.ndarray | None:
    """The concrete array below vmap and differentiation, or None where a program is staged."""
    value = staged(value)
    if isinstance(value, jax.core.Tracer):
        return None
    return value if isinstance(value, jax.Array) else np.asarray(value)


def is_new_in_each_call(value: object) -> bool:
    """Whether a staged value depends on an argument of the program that is being traced."""
    value = staged(value)
    if not isinstance(value, jax.core.Tracer):
        return True
    frame = getattr(value._trace, "frame", None)  # None in an eager shard_map
    return frame is None or bool(frame.find_progenitors(value)[0])


def scope_of_value(value: object) -> Any:
    """The trace of the staged program that holds `value`; None for a concrete value."""
    value = staged(value)
    return value._trace if isinstance(value, jax.core.Tracer) else None


def scope_of_trace(trace: Any) -> object:
    """The trace of the staged program that is being traced now; None in eager execution."""
    while type(trace).__name__ in _SEE_THROUGH:
        trace = trace.parent_trace
    return None if type(trace).__name__ == "EvalTrace" else trace
