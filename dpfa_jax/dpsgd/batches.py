"""Poisson batches as accounted: drawn independently, cut at the capacity, padded to it."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.release import Sampling

PADDING = -1


def poisson_batches(
    sampling: Sampling, rng: np.random.Generator, steps: int, *, first_step: int = 0
) -> Iterator[np.ndarray]:
    """`steps` batches of example indices, shape (capacity,), padded with -1.

    Every example enters each batch independently with `sampling.probability`; a batch beyond the
    capacity is cut to a uniformly random subset. Cyclic batches (b = `sampling.cycle_length` > 1)
    of step t, counted from `first_step` on, hold only examples i with i mod b = t mod b: nobody
    takes part twice within b steps, also where batches are drawn in several calls. The last n mod b
    examples are then never drawn. Who is in a batch is secret: draw `rng` from the
    operating system's entropy (`np.random.default_rng()`), and publish neither seed nor indices.

    Errors: ArgumentError for another sampling scheme or an `rng` that is no numpy Generator.
    Source: jax_privacy.batch_selection (Google DeepMind, 2025) draws the indices.
    """
    if sampling.scheme != "poisson":
        raise ArgumentError(
            "sampling",
            sampling.scheme,
            "these batches are drawn by Poisson sampling",
            'Pass a release with sampling="poisson".',
        )
    if not isinstance(rng, np.random.Generator):
        raise ArgumentError(
            "rng",
            rng,
            "not a numpy.random.Generator",
            "Pass np.random.default_rng(), which takes its seed from the operating system.",
        )
    checks.count("steps", steps, minimum=0)
    checks.count("first_step", first_step, minimum=0)
    return _batches(sampling, rng, range(first_step, first_step + steps))


def _batches(sampling: Sampling, rng: np.random.Generator, steps: range) -> Iterator[np.ndarray]:
    from jax_privacy import batch_selection  # heavy: only where batches are drawn

    strategy = batch_selection.CyclicPoissonSampling(
        sampling_prob=sampling.probability,
        iterations=len(steps),
        truncated_batch_size=sampling.truncated_batch_size,
    )
    cycle = sampling.cycle_length
    drawn_places = strategy.batch_iterator(sampling.group_size, rng=rng)
    for step, drawn in zip(steps, drawn_places, strict=True):
        indices = np.full(sampling.truncated_batch_size, PADDING, dtype=np.int64)
        indices[: len(drawn)] = drawn.astype(np.int64) * cycle + step % cycle
        yield indices


def take_batch(
    examples: PyTree, indices: np.ndarray, dataset_size: int | None = None
) -> tuple[PyTree, np.ndarray]:
    """Rows of a pytree of host arrays: (batch, is_real). Padding rows hold zeros, not data.

    Args:
      examples: pytree of numpy arrays with leading axis n.
      indices: (capacity,), -1 for padding. No example may be in a batch twice: each of its rows
        is clipped by itself, so together they would weigh twice what was accounted.
      dataset_size: that of the plan. Rows beyond it are never drawn, which the indices of one batch
        do not tell: given, it must be n.

    Errors: ArgumentError for indices that are no vector of integers, an index outside -1 .. n-1, an
    example that is in the batch twice, a leaf that is no array of rows, or another number of rows
    than `dataset_size`.
    """
    indices = np.asarray(indices)
    if indices.ndim != 1 or not (np.issubdtype(indices.dtype, np.integer) or not indices.size):
        raise ArgumentError(
            "indices",
            f"array of {indices.dtype}, shape {indices.shape}",
            "not a vector of integers",
            "Pass one of those that plan.index_batches gives.",
        )
    is_real = indices != PADDING
    drawn = np.sort(indices[is_real])
    if (drawn[1:] == drawn[:-1]).any():
        raise ArgumentError(
            "indices",
            int(drawn[1:][drawn[1:] == drawn[:-1]][0]),
            "this example is in the batch more than once, and would count beyond its clip norm",
            "Draw each example at most once a batch, as plan.index_batches does.",
        )

    def rows(path: tuple[Any, ...], leaf: np.ndarray) -> np.ndarray:
        if not getattr(leaf, "shape", ()):
            raise ArgumentError(
                f"examples{jax.tree_util.keystr(path)}",
                type(leaf),
                "not an array with one row an example",
                "Pass arrays, np.asarray(...) of a list, and put numbers for all into the loss.",
            )
        if dataset_size is not None and len(leaf) != dataset_size:
            raise ArgumentError(
                "dataset_size",
                dataset_size,
                f"the examples have {len(leaf)} rows",
                "Plan for that many: others are never drawn, or missing when they are.",
            )
        if indices.size and (indices.min() < PADDING or indices.max() >= len(leaf)):
            raise ArgumentError(
                "indices",
                (int(indices.min()), int(indices.max())),
                f"outside -1 .. {len(leaf) - 1}",
                "Draw the batches for the dataset_size of these examples.",
            )
        taken = np.zeros((len(indices), *leaf.shape[1:]), leaf.dtype)
        taken[is_real] = leaf[indices[is_real]]
        return taken

    return jax.tree.map_with_path(rows, examples), is_real
