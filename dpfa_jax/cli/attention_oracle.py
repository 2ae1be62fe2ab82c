"""The right answers of `attention_cases` in float64 by numpy, and how far each may be missed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax.cli.attention_cases import BOUND, CLIP, FLOOR, GRID, SCALE
from dpfa_jax.clipping.rows import clip_rows_stored
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout, MemoryReadout
from dpfa_jax.noise import attention_noise

# Per result: what is right, and what each number may differ from it.
Answers = dict[str, tuple[np.ndarray, np.ndarray]]


def answers(spec: AttentionSpec, inputs: AttentionInputs, cotangent: jax.Array) -> Answers:
    """Output, and of a plain call the gradients.

    Plain numbers may err twice as much as the textbook formula in the precision of the inputs;
    private ones, from the same test noise, by one step of the public grid in each number that was
    snapped, and the cast.
    """
    if isinstance(spec.readout, MemoryReadout):
        return {"output": _memory(inputs)}
    if isinstance(spec.readout, ExampleReadout):
        output = _plain(spec, inputs, cotangent)["output"]
        norms = np.linalg.norm(output, axis=-1, keepdims=True)
        clipped = output * np.minimum(1.0, spec.readout.l2_clip_norm / norms)
        released = _snapped(clipped + _noise(inputs, output.shape))
        epsilon = float(jnp.finfo(inputs.query.dtype).eps)
        return {"output": (released, GRID + epsilon * (np.abs(released) + GRID))}
    exact = _plain(spec, inputs, cotangent)
    naive = jax.jit(
        functools.partial(_naive, spec, _visible(spec, inputs)),
        compiler_options={"xla_backend_optimization_level": "0"},  # compiles in half the time
    )(inputs, cotangent)
    return {
        name: (want, 2.0 * np.abs(np.asarray(naive[name], np.float64) - want).max())
        for name, want in exact.items()
    }


def _visible(spec: AttentionSpec, inputs: AttentionInputs) -> np.ndarray:
    """Which keys each row sees, (B, 1, T, S)."""
    batch, rows, keys = inputs.query.shape[0], inputs.query.shape[1], inputs.key.shape[1]
    t, s = np.arange(rows)[:, None], np.arange(keys)[None, :]
    seen = np.ones((batch, 1, rows, keys), bool)
    if spec.is_causal:
        seen &= s <= t
    if spec.local_window is not None:
        seen &= (t - spec.local_window[0] <= s) & (s <= t + spec.local_window[1])
    for lengths, index in ((inputs.query_lengths, t), (inputs.key_lengths, s)):
        if lengths is not None:
            seen &= index < np.asarray(lengths)[:, None, None, None]
    return seen if inputs.mask is None else seen & np.asarray(inputs.mask)


def _textbook(library, spec, seen, query, key, value, bias):  # type: ignore[no-untyped-def]
    """Weights and output in the precision of the arguments; `library` is numpy or jax.numpy."""
    logits = spec.scale * library.einsum("btnh,bsnh->bnts", query, key)
    logits = library.where(seen, logits if bias is None else logits + bias, -np.inf)
    largest = logits.max(axis=-1, keepdims=True)
    weights = library.exp(logits - library.where(largest > -np.inf, largest, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights / library.where(total > 0.0, total, 1.0)
    return weights, library.einsum("bnts,bsnh->btnh", weights, value)


def _plain(
    spec: AttentionSpec, inputs: AttentionInputs, cotangent: jax.Array
) -> dict[str, np.ndarray]:
    query, key, value = repeated(inputs, np.float64)
    bias = None if inputs.bias is None else np.asarray(inputs.bias, np.float64)
    weights, output = _textbook(np, spec, _visible(spec, inputs), query, key, value, bias)
    d_output = np.asarray(cotangent, np.float64)
    d_weights = np.einsum("btnh,bsnh->bnts", d_output, value)
    along = (weights * d_weights).sum(axis=-1, keepdims=True)
    d_logits = weights * (d_weights - along)
    found = {
        "output": output,
        "query": spec.scale * np.einsum("bnts,bsnh->btnh", d_logits, key),
        "key": _summed(inputs, spec.scale * np.einsum("bnts,btnh->bsnh", d_logits, query)),
        "value": _summed(inputs, np.einsum("bnts,btnh->bsnh", weights, d_output)),
    }
    return found if bias is None else {**found, "bias": d_logits}


def _naive(
    spec: AttentionSpec, seen: np.ndarray, inputs: AttentionInputs, cotangent: jax.Array
) -> dict[str, jax.Array]:
    groups = inputs.query.shape[2] // inputs.key.shape[2]

    def call(parts: dict[str, jax.Array]) -> jax.Array:
        key, value = (jnp.repeat(parts[name], groups, axis=2) for name in ("key", "value"))
        return _textbook(jnp, spec, seen, parts["query"], key, value, parts.get("bias"))[1]

    output, pull_back = jax.vjp(call, differentiated(inputs))
    return {"output": output, **pull_back(cotangent)[0]}


def differentiated(inputs: AttentionInputs) -> dict[str, jax.Array]:
    """The arrays of a call that have a gradient, by name."""
    parts = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "bias": inputs.bias}
    return {name: x for name, x in parts.items() if x is not None}


def _memory(inputs: AttentionInputs) -> tuple[np.ndarray, np.ndarray]:
    dtype = inputs.value.dtype
    clipped = clip_rows_stored(inputs.value, CLIP)
    norms = np.linalg.norm(np.asarray(clipped, np.float64), axis=-1)
    if not (norms.max() <= CLIP and norms.min() > 0.98 * CLIP):  # all rows were longer than that
        raise AssertionError(f"clipped rows have norms {norms.min():.6f} to {norms.max():.6f}")
    query, key, value = repeated(inputs._replace(value=clipped), np.float64)
    logits = SCALE * np.einsum("btnh,bsnh->bnts", query, key)
    weights = np.exp(np.minimum(logits, BOUND) - BOUND).astype(dtype).astype(np.float64)
    ones = np.full((*value.shape[:3], 1), CLIP)  # the normaliser rides along, times kappa
    sums = np.einsum("bnts,bsnh->btnh", weights, np.concatenate([value, ones], axis=-1))
    released = _snapped(sums + _noise(inputs, sums.shape))
    total = np.maximum(released[..., -1:] / CLIP, FLOOR)
    answer = released[..., :-1] / total
    # One step of the grid in the numerator and one in the normaliser; then the cast of that.
    steps = (GRID + np.abs(answer) * GRID / CLIP) / (total - GRID / CLIP)
    return answer, steps + 2.0 * float(jnp.finfo(dtype).eps) * (np.abs(answer) + steps)


def repeated(inputs: AttentionInputs, dtype: np.typing.DTypeLike) -> tuple[np.ndarray, ...]:
    """Query, key and value in `dtype`, one key head for each query head."""
    query, key, value = (np.asarray(x).astype(dtype) for x in inputs[:3])
    groups = query.shape[2] // key.shape[2]
    return query, np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)


def _summed(inputs: AttentionInputs, gradient: np.ndarray) -> np.ndarray:
    """A gradient of repeated key heads, summed over those that are one."""
    batch, keys, heads, size = inputs.key.shape
    return gradient.reshape(batch, keys, heads, -1, size).sum(axis=3)


def _noise(inputs: AttentionInputs, shape: tuple[int, ...]) -> np.ndarray:
    """The test noise of these inputs in float64; all standard deviations are 1."""
    assert inputs.noise is not None
    rows, heads, columns = shape[1:]
    draw = functools.partial(attention_noise, heads=heads, row_start=0, rows=rows, columns=columns)
    return np.asarray(jax.jit(draw)(*inputs.noise), np.float64)


def _snapped(x: np.ndarray) -> np.ndarray:
    return np.round(x / GRID) * GRID
