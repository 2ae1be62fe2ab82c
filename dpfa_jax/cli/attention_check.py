"""Self-test of the attention backends of this machine against float64, noise included."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax.clipping.rows import clip_rows_stored
from dpfa_jax.core import UnsupportedBackendError
from dpfa_jax.kernels import dispatch
from dpfa_jax.kernels.base import (
    AttentionInputs,
    AttentionSpec,
    Backend,
    ExampleReadout,
    MemoryReadout,
    NoiseInputs,
)
from dpfa_jax.noise import attention_noise, insecure_test_key, key_words

_HEADS, _GRID, _CLIP, _BOUND, _FLOOR = 4, 2.0**-4, 1.0, 1.0, 1.0
_SCALE = 0.125
_NOISE, _GRIDS = (1.0,) * _HEADS, (_GRID,) * _HEADS
_EXAMPLE = ExampleReadout(0.25, _NOISE, _GRIDS)
_MEMORY = MemoryReadout("sum", _BOUND, _CLIP, _CLIP, _FLOOR, _NOISE, _GRIDS)

Case = tuple[AttentionSpec, AttentionInputs]


def cases() -> dict[str, Case]:
    """Small calls of every kind: 2 examples, 100 rows, 130 keys, 4 heads on 2, head size 64."""
    wide, narrow = _inputs(jnp.float32), _inputs(jnp.bfloat16)
    return {
        "plain, float32": (AttentionSpec(_SCALE), wide._replace(noise=None)),
        "causal, bfloat16": (AttentionSpec(_SCALE, is_causal=True), narrow._replace(noise=None)),
        "private example, float32": (AttentionSpec(_SCALE, readout=_EXAMPLE), wide),
        "private memory, bfloat16": (AttentionSpec(_SCALE, readout=_MEMORY), narrow),
    }


def serving() -> list[tuple[str, str, str]]:
    """For each case: the backend that serves it, and why the ones before it do not."""
    rows = []
    for case, (spec, inputs) in cases().items():
        chosen = dispatch.choose(spec, inputs).name
        passed_over = []
        for name in dispatch.BACKENDS:
            if name == chosen:
                break
            try:
                dispatch.choose(spec, inputs, name)
            except UnsupportedBackendError as error:
                passed_over.append(str(error))
        rows.append((case, chosen, "; ".join(passed_over) or "first choice"))
    return rows


def check() -> str:
    """Every backend here, on every case that it serves, against numpy in float64.

    Plain answers may err twice as much as the textbook formula in the precision of the inputs.
    Private answers, from the same test noise, may differ by one step of the public grid in each
    number that was snapped: from the float64 ones, and between backends.

    Errors: AssertionError that names backend, case, error and bound.
    """
    tested: dict[str, int] = {}
    for case, (spec, inputs) in cases().items():
        want, allowed = _expected(spec, inputs)
        first: np.ndarray | None = None
        for backend in _backends(spec, inputs):
            got = np.asarray(jax.jit(_output_of(backend, spec))(inputs), np.float64)
            _require(got, want, allowed, f"{backend.name}, {case}")
            if inputs.noise is not None:
                first = got if first is None else first
                _require(got, first, allowed, f"{backend.name} against another backend, {case}")
            tested[backend.name] = tested.get(backend.name, 0) + 1
    return ", ".join(f"{name} in {count} cases" for name, count in tested.items())


def _require(got: np.ndarray, want: np.ndarray, allowed: np.ndarray, what: str) -> None:
    excess = np.abs(got - want) - allowed
    if not (excess <= 0.0).all():  # also for NaN
        worst = np.unravel_index(np.argmax(np.nan_to_num(excess, nan=np.inf)), excess.shape)
        bound = np.broadcast_to(allowed, excess.shape)[worst]
        raise AssertionError(
            f"{what}: {got[worst]:.6g} where {want[worst]:.6g} is right; {bound:.1e} is allowed"
        )


def _backends(spec: AttentionSpec, inputs: AttentionInputs) -> list[Backend]:
    found = []
    for name in dispatch.BACKENDS:
        try:
            found.append(dispatch.choose(spec, inputs, name))
        except UnsupportedBackendError:
            continue
    return found


def _output_of(backend: Backend, spec: AttentionSpec) -> Callable[[AttentionInputs], jax.Array]:
    return lambda inputs: backend.forward(spec, inputs).output


def _inputs(dtype: jnp.dtype) -> AttentionInputs:
    rng = np.random.default_rng(0)
    shapes = ((2, 100, _HEADS, 64), (2, 130, 2, 64), (2, 130, 2, 64))
    query, key, value = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    words = jnp.broadcast_to(key_words(insecure_test_key(7)), (2, 2))
    noise = NoiseInputs(words, jnp.arange(2, dtype=jnp.uint32), jnp.zeros(2, jnp.uint32))
    return AttentionInputs(query, key, value, noise=noise)


def _expected(spec: AttentionSpec, inputs: AttentionInputs) -> tuple[np.ndarray, np.ndarray]:
    """The right answer in float64, and how far each number may be from it."""
    if isinstance(spec.readout, MemoryReadout):
        return _memory(inputs)
    exact = _softmax_attention(np, spec, *_repeated(inputs, np.float64))
    if isinstance(spec.readout, ExampleReadout):
        norms = np.linalg.norm(exact, axis=-1, keepdims=True)
        clipped = exact * np.minimum(1.0, spec.readout.l2_clip_norm / norms)
        return _snapped(clipped + _noise(inputs, exact.shape)), np.asarray(_GRID)
    textbook = jax.jit(lambda *arrays: _softmax_attention(jnp, spec, *arrays))
    naive = textbook(*_repeated(inputs, inputs.query.dtype))
    error = np.abs(np.asarray(naive, np.float64) - exact).max()
    return exact, np.asarray(2.0 * error)


def _memory(inputs: AttentionInputs) -> tuple[np.ndarray, np.ndarray]:
    dtype = inputs.value.dtype
    clipped = clip_rows_stored(inputs.value, _CLIP)
    norms = np.linalg.norm(np.asarray(clipped, np.float64), axis=-1)
    if not (norms.max() <= _CLIP and norms.min() > 0.98 * _CLIP):  # all rows were longer than that
        raise AssertionError(f"clipped rows have norms {norms.min():.6f} to {norms.max():.6f}")
    query, key, value = _repeated(inputs._replace(value=clipped), np.float64)
    logits = _SCALE * np.einsum("btnh,bsnh->bnts", query, key)
    weights = np.exp(np.minimum(logits, _BOUND) - _BOUND).astype(dtype).astype(np.float64)
    ones = np.full((*value.shape[:3], 1), _CLIP)  # the normaliser rides along, times kappa
    sums = np.einsum("bnts,bsnh->btnh", weights, np.concatenate([value, ones], axis=-1))
    released = _snapped(sums + _noise(inputs, sums.shape))
    total = np.maximum(released[..., -1:] / _CLIP, _FLOOR)
    answer = released[..., :-1] / total
    # One step of the grid in the numerator and one in the normaliser; then the cast.
    steps = (_GRID + np.abs(answer) * _GRID / _CLIP) / (total - _GRID / _CLIP)
    return answer, steps + 2.0 * float(jnp.finfo(dtype).eps) * np.abs(answer)


def _repeated(inputs: AttentionInputs, dtype: np.typing.DTypeLike) -> tuple[np.ndarray, ...]:
    """Query, key and value in `dtype`, one key head for each query head."""
    query, key, value = (np.asarray(x).astype(dtype) for x in inputs[:3])
    groups = query.shape[2] // key.shape[2]
    return query, np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)


def _softmax_attention(library, spec: AttentionSpec, query, key, value):  # type: ignore[no-untyped-def]
    """The textbook formula, in the precision of its arguments; `library` is numpy or jax.numpy."""
    logits = spec.scale * library.einsum("btnh,bsnh->bnts", query, key)
    if spec.is_causal:
        hidden = np.arange(key.shape[1])[None, :] > np.arange(query.shape[1])[:, None]
        logits = library.where(hidden, -np.inf, logits)
    weights = library.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return library.einsum("bnts,bsnh->btnh", weights, value)


def _noise(inputs: AttentionInputs, shape: tuple[int, ...]) -> np.ndarray:
    """The test noise of these inputs in float64; all standard deviations are 1."""
    assert inputs.noise is not None
    rows, heads, columns = shape[1:]
    draw = functools.partial(attention_noise, heads=heads, row_start=0, rows=rows, columns=columns)
    return np.asarray(jax.jit(draw)(*inputs.noise), np.float64)


def _snapped(x: np.ndarray) -> np.ndarray:
    return np.round(x / _GRID) * _GRID
