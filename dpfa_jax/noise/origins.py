"""Where traced values come from: which are equal, which repeat, which numbers surely differ.

Values of a program are numbered so that equal derivations get one number. A key is the same after
`reshape` or `clone`; child i of `split` and `fold_in(key, i)` are one key; an integer is known up
to a multiple and a sum of what it comes from. What is not known to be equal counts as another
value; two numbers that are not known to differ are `UNSURE`.
"""

import itertools
import math
from typing import Any, Final, Literal, NamedTuple, TypeGuard

import jax.numpy as jnp
import numpy as np

from dpfa_jax.noise.repeats import Value, repeats_of

SAME: Final = "same"
DIFFERENT: Final = "different"
UNSURE: Final = "unsure"
Verdict = Literal["same", "different", "unsure"]
_WORD = 2**32  # numbers of uses are taken modulo this
_NOTHING: frozenset[Any] = frozenset()


def _set_of(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Primitives that hand their first operands on unchanged.
_IDENTITIES = _set_of(
    "dpfa_guard_noise_key optimization_barrier copy copy_p sharding_constraint pvary pcast reshard "
    "random_clone random_wrap random_unwrap"
)
# The same elements in the same order, if only axes of size 1 come or go.
_RESHAPES = _set_of("reshape squeeze expand_dims broadcast_in_dim tile slice transpose")
# Several inputs give one result: what changes does not make it change.
_COLLAPSES = _set_of(
    "div rem and or not max min clamp sign floor ceil round is_finite eq ne lt le gt ge argmax "
    "argmin reduce_sum reduce_max reduce_min reduce_and reduce_or shift_right_logical "
    "shift_right_arithmetic population_count"
)


class Affine(NamedTuple):
    """An integer as factor * base + offset, modulo 2^32; a known number has no base."""

    base: object
    factor: int
    offset: int


class Use(NamedTuple):
    """One use of a key: the numbers that tell it from others, and how many follow each of them."""

    key: Value
    numbers: tuple[Value, ...]
    sizes: tuple[int, ...]


def constant(value: object, aval: object = "") -> Value:
    """The value of a literal."""
    array = np.asarray(value) if isinstance(value, (bool, int, np.ndarray, np.generic)) else None
    if array is not None and array.size == 1 and array.dtype.kind in "iu":
        return Value(Affine(None, 0, int(array.reshape(())) % _WORD))
    if array is not None:
        return Value(("array", str(array.dtype), array.shape, array.tobytes()))
    return Value(("literal", str(value), str(aval)))


class Origins:
    """Numbers values, so that equal derivations get one number."""

    def __init__(self) -> None:
        self._count = itertools.count()
        self._numbers: dict[object, int] = {}
        self._made: dict[object, tuple[Any, ...]] = {}
        self.carries: dict[object, object] = {}  # identity of a carry -> its loop

    def fresh(self) -> int:
        """A number that no value has."""
        return next(self._count)

    def number(self, *made: object) -> int:
        """The number of what is made so."""
        if made not in self._numbers:
            self._numbers[made] = self.fresh()
            self._made[self._numbers[made]] = made
        return self._numbers[made]

    def derive(self, equation: Any, operands: list[Value]) -> list[Value]:
        """The values of an equation without a body."""
        name, params = equation.primitive.name, equation.params
        if not equation.outvars:
            return []
        shapes = [_shape(atom) for atom in equation.invars]
        repeats = repeats_of(name, params, operands, shapes, _shape(equation.outvars[0]))
        if name in _IDENTITIES and len(equation.outvars) <= len(operands):
            outvars = equation.outvars
            return [
                value._replace(repeats=repeats if len(outvars) == 1 else value.repeats)
                for value, _ in zip(operands, outvars, strict=False)
            ]
        places = range(len(equation.outvars))
        found = [self._identity(equation, operands, place) for place in places]
        varies = self._varies(name, operands)
        return [Value(made, _NOTHING if _is_known(made) else varies, repeats) for made in found]

    def _identity(self, equation: Any, operands: list[Value], place: int) -> object:
        name, params = equation.primitive.name, equation.params
        before = [_shape(atom) for atom in equation.invars]
        after = _shape(equation.outvars[place])
        own = [value.identity for value in operands]
        number = _arithmetic(name, equation, own)
        if number is not None:
            return number
        if name in _RESHAPES and _solid(before[0]) == _solid(after):
            order = [axis for axis in params.get("permutation", ()) if before[0][axis] != 1]
            if order == sorted(order):
                return own[0]
        at = own[1].offset if len(own) > 1 and _is_known(own[1]) else None
        if name == "iota" and len(after) == 1:
            return self.number("iota", after[0])
        if name == "random_fold_in" and at is not None and before[0] == ():
            return self.number("child", own[0], at)
        if name == "random_split" and before[0] == () and len(after) == 1:
            return self.number("children", own[0], after[0])
        if name == "stack" and params["axis"] == 0 and not any(before):
            return self.number("stack", *own)
        if name == "unstack" and len(before[0]) == 1:
            return self._element(own[0], place)
        if name == "slice" and len(before[0]) == 1 and params["strides"] in (None, (1,)):
            start = params["start_indices"][0]
            return (
                self._element(own[0], start)
                if after == (1,)
                else self._part(own[0], start, params["limit_indices"][0])
            )
        if name == "dynamic_slice" and len(before[0]) == 1 and after == (1,) and at is not None:
            return self._element(own[0], min(at, before[0][0] - 1))
        made = (name, tuple(sorted((k, str(v)) for k, v in params.items())), *own)
        return (self.number(*made), place)

    def _element(self, array: object, index: int) -> object:
        made = self._made.get(array, ("",))
        if made[0] == "stack":
            return made[1 + index]
        if made[0] == "iota":
            return Affine(None, 0, index)
        if made[0] == "children":
            return self.number("child", made[1], index)
        if made[0] == "part":
            return self._element(made[1], made[2] + index)
        return self.number("element", array, index)

    def _part(self, array: object, start: int, stop: int) -> object:
        kind, *made = self._made.get(array, ("",))
        if kind == "stack":
            return self.number("stack", *made[start:stop])
        if kind == "part":
            return self._part(made[0], made[1] + start, made[1] + stop)
        return self.number("part", array, start, stop)

    def each(self, array: object, loop: object) -> object:
        """The identity of one slice after the other of `array`, in a scan."""
        if isinstance(array, Affine):
            return _plain(self.number("each", array.base, loop), array.factor, array.offset)
        return self.number("each", array, loop)

    def _varies(self, name: str, operands: list[Value]) -> frozenset[object]:
        if name in _COLLAPSES:
            return _NOTHING
        if name == "select_n":
            return self.chosen_varies(operands[1:])
        return _NOTHING.union(*(value.varies for value in operands))

    def chosen_varies(self, choices: list[Value]) -> frozenset[object]:
        """Over which loops one of several values changes, whichever is chosen.

        A carry that is chosen as it is does not change there.
        """
        return frozenset.intersection(
            *(value.varies - {self.carries.get(value.identity)} for value in choices)
        )

    def _spans(self, key: object) -> list[tuple[object, float, float]]:
        """Where the key, or array of keys, lies: (among the elements of what, from, to before)."""
        kind, *made = self._made.get(key, ("",))
        if kind == "child":
            return [(("children of", made[0]), made[1], made[1] + 1)]
        if kind == "children":
            return [(("children of", made[0]), 0, made[1])]
        if kind == "element":
            return [(made[0], made[1], made[1] + 1)]
        if kind == "each":
            return self._spans(made[0])
        if kind == "stack":
            return [span for member in made for span in self._spans(member)]
        if kind == "part":
            return [
                (g, at + made[1], min(end, at + made[2])) for g, at, end in self._spans(made[0])
            ]
        return [(key, 0, math.inf)]

    def compare(self, one: Use, other: Use) -> Verdict:
        """Whether two uses draw the same noise."""
        pairs = itertools.product(self._spans(one.key.identity), self._spans(other.key.identity))
        if not any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for a, b in pairs):
            return DIFFERENT
        if len(one.numbers) != len(other.numbers):
            return DIFFERENT
        verdicts = [self.apart(one, other, place) for place in range(len(one.numbers))]
        if DIFFERENT in verdicts:
            return DIFFERENT
        return UNSURE if UNSURE in verdicts else SAME

    def apart(self, one: Use, other: Use, place: int) -> Verdict:
        """Whether the ranges from one number of two uses share no number."""
        size, other_size = one.sizes[place], other.sizes[place]
        a, b = (_affine(use.numbers[place].identity) for use in (one, other))
        # Element by element only where the keys are the same ones in the same order.
        is_aligned = one.key.identity == other.key.identity
        is_aligned &= not (one.key.repeats or other.key.repeats)
        if not is_aligned or self._root(a.base) != self._root(b.base) or a.factor != b.factor:
            (least, most), (other_least, other_most) = self._bounds(a), self._bounds(b)
            is_apart = most + size <= other_least or other_most + other_size <= least
            return DIFFERENT if is_apart else UNSURE
        distance = (b.offset - a.offset) % _WORD
        is_same = a.base == b.base
        if is_same and one.numbers[place].varies <= one.key.varies & other.key.varies:
            is_apart = size <= distance <= _WORD - other_size
        else:  # of any two iterations: distances are off by multiples of the factor
            least, most = self._bounds(a)
            away = (distance + _WORD // 2) % _WORD - _WORD // 2  # signed, where nothing wraps
            wraps = math.isinf(least)
            step = math.gcd(a.factor, _WORD) if wraps else a.factor
            is_apart = size <= away % step <= step - other_size if a.factor else False
            is_apart |= most - least + size <= distance <= _WORD - (most - least) - other_size
        if is_apart:
            return DIFFERENT
        is_met = distance < size or _WORD - distance < other_size
        return SAME if is_same and is_met else UNSURE

    def _root(self, base: object) -> object:
        """What a loop goes through, for the number of an iteration."""
        kind, *made = self._made.get(base, ("",))
        return made[0] if kind == "each" else base

    def _bounds(self, number: Affine) -> tuple[float, float]:
        """The least and the largest value, where they are known to be 32-bit words."""
        if number.base is None:
            return number.offset, number.offset
        kind, *made = self._made.get(self._root(number.base), ("",))
        most = number.offset + number.factor * (made[0] - 1) if kind == "iota" else _WORD
        return (number.offset, most) if most < _WORD else (-math.inf, math.inf)


def repeated_axes(key: Value, shape: tuple[int, ...], numbers: list[tuple[Value, Any]]) -> set[int]:
    """Axes of a use of several keys along which two places have the same key and numbers.

    `numbers` are values with their shapes, which broadcast to that of the keys.
    """
    return {
        axis
        for axis in key.repeats
        if shape[axis] > 1
        and all(
            not size or size[axis] == 1 or axis in number.repeats
            for number, size in numbers
            if len(size) in (0, len(shape))
        )
    }


def _is_known(identity: object) -> TypeGuard[Affine]:
    return isinstance(identity, Affine) and identity.base is None


def _affine(identity: object) -> Affine:
    return identity if isinstance(identity, Affine) else Affine(identity, 1, 0)


def _arithmetic(name: str, equation: Any, own: list[object]) -> object | None:
    """The identity of integers of 32 bits or more after `add`, `sub`, `mul` by a known number."""
    types = [getattr(atom.aval, "dtype", None) for atom in (*equation.invars, equation.outvars[0])]
    if not all(t is not None and _is_word(t) for t in types):
        return None
    if name == "convert_element_type":
        return own[0]
    if name not in ("add", "sub", "mul"):
        return None
    a, b = (_affine(identity) for identity in own)
    if name == "mul":
        if a.base is None:
            a, b = b, a
        if b.base is not None:
            return None
        return _plain(a.base, a.factor * b.offset, a.offset * b.offset)
    if name == "sub":
        b = Affine(b.base, -b.factor, -b.offset)
    if a.base is not None and b.base is not None:
        return None
    base, factor = (a.base, a.factor) if b.base is None else (b.base, b.factor)
    return _plain(base, factor, a.offset + b.offset)


def _plain(base: object, factor: int, offset: int) -> object:
    factor, offset = factor % _WORD, offset % _WORD
    if base is not None and (factor, offset) == (1, 0):
        return base
    return Affine(base if factor else None, factor if base is not None else 0, offset)


def _is_word(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize >= 4


def _solid(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _shape(atom: Any) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())
