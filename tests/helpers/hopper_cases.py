"""Cases, backends and references that the tests of the Hopper kernels on a device share."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import attention_oracle as oracle

from dpfa_jax.attention import core
from dpfa_jax.kernels.base import NoiseInputs
from dpfa_jax.kernels.mosaic_gpu import backend as backend_module
from dpfa_jax.kernels.mosaic_gpu.backend import MosaicGpuBackend
from dpfa_jax.kernels.mosaic_gpu.tiles import (
    MAX_HEAD_SIZE_ONE_WARPGROUP,
    BackwardTiles,
    FusedTiles,
    backward_tiles,
)

BACKEND = MosaicGpuBackend()
# Names of their own keep the traces of the backward kernels apart.
TWO = MosaicGpuBackend(name="mosaic_gpu, two kernels")
FUSED = MosaicGpuBackend(name="mosaic_gpu, fused")
# Where the noise of an example release is made; above head size 128 after the kernel only.
PLACES = {
    "inside": MosaicGpuBackend(noise_pass=False),
    "after": MosaicGpuBackend(noise_pass=True),
}
PLACES_OF_SIZES = [(128, "inside"), (128, "after"), (256, "after")]
CASES = {
    "full, GQA": ((2, 512, 512, 4, 2, 64), {}, jnp.bfloat16),
    "causal, MQA, ragged": ((2, 333, 259, 4, 1, 128), {"is_causal": True}, jnp.float16),
    "causal, GQA, lengths, head size 64": (
        (3, 333, 459, 4, 2, 64),
        {"is_causal": True, "lengths": True},
        jnp.bfloat16,
    ),
    "window, cap, lengths": (
        (3, 400, 410, 2, 2, 128),
        {"local_window": (130, 17), "logits_soft_cap": 8.0, "lengths": True},
        jnp.bfloat16,
    ),
    # 8 steps of 128 keys or more: a row's maximum is kept.
    "many keys, MQA, ragged, head size 64": ((1, 260, 1100, 2, 1, 64), {}, jnp.bfloat16),
    "many keys, window, lengths": (
        (3, 1300, 1400, 2, 1, 128),
        {"local_window": (1200, 600), "lengths": True},
        jnp.float16,
    ),
    "many keys, causal, GQA, lengths, head size 64": (
        (2, 2100, 2100, 4, 2, 64),
        {"is_causal": True, "lengths": True},
        jnp.bfloat16,
    ),
    "one row, one key, head size 80": ((2, 1, 1, 2, 2, 80), {}, jnp.bfloat16),
    "head size 256": ((1, 130, 300, 2, 2, 256), {"is_causal": True}, jnp.bfloat16),
    "head size 256, full, GQA": ((2, 512, 512, 4, 2, 256), {}, jnp.bfloat16),
    "head size 256, causal, MQA, ragged": (
        (2, 333, 259, 4, 1, 256),
        {"is_causal": True},
        jnp.float16,
    ),
    "head size 192, window, cap, lengths": (
        (3, 400, 410, 2, 2, 192),
        {"local_window": (130, 17), "logits_soft_cap": 8.0, "lengths": True},
        jnp.bfloat16,
    ),
    "one row, one key, head size 200": ((2, 1, 1, 2, 2, 200), {}, jnp.bfloat16),
    "head size 192, causal": ((1, 1000, 1000, 2, 2, 192), {"is_causal": True}, jnp.bfloat16),
    # A warpgroup whose window lies behind the last key, beside one that sees keys.
    "head size 192, window behind the last key": (
        (1, 256, 256, 1, 1, 192),
        {"local_window": (5, 3), "lengths": ([256], [60])},
        jnp.bfloat16,
    ),
    "window to the left of the diagonal": (
        (1, 300, 300, 2, 2, 64),
        {"local_window": (100, -3)},
        jnp.bfloat16,
    ),
    "head size 192, window to the right of the diagonal": (
        (1, 300, 310, 2, 1, 192),
        {"local_window": (-5, 40)},
        jnp.float16,
    ),
    # Without a running maximum; logits here have a standard deviation of 1, at most 5.3.
    "bound": ((2, 512, 512, 4, 2, 128), {"largest_logit": 6.0}, jnp.bfloat16),
    "bound, wide key tiles": ((1, 260, 1100, 2, 1, 64), {"largest_logit": 8.0}, jnp.bfloat16),
    "bound, causal, float16": (
        (2, 333, 259, 4, 1, 128),
        {"is_causal": True, "largest_logit": 10.0},
        jnp.float16,
    ),
    "cap, window, lengths": (
        (3, 400, 410, 2, 2, 64),
        {"local_window": (130, 17), "logits_soft_cap": 2.0, "lengths": True},
        jnp.bfloat16,
    ),
    "bound, head size 256": (
        (1, 130, 300, 2, 2, 256),
        {"is_causal": True, "largest_logit": 60.0},
        jnp.bfloat16,
    ),
    "bound that logits exceed by 4": (
        (1, 300, 300, 2, 2, 128),
        {"largest_logit": 1.0},
        jnp.bfloat16,
    ),
    "bound that needs a running maximum": (
        (1, 300, 300, 2, 2, 128),
        {"largest_logit": 80.0},
        jnp.bfloat16,
    ),
}


def draw(rng, shape, dtype):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def noise_inputs(batch, seed=0):
    words = np.random.default_rng(seed).integers(0, 2**32, (batch, 2), dtype=np.uint32)
    return NoiseInputs(
        jnp.asarray(words), jnp.arange(batch, dtype=jnp.uint32), jnp.full(batch, 3, jnp.uint32)
    )


def value_and_gradients(spec, inputs, cotangent, backend=BACKEND):
    """(output, lse, dq, dk, dv) by one compiled program."""

    def run(inputs, cotangent):
        def answer(query, key, value):
            arrays = inputs._replace(query=query, key=key, value=value)
            return core.attend(backend, spec, arrays)

        (output, lse), pull = jax.vjp(answer, inputs.query, inputs.key, inputs.value)
        return output, lse, *pull((cotangent, jnp.zeros_like(lse)))

    return jax.jit(run)(inputs, cotangent)


def naive(spec, lengths, query, key, value):
    """Attention as a textbook writes it, products and weights in the inputs' precision."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    logits = logits * spec.scale
    if spec.logits_soft_cap is not None:
        logits = spec.logits_soft_cap * jnp.tanh(logits / spec.logits_soft_cap)
    seen = jnp.asarray(
        oracle.visibility(
            logits.shape, is_causal=spec.is_causal, window=spec.local_window, **lengths
        )
    )
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
    weights = jnp.where(seen, weights, 0).astype(value.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def distance(x, y):
    return np.linalg.norm(np.asarray(x, np.float64) - y)


def two_kernels(spec, head_size, keys, **_):
    if head_size > MAX_HEAD_SIZE_ONE_WARPGROUP:  # one way serves there
        return backward_tiles(spec, head_size, keys)
    return BackwardTiles(block_kv_dq=128 if head_size == 64 else 64)


def fused(spec, head_size, keys, **_):
    return FusedTiles(heads=16)


def use_tiles(monkeypatch, tiles_of):
    """Backward passes by the kernels whose tiles these are, on a backend of its own name."""
    monkeypatch.setattr(backend_module, "backward_tiles", tiles_of)


BACKWARD = {
    "two kernels": (TWO, two_kernels, True),
    "fused, in order": (FUSED, fused, True),
    "fused, any order": (FUSED, fused, False),
}
