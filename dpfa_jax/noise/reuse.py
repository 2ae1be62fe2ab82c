"""Finds repeated noise keys in a whole program, before it runs."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, jaxprs_in_params

from dpfa_jax.core import KeyReuseError
from dpfa_jax.noise import origins, varying
from dpfa_jax.noise.keys import is_key_array
from dpfa_jax.noise.origins import Origins, Use
from dpfa_jax.noise.repeats import Value

GUARD = "dpfa_guard_noise_key"


def check_no_reuse(function: Callable[..., object]) -> Callable[..., None]:
    """A function of the same arguments that traces `function` and refuses repeated noise keys.

    It finds, without running anything: a key that stays the same over the iterations of a scan or
    while loop (or that comes back: swapped carries), over the places of a vmap or the shards of a
    shard_map; a key that depends on no argument of `function`; and two releases under one key,
    unless a number of their use (release_id, layer, batch_start, head_start) surely differs.

    Not found: a key picked twice from an array by numbers that are computed or given; keys rebuilt
    from some of their words, or derived by numbers that turn out equal; numbers that repeat over
    the iterations of a loop although they are computed from its index.

    Errors of the returned function: KeyReuseError.
    """

    def check(*args: object, **kwargs: object) -> None:
        closed = jax.make_jaxpr(function)(*args, **kwargs)
        Reader().program(closed.jaxpr, jax.tree.leaves((args, kwargs)))

    return check


def require_distinct(use: Use, shapes: list[tuple[int, ...]]) -> None:
    """Refuses a use of an array of keys, under vmap, of which two are one.

    `shapes` are those of the keys and of the numbers. Errors: KeyReuseError.
    """
    numbers = list(zip(use.numbers, shapes[1:], strict=True))
    if origins.repeated_axes(use.key, shapes[0], numbers):
        raise KeyReuseError(
            "noise_key: the keys of a vmap are one key, repeated (broadcast, stack, repeat): every "
            "element would get the same noise. Map over different keys: charge(ledger, release, "
            "count=size) pays for and gives that many; where every element is another individual, "
            "jax.random.split(noise_key, size) of one charge will do."
        )


def require_different(values: Origins, new: Use, drawn: list[Use], names: tuple[str, ...]) -> None:
    """Refuses a use that is, or may be, one of those `drawn` under the same key.

    `names` are those of the use's numbers. Errors: KeyReuseError.
    """
    for old in drawn:
        verdict = values.compare(new, old)
        if verdict == origins.SAME:
            raise KeyReuseError(
                "noise_key serves two answers of one program: their difference is noise-free. "
                "Take one key for each: charge(ledger, release) gives one each time; release_id "
                "and layer tell charged uses of one key apart."
            )
        if verdict == origins.UNSURE:
            places = range(len(new.numbers))
            found = [i for i in places if values.apart(new, old, i) == origins.UNSURE]
            unsure = " or ".join(names[i] if i < len(names) else f"uses[{i}]" for i in found)
            raise KeyReuseError(
                f"noise_key serves two answers of one program that only {unsure} could tell "
                "apart: numbers that are computed, and may be equal. Pass literal ones, or take "
                "one key for each answer: charge(ledger, release) gives one each time."
            )


class Reader:
    """Reads a program equation by equation, numbering values so that equal ones get one number."""

    def __init__(self) -> None:
        self.values = Origins()
        self._used: list[Use] = []

    def program(self, jaxpr: Jaxpr, arguments: list[object]) -> None:
        """Reads a whole program. Errors: KeyReuseError."""
        call = object()  # changes from call to call of the whole program
        inputs = [self._argument(x, frozenset({call})) for x in arguments]
        if len(inputs) != len(jaxpr.invars):
            inputs = [Value(self.values.fresh(), frozenset({call})) for _ in jaxpr.invars]
        self._body(jaxpr, inputs, frozenset({call}), counts=True)

    def _argument(self, argument: Any, varies: frozenset[object]) -> Value:
        """Keys at hand are compared by their words; nothing else is known of an argument."""
        if not is_key_array(argument) or isinstance(argument, jax.core.Tracer):
            return Value(self.values.fresh(), varies)
        words = np.asarray(jax.random.key_data(argument))
        repeats = frozenset(
            axis
            for axis, size in enumerate(argument.shape)
            if size and np.unique(words, axis=axis).shape[axis] < size
        )
        return Value(self.values.number("words", words.tobytes()), varies, repeats)

    def _body(
        self, jaxpr: Jaxpr, inputs: list[Value], loops: frozenset[object], counts: bool
    ) -> list[Value]:
        values: dict[Var, Value] = dict(zip(jaxpr.invars, inputs, strict=True))
        for var in jaxpr.constvars:
            values[var] = Value(self.values.fresh())

        def read(atom: Var | Literal) -> Value:
            if isinstance(atom, Literal):
                return origins.constant(atom.val, atom.aval)
            return values[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            results = self.equation(equation, operands, loops, counts)
            values.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(
        self,
        equation: JaxprEqn,
        operands: list[Value],
        loops: frozenset[object] = frozenset(),
        counts: bool = False,
    ) -> list[Value]:
        """The results of one equation.

        Uses inside must change over `loops`, and are noted if it `counts`. Errors: KeyReuseError.
        """
        name, params = equation.primitive.name, equation.params
        if name == GUARD and loops:  # outside of every loop only the flow of values is wanted
            self._use(equation, operands, loops, counts)
        if name == "scan":
            return self._scan(equation, operands, loops, counts)
        if name == "while":
            return self._while(params, operands, loops, counts)
        if name == "cond":
            return self._cond(params, operands, loops, counts)
        if name == "axis_index":
            return [
                Value(self.values.number(name, params["axis_name"]), _axes(params["axis_name"]))
            ]
        # A differentiated checkpoint computes again what its first run has drawn and counted.
        counts = counts and not params.get("differentiated", False)
        body = _only_body(params)
        if body is not None and len(body.invars) == len(operands):
            if name == "shard_map":
                return self._shard_map(equation, body, operands, loops, counts)
            results = self._body(body, operands, loops, counts)
            if len(results) == len(equation.outvars):
                return results
        elif any(_draws(inner) for inner in jaxprs_in_params(params)):
            raise KeyReuseError(
                f"a noise key draws inside {name!r}, whose body cannot be read: whether it runs "
                "more than once with one key, nobody can tell. Call it without that."
            )
        return self.values.derive(equation, operands)

    def _use(
        self, equation: JaxprEqn, operands: list[Value], loops: frozenset[object], counts: bool
    ) -> None:
        params, (key, *others) = equation.params, operands
        use = Use(key, tuple(others[: len(params["sizes"])]), params["sizes"])
        varies = key.varies.union(*(number.varies for number in use.numbers))
        if not loops <= varies:
            raise KeyReuseError(
                "a noise key stays the same over the iterations of a loop, or over calls of the "
                "whole function. Carry a new key (noise_key, step_key = jax.random.split("
                "noise_key)), scan over different keys, or fold the loop index in; pass keys as "
                "arguments."
            )
        typed = [varying.varying_axes(atom.aval) for atom in equation.invars]
        shards = typed[0] & frozenset().union(*typed[1 + len(use.numbers) :])
        if not shards <= varies:
            raise KeyReuseError(
                f"noise_key is the same on all shards of mesh axes {sorted(shards - varies)}: an "
                "array of keys that repeats one, or a key that is only marked as varying. Pass "
                "different keys: charge(ledger, release, count=shards)."
            )
        shapes = [getattr(atom.aval, "shape", ()) for atom in equation.invars]
        require_distinct(use, shapes[: 1 + len(use.numbers)])
        if counts and params["is_answer"]:
            require_different(self.values, use, self._used, params["names"])
            self._used.append(use)

    def _shard_map(
        self,
        equation: JaxprEqn,
        body: Jaxpr,
        operands: list[Value],
        loops: frozenset[object],
        counts: bool,
    ) -> list[Value]:
        specs = equation.params["in_specs"]
        inputs = [self._shard(*pair) for pair in zip(operands, specs, strict=True)]
        results = self._body(body, inputs, loops, counts)
        axes = _axes(equation.params["mesh"].axis_names)
        return [Value(self.values.fresh(), value.varies - axes) for value in results]

    def _shard(self, value: Value, spec: Any) -> Value:
        cut = {axis: _axes(names) for axis, names in enumerate(spec) if names is not None}
        if not cut:
            return value
        over = frozenset().union(
            *(axes for place, axes in cut.items() if place not in value.repeats)
        )
        identity = self.values.number("shard", value.identity, str(spec))
        return Value(identity, value.varies | over, value.repeats)

    def _cond(
        self, params: dict, operands: list[Value], loops: frozenset[object], counts: bool
    ) -> list[Value]:
        before, after, outputs = self._used, [*self._used], []
        for branch in params["branches"]:  # one of them runs
            self._used = [*before]
            outputs.append(self._body(_open(branch), operands[1:], loops, counts))
            after += self._used[len(before) :]
        self._used = after
        return [self._chosen(choices) for choices in zip(*outputs, strict=True)]

    def _chosen(self, choices: tuple[Value, ...]) -> Value:
        if len({value.identity for value in choices}) == 1:
            return choices[0]
        return Value(self.values.fresh(), self.values.chosen_varies([*choices]))

    def _scan(
        self, equation: JaxprEqn, operands: list[Value], loops: frozenset[object], counts: bool
    ) -> list[Value]:
        body, loop = _open(equation.params["jaxpr"]), object()
        # By shape, since the names of scan's parameters change: a slice and a stacked result have
        # one axis less inside the body than outside.
        slices = sum(_loses_axis(*pair) for pair in zip(equation.invars, body.invars, strict=True))
        stacked = sum(
            _loses_axis(*pair) for pair in zip(equation.outvars, body.outvars, strict=True)
        )
        fixed = len(operands) - slices
        first = fixed - (len(equation.outvars) - stacked)
        xs = [self._each(value, loop) for value in operands[fixed:]]
        demanded = loops if equation.params["length"] == 1 else loops | {loop}
        results = self._loop(
            body, operands[:first], operands[first:fixed], xs, loop, demanded, counts
        )
        carried = len(results) - stacked
        return [*results[:carried], *(self._stacked(value, loop) for value in results[carried:])]

    def _stacked(self, each: Value, loop: object) -> Value:
        repeats = {axis + 1 for axis in each.repeats} | ({0} if loop not in each.varies else set())
        return Value(self.values.fresh(), each.varies - {loop}, frozenset(repeats))

    def _each(self, array: Value, loop: object) -> Value:
        changes = array.varies if 0 in array.repeats else array.varies | {loop}
        repeats = frozenset(axis - 1 for axis in array.repeats if axis)
        return Value(self.values.each(array.identity, loop), changes, repeats)

    def _while(
        self, params: dict, operands: list[Value], loops: frozenset[object], counts: bool
    ) -> list[Value]:
        skip, first = params["cond_nconsts"], params["body_nconsts"]
        loop = object()
        if _draws(_open(params["cond_jaxpr"])):
            raise KeyReuseError(
                "a noise key draws in the condition of a while_loop, which runs once more than its "
                "body. Draw in the body, and carry what the condition needs."
            )
        consts, carry = operands[skip : skip + first], operands[skip + first :]
        body = _open(params["body_jaxpr"])
        return self._loop(body, consts, carry, [], loop, loops | {loop}, counts)

    def _loop(
        self,
        body: Jaxpr,
        consts: list[Value],
        carry: list[Value],
        xs: list[Value],
        loop: object,
        loops: frozenset[object],
        counts: bool,
    ) -> list[Value]:
        """Reads a loop's body with each carry marked as changing only if it really does.

        Returns the carries after the loop, and the other results of an iteration.
        """
        changing = [True] * len(carry)
        identities = [self.values.fresh() for _ in carry]
        self.values.carries |= dict.fromkeys(identities, loop)
        while True:
            inputs = [
                Value(identity, value.varies | {loop} if changes else value.varies)
                for identity, value, changes in zip(identities, carry, changing, strict=True)
            ]
            # No enclosing loop is demanded and nothing is counted: only the flow is wanted.
            results = self._body(body, [*consts, *inputs, *xs], frozenset(), counts=False)
            source: dict[object, int] = {own: place for place, own in enumerate(identities)}
            came_from = [source.get(value.identity) for value in results[: len(carry)]]
            still = [
                changes and loop in results[place].varies and not _returns(place, came_from)
                for place, changes in enumerate(changing)
            ]
            if still == changing:
                break
            changing = still
        # What is handed on as it came is the value from outside.
        inputs = [
            before if origin == place else value
            for place, (before, origin, value) in enumerate(
                zip(carry, came_from, inputs, strict=True)
            )
        ]
        results = self._body(body, [*consts, *inputs, *xs], loops, counts)
        after = [
            before
            if origin == place
            else Value(self.values.fresh(), result.varies - {loop}, result.repeats)
            for place, (before, origin, result) in enumerate(
                zip(carry, came_from, results, strict=False)
            )
        ]
        return [*after, *results[len(carry) :]]


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


def _draws(jaxpr: Jaxpr) -> bool:
    return any(
        equation.primitive.name == GUARD
        or any(_draws(inner) for inner in jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )


def _only_body(params: dict) -> Jaxpr | None:
    """The body of a call-like equation (jit, checkpoint, custom_vjp, shard_map), if it has one."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        if name in params:
            return _open(params[name])
    return None


def _axes(names: Any) -> frozenset[object]:
    return frozenset(names if isinstance(names, tuple | list) else (names,))
