"""The models of the training benchmark in plain JAX: losses of one number an example.

Parameters are float32, products bfloat16 on a GPU (and float32 elsewhere), norms and losses
float32. All methods run the same functions.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dpfa_jax import dot_product_attention

Params = dict[str, Any]
HALF = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32


@dataclasses.dataclass(frozen=True)
class Model:
    """`init(key) -> (trainable, frozen)`, `loss(trainable, frozen, batch) -> (B,)`.

    `stacked`: path prefixes of parameters that hold all layers, for `scan`.
    """

    init: Callable[[jax.Array], tuple[Params, Params]]
    loss: Callable[[Params, Params, Any], jax.Array]
    batch: Callable[[jax.Array, int, int], Any]
    stacked: tuple[str, ...] = ()


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, jnp.float32)


def _dense(params: Params, x: jax.Array) -> jax.Array:
    y = x @ params["kernel"].astype(HALF)
    return y + params["bias"].astype(HALF) if "bias" in params else y


def _layer_norm(params: Params, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    return (scaled * params["scale"] + params["bias"]).astype(HALF)


def _rms_norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return (x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5) * scale).astype(HALF)


def _block(params: Params, x: jax.Array, *, heads: int, causal: bool) -> jax.Array:
    batch, length, width = x.shape
    qkv = _dense(params["qkv"], _layer_norm(params["norm1"], x))
    query, key, value = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, width // heads), 2, 0)
    mixed = dot_product_attention(query, key, value, is_causal=causal)
    x = x + _dense(params["out"], mixed.reshape(batch, length, width))
    hidden = jax.nn.gelu(_dense(params["up"], _layer_norm(params["norm2"], x)))
    return x + _dense(params["down"], hidden)


def _blocks(key: jax.Array, layers: int, width: int) -> list[Params]:
    def norm() -> Params:
        return {"scale": jnp.ones(width), "bias": jnp.zeros(width)}

    def dense(key: jax.Array, rows: int, columns: int) -> Params:
        return {"kernel": _normal(key, rows, columns), "bias": jnp.zeros(columns)}

    return [
        {
            "norm1": norm(),
            "norm2": norm(),
            "qkv": dense(k[0], width, 3 * width),
            "out": dense(k[1], width, width),
            "up": dense(k[2], width, 4 * width),
            "down": dense(k[3], 4 * width, width),
        }
        for k in (jax.random.split(each, 4) for each in jax.random.split(key, layers))
    ]


def _token_losses(logits: jax.Array, targets: jax.Array) -> jax.Array:
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(logs, targets[..., None], axis=-1)[..., 0].mean(axis=-1)


def gpt2(
    layers: int, width: int, heads: int, vocabulary: int = 50304, *, stacked: bool = False
) -> Model:
    """GPT-2 with a tied head (Radford et al., 2019).

    `stacked`: one array holds a parameter of all layers; the layers are run by `scan` and
    recomputed in the backward pass (`checkpoint`).
    """

    def init(key: jax.Array) -> tuple[Params, Params]:
        k = jax.random.split(key, 3)
        norm = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
        table, places = _normal(k[0], vocabulary, width), _normal(k[1], 4096, width)
        blocks: Any = _blocks(k[2], layers, width)
        if stacked:
            blocks = jax.tree.map(lambda *layers: jnp.stack(layers), *blocks)
        return {"tokens": table, "places": places, "blocks": blocks, "norm": norm}, {}

    def loss(params: Params, frozen: Params, batch: jax.Array) -> jax.Array:
        del frozen
        inputs, targets = batch[:, :-1], batch[:, 1:]
        table = params["tokens"].astype(HALF)
        x = table[inputs] + params["places"].astype(HALF)[: inputs.shape[1]]
        block_of = functools.partial(_block, heads=heads, causal=True)
        if stacked:
            again = jax.checkpoint(lambda x, block: (block_of(block, x), None))
            x, _ = jax.lax.scan(again, x, params["blocks"])
        else:
            for block in params["blocks"]:
                x = block_of(block, x)
        return _token_losses(_layer_norm(params["norm"], x) @ table.T, targets)

    tokens = functools.partial(_tokens, vocabulary)
    return Model(init, loss, tokens, ("blocks",) if stacked else ())


def vit(layers: int, width: int, heads: int, patch: int = 16, classes: int = 1000) -> Model:
    """ViT (Dosovitskiy et al., 2021); T is the number of patches."""

    def init(key: jax.Array) -> tuple[Params, Params]:
        k = jax.random.split(key, 4)
        params = {
            "patches": {
                "kernel": _normal(k[0], patch * patch * 3, width),
                "bias": jnp.zeros(width),
            },
            "places": _normal(k[1], 4096, width),
            "blocks": _blocks(k[2], layers, width),
            "norm": {"scale": jnp.ones(width), "bias": jnp.zeros(width)},
            "head": {"kernel": _normal(k[3], width, classes), "bias": jnp.zeros(classes)},
        }
        return params, {}

    def loss(params: Params, frozen: Params, batch: Params) -> jax.Array:
        del frozen
        x = _dense(params["patches"], batch["patches"].astype(HALF))
        x = x + params["places"].astype(HALF)[: x.shape[1]]
        for block in params["blocks"]:
            x = _block(block, x, heads=heads, causal=False)
        pooled = _layer_norm(params["norm"], x).mean(axis=1)
        return _token_losses(_dense(params["head"], pooled)[:, None], batch["label"][:, None])

    def batch(key: jax.Array, rows: int, length: int) -> Params:
        images = jax.random.normal(key, (rows, length, patch * patch * 3))
        return {"patches": images, "label": jax.random.randint(key, (rows,), 0, classes)}

    return Model(init, loss, batch)


def llama(
    layers: int, width: int, heads: int, kv_heads: int, hidden: int, rank: int | None
) -> Model:
    """Llama shape (Touvron et al., 2023): RMSNorm, rotary positions, grouped keys, gated MLP.

    `rank`: low-rank adapters of this rank (Hu et al., 2021) on a frozen base; None trains all.
    """
    vocabulary, size = 32000, width // heads
    shapes = {
        "query": (width, heads * size),
        "key": (width, kv_heads * size),
        "value": (width, kv_heads * size),
        "out": (heads * size, width),
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
    }

    def init(key: jax.Array) -> tuple[Params, Params]:
        keys = iter(jax.random.split(key, 2 + 9 * layers))
        base: Params = {
            "tokens": _normal(next(keys), vocabulary, width),
            "head": _normal(next(keys), width, vocabulary),
            "norm": jnp.ones(width),
            "blocks": [
                {name: _normal(next(keys), *shape) for name, shape in shapes.items()}
                | {"norm1": jnp.ones(width), "norm2": jnp.ones(width)}
                for _ in range(layers)
            ],
        }
        if rank is None:
            return base, {}
        adapters = [
            {
                name: {
                    "a": _normal(next(keys), shapes[name][0], rank),
                    "b": jnp.zeros((rank, shapes[name][1])),
                }
                for name in ("query", "value")
            }
            for _ in range(layers)
        ]
        return {"blocks": adapters}, jax.tree.map(lambda leaf: leaf.astype(HALF), base)

    def loss(params: Params, frozen: Params, batch: jax.Array) -> jax.Array:
        base = frozen or params
        inputs, targets = batch[:, :-1], batch[:, 1:]
        x = base["tokens"].astype(HALF)[inputs]
        for block, own in zip(base["blocks"], params["blocks"], strict=True):
            x = _llama_block(block, own if frozen else {}, x, heads, kv_heads)
        return _token_losses(_rms_norm(base["norm"], x) @ base["head"].astype(HALF), targets)

    return Model(init, loss, functools.partial(_tokens, vocabulary))


def _llama_block(
    block: Params, adapters: Params, x: jax.Array, heads: int, kv_heads: int
) -> jax.Array:
    batch, length, width = x.shape

    def project(name: str, y: jax.Array) -> jax.Array:
        out = y @ block[name].astype(HALF)
        if name in adapters:
            low = y @ adapters[name]["a"].astype(HALF)
            out = out + low @ adapters[name]["b"].astype(HALF)
        return out

    y = _rms_norm(block["norm1"], x)
    query = _rotated(project("query", y).reshape(batch, length, heads, -1))
    key = _rotated(project("key", y).reshape(batch, length, kv_heads, -1))
    value = project("value", y).reshape(batch, length, kv_heads, -1)
    mixed = dot_product_attention(query, key, value, is_causal=True)
    x = x + project("out", mixed.reshape(batch, length, width))
    y = _rms_norm(block["norm2"], x)
    return x + project("down", jax.nn.silu(project("gate", y)) * project("up", y))


def _rotated(x: jax.Array) -> jax.Array:
    """Rotary positions (Su et al., 2021)."""
    length, half = x.shape[1], x.shape[-1] // 2
    rates = 10000.0 ** (-jnp.arange(half) / half)
    angles = jnp.arange(length)[:, None] * rates
    cosine, sine = (f(angles)[None, :, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


def _tokens(vocabulary: int, key: jax.Array, rows: int, length: int) -> jax.Array:
    return jax.random.randint(key, (rows, length + 1), 0, vocabulary)


MODELS = {
    "gpt2-small": gpt2(12, 768, 12),
    "gpt2-medium": gpt2(24, 1024, 16),
    "gpt2-medium-stacked": gpt2(24, 1024, 16, stacked=True),
    "vit-b": vit(12, 768, 12),
    "llama-1b": llama(16, 2048, 32, 8, 8192, None),
    "llama-1b-lora": llama(16, 2048, 32, 8, 8192, 16),
    # Stand-ins, to try a run anywhere.
    "gpt2-tiny": gpt2(1, 32, 2, 64),
    "gpt2-tiny-stacked": gpt2(2, 32, 2, 64, stacked=True),
    "vit-tiny": vit(1, 32, 2, patch=2, classes=8),
    "llama-tiny": llama(1, 32, 4, 2, 64, None),
    "llama-tiny-lora": llama(1, 32, 4, 2, 64, 2),
}
