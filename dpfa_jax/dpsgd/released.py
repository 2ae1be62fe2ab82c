"""What has left the sum of clipped gradients with its noise, and what makes it leave."""

import dataclasses
from collections.abc import Callable, Sequence

from jaxtyping import Array, Float, Float32


@dataclasses.dataclass(frozen=True, eq=False)
class Released:
    """The released mean of one leaf, noise in it.

    No array and no pytree: whatever takes it for a sum (adds to it, scales it, noises it) fails.

    Attributes:
      leaf: its place among the parameters, whose noise it has.
      mean: in the parameter's shape.
    """

    leaf: int
    mean: Float32[Array, "..."]


# A sum, noise due; or what has left with it.
Leaf = Float32[Array, "..."] | Released

# (gradients of ALL examples of a batch in the parameter's shape, what each is multiplied by) -> the
# released mean of one leaf; None where this takes two passes: then a sum is due.
Release = Callable[[Float[Array, "batch ..."], Float32[Array, " batch"]], Released | None]


def array_of(leaf: Leaf) -> Float32[Array, "..."]:
    """What it holds: to wait for, or to look at its shape."""
    return leaf.mean if isinstance(leaf, Released) else leaf


def sums_of(leaves: Sequence[Leaf]) -> list[Float32[Array, "..."]]:
    """`leaves`, all of which are parts of a sum still: noise on a part would be noise many times.

    Errors: TypeError.
    """
    for leaf in leaves:
        if isinstance(leaf, Released):
            raise TypeError(f"leaf {leaf.leaf} has left with its noise; it is no part of a sum")
    return [leaf for leaf in leaves if not isinstance(leaf, Released)]
