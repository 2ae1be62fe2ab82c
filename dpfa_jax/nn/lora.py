"""Low-rank adaptation: small trainable factors beside frozen linear layers."""

import math
import re
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dpfa_jax.core import ArgumentError, checks

_TARGETS = (nnx.Linear, nnx.LinearGeneral)


class LowRankLinear(nnx.LoRA):
    """base(x) + alpha / rank * x A B, A: (in, rank), B: (rank, out) at first zero.

    For `nnx.Linear` and `nnx.LinearGeneral` (the projections of an attention layer): the input axes
    of the base are flattened to `in`, its output axes to `out`. The factors are `nnx.LoRAParam`.

    Args:
      base: the layer that is adapted; it becomes `base_module`.
      rank, alpha: of the update.
      rngs: flax random streams for A.

    Errors: ArgumentError for a base of another kind, or with batch axes.
    Source: Hu et al., "LoRA" (2021).
    """

    def __init__(
        self,
        base: nnx.Linear | nnx.LinearGeneral,
        *,
        rank: int,
        alpha: float,
        rngs: nnx.Rngs,
    ):
        if isinstance(base, nnx.LinearGeneral) and not base.batch_axis:
            inputs, outputs, axes = base.in_features, base.out_features, base.axis
        elif isinstance(base, nnx.Linear):
            inputs, outputs, axes = (base.in_features,), (base.out_features,), (-1,)
        else:
            raise ArgumentError(
                "base",
                type(base),
                "not an nnx.Linear or an nnx.LinearGeneral without batch axes",
                "Leave it out of targets.",
            )
        self.input_axes: tuple[int, ...] = tuple(axes)
        self.output_shape: tuple[int, ...] = tuple(outputs)
        self.alpha = checks.positive("alpha", alpha)
        self.rank = checks.count("rank", rank)
        super().__init__(
            math.prod(inputs),
            rank,
            math.prod(self.output_shape),
            base_module=base,
            dtype=base.dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "*in_shape"], **options: Any) -> Float[Array, "*out_shape"]:
        """The base's output with the update added; `options` go to the base."""
        axes = [axis % x.ndim for axis in self.input_axes]
        rest = [size for axis, size in enumerate(x.shape) if axis not in axes]
        flat = jnp.moveaxis(x, axes, range(len(rest), x.ndim)).reshape(*rest, self.in_features)
        factors = self.lora_a[...], self.lora_b[...]
        flat, a, b = self.promote_dtype((flat, *factors), dtype=self.dtype)
        update = (flat @ a @ b * (self.alpha / self.rank)).reshape(*rest, *self.output_shape)
        return self.base(x, **options) + update

    @property
    def base(self) -> nnx.Linear | nnx.LinearGeneral:
        """The layer that is adapted."""
        assert isinstance(self.base_module, _TARGETS)
        return self.base_module

    def merged(self) -> nnx.Linear | nnx.LinearGeneral:
        """The base with the update added to its kernel, for use without the factors."""
        base = nnx.clone(self.base)
        kernel = base.kernel[...]
        update = self.lora_a[...] @ self.lora_b[...] * (self.alpha / self.rank)
        base.kernel[...] = (kernel + update.reshape(kernel.shape)).astype(kernel.dtype)
        return base


def add_lora(
    model: nnx.Module,
    *,
    rank: int,
    targets: str,
    alpha: float | None = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A copy of `model` with low-rank updates beside its linear layers; it computes the same.

    Train only the updates with `privatize(model, trainable=nnx.LoRAParam)`, or the updates and a
    new head with `trainable=(nnx.LoRAParam, "^head/")`. Load the base weights first: an adapted
    layer's own parameters move one name down, to "base_module".

    Args:
      rank: of the updates.
      targets: regular expression searched in the paths of `nnx.Linear` and `nnx.LinearGeneral`
        layers, "attention/(query|value)$". A layer under two names has one update under both.
      alpha: the update counts alpha / rank; `rank` where None.
      rngs: flax random streams for the factors.

    Errors: ArgumentError for targets that match no such layer.
    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
    """
    checks.count("rank", rank)
    pattern = re.compile(targets)
    model = nnx.clone(model)
    places = [
        (parent, str(name), "/".join(map(str, (*path, name))), child)
        for path, parent in nnx.iter_modules(model)
        if not isinstance(parent, nnx.LoRA)
        for name, child in nnx.iter_children(parent)
        if isinstance(child, _TARGETS)
    ]
    alpha = rank if alpha is None else alpha
    adapted: dict[int, LowRankLinear] = {}
    for _, _, path, layer in places:
        if pattern.search(path) is not None and id(layer) not in adapted:
            adapted[id(layer)] = LowRankLinear(layer, rank=rank, alpha=alpha, rngs=rngs)
    if not adapted:
        raise ArgumentError(
            "targets",
            targets,
            f"matches none of the linear layers {[path for _, _, path, _ in places]}",
            "Pass a regular expression found in their paths.",
        )
    for parent, name, _, layer in places:
        if id(layer) in adapted:  # under every name that the layer has
            setattr(parent, name, adapted[id(layer)])
    return model


def merge_lora(model: nnx.Module) -> nnx.Module:
    """A copy of `model` with every low-rank update added to its base layer's kernel.

    Its structure is that of the model before `add_lora`.
    """
    model = nnx.clone(model)
    merged: dict[int, nnx.Module] = {}
    for _, parent in list(nnx.iter_modules(model)):
        for name, child in list(nnx.iter_children(parent)):
            if isinstance(child, LowRankLinear):
                setattr(parent, str(name), merged.setdefault(id(child), child.merged()))
    return model
