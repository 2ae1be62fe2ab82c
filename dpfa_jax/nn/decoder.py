"""A stack of blocks in which every position sees itself and what is before it."""

from flax import nnx
from jaxtyping import Array, Bool, Float

from dpfa_jax.nn.block import Block


class Decoder(nnx.Module):
    """Pre-norm causal transformer (Radford et al., 2019) with a final norm.

    Nothing couples the rows of a batch, as in `Encoder`. Use it functionally through `nnx.split`
    and `nnx.merge`.

    Args: as `Block`, and `num_layers`.
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
        rngs: nnx.Rngs,
    ):
        self.blocks = nnx.List(
            Block(
                features,
                num_heads,
                hidden_features,
                num_kv_heads=num_kv_heads,
                is_causal=True,
                residual_init=residual_init,
                rngs=rngs,
            )
            for _ in range(num_layers)
        )
        self.norm = nnx.LayerNorm(features, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B S E"], is_real: Bool[Array, "B S"] | None = None
    ) -> Float[Array, "B S E"]:
        """Decoded positions: each depends on earlier real positions and itself only."""
        mask = None if is_real is None else is_real[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)
