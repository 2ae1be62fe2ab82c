"""Finds repeated noise keys in a whole program, before it runs."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from dpfa_jax.core import KeyReuseError
from dpfa_jax.noise.hazards import guard_p

# Primitives that hand their first operands on unchanged.
_IDENTITIES = (
    "dpfa_guard_noise_key",
    "optimization_barrier",
    "copy",
    "copy_p",
    "sharding_constraint",
    "pvary",
)


class _Value(NamedTuple):
    """What is known of one value: its identity, and over which loops it changes."""

    identity: object
    varies: frozenset[object]


class _Uses(NamedTuple):
    """One use of a key: the key's identity and what tells uses of one key apart."""

    key: object
    numbers: tuple[object, ...]


def check_no_reuse(function: Callable[..., object]) -> Callable[..., None]:
    """A function of the same arguments that traces `function` and refuses repeated noise keys.

    It finds, without running anything: a key that stays the same over the iterations of a scan or
    while loop (or that comes back: swapped carries), a key that depends on no argument of
    `function`, and two releases under one key and the same (release_id, layer).

    Errors of the returned function: KeyReuseError.
    """

    def check(*args: object, **kwargs: object) -> None:
        closed = jax.make_jaxpr(function)(*args, **kwargs)
        _Reader().program(closed.jaxpr)

    return check


