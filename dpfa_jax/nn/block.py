"""One pre-norm transformer block: attention and MLP, each beside a residual path."""

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from dpfa_jax.nn.multi_head_attention import MultiHeadAttention


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (Xiong et al., 2020). Acts on each example.

    Args:
      features: width of the stream.
      num_heads: query heads; they divide `features`.
      hidden_features: width of the MLP's middle layer (GELU).
      num_kv_heads: key and value heads (GQA); `num_heads` where None.
      is_causal: each position attends to itself and what is before it.
      residual_init: initializer of the two matrices that write to the stream. Zeros make the block
        the identity at first.
      rngs: flax random streams for the initial parameters.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        hidden_features: int,
        *,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        residual_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.lecun_normal()
        residual_init = init if residual_init is None else residual_init
        self.is_causal = is_causal
        self.attention_norm = nnx.LayerNorm(features, rngs=rngs)
        self.attention = MultiHeadAttention(
            num_heads,
            features,
            num_kv_heads=num_kv_heads,
            kernel_init=init,
            out_kernel_init=residual_init,
            decode=False,
            rngs=rngs,
        )
        self.mlp_norm = nnx.LayerNorm(features, rngs=rngs)
        self.mlp_in = nnx.Linear(features, hidden_features, kernel_init=init, rngs=rngs)
        self.mlp_out = nnx.Linear(hidden_features, features, kernel_init=residual_init, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B S E"], mask: Bool[Array, "B _ _ S"] | None = None
    ) -> Float[Array, "B S E"]:
        """The stream after this block; `mask` is True where a position may attend to another."""
        x = x + self.attention(self.attention_norm(x), mask=mask, is_causal=self.is_causal)
        return x + self.mlp_out(jax.nn.gelu(self.mlp_in(self.mlp_norm(x))))
