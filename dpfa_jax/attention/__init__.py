"""Attention, plain and private, on every device."""

from dpfa_jax.attention.charging import charge
from dpfa_jax.attention.plain import dot_product_attention
from dpfa_jax.attention.private import dp_attention

__all__ = ["charge", "dot_product_attention", "dp_attention"]
