"""Clipped sums of any loss, one `jax.grad` after the other, against which sums are judged."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax.clipping.trees import CLIP_MARGIN
from dpfa_jax.dpsgd.clipped_sum import ClippedSum, late_sum

# Tests compile more than they compute.
QUICKLY_COMPILED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def clipped_sum(*arguments, leaf_groups, **named) -> ClippedSum:
    """`late_sum` whose leaves all stay sums."""
    late = late_sum(*arguments, leaf_groups=leaf_groups, **named)
    return late.added([None] * len(leaf_groups))


def cast(tree, dtype):
    """Floating-point leaves in `dtype`; integers, booleans and keys as they are."""

    def one(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return jnp.asarray(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.asarray(x)

    return jax.tree.map(one, tree)


def gradients_by_grad(loss_fn, params, batch, dtype):
    """One example's gradients after the other's, everything in `dtype`: a list of path -> array."""
    with jax.enable_x64(dtype == np.float64):
        loss_fn, params, batch = cast(loss_fn, dtype), cast(params, dtype), cast(batch, dtype)

        @functools.partial(jax.jit, compiler_options=QUICKLY_COMPILED)
        def one(loss_fn, params, example):
            alone = jax.tree.map(lambda x: x[None], example)
            return jax.grad(lambda p: loss_fn(p, alone)[0])(params)

        examples = (jax.tree.map(lambda x, i=i: x[i], batch) for i in range(_rows(batch)))
        return [jax.tree.map(np.asarray, one(loss_fn, params, example)) for example in examples]


def clipped_by_hand(rows, l2_clip_norm, dtype):
    """Sum of the clipped gradients `rows`, in `dtype`: path -> array."""
    totals = jax.tree.map(np.zeros_like, rows[0])
    for row in rows:
        squares = sum(np.sum(np.square(leaf, dtype=dtype)) for leaf in jax.tree.leaves(row))
        scale = dtype(min(1.0, l2_clip_norm * (1.0 - CLIP_MARGIN) / np.sqrt(squares)))
        totals = jax.tree.map(lambda total, leaf, scale=scale: total + scale * leaf, totals, row)
    return totals


def check_clipped_sum(loss_fn, params, batch, *, micro_batch_size, invariant=""):
    """Error of the clipped sum at most twice the naive one, for every parameter; ragged batch.

    The clip norm is the median: half of the examples pass it. Controls: one example more is seen in
    every parameter, but for those to which the loss is `invariant` (a regular expression): their
    gradient is zero but for rounding.
    """
    exact, naive = (gradients_by_grad(loss_fn, params, batch, d) for d in (np.float64, np.float32))
    norms = [np.sqrt(sum(np.sum(leaf**2) for leaf in row.values())) for row in exact]
    norm = float(np.median(norms))
    more, real = clipped_by_hand(exact, norm, np.float64), np.arange(len(exact)) < len(exact) - 1
    exact = clipped_by_hand(exact[:-1], norm, np.float64)
    naive = clipped_by_hand(naive[:-1], norm, np.float32)
    whole = functools.partial(
        clipped_sum,
        l2_clip_norms=(norm,),
        leaf_groups=(0,) * len(jax.tree.leaves(params)),
        micro_batch_size=micro_batch_size,
        per_example_bytes=2**24,
    )
    summed = jax.jit(whole, compiler_options=QUICKLY_COMPILED)(loss_fn, params, batch, real)
    size = np.sqrt(sum(np.sum(leaf**2) for leaf in exact.values()))
    for path, leaf in summed.gradients.items():
        error = np.linalg.norm(np.asarray(leaf, np.float64) - exact[path])
        budget = 2.0 * max(np.linalg.norm(naive[path] - exact[path]), 2.0**-22 * size)
        assert error <= budget, (path, error, budget)
        is_invariant = bool(invariant and re.search(invariant, path))
        assert is_invariant == (np.linalg.norm(exact[path]) < 1e-12 * size), path
        assert is_invariant or np.linalg.norm(more[path] - exact[path]) > 10 * error, path


def _rows(batch):
    return jax.tree.leaves(batch)[0].shape[0]
