"""Which parameters a plan protects, and in which clip group each of them is."""

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dpfa_jax.core import ArgumentError, CoverageError

# A clip group is a tuple of path prefixes: ("encoder/0", "embedding").
Groups = tuple[tuple[str, ...], ...]


def leaf_paths(params: PyTree) -> tuple[str, ...]:
    """Path of each leaf, in `jax.tree.leaves` order: "encoder/0/kernel"."""
    return tuple(
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    )


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


def _covers(prefix: str, path: str) -> bool:
    return prefix in ("", path) or path.startswith(prefix + "/")
