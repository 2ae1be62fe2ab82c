"""A traced program as data: its jitted calls replaced by what they call, one equation applied.

Only public names of JAX: `jax.make_jaxpr` gives the program, `jax.extend.core` its parts.
"""

from collections.abc import Sequence

import numpy as np
from jax.extend import core as jex
from jaxtyping import Array

_CALLS = {"jit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr"}
_RESHAPED = ("convert_element_type", "reshape", "slice", "squeeze", "transpose")
_NAMES = jex.DebugInfo("deferral", "gradient of one example", None, None)


def apply(eqn: jex.JaxprEqn, env: dict[jex.Var, Array]) -> list[Array]:
    """The outputs of one equation, as the program that consists of it."""
    used = list(dict.fromkeys(atom for atom in eqn.invars if isinstance(atom, jex.Var)))
    program = jex.Jaxpr((), used, eqn.outvars, [eqn], eqn.effects, _NAMES)
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(program, ()))(*[env[var] for var in used])


def after_first_output(jaxpr: jex.Jaxpr) -> list[jex.JaxprEqn]:
    """What comes after the equation that makes the first output: behind a loss, its gradient."""
    makes = [jaxpr.outvars[0] in eqn.outvars for eqn in jaxpr.eqns]
    return jaxpr.eqns[makes.index(True) + 1 :] if True in makes else []


def apply_to(eqn: jex.JaxprEqn, values: list[Array]) -> Array:
    """The one output of an equation at these inputs."""
    inputs = zip(eqn.invars, values, strict=True)
    return apply(eqn, {atom: value for atom, value in inputs if isinstance(atom, jex.Var)})[0]


def value_of(env: dict[jex.Var, Array], atom: jex.Var | jex.Literal) -> Array:
    """A literal's value, or a variable's."""
    return atom.val if isinstance(atom, jex.Literal) else env[atom]


def varying_vars(jaxpr: jex.Jaxpr, varies: Sequence[bool]) -> set[jex.Var]:
    """Variables that depend on an input that varies; `varies` has one entry an input."""
    varying = {var for var, does in zip(jaxpr.invars, varies, strict=True) if does}
    for eqn in jaxpr.eqns:
        if any(isinstance(atom, jex.Var) and atom in varying for atom in eqn.invars):
            varying.update(eqn.outvars)
    return varying


def loop_varies(jaxpr: jex.Jaxpr, varies: Sequence[bool], consts: int, carries: int) -> list[bool]:
    """`varies` of a loop body's inputs: a carry varies once any round has made it vary."""
    varies = list(varies)
    while True:
        varying = varying_vars(jaxpr, varies)
        for place in range(carries):
            out = jaxpr.outvars[place]
            if isinstance(out, jex.Var) and out in varying and not varies[consts + place]:
                varies[consts + place] = True
                break
        else:
            return varies


def inlined(jaxpr: jex.Jaxpr) -> jex.Jaxpr:
    """`jaxpr` with the calls of jitted functions replaced by what they call, but for kernels.

    A jitted function around a kernel (flash attention) stays one function that all its calls share:
    apart, each would be lowered anew, which takes a second a kernel.
    """
    if not any(eqn.primitive.name in _CALLS for eqn in jaxpr.eqns):
        return jaxpr
    eqns: list[jex.JaxprEqn] = []
    names: dict[jex.Var, jex.Var | jex.Literal] = {}
    _inline(jaxpr, names, eqns)
    return jaxpr.replace(eqns=eqns, outvars=[_read(names, out) for out in jaxpr.outvars])


def _inline(
    jaxpr: jex.Jaxpr, names: dict[jex.Var, jex.Var | jex.Literal], eqns: list[jex.JaxprEqn]
) -> None:
    for eqn in jaxpr.eqns:
        invars = [_read(names, atom) for atom in eqn.invars]
        inner = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
        if not isinstance(inner, jex.ClosedJaxpr) or inner.consts or _is_kernel(inner.jaxpr):
            fresh = [jex.Var(out.aval) for out in eqn.outvars]
            names.update(zip(eqn.outvars, fresh, strict=True))
            eqns.append(eqn.replace(invars=invars, outvars=fresh))
            continue
        within: dict[jex.Var, jex.Var | jex.Literal] = dict(
            zip(inner.jaxpr.invars, invars, strict=True)
        )
        _inline(inner.jaxpr, within, eqns)
        results = [_read(within, out) for out in inner.jaxpr.outvars]
        names.update(zip(eqn.outvars, results, strict=True))


def _is_kernel(jaxpr: jex.Jaxpr) -> bool:
    """Whether it calls what brings its own rule for batches, and returns no product beside."""
    makers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    if not any(eqn.primitive.name == "custom_vmap_call" for eqn in jaxpr.eqns):
        return False

    def maker_of(out: jex.Var | jex.Literal) -> str:
        eqn = makers.get(out) if isinstance(out, jex.Var) else None
        while eqn is not None and eqn.primitive.name in _RESHAPED:
            source = eqn.invars[0]
            eqn = makers.get(source) if isinstance(source, jex.Var) else None
        return "" if eqn is None else eqn.primitive.name

    return all(maker_of(out) in ("", "custom_vmap_call") for out in jaxpr.outvars)


def _read(
    names: dict[jex.Var, jex.Var | jex.Literal], atom: jex.Var | jex.Literal
) -> jex.Var | jex.Literal:
    return names.get(atom, atom) if isinstance(atom, jex.Var) else atom


def shape_of(atom: jex.Var | jex.Literal) -> tuple[int, ...]:
    """Its shape."""
    return getattr(atom.aval, "shape", ())


def dtype_of(atom: jex.Var | jex.Literal) -> np.dtype:
    """Its dtype."""
    return getattr(atom.aval, "dtype", np.dtype(np.float32))


def bytes_of(atom: jex.Var | jex.Literal) -> int:
    """Memory of its value."""
    return int(np.prod(shape_of(atom), dtype=np.int64)) * dtype_of(atom).itemsize
