"""Flax: private training of existing models, LoRA, and layers on this library's attention."""

from dpfa_jax.nn.attention_fn import attention_fn
from dpfa_jax.nn.block import Block
from dpfa_jax.nn.coverage import Coverage
from dpfa_jax.nn.decoder import Decoder
from dpfa_jax.nn.encoder import Encoder
from dpfa_jax.nn.lora import LowRankLinear, add_lora, merge_lora
from dpfa_jax.nn.multi_head_attention import MultiHeadAttention
from dpfa_jax.nn.private_model import PrivateModel
from dpfa_jax.nn.privatize import privatize

__all__ = [
    "Block",
    "Coverage",
    "Decoder",
    "Encoder",
    "LowRankLinear",
    "MultiHeadAttention",
    "PrivateModel",
    "add_lora",
    "attention_fn",
    "merge_lora",
    "privatize",
]
