"""Hopper backward kernels in the Mosaic GPU simulator, against float64."""

import jax.numpy as jnp
import numpy as np
from helpers import attention_oracle as oracle
from helpers import forced_devices
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.mosaic_gpu.backward import attention_backward


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def gradients_and_expected(sizes, options, tile, change=lambda x: x):
    """(dq, dk, dv) of the kernels and in float64; `change`: of the kernels' cotangents.

    `sizes`: (B, T, S, N, K, H). `options`: of `AttentionSpec`; `key_lengths`; shapes of `mask`
    and `bias`.
    """
    batch, rows, keys, heads, kv_heads, size = sizes
    options = dict(options)
    key_lengths = options.pop("key_lengths", None)
    shapes = {name: options.pop(name) for name in ("mask", "bias") if name in options}
    arrays = {name: draw(*shape, seed=5) for name, shape in shapes.items()}
    if "mask" in arrays:
        arrays["mask"] = arrays["mask"] > -0.5
    bias = arrays.get("bias")
    spec = AttentionSpec(0.2, **options)
    query, cotangent = (draw(batch, rows, heads, size, seed=n) for n in (1, 2))
    key, value = (draw(batch, keys, kv_heads, size, seed=n) for n in (3, 4))
    hiding = {
        "is_causal": spec.is_causal,
        "window": spec.local_window,
        "key_lengths": key_lengths,
        "mask": arrays.get("mask"),
    }
    output, *expected, _ = oracle.attention(
        *(query, key, value, cotangent),
        scale=0.2,
        soft_cap=spec.logits_soft_cap,
        bias=bias,
        **hiding,
    )
    q, k = (np.asarray(x, np.float64) for x in (query, np.repeat(key, heads // kv_heads, 2)))
    logits = 0.2 * np.einsum("btnh,bsnh->bnts", q, k)
    if spec.logits_soft_cap is not None:
        logits = spec.logits_soft_cap * np.tanh(logits / spec.logits_soft_cap)
    if bias is not None:
        logits = logits + np.asarray(bias, np.float64)
    seen = oracle.visibility(logits.shape, **hiding)
    with np.errstate(divide="ignore"):
        lse = np.log(np.sum(np.exp(logits) * seen, -1))
    delta = np.einsum("btnh,btnh->bnt", output, np.asarray(cotangent, np.float64))
    gradients = attention_backward(
        *(spec, query, key, value, change(cotangent)),
        jnp.asarray(lse, jnp.float32),
        jnp.asarray(delta, jnp.float32),
        None if key_lengths is None else jnp.asarray(key_lengths, jnp.int32),
        tile,
        **arrays,
        interpret=plgpu.InterpretGPUParams(),
    )
    assert all(x.shape == y.shape for x, y in zip(gradients, expected, strict=True))
    return gradients, expected


def errors(sizes, options, tile, change=lambda x: x):
    """Relative errors of dq, dk, dv."""
    pairs = zip(*gradients_and_expected(sizes, options, tile, change), strict=True)
    return [
        np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(np.asarray(y))
        for x, y in pairs
    ]


def in_a_process(file, *arguments):
    """Numbers that `file` prints, in a process whose CPU client has a thread for each warpgroup.

    Fewer threads than barriers that are waited on at once never come back.
    """
    printed = forced_devices.printed(8, file, *arguments, timeout=300)
    return [float(x) for x in printed.split()]
