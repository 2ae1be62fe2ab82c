"""Data sources, one file each."""

from dpfa_jax.train.data.dataset import ClassificationData
from dpfa_jax.train.data.errors import DataError
from dpfa_jax.train.data.load import SOURCES, load_data
from dpfa_jax.train.data.tokens import text_encoder, token_embeddings

__all__ = [
    "SOURCES",
    "ClassificationData",
    "DataError",
    "load_data",
    "text_encoder",
    "token_embeddings",
]
