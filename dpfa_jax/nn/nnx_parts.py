"""An nnx module as parts. State that a call changes is found, because a pure loss would drop it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core as jex
from jaxtyping import Array, Key

from dpfa_jax.core import CoverageError
from dpfa_jax.nn.parts import Leaf, Parts, Role

# Each mixes the examples of a batch, or keeps statistics of what it has seen.
_COUPLED = (nnx.BatchNorm, nnx.SpectralNorm)
_CALLS = ("jit", "closed_call", "remat", "remat2", "checkpoint")


def nnx_parts(module: nnx.Module) -> Parts:
    """The parts of `module`, which stays as it is. A Variable held under two names is one leaf.

    Errors: CoverageError for a layer that couples the examples of a batch, by name.
    """
    for path, layer in nnx.iter_modules(module):
        if isinstance(layer, _COUPLED):
            name = "/".join(map(str, path))
            raise CoverageError(
                f"layer {name!r} is a {type(layer).__name__}: it mixes the examples of a batch, or "
                "keeps statistics of them, so that no gradient belongs to one example. Put "
                "LayerNorm, RMSNorm or GroupNorm in its place."
            )
    graph, state = nnx.split(module)
    structure, leaves = jax.tree.structure(state), _leaves(state)

    def merged(values: list[Array], rng_key: Key[Array, ""] | None) -> nnx.Module:
        if rng_key is not None:
            values = _seeded(leaves, values, rng_key)
        return nnx.merge(graph, jax.tree.unflatten(structure, values))

    def run(fn: Callable[[Any], Any], values: list[Array], rng_key: Key[Array, ""] | None) -> Any:
        watched = [i for i, leaf in enumerate(leaves) if leaf.role != "stream" or rng_key is None]
        model = merged(values, rng_key)
        before = _watched_values(model, leaves, watched)
        out = fn(model)
        _check_nothing_new(model, leaves)
        after = _watched_values(model, leaves, watched)
        if any(old is not new for old, new in zip(before, after, strict=True)):
            # Lifted transforms return even what they leave alone as new arrays: ask the program.
            def changed(values: list[Array]) -> list[Array | None]:
                model = merged(values, rng_key)
                fn(model)
                return _watched_values(model, leaves, watched)

            _check_unchanged(changed, values, leaves, watched)
        return out

    return Parts(type(module).__name__, leaves, merged, run)


def _leaves(state: nnx.State) -> tuple[Leaf, ...]:
    """In the order in which jax flattens `state`."""
    variables = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    owners = [owner for owner in variables for _ in jax.tree.leaves(owner)]
    leaves = []
    for (path, value), owner in zip(jax.tree.leaves_with_path(state), owners, strict=True):
        variable = type(owner) if isinstance(owner, nnx.Variable) else None
        kind = "array" if variable is None else variable.__name__
        place = f"model{jax.tree_util.keystr(_owner(path))}"
        leaves.append(Leaf(_name(path), place, kind, _role(variable), value, variable))
    return tuple(leaves)


def _role(variable: type | None) -> Role:
    if variable is None:
        return "constant"
    if issubclass(variable, nnx.Param):
        return "parameter"
    return "stream" if issubclass(variable, nnx.RngState) else "state"


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(_owner(path), simple=True, separator="/")


def _owner(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of the variable, for the path of the array inside it."""
    return path[:-1] if isinstance(path[-1], jax.tree_util.GetAttrKey) else path


def _seeded(leaves: tuple[Leaf, ...], values: list[Array], rng_key: Key[Array, ""]) -> list[Array]:
    """Every random stream begun anew, each from its own key."""

    def begun(i: int, leaf: Leaf, value: Array) -> Array:
        if leaf.role != "stream":
            return value
        if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return jnp.zeros_like(value)
        key = jax.random.fold_in(rng_key, i)
        return key if value.shape == () else jax.random.split(key, value.shape)

    each = enumerate(zip(leaves, values, strict=True))
    return [begun(i, leaf, value) for i, (leaf, value) in each]


def _watched_values(
    model: nnx.Module, leaves: tuple[Leaf, ...], watched: list[int]
) -> list[Array | None]:
    if not watched:
        return []
    held = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(nnx.state(model))}
    return [held.get(leaves[i].path) for i in watched]


def _check_nothing_new(model: nnx.Module, leaves: tuple[Leaf, ...]) -> None:
    """Refuses variables that a call has made, but for what `sow` leaves for its caller."""
    known = {leaf.place for leaf in leaves}
    for leaf in _leaves(nnx.state(model)):
        sown = leaf.variable is not None and issubclass(leaf.variable, nnx.Intermediate)
        if leaf.place not in known and not sown:
            raise CoverageError(
                f"the model makes {leaf.path!r} ({leaf.kind}) when it is called, so it would be "
                "made anew, and not trained, at every step. Make it when the model is built."
            )


def _check_unchanged(
    changed: Callable[[list[Array]], list[Array | None]],
    values: list[Array],
    leaves: tuple[Leaf, ...],
    watched: list[int],
) -> None:
    def after(values: list[Array]) -> list[Array]:
        return [jnp.zeros(()) if x is None else jnp.asarray(x) for x in changed(values)]

    program = jax.make_jaxpr(after)(values).jaxpr
    for i, out in zip(watched, program.outvars, strict=True):
        if _source(program, out) is program.invars[i]:
            continue
        leaf = leaves[i]
        if leaf.role == "stream":
            stream = leaf.path.rpartition("/")[0]
            raise CoverageError(
                f"the model draws from its random stream {stream!r}, which is frozen: every "
                "example at every step would get the same mask. Put a key of the step and "
                'the example into the batch and name it, loss(fn, rng_key="..."), or call '
                "model.eval() first."
            )
        raise CoverageError(
            f"the model changes {leaf.path!r} ({leaf.kind}) when it is called. What it would keep "
            "there may come from private examples without noise, and a step does not return it. "
            "Replace that layer by one that changes nothing (no statistics, no cache)."
        )


def _source(jaxpr: jex.Jaxpr, atom: jex.Var | jex.Literal) -> jex.Var | None:
    """The input of `jaxpr` that `atom` is handed through from, if that is all there is to it."""
    makers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    while isinstance(atom, jex.Var) and atom in makers:
        eqn = makers[atom]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name not in (*_CALLS, "scan") or inner is None:
            return None
        inner = getattr(inner, "jaxpr", inner)
        given = _source(inner, inner.outvars[eqn.outvars.index(atom)])
        if given is None or given not in inner.invars:
            return None
        source = eqn.invars[inner.invars.index(given)]
        # Of what a scan takes and stacks slices of, slice i is handed through; of no carry.
        sliced = getattr(source.aval, "shape", ()) != getattr(given.aval, "shape", ())
        if eqn.primitive.name == "scan" and not sliced:
            return None
        atom = source
    return atom if isinstance(atom, jex.Var) else None
