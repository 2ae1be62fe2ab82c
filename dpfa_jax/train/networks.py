"""Networks from positions (token or patch features) to class logits. No layer couples examples."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from dpfa_jax.nn import Encoder


class TransformerClassifier(nnx.Module):
    """Projection, pre-norm encoder, mean over the real positions, norm, linear head.

    The norm comes after the mean: the mean of many positions is small, and small features make
    small gradients, which the noise then drowns. The head starts at zero and each block as the
    identity, so the first noisy steps train a linear model, which small signals can; attention and
    MLP grow in later.
    """

    def __init__(
        self,
        width: int,
        length: int,
        classes: int,
        *,
        features: int,
        num_heads: int,
        hidden_features: int,
        num_layers: int,
        learn_positions: bool,
        rngs: nnx.Rngs,
    ):
        zeros = nnx.initializers.zeros
        self.project = nnx.Linear(width, features, rngs=rngs)
        self.position = (
            nnx.Param(0.02 * rngs.params.normal((length, features))) if learn_positions else None
        )
        self.encoder = Encoder(
            features,
            num_heads,
            hidden_features,
            num_layers,
            residual_init=zeros,
            final_norm=False,
            rngs=rngs,
        )
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.head = nnx.Linear(features, classes, kernel_init=zeros, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B S W"], is_real: Bool[Array, "B S"]
    ) -> Float[Array, "B C"]:
        """Logits of each example."""
        x = self.project(x)
        if self.position is not None:
            x = x + self.position[...]
        return self.head(self.norm(_mean(self.encoder(x, is_real), is_real)))


class LinearClassifier(nnx.Module):
    """Logistic regression: the baseline of the transformer.

    It reads the mean of the real positions; or, where `length` is given and no position is padding,
    all of them side by side, because a mean over an image's patches forgets where things are.
    """

    def __init__(self, width: int, classes: int, *, length: int | None = None, rngs: nnx.Rngs):
        self.is_mean = length is None
        self.head = nnx.Linear(
            width * (length or 1), classes, kernel_init=nnx.initializers.zeros, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B S W"], is_real: Bool[Array, "B S"]
    ) -> Float[Array, "B C"]:
        """Logits of each example."""
        return self.head(_mean(x, is_real) if self.is_mean else x.reshape(x.shape[0], -1))


def _mean(x: Float[Array, "B S W"], is_real: Bool[Array, "B S"]) -> Float[Array, "B W"]:
    weight = is_real.astype(x.dtype)
    return jnp.einsum("bsw,bs->bw", x, weight) / jnp.maximum(weight.sum(axis=1, keepdims=True), 1)
