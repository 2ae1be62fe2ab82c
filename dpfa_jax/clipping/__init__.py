"""Clipping: rows of attention, trees of one example's gradients."""

from dpfa_jax.clipping.rows import clip_rows, clip_rows_stored
from dpfa_jax.clipping.trees import (
    Measured,
    TableRows,
    centred_count,
    clip_scales,
    clipped_rows_sum,
    squared_norms,
    table_rows,
    weighted_sum,
)

__all__ = [
    "Measured",
    "TableRows",
    "centred_count",
    "clip_rows",
    "clip_rows_stored",
    "clip_scales",
    "clipped_rows_sum",
    "squared_norms",
    "table_rows",
    "weighted_sum",
]
