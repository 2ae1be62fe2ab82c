"""Over which manual mesh axes arrays vary inside shard_map, as far as their types tell.

The only file that reads that part of an array's type: its name has changed between JAX releases.
"""

from typing import Any

import jax


def manual_axis_type(value: object) -> Any:
    """The part of an array's type, or of a type, that tells it; None where there is none."""
    described = value if isinstance(value, jax.core.AbstractValue) else jax.typeof(value)
    return getattr(described, "manual_axis_type", None)


def varying_axes(*arrays: object) -> frozenset[str]:
    """Manual mesh axes over which any of `arrays` (or types) varies; empty outside shard_map."""
    types = (manual_axis_type(array) for array in arrays if array is not None)
    return frozenset().union(*(getattr(of, "varying", frozenset()) for of in types))
