"""Which parameters a plan protects, and in which clip group each of them is."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dpfa_jax.core import ArgumentError, CoverageError, checks

# A clip group is a tuple of path prefixes: ("encoder/0", "embedding").
Groups = tuple[tuple[str, ...], ...]

# The clip group of a leaf; or that of each slice along its leading axis.
Owner = int | tuple[int, ...]


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
    stacked: tuple[str, ...] = (),
) -> ClipGroups:
    """Groups for per-layer clipping whose norms together allow an example as much as one flat C.

    Args:
      params: pytree of arrays or of `jax.ShapeDtypeStruct`.
      l2_clip_norm: C, the norm that a whole example may reach.
      depth: names of a path that make a layer: 2 puts "encoder/0/kernel" and "encoder/0/bias" into
        "encoder/0". None: each parameter is a group of its own.
      weights: "equal": C_l = C / sqrt(L). "size": C_l = C sqrt(d_l / d), d_l the group's numbers.
      stacked: path prefixes of parameters that hold all layers, one a slice of their leading axis,
        as `jax.lax.scan` takes them: each slice is then a layer (or, by depth, slice i of all
        parameters of one name), "blocks/kernel/3".

    Errors: ArgumentError for a clip norm, depth or weights out of range, and for a prefix of
    `stacked` that covers nothing, or a parameter without a leading axis.
    Source: McMahan et al., "Learning differentially private recurrent language models" (2018), for
    both ways to divide C.
    """
    checks.magnitude("l2_clip_norm", l2_clip_norm)
    checks.choice("weights", weights, ("equal", "size"))
    names = None if depth is None else checks.count("depth", depth)
    paths = leaf_paths(params)
    _check_stacked(stacked, paths)
    prefixes: dict[tuple[str, str], list[str]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for path, leaf in zip(paths, jax.tree.leaves(params), strict=True):
        name, slices = "/".join(path.split("/")[:names]), [""]
        if any(_covers(prefix, path) for prefix in stacked):
            slices = [f"/{index}" for index in range(_layers_of(path, leaf.shape))]
        for index in slices:
            layer = (name, index)
            # The layer's name covers all of it, where no part of it may be of another layer.
            prefixes.setdefault(layer, []).append(path + index if stacked else name)
            sizes[layer] = sizes.get(layer, 0) + math.prod(leaf.shape) // len(slices)
    if not sizes:
        raise ArgumentError("params", params, "holds no parameter", "Pass the model's parameters.")
    shares = [1.0 if weights == "equal" else float(max(size, 1)) for size in sizes.values()]
    norms = tuple(l2_clip_norm * math.sqrt(share / math.fsum(shares)) for share in shares)
    return ClipGroups(tuple(tuple(dict.fromkeys(each)) for each in prefixes.values()), norms)


def leaf_groups(params: PyTree, groups: Groups | None) -> tuple[Owner, ...]:
    """The clip group of each leaf, or those of its slices; group 0 for all where `groups` is None.

    A prefix covers a path that equals it or continues it after a "/". "" covers everything. Slice i
    of a leaf along its leading axis has the leaf's path and then "/i".

    Errors: CoverageError naming a parameter, or a slice of one, under no group; ArgumentError for
    one under two, and for a prefix that covers nothing.
    """
    paths = leaf_paths(params)
    if groups is None:
        return (0,) * len(paths)
    every = [prefix for prefixes in groups for prefix in prefixes]
    used: set[str] = set()

    def owner_of(path: str) -> int:
        found = {
            index: prefix
            for index, prefixes in enumerate(groups)
            for prefix in prefixes
            if _covers(prefix, path)
        }
        used.update(prefix for prefix in every if _covers(prefix, path))
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
                f"parameter {path!r} is under groups {[*found]}",
                "Make the prefixes disjoint: each parameter belongs to exactly one group.",
            )
        return next(iter(found))

    owners: list[Owner] = []
    for path, leaf in zip(paths, jax.tree.leaves(params), strict=True):
        divided = any(prefix.startswith(path + "/") for prefix in every)
        slices = range(leaf.shape[0] if divided and leaf.shape else 0)
        found = tuple(owner_of(f"{path}/{index}") for index in slices)
        owners.append(found if len(set(found)) > 1 else found[0] if found else owner_of(path))
    for prefix in every:
        if prefix not in used:
            raise ArgumentError(
                "groups", prefix, f"covers none of the parameters {paths}", "Remove or fix it."
            )
    return tuple(owners)


def _check_stacked(stacked: tuple[str, ...], paths: tuple[str, ...]) -> None:
    if not isinstance(stacked, tuple) or not all(isinstance(prefix, str) for prefix in stacked):
        raise ArgumentError(
            "stacked", stacked, "not a tuple of path prefixes", 'Write ("blocks",).'
        )
    for prefix in stacked:
        if not any(_covers(prefix, path) for path in paths):
            raise ArgumentError(
                "stacked", prefix, f"covers none of the parameters {paths}", "Remove or fix it."
            )


def _layers_of(path: str, shape: tuple[int, ...]) -> int:
    if not shape or shape[0] == 0:
        raise ArgumentError(
            "stacked",
            path,
            f"a parameter of shape {shape} has no leading axis of layers",
            "Name only parameters that hold one layer a slice.",
        )
    return shape[0]


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
