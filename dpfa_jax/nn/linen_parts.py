"""A linen module with its variables as parts. Linen itself refuses to change state unasked."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import errors, linen
from jaxtyping import Array, Key

from dpfa_jax.core import CoverageError
from dpfa_jax.nn.parts import Leaf, Parts

_PARAMETERS = "params"
_STATISTICS = "batch_stats"


def linen_parts(module: linen.Module, variables: Mapping[str, Any]) -> Parts:
    """The parts of `module`; paths are those in `variables`, without "params/".

    Errors: CoverageError for statistics over batches, by name.
    """
    named = jax.tree.leaves_with_path(dict(variables))
    structure = jax.tree.structure(dict(variables))
    leaves = tuple(_leaf(path, value) for path, value in named)
    for leaf in leaves:
        if leaf.kind == _STATISTICS:
            layer = leaf.path.removeprefix(f"{_STATISTICS}/").rpartition("/")[0]
            raise CoverageError(
                f"layer {layer!r} keeps {leaf.path!r}: it mixes the examples of a batch, so that "
                "no gradient belongs to one example. Put LayerNorm, RMSNorm or GroupNorm in its "
                "place."
            )

    def merged(values: list[Array], rng_key: Key[Array, ""] | None) -> linen.Module:
        rngs = None
        if rng_key is not None:  # other streams of the module follow from "params"
            rngs = dict(zip(("dropout", _PARAMETERS), jax.random.split(rng_key), strict=True))
        return module.bind(jax.tree.unflatten(structure, values), rngs=rngs)

    def run(fn: Callable[[Any], Any], values: list[Array], rng_key: Key[Array, ""] | None) -> Any:
        try:
            return fn(merged(values, rng_key))
        except errors.InvalidRngError as error:
            raise CoverageError(
                "the model draws random numbers. Put a key of the step and the example into the "
                'batch and name it, loss(fn, rng_key="..."), or call it deterministically.'
            ) from error
        except errors.ModifyScopeVariableError as error:
            raise CoverageError(
                "the model changes its state when it is called. What it would keep there comes "
                "from private examples without noise. Replace that layer by one without "
                f"statistics. ({error})"
            ) from error

    return Parts(type(module).__name__, leaves, merged, run)


def _leaf(path: tuple[Any, ...], value: Array) -> Leaf:
    collection, _, name = jax.tree_util.keystr(path, simple=True, separator="/").partition("/")
    place = f"variables{jax.tree_util.keystr(path)}"
    if collection == _PARAMETERS:
        return Leaf(name, place, collection, "parameter", value)
    return Leaf(f"{collection}/{name}", place, collection, "state", value)
