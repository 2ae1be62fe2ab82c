"""What in the program of one example could reach another example, refused by name."""

import types
from collections.abc import Iterable, Set
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jaxtyping import Array, PyTree

from dpfa_jax.core import CoverageError
from dpfa_jax.kernels.manual_axes import varying_axes
from dpfa_jax.noise.keys import is_threefry

# They name an axis and pass no value along it. (Kernels name the axes of their own grid.)
_HARMLESS = ("axis_index", "pbroadcast", "pcast", "pvary")
_KERNELS = ("core_map", "pallas_call")
# How a callback under vmap is given one example at a time.
_ONE_AT_A_TIME = ("sequential", "sequential_unrolled")
_FOREIGN_CALLS = ("ffi_call", "pure_callback")
# The first draws for a whole batch under vmap from the key of its first row; the second from no key
# at all, so that a gradient that is made twice is not the same twice.
_UNKEYED_DRAWS = ("rng_bit_generator", "rng_uniform")
# Packages whose own rules for vmap are known to keep rows apart.
_TRUSTED = ("dpfa_jax", "jax")


def check_uncoupled(jaxpr: jex.Jaxpr, batch: PyTree[Array]) -> None:
    """Refuses collectives over axes along which examples differ, and code that sees several.

    Such code are callbacks, foreign functions, and the rule of a `custom_vmap`, which may do with a
    batch what the function does not do with an example. Elsewhere each example goes through the
    program alone, with a batch of one. Along a mesh axis of `jax.shard_map` over which the batch is
    replicated collectives may run (tensor parallelism); where types do not tell
    (`check_vma=False`), along none. Random numbers come from threefry keys: of other generators
    ("rbg"), one example's key may draw for its whole batch.

    Errors: CoverageError, with the primitive, and the axis or the type of the key.
    """
    arrays = (x for x in jax.tree.leaves(batch) if not isinstance(x, jax.ShapeDtypeStruct))
    shards = varying_axes(*arrays)
    manual = frozenset(jax.sharding.get_abstract_mesh().manual_axes)
    _check(jaxpr, manual - shards if shards else frozenset())


def _check(jaxpr: jex.Jaxpr, harmless_axes: Set[str]) -> None:
    for eqn in jaxpr.eqns:
        name, inside = eqn.primitive.name, harmless_axes
        if name in _KERNELS:
            continue
        if name == "shard_map":  # axes of its own: all of them hold the same example
            inside = inside | frozenset(eqn.params["mesh"].axis_names)
        elif name not in _HARMLESS:
            coupled = _axes_of(eqn.params) - inside
            if coupled:
                raise CoverageError(
                    f"loss_fn: {name!r} over the axis {min(coupled)!r} makes an example's gradient "
                    "depend on examples of other devices. Compute the loss of each example from "
                    "that example alone (normalisation layers: without axis_name)."
                )
        _check_draw(eqn)
        if name == "io_callback" or (
            name in _FOREIGN_CALLS and eqn.params.get("vmap_method") not in _ONE_AT_A_TIME
        ):
            raise CoverageError(
                f"loss_fn: {name!r} could see several examples at once. Use a pure_callback, or a "
                "ffi_call, with vmap_method='sequential'."
            )
        if name == "custom_vmap_call" and not _keeps_rows_apart(eqn.params["rule"]):
            raise CoverageError(
                f"loss_fn: the custom_vmap of {eqn.params['call'].jaxpr.debug_info.func_name!r} "
                "brings a rule of its own for batches, which could mix examples. Use "
                "jax.custom_batching.sequential_vmap, or the function without a rule."
            )
        for inner in jex.jaxprs_in_params(eqn.params):
            _check(inner, inside)


def _check_draw(eqn: jex.JaxprEqn) -> None:
    name = eqn.primitive.name
    types = [getattr(atom.aval, "dtype", None) for atom in (*eqn.invars, *eqn.outvars)]
    keys = [x for x in types if x is not None and jnp.issubdtype(x, jax.dtypes.prng_key)]
    others = [key for key in keys if not is_threefry(key)] if name.startswith("random_") else []
    if name in _UNKEYED_DRAWS or others:
        drawn = f"{name!r} of a {others[0]}" if others else repr(name)
        raise CoverageError(
            f"loss_fn: {drawn} may give an example random numbers that depend on other rows of its "
            "batch, on padding too. Draw with threefry keys: jax.random.key(seed, "
            'impl="threefry2x32"), JAX\'s default (jax_default_prng_impl).'
        )


def _keeps_rows_apart(rule: object) -> bool:
    """Whether a rule is this library's or JAX's, by where its code stands: names can be copied."""
    own = getattr(rule, "__wrapped__", rule)  # JAX wraps a rule once
    if not isinstance(own, types.FunctionType):
        return False
    module = str(own.__globals__.get("__name__", ""))
    if module == jax.custom_batching.custom_vmap.__module__:
        name = jax.custom_batching.sequential_vmap.__qualname__
        return own.__code__.co_qualname.startswith(f"{name}.<locals>.")
    return module.partition(".")[0] in _TRUSTED


def _axes_of(params: dict[str, Any]) -> frozenset[str]:
    """Names of mesh and vmap axes among an equation's parameters; array axes are integers."""
    found: list[Any] = []
    for key in ("axes", "axis_name"):
        value = params.get(key, ())
        found += value if isinstance(value, Iterable) and not isinstance(value, str) else [value]
    return frozenset(name for name in found if isinstance(name, str))
