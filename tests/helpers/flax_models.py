"""Small models of the four families that people train, with random weights, and their batches."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from dpfa_jax import nn
from dpfa_jax.attention import dot_product_attention

ROWS, TOKENS, VOCABULARY, WIDTH, HEADS = 6, 7, 13, 8, 2


def next_token_losses(logits, tokens):
    logs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1).mean(axis=(1, 2))


def label_losses(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]


def embedding(size, width, rngs):
    """nnx.Embed that computes in the dtype it is given: the oracle's is float64."""
    embed = nnx.Embed(size, width, rngs=rngs)
    embed.dtype = None
    return embed


class GPT(nnx.Module):
    """Learned positions, pre-norm causal blocks, head tied to the embedding."""

    def __init__(self, rngs):
        self.embed = embedding(VOCABULARY, WIDTH, rngs)
        self.position = nnx.Param(0.1 * rngs.params.normal((TOKENS, WIDTH)))
        self.decoder = nn.Decoder(WIDTH, HEADS, 4 * WIDTH, 2, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        return self.embed.attend(self.decoder(x))


class BERT(nnx.Module):
    """Token, position and segment embeddings, padding mask, post-embedding norm, pooled head."""

    def __init__(self, rngs):
        self.token = embedding(VOCABULARY, WIDTH, rngs)
        self.position = embedding(TOKENS, WIDTH, rngs)
        self.segment = embedding(2, WIDTH, rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.encoder = nn.Encoder(WIDTH, HEADS, 4 * WIDTH, 1, rngs=rngs)
        self.pool = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, tokens, segments, is_real):
        places = jnp.arange(tokens.shape[1])
        x = self.norm(self.token(tokens) + self.position(places) + self.segment(segments))
        return self.head(jnp.tanh(self.pool(self.encoder(x, is_real)[:, 0])))


class ViT(nnx.Module):
    """Convolution patches, class token, learned positions, encoder."""

    def __init__(self, rngs):
        self.patches = nnx.Conv(3, WIDTH, (4, 4), strides=(4, 4), padding="VALID", rngs=rngs)
        self.first = nnx.Param(0.1 * rngs.params.normal((1, 1, WIDTH)))
        self.position = nnx.Param(0.1 * rngs.params.normal((5, WIDTH)))
        self.encoder = nn.Encoder(WIDTH, HEADS, 2 * WIDTH, 1, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, images):
        x = self.patches(images)
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = jnp.concatenate([jnp.broadcast_to(self.first[...], (x.shape[0], 1, WIDTH)), x], axis=1)
        return self.head(self.encoder(x + self.position[...])[:, 0])


def rotated(x):
    """Rotary positions (Su et al., 2021) of (B, T, N, H)."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] / 100.0 ** (jnp.arange(half) / half)
    cos, sin = (f(angles)[:, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class LlamaBlock(nnx.Module):
    def __init__(self, rngs):
        heads, size = 4, 4
        bare = {"use_bias": False, "rngs": rngs}
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.query = nnx.LinearGeneral(WIDTH, (heads, size), **bare)
        self.key = nnx.LinearGeneral(WIDTH, (heads // 2, size), **bare)
        self.value = nnx.LinearGeneral(WIDTH, (heads // 2, size), **bare)
        self.out = nnx.LinearGeneral((heads, size), WIDTH, axis=(-2, -1), **bare)
        self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.gate = nnx.Linear(WIDTH, 3 * WIDTH, **bare)
        self.up = nnx.Linear(WIDTH, 3 * WIDTH, **bare)
        self.down = nnx.Linear(3 * WIDTH, WIDTH, **bare)

    def __call__(self, x):
        y = self.attention_norm(x)
        query, key = rotated(self.query(y)), rotated(self.key(y))
        x = x + self.out(dot_product_attention(query, key, self.value(y), is_causal=True))
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
    """RMSNorm, rotary positions, GQA, gated MLP, a head of its own; blocks recomputed."""

    def __init__(self, rngs, blocks=2):
        self.embed = embedding(VOCABULARY, WIDTH, rngs)
        self.blocks = nnx.List(LlamaBlock(rngs) for _ in range(blocks))
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return self.head(self.norm(x))


class LinenGPT(linen.Module):
    """GPT in linen, on this library's attention."""

    def setup(self):
        self.embed = linen.Embed(VOCABULARY, WIDTH)
        self.norms = [linen.LayerNorm() for _ in range(3)]
        self.attention = linen.MultiHeadDotProductAttention(HEADS, attention_fn=nn.attention_fn)
        self.up, self.down = linen.Dense(4 * WIDTH), linen.Dense(WIDTH)

    def __call__(self, tokens):
        x = self.embed(tokens)
        mask = linen.make_causal_mask(tokens)
        x = x + self.attention(self.norms[0](x), mask=mask)
        x = x + self.down(linen.gelu(self.up(self.norms[1](x))))
        return self.embed.attend(self.norms[2](x))


def tokens_batch(rows=ROWS):
    rng = np.random.default_rng(5)
    return {"tokens": rng.integers(0, VOCABULARY, (rows, TOKENS)).astype(np.int32)}


def text_batch(rows=ROWS):
    rng = np.random.default_rng(6)
    return tokens_batch(rows) | {
        "segments": rng.integers(0, 2, (rows, TOKENS)).astype(np.int32),
        "is_real": np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (rows, 1)),
        "labels": rng.integers(0, 3, rows).astype(np.int32),
    }


def image_batch(rows=ROWS):
    rng = np.random.default_rng(7)
    return {
        "images": rng.standard_normal((rows, 8, 8, 3)).astype(np.float32),
        "labels": rng.integers(0, 3, rows).astype(np.int32),
    }


def language_loss(model, batch):
    return next_token_losses(model(batch["tokens"]), batch["tokens"])


def text_loss(model, batch):
    logits = model(batch["tokens"], batch["segments"], batch["is_real"])
    return label_losses(logits, batch["labels"])


def image_loss(model, batch):
    return label_losses(model(batch["images"]), batch["labels"])


def linen_gpt():
    model = LinenGPT()
    return model, model.init(jax.random.key(0), tokens_batch()["tokens"])


# Name -> (what privatize takes, loss of a model and a batch, batch).
FAMILIES = {
    "gpt": lambda: ((GPT(nnx.Rngs(0)),), language_loss, tokens_batch()),
    "bert": lambda: ((BERT(nnx.Rngs(0)),), text_loss, text_batch()),
    "vit": lambda: ((ViT(nnx.Rngs(0)),), image_loss, image_batch()),
    "llama": lambda: ((Llama(nnx.Rngs(0)),), language_loss, tokens_batch()),
    "linen gpt": lambda: (linen_gpt(), language_loss, tokens_batch()),
}
