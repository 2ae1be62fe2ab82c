"""A stack of blocks in which every position sees every real position."""

from flax import nnx
from jaxtyping import Array, Bool, Float

from dpfa_jax.nn.block import Block


class Encoder(nnx.Module):
    """Pre-norm transformer encoder (Vaswani et al., 2017).

    Nothing couples the rows of a batch: one example's output depends on that example only, so
    per-example gradients exist. Use it functionally through `nnx.split` and `nnx.merge`.

    Args: as `Block`, `num_layers`, and `final_norm`: normalise each position at the end.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        hidden_features: int,
        num_layers: int,
        *,
        num_kv_heads: int | None = None,
        residual_init: nnx.Initializer | None = None,
        final_norm: bool = True,
        rngs: nnx.Rngs,
    ):
        self.blocks = nnx.List(
            Block(
                features,
                num_heads,
                hidden_features,
                num_kv_heads=num_kv_heads,
                residual_init=residual_init,
                rngs=rngs,
            )
            for _ in range(num_layers)
        )
        self.norm = nnx.LayerNorm(features, rngs=rngs) if final_norm else None

    def __call__(
        self, x: Float[Array, "B S E"], is_real: Bool[Array, "B S"] | None = None
    ) -> Float[Array, "B S E"]:
        """Encoded positions. Positions where `is_real` is False are never attended to."""
        mask = None if is_real is None else is_real[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return x if self.norm is None else self.norm(x)
