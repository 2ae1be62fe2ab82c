"""A gradient as it was before casts that lost nothing and zeros around it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jaxtyping import Array

from dpfa_jax.dpsgd.equations import dtype_of
from dpfa_jax.dpsgd.forms import Makers, is_zeros


def narrowed(
    makers: Makers, atom: jex.Var | jex.Literal, *, pads: bool = True
) -> tuple[jex.Var | jex.Literal, Callable[[Array], Array]]:
    """What `atom` was, and a function: a sum of such, float32 -> the same in the shape of `atom`.

    What was has the same norm, and the memory of fewer numbers or of fewer bits: zeros are around
    the gradient of a table of positions of which a part is used (they stay where not `pads`).
    """
    eqn = makers.get(atom) if isinstance(atom, jex.Var) else None
    name = "" if eqn is None else eqn.primitive.name
    if eqn is not None and name == "convert_element_type":
        narrow, wide = dtype_of(eqn.invars[0]), eqn.params["new_dtype"]
        floats = jnp.issubdtype(narrow, jnp.floating) and jnp.issubdtype(wide, jnp.floating)
        if floats and jnp.promote_types(narrow, wide) == wide:
            return narrowed(makers, eqn.invars[0], pads=pads)
    if eqn is not None and pads and name == "pad" and is_zeros(makers, eqn.invars[1]):
        sides = eqn.params["padding_config"]
        if all(low >= 0 and high >= 0 for low, high, _ in sides):  # else it cuts numbers off
            inner, finish = narrowed(makers, eqn.invars[0])
            return inner, lambda total: jax.lax.pad(finish(total), jnp.float32(0), sides)
    return atom, lambda total: total
