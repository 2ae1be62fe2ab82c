"""Clipping: rows of attention, trees of one example's gradients."""

from dpfa_jax.clipping.rows import clip_rows, clip_rows_stored

__all__ = ["clip_rows", "clip_rows_stored"]
