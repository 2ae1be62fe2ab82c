"""Flax layers on top of this library's attention."""

from dpfa_jax.nn.attention_fn import attention_fn
from dpfa_jax.nn.block import Block
from dpfa_jax.nn.decoder import Decoder
from dpfa_jax.nn.encoder import Encoder
from dpfa_jax.nn.multi_head_attention import MultiHeadAttention

__all__ = ["Block", "Decoder", "Encoder", "MultiHeadAttention", "attention_fn"]
