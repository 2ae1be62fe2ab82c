"""An existing nnx or linen model made ready for private training, or refused by name."""

from collections.abc import Mapping
from typing import Any

from flax import linen, nnx

from dpfa_jax.core import ArgumentError
from dpfa_jax.nn.linen_parts import linen_parts
from dpfa_jax.nn.nnx_parts import nnx_parts
from dpfa_jax.nn.private_model import PrivateModel
from dpfa_jax.nn.roles import Rule, trained_leaves


def privatize(
    model: nnx.Module | linen.Module,
    variables: Mapping[str, Any] | None = None,
    *,
    trainable: Rule | None = None,
    frozen: Rule | None = None,
) -> PrivateModel:
    """Takes a model apart into what is trained privately and what stays as it is.

    No layer is replaced: per-example clipping reads the program of the gradient, so every layer
    whose output for an example depends on that example alone is covered. What cannot be covered is
    refused here, by name.

    Args:
      model: an nnx module, which is not changed, or a linen module.
      variables: of a linen module, as its `init` returns them; left out for nnx.
      trainable: what is trained: a regular expression searched in the paths ("head|norm"), an nnx
        variable class (`nnx.LoRAParam`), or a tuple of such. None: every `nnx.Param`, or linen's
        "params", that is not under `frozen`.
      frozen: what is deliberately not trained, in the same way. Needed for floating-point variables
        of other kinds (an `nnx.Variable` of one's own, linen collections beside "params"). Where
        `trainable` is given, other parameters are frozen without being named.

    Errors: CoverageError for a layer that mixes the examples of a batch (BatchNorm, SpectralNorm,
    a "batch_stats" collection), for a floating-point variable that neither argument covers, for a
    trainable one without a floating-point array, for two parameters that hold one array, and for
    two arrays of one path; ArgumentError for rules that cover nothing or overlap, and for what is
    no Flax model.
    """
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise ArgumentError(
                "variables", type(variables), "an nnx module holds its own", "Leave it out."
            )
        parts = nnx_parts(model)
    elif isinstance(model, linen.Module):
        if not isinstance(variables, Mapping) or "params" not in variables:
            raise ArgumentError(
                "variables",
                None if variables is None else type(variables),
                'not the variables of a linen module, {"params": ...}',
                "Pass what model.init returned.",
            )
        parts = linen_parts(model, variables)
    else:
        raise ArgumentError(
            "model", type(model), "neither an nnx nor a linen module", "Pass a Flax module."
        )
    trained = trained_leaves(parts.leaves, trainable, frozen)
    chosen = list(zip(parts.leaves, trained, strict=True))
    return PrivateModel(
        {leaf.path: leaf.value for leaf, is_trained in chosen if is_trained},
        {leaf.path: leaf.value for leaf, is_trained in chosen if not is_trained},
        parts,
    )
