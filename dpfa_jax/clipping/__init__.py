"""Clipping: rows of attention, trees of one example's gradients."""

from dpfa_jax.clipping.rows import clip_rows, clip_rows_stored
from dpfa_jax.clipping.trees import clipped_rows_sum, clipped_sum

__all__ = ["clip_rows", "clip_rows_stored", "clipped_rows_sum", "clipped_sum"]
