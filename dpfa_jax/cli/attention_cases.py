"""Small attention calls of every kind that `dpfa doctor` asks of each backend."""

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax.kernels.base import (
    AttentionInputs,
    AttentionSpec,
    ExampleReadout,
    MemoryReadout,
    NoiseInputs,
)
from dpfa_jax.noise import insecure_test_key, key_words

HEADS, GRID, CLIP, BOUND, FLOOR, SCALE = 4, 2.0**-4, 1.0, 1.0, 1.0, 0.125
_BATCH, _ROWS, _KEYS, _KEY_HEADS = 2, 100, 130, 2
_NOISE, _GRIDS = (1.0,) * HEADS, (GRID,) * HEADS
_EXAMPLE = ExampleReadout(0.25, _NOISE, _GRIDS)
_MEMORY = MemoryReadout("sum", BOUND, CLIP, CLIP, FLOOR, _NOISE, _GRIDS)

Case = tuple[AttentionSpec, AttentionInputs]

# How the names of those cases begin that every backend is asked for; of the others, the one that
# serves them. A kernel takes a second and more to compile.
FOR_ALL = ("plain, head size 64", "mask and bias", "private")


def cases() -> dict[str, Case]:
    """2 examples, 100 rows, 130 keys, 4 heads on 2; head size 64 where the name says no other.

    Head sizes and the example release are tried in the dtype that this platform's kernels are for.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    found = {
        f"plain, head size {size}, {jnp.dtype(dtype)}": (
            AttentionSpec(SCALE),
            _inputs(dtype, size),
        )
        for size in (64, 128, 256)
    }
    rng = np.random.default_rng(1)
    mask = jnp.asarray(rng.random((1, 1, _ROWS, _KEYS)) < 0.8)
    bias = jnp.asarray(rng.standard_normal((_BATCH, HEADS, _ROWS, _KEYS)), jnp.float16)
    query_lengths, key_lengths = jnp.asarray([_ROWS - 7, 50]), jnp.asarray([_KEYS, 77])
    return {
        **found,
        "causal, bfloat16": (AttentionSpec(SCALE, is_causal=True), _inputs(jnp.bfloat16)),
        "mask and bias, float16": (
            AttentionSpec(SCALE),
            _inputs(jnp.float16)._replace(mask=mask, bias=bias),
        ),
        "lengths and window, bfloat16": (
            AttentionSpec(SCALE, local_window=(40, 20)),
            _inputs(jnp.bfloat16)._replace(query_lengths=query_lengths, key_lengths=key_lengths),
        ),
        f"private example, {jnp.dtype(dtype)}": (
            AttentionSpec(SCALE, readout=_EXAMPLE),
            _noised(dtype),
        ),
        "private memory, bfloat16": (AttentionSpec(SCALE, readout=_MEMORY), _noised(jnp.bfloat16)),
    }


def _inputs(dtype: jnp.dtype, size: int = 64) -> AttentionInputs:
    rng = np.random.default_rng(0)
    shapes = ((_BATCH, _ROWS, HEADS, size), *((_BATCH, _KEYS, _KEY_HEADS, size),) * 2)
    query, key, value = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return AttentionInputs(query, key, value)


def _noised(dtype: jnp.dtype) -> AttentionInputs:
    words = jnp.broadcast_to(key_words(insecure_test_key(7)), (_BATCH, 2))
    noise = NoiseInputs(words, jnp.arange(_BATCH, dtype=jnp.uint32), jnp.zeros(_BATCH, jnp.uint32))
    return _inputs(dtype)._replace(noise=noise)
