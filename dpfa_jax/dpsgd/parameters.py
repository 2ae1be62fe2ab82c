"""Which parameters a plan protects, and in which clip group each of them is."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dpfa_jax.core import ArgumentError, CoverageError, checks

# A clip group is a tuple of path prefixes: ("encoder/0", "embedding").
Groups = tuple[tuple[str, ...], ...]


def leaf_paths(params: PyTree) -> tuple[str, ...]:
    """Path of each leaf, in `jax.tree.leaves` order: "encoder/0/kernel"."""
    return tuple(
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    )


class ClipGroups(NamedTuple):
    """Clip groups with their clip norms, as a plan takes them.

    Attributes:
      groups: path prefixes of each group.
      l2_clip_norms: C_l of each group; sum C_l^2 = C^2.
    """

    groups: Groups
    l2_clip_norms: tuple[float, ...]


def per_layer_groups(
    params: PyTree,
    l2_clip_norm: float,
    *,
    depth: int | None = None,
    weights: Literal["equal", "size"] = "equal",
) -> ClipGroups:
    """Groups for per-layer clipping whose norms together allow an example as much as one flat C.

    Args:
      params: pytree of arrays or of `jax.ShapeDtypeStruct`.
      l2_clip_norm: C, the norm that a whole example may reach.
      depth: names of a path that make a layer: 2 puts "encoder/0/kernel" and "encoder/0/bias" into
        "encoder/0". None: each parameter is a group of its own.
      weights: "equal": C_l = C / sqrt(L). "size": C_l = C sqrt(d_l / d), d_l the group's numbers.

    A leaf is never divided: where the parameters of all layers are stacked into one for `scan`, it
    is one group, clipped over all its layers together. Unstack it for one norm a layer.

    Errors: ArgumentError for a clip norm, depth or weights out of range.
    Source: McMahan et al., "Learning differentially private recurrent language models" (2018), for
    both ways to divide C.
    """
    checks.magnitude("l2_clip_norm", l2_clip_norm)
    checks.choice("weights", weights, ("equal", "size"))
    names = None if depth is None else checks.count("depth", depth)
    sizes: dict[str, int] = {}
    for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True):
        layer = "/".join(path.split("/")[:names])
        sizes[layer] = sizes.get(layer, 0) + math.prod(leaf.shape)
    if not sizes:
        raise ArgumentError("params", params, "holds no parameter", "Pass the model's parameters.")
    shares = [1.0 if weights == "equal" else float(max(size, 1)) for size in sizes.values()]
    norms = tuple(l2_clip_norm * math.sqrt(share / math.fsum(shares)) for share in shares)
    return ClipGroups(tuple((layer,) for layer in sizes), norms)


def leaf_groups(params: PyTree, groups: Groups | None) -> tuple[int, ...]:
    """The clip group of each leaf; group 0 for all where `groups` is None.

    A prefix covers a path that equals it or continues it after a "/". "" covers everything.

    Errors: CoverageError naming a parameter under no group; ArgumentError for one under two, and
    for a prefix that covers nothing.
    """
    paths = leaf_paths(params)
    if groups is None:
        return (0,) * len(paths)
    owners = []
    for path in paths:
        found = [
            index
            for index, prefixes in enumerate(groups)
            if any(_covers(prefix, path) for prefix in prefixes)
        ]
        if not found:
            raise CoverageError(
                f"parameter {path!r} is under no clip group; it would leave unprotected. Add a "
                f"prefix of its path to one of groups = {groups!r}, or keep it out of params if "
                "it is frozen."
            )
        if len(found) > 1:
            raise ArgumentError(
                "groups",
                groups,
                f"parameter {path!r} is under groups {found}",
                "Make the prefixes disjoint: each parameter belongs to exactly one group.",
            )
        owners.append(found[0])
    for prefixes in groups:
        for prefix in prefixes:
            if not any(_covers(prefix, path) for path in paths):
                raise ArgumentError(
                    "groups", prefix, f"covers none of the parameters {paths}", "Remove or fix it."
                )
    return tuple(owners)


def check_parameters(params: PyTree, num_parameters: int) -> None:
    """Refuses what cannot be released as charged.

    Errors: ArgumentError for a leaf that is no floating-point array, by name, and for a number of
    parameters other than the charged `num_parameters`.
    """
    leaves = jax.tree.leaves(params)
    for path, leaf in zip(leaf_paths(params), leaves, strict=True):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ArgumentError(
                f"params[{path!r}]",
                dtype if dtype is not None else type(leaf),
                "not a floating-point array",
                "Keep integer tables, counters and frozen values out of params: close over them.",
            )
    found = sum(leaf.size for leaf in leaves)
    if found != num_parameters:
        raise ArgumentError(
            "params",
            found,
            f"the number of parameters is not the num_parameters = {num_parameters} of the release",
            f"Plan with num_parameters={found}, or pass the parameters that were planned for.",
        )


def check_untied(params: PyTree) -> None:
    """Refuses one array under two names: it would be clipped, noised and moved as two parameters.

    Errors: ArgumentError naming both.
    """
    names: dict[int, str] = {}
    for path, leaf in zip(leaf_paths(params), jax.tree.leaves(params), strict=True):
        first = names.setdefault(id(leaf), path)
        if first != path:
            raise ArgumentError(
                f"params[{path!r}]",
                f"the array of params[{first!r}]",
                "one array is given under two names",
                "Tied weights must be ONE leaf that both layers read; if the two only start equal, "
                "copy one: jnp.array(x, copy=True).",
            )


def _covers(prefix: str, path: str) -> bool:
    return prefix in ("", path) or path.startswith(prefix + "/")
