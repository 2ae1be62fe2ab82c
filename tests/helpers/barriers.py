"""What a traced program makes its results of behind its last compiler barriers."""

import jax

from dpfa_jax.dpsgd.equations import inlined


def without_a_barrier(function, *arguments) -> set[str]:
    """Inputs and parts of the generator that results are made of with no barrier between."""
    # A new function each time: JAX keeps what it has traced.
    jaxpr = inlined(jax.make_jaxpr(lambda *x: function(*x))(*arguments).jaxpr)
    maker = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    todo, seen, found = list(jaxpr.outvars), set(), set()
    while todo:
        atom = todo.pop()
        if hasattr(atom, "val") or atom in seen:  # a literal
            continue
        seen.add(atom)
        if atom in jaxpr.invars:
            found.add("input")
        elif atom in maker and maker[atom].primitive.name != "optimization_barrier":
            found |= {"cos", "sin"} & {maker[atom].primitive.name}
            todo += maker[atom].invars
    return found
