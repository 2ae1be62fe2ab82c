"""Inside shard_map, arrays carry the mesh axes over which they vary; loops want these to agree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array, Shaped

from dpfa_jax.noise.varying import manual_axis_type, varying_axes

__all__ = ["result", "unaware", "vary_over", "varying_axes", "zeros"]


def vary_over(array: Shaped[Array, "*shape"], axes: frozenset[str]) -> Shaped[Array, "*shape"]:
    """`array`, marked as varying over `axes`. Its transpose sums over the newly marked ones."""
    missing = tuple(sorted(axes - varying_axes(array)))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


def zeros(
    shape: tuple[int, ...], dtype: jnp.dtype, axes: frozenset[str], fill: float = 0.0
) -> Shaped[Array, "*shape"]:
    """A loop's initial value: `fill` everywhere, varying over `axes`."""
    return vary_over(jnp.full(shape, fill, dtype), axes)


def result(
    shape: tuple[int, ...], dtype: jnp.dtype, like: Shaped[Array, "..."]
) -> jax.ShapeDtypeStruct:
    """The shape of a kernel's result that varies over the same axes as its operand `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual_axis_type(like))


def unaware(function: Callable[..., Any]) -> Callable[..., tuple[jax.Array, ...]]:
    """`function`, a kernel call and nothing else, traced as if no argument varied over a mesh axis.

    For kernels that map over warps, which Pallas refuses where a reference varies. Its results are
    not marked as varying either, so mark them.
    """

    def call(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        plain = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
        return tuple(jaxpr_as_fun(jax.make_jaxpr(function)(*plain))(*arrays))

    return call
