"""What a kernel's body works on, without numbers: references that record what is done to them."""

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

integer = np.int32


class Dims(NamedTuple):
    """`pl.ds`."""

    start: Any
    size: int

    @property
    def range(self):
        return range(int(self.start), int(self.start) + self.size)


class Numbers:
    """An array whose numbers are left out."""

    __array_ufunc__ = None
    dtype = jnp.bfloat16

    def __init__(self, shape=None):
        self.shape = shape

    def _same(self, *_, **__):
        return Numbers(self.shape)

    astype = __getitem__ = __invert__ = __neg__ = _same
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _same
    __truediv__ = __rtruediv__ = _same
    __and__ = __rand__ = __or__ = __ror__ = __lshift__ = __rlshift__ = __rshift__ = _same
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _same
    __hash__ = object.__hash__

    def max(self, axis):
        return Numbers()

    sum = max


class Ref:
    """A reference: to global or shared memory, an accumulator or barriers."""

    dtype = jnp.bfloat16

    def __init__(self, recording, space, name, shape, *, index=(), values=None):
        self._recording, self.space, self.name, self.shape = recording, space, name, shape
        self.index, self._values = index, values

    @property
    def at(self):
        return _At(self)

    @property
    def T(self):
        return self

    def sub(self, index):
        index = (*self.index, index if isinstance(index, tuple) else (index,))
        return Ref(self._recording, self.space, self.name, self.shape, index=index)

    @property
    def key(self):
        """Place: the name and the leading integers of the index."""
        flat = itertools.chain.from_iterable(self.index)
        leading = itertools.takewhile(lambda x: not isinstance(x, Dims | slice), flat)
        return self._recording.place_of((self.name, *(int(x) for x in leading)))

    def __getitem__(self, index):
        if self._values is not None:
            return integer(np.asarray(self._values)[index])
        if self.space == "accumulator":
            self._recording.op("multiplied", 0)
        elif self.space == "shared":
            self._recording.op("read", self.key, self.name)
        return Numbers(self.shape if self.space == "accumulator" else None)

    def __setitem__(self, index, value):
        if self.space == "shared":
            self._recording.op("write", self.key, self.name)
        elif self.space == "global":
            ref = self if index is Ellipsis else self.sub(index)
            self._recording.op("put", self.name, ref.index[0])


class _At:
    def __init__(self, ref):
        self._ref = ref

    def __getitem__(self, index):
        return self._ref.sub(index)
