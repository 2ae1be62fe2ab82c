"""What a Flax model is made of: named arrays, and how to run the model on other arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxtyping import Array, Key

# parameter: nnx.Param or linen's "params". state: any other variable. stream: random numbers.
# constant: an array that is no variable, such as a table of positions.
Role = Literal["parameter", "state", "stream", "constant"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a model.

    Attributes:
      path: its name, "blocks/0/mlp_in/kernel".
      place: where it is, in full; alone of its kind where a path might not be.
      kind: the name of its nnx variable class or linen collection.
      role: what it is for.
      value: the array.
      variable: its nnx variable class, else None.
    """

    path: str
    place: str
    kind: str
    role: Role
    value: Array
    variable: type | None = None


@dataclasses.dataclass(frozen=True)
class Parts:
    """A model taken apart.

    Attributes:
      name: of the model's class.
      leaves: its arrays.
      merged: (arrays in the order of `leaves`, key of the random streams or None) -> the model.
      run: (function of a model, arrays, key) -> what the function returns for that model; refuses,
        by name, state that it would change and a random stream that it would draw from unseeded.
    """

    name: str
    leaves: tuple[Leaf, ...]
    merged: Callable[[list[Array], Key[Array, ""] | None], Any]
    run: Callable[[Callable[[Any], Any], list[Array], Key[Array, ""] | None], Any]