class _Reader:
    """Reads a program equation by equation, numbering values so that equal ones get one number."""

    def __init__(self) -> None:
        self._fresh = itertools.count()
        self._known: dict[object, object] = {}
        self._used: set[_Uses] = set()

    def program(self, jaxpr: Jaxpr) -> None:
        call = object()  # changes from call to call of the whole program
        inputs = [_Value(next(self._fresh), frozenset({call})) for _ in jaxpr.invars]
        self._body(jaxpr, inputs, frozenset({call}), counts=True)

    def _body(
        self, jaxpr: Jaxpr, inputs: list[_Value], loops: frozenset[object], counts: bool
    ) -> list[_Value]:
        values: dict[Var, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var in jaxpr.constvars:
            values[var] = _Value(next(self._fresh), frozenset())

        def read(atom: Var | Literal) -> _Value:
            if isinstance(atom, Literal):
                return _Value(("literal", str(atom.val), str(atom.aval)), frozenset())
            return values[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            results = self._equation(equation, operands, loops, counts)
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(
        self,
        equation: JaxprEqn,
        operands: list[_Value],
        loops: frozenset[object],
        counts: bool,
    ) -> list[_Value]:
        name, params = equation.primitive.name, equation.params
        if equation.primitive is guard_p:
            self._use(operands[0], operands[1 : 1 + params["num_uses"]], loops, counts)
        if name in _IDENTITIES and len(equation.outvars) <= len(operands):
            return operands[: len(equation.outvars)]
        if name == "scan":
            return self._scan(equation, operands, loops, counts)
        if name == "while":
            return self._while(params, operands, loops, counts)
        if name == "cond":
            return self._cond(params, operands, loops, counts)
        # A differentiated checkpoint computes again what its first run has drawn and counted.
        counts = counts and not params.get("differentiated", False)
        body = _only_body(params)
        if body is not None and len(body.invars) == len(operands):
            results = self._body(body, operands, loops, counts)
            if len(results) == len(equation.outvars):
                return results
        return self._derived(equation, operands)

    def _derived(self, equation: JaxprEqn, operands: list[_Value]) -> list[_Value]:
        varies = frozenset().union(*(value.varies for value in operands))
        made = (
            equation.primitive.name,
            tuple(sorted((k, str(v)) for k, v in equation.params.items())),
            tuple(value.identity for value in operands),
        )
        number = self._known.setdefault(made, next(self._fresh))
        return [_Value((number, place), varies) for place in range(len(equation.outvars))]

    def _use(
        self, key: _Value, numbers: list[_Value], loops: frozenset[object], counts: bool
    ) -> None:
        varies = key.varies.union(*(number.varies for number in numbers))
        if not loops <= varies:
            raise KeyReuseError(
                "a noise key stays the same over the iterations of a loop, or over calls of the "
                "whole function. Carry a new key (noise_key, step_key = jax.random.split("
                "noise_key)), scan over keys, or fold the loop index in; pass keys as arguments."
            )
        use = _Uses(key.identity, tuple(number.identity for number in numbers))
        if counts:
            if use in self._used:
                raise KeyReuseError(
                    "one noise key serves two releases of the same (release_id, layer). Split the "
                    "key, or give each release its own release_id."
                )
            self._used.add(use)

    def _cond(
        self, params: dict, operands: list[_Value], loops: frozenset[object], counts: bool
    ) -> list[_Value]:
        before, after = self._used, set(self._used)
        outputs = []
        for branch in params["branches"]:  # one of them runs
            self._used = set(before)
            outputs.append(self._body(_open(branch), operands[1:], loops, counts))
            after |= self._used
        self._used = after
        merged = []
        for choices in zip(*outputs, strict=True):
            varies = operands[0].varies.union(*(value.varies for value in choices))
            same = len({value.identity for value in choices}) == 1
            merged.append(choices[0] if same else _Value(next(self._fresh), varies))
        return merged

    def _scan(
        self, equation: JaxprEqn, operands: list[_Value], loops: frozenset[object], counts: bool
    ) -> list[_Value]:
        body, loop = _open(equation.params["jaxpr"]), object()
        # By shape, since the names of scan's parameters change: a slice and a stacked result have
        # one axis less inside the body than outside.
        slices = sum(_loses_axis(*pair) for pair in zip(equation.invars, body.invars, strict=True))
        stacked = sum(
            _loses_axis(*pair) for pair in zip(equation.outvars, body.outvars, strict=True)
        )
        fixed = len(operands) - slices
        first = fixed - (len(equation.outvars) - stacked)
        xs = [_Value(next(self._fresh), value.varies | {loop}) for value in operands[fixed:]]
        demanded = loops if equation.params["length"] == 1 else loops | {loop}
        results = self._loop(
            body, operands[:first], operands[first:fixed], xs, loop, demanded, counts
        )
        return [_Value(next(self._fresh), value.varies - {loop}) for value in results]

    def _while(
        self, params: dict, operands: list[_Value], loops: frozenset[object], counts: bool
    ) -> list[_Value]:
        skip, first = params["cond_nconsts"], params["body_nconsts"]
        loop = object()
        consts, carry = operands[skip : skip + first], operands[skip + first :]
        body = _open(params["body_jaxpr"])
        results = self._loop(body, consts, carry, [], loop, loops | {loop}, counts)
        return [_Value(next(self._fresh), value.varies - {loop}) for value in results]

    def _loop(
        self,
        body: Jaxpr,
        consts: list[_Value],
        carry: list[_Value],
        xs: list[_Value],
        loop: object,
        loops: frozenset[object],
        counts: bool,
    ) -> list[_Value]:
        """Reads a loop's body with each carry marked as changing only if it really does."""
        changing = [True] * len(carry)
        identities = [next(self._fresh) for _ in carry]
        while True:
            inputs = [
                _Value(identity, value.varies | {loop} if changes else value.varies)
                for identity, value, changes in zip(identities, carry, changing, strict=True)
            ]
            quiet = _Reader()
            quiet._fresh = self._fresh
            results = quiet._results(body, [*consts, *inputs, *xs])
            source: dict[object, int] = {own: place for place, own in enumerate(identities)}
            came_from = [source.get(value.identity) for value in results[: len(carry)]]
            still = [
                changes and loop in results[place].varies and not _returns(place, came_from)
                for place, changes in enumerate(changing)
            ]
            if still == changing:
                break
            changing = still
        return self._body(body, [*consts, *inputs, *xs], loops, counts)

    def _results(self, body: Jaxpr, inputs: list[_Value]) -> list[_Value]:
        # No enclosing loop is demanded and nothing is counted: only the flow of values is wanted.
        return self._body(body, inputs, frozenset(), counts=False)


def _returns(place: int, came_from: list[int | None]) -> bool:
    """Whether a carry is handed round unchanged until it is back at its own place."""
    at = came_from[place]
    for _ in came_from:
        if at is None or at == place:
            break
        at = came_from[at]
    return at == place


def _loses_axis(outside: Var | Literal, inside: Var | Literal) -> bool:
    return len(_shape(outside)) == len(_shape(inside)) + 1


def _shape(atom: Var | Literal) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())


def _open(jaxpr: Any) -> Jaxpr:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _only_body(params: dict) -> Jaxpr | None:
    """The body of a call-like equation (jit, checkpoint, custom_vjp, shard_map), if it has one."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in params:
            return _open(params[name])
    return None
