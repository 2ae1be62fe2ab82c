"""Adapter: this library's plain attention as `attention_fn` of flax nnx and linen layers."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from dpfa_jax.attention import dot_product_attention
from dpfa_jax.core import ArgumentError


def attention_fn(
    query: Float[Array, "*batch T N H"],
    key: Float[Array, "*batch S K H"],
    value: Float[Array, "*batch S K H"],
    bias: Num[Array, "*#batch #N #T #S"] | None = None,
    mask: Num[Array, "*#batch #N #T #S"] | None = None,
    *,
    dropout_rate: float = 0.0,
    deterministic: bool = True,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    **options: Any,
) -> Float[Array, "*batch T N H"]:
    """Attention for `flax.nnx.MultiHeadAttention` and `flax.linen.MultiHeadDotProductAttention`.

    nnx passes every keyword of its own attention and linen filters by signature; both are served.
    Any number of leading batch axes. linen's float mask counts as boolean (nonzero: attend).
    `options` go on to `dot_product_attention` (`local_window_size`, `implementation`, ...).

    Errors: ArgumentError for what cannot be honoured: dropout, sown weights, a precision.
    """
    del broadcast_dropout, dropout_rng
    if dropout_rate > 0.0 and not deterministic:
        raise ArgumentError(
            "dropout_rate",
            dropout_rate,
            "attention dropout is not offered",
            "Pass dropout_rate=0 or deterministic=True.",
        )
    if module is not None and _sows_weights(module):
        raise ArgumentError(
            "sow_weights",
            True,
            "attention weights are never formed, let alone stored",
            "Leave sow_weights out.",
        )
    if precision is not None:
        raise ArgumentError(
            "precision", precision, "not offered", "Cast the inputs, or leave precision out."
        )
    if dtype is not None:
        query, key, value = (x.astype(dtype) for x in (query, key, value))
    batch = query.shape[:-3]
    if mask is not None and mask.dtype != jnp.bool_:
        mask = mask != 0
    query, key, value = (_one_batch_axis(x, batch, 3) for x in (query, key, value))
    bias, mask = (None if x is None else _logit_shaped(x, batch) for x in (bias, mask))
    output = dot_product_attention(
        query, key, value, bias=bias, mask=mask, is_causal=is_causal, **options
    )
    return output.reshape(*batch, *output.shape[1:])


def _sows_weights(module: Any) -> bool:
    # nnx passes the module only when asked to sow; linen's dotted twin passes it the same way.
    return module is not None


def _one_batch_axis(x: Array, batch: tuple[int, ...], trailing: int) -> Array:
    return x.reshape(math.prod(batch), *x.shape[-trailing:])


def _logit_shaped(x: Array, batch: tuple[int, ...]) -> Array:
    """(B or 1, N or 1, T or 1, S or 1) of an array that broadcasts against the logits."""
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    if all(size == 1 for size in x.shape[: len(batch)]):
        return x.reshape(1, *x.shape[-3:])
    return _one_batch_axis(jnp.broadcast_to(x, batch + x.shape[-3:]), batch, 3)
