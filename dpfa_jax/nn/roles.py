"""Which arrays of a model are trained privately and which stay as they are. Nothing in between."""

import re

import jax.numpy as jnp
from jaxtyping import Array

from dpfa_jax.core import ArgumentError, CoverageError
from dpfa_jax.nn.parts import Leaf

# A regular expression that is searched in paths, an nnx variable class, or several of them.
Rule = str | type | tuple[str | type, ...]


def trained_leaves(
    leaves: tuple[Leaf, ...], trainable: Rule | None, frozen: Rule | None
) -> tuple[bool, ...]:
    """For each leaf, whether it is trained.

    Errors: CoverageError for two arrays of one path and for an array that nothing covers, by name;
    ArgumentError for a rule that covers nothing and for two that overlap.
    """
    _check_one_array_each(leaves)
    for name, rule in (("trainable", trainable), ("frozen", frozen)):
        if rule is not None and not any(_matches(rule, leaf) for leaf in leaves):
            raise ArgumentError(
                name,
                rule,
                f"covers none of {[leaf.path for leaf in leaves]}",
                "Pass a regular expression found in their paths, or an nnx variable class.",
            )
    trained = tuple(_is_trained(leaf, trainable, frozen) for leaf in leaves)
    if not any(trained):
        raise CoverageError("no parameter of the model is trainable.")
    _check_one_name_each(leaves, trained)
    return trained


def _is_trained(leaf: Leaf, trainable: Rule | None, frozen: Rule | None) -> bool:
    is_frozen = frozen is not None and _matches(frozen, leaf)
    if trainable is None:
        is_trained = leaf.role == "parameter" and not is_frozen
    else:
        is_trained = _matches(trainable, leaf)
    if is_trained and is_frozen:
        raise ArgumentError(
            "frozen", frozen, f"{leaf.path!r} is under trainable as well", "Make the two disjoint."
        )
    if is_trained and not _is_float(leaf.value):
        raise CoverageError(
            f"parameter {leaf.path!r} is trainable, but {_dtype(leaf.value)} has no gradient that "
            "could be clipped. Name it in frozen=, or make it a floating-point array."
        )
    if not is_trained and not is_frozen and leaf.role == "state" and _is_float(leaf.value):
        raise CoverageError(
            f"{leaf.path!r} is a {leaf.kind} of floating-point numbers: it may be meant to be "
            "trained, and would leave unprotected or stay as it is in silence. Name it in "
            "trainable= or in frozen=."
        )
    return is_trained


def _matches(rule: Rule, leaf: Leaf) -> bool:
    if isinstance(rule, tuple):
        return any(_matches(part, leaf) for part in rule)
    if isinstance(rule, str):
        return re.search(rule, leaf.path) is not None
    if isinstance(rule, type):
        return leaf.variable is not None and issubclass(leaf.variable, rule)
    raise ArgumentError(
        "trainable or frozen",
        rule,
        "neither a regular expression nor an nnx variable class",
        'Pass e.g. "head|norm" or nnx.LoRAParam, or a tuple of such.',
    )


def _check_one_array_each(leaves: tuple[Leaf, ...]) -> None:
    first: dict[str, Leaf] = {}
    for leaf in leaves:
        other = first.setdefault(leaf.path, leaf)
        if other is not leaf:
            raise CoverageError(
                f"{other.place} and {leaf.place} have one path, {leaf.path!r}: only one of the two "
                "would be kept and trained, in both places. Rename one of them: no name with a "
                "'/' in it, no linen collection with the name of a submodule."
            )


def _check_one_name_each(leaves: tuple[Leaf, ...], trained: tuple[bool, ...]) -> None:
    first: dict[int, tuple[Leaf, bool]] = {}
    for leaf, is_trained in zip(leaves, trained, strict=True):
        other, other_trained = first.setdefault(id(leaf.value), (leaf, is_trained))
        if other is not leaf and (is_trained or other_trained):
            raise CoverageError(
                f"parameters {other.path!r} and {leaf.path!r} hold one and the same array, but "
                "each would be clipped, noised and updated on its own. If they are one parameter, "
                "share the nnx Variable (or linen submodule); if they are two, copy the array."
            )


def _is_float(value: Array) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _dtype(value: Array) -> str:
    return str(getattr(value, "dtype", type(value).__name__))
