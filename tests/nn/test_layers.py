"""Ordinary Flax layers are covered as they are: clipped sums against a float64 oracle (V8)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers.clipping_oracle import check_clipped_sum
from helpers.flax_models import FAMILIES, embedding

from dpfa_jax import dpsgd, nn
from dpfa_jax.clipping import trees

pytestmark = pytest.mark.quickly_compiled

SLOW = pytest.mark.slow
ROWS, TOKENS, WIDTH = 4, 5, 8
# The loss does not depend on what is added to every key alike.
INVARIANT = "key/bias"


def attention(query, key, value, **options):
    """nnx's own, but for the oracle: its softmax is in float32 whatever it is given."""
    if query.dtype != jnp.float64:
        return nnx.dot_product_attention(query, key, value, **options)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(query.shape[-1])
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(logits), value)


class EveryNNXLayer(nnx.Module):
    """One after the other, each beside a residual path; the table serves twice."""

    def __init__(self, rngs):
        heads = (2, WIDTH // 2)
        self.embed = embedding(11, WIDTH, rngs)
        self.layers = nnx.Dict(
            linear=nnx.Linear(WIDTH, WIDTH, rngs=rngs),
            split=nnx.LinearGeneral(WIDTH, heads, rngs=rngs),
            join=nnx.LinearGeneral(heads, WIDTH, axis=(-2, -1), rngs=rngs),
            einsum=nnx.Einsum("btd,de->bte", (WIDTH, WIDTH), (WIDTH,), rngs=rngs),
            layer_norm=nnx.LayerNorm(WIDTH, rngs=rngs),
            rms_norm=nnx.RMSNorm(WIDTH, rngs=rngs),
            group_norm=nnx.GroupNorm(WIDTH, num_groups=2, rngs=rngs),
            conv=nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs),
            attention=nnx.MultiHeadAttention(
                2, WIDTH, attention_fn=attention, decode=False, rngs=rngs
            ),
        )

    def __call__(self, tokens):
        x = self.embed(tokens)
        for name, layer in self.layers.items():
            if name not in ("split", "join"):
                x = x + jnp.sin(layer(x))
        x = x + self.layers["join"](jnp.sin(self.layers["split"](x)))
        return self.embed.attend(x)


class EveryLinenLayer(linen.Module):
    """The same in linen."""

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(11, WIDTH)(tokens)
        for layer in (
            linen.Dense(WIDTH),
            linen.LayerNorm(),
            linen.RMSNorm(),
            linen.GroupNorm(num_groups=2),
            linen.Conv(WIDTH, (3,)),
            linen.MultiHeadDotProductAttention(2),
        ):
            x = x + jnp.sin(layer(x))
        split = linen.DenseGeneral((2, WIDTH // 2))(x)
        return x + linen.DenseGeneral(WIDTH, axis=(-2, -1))(jnp.sin(split))


class Scanned(nnx.Module):
    """Blocks whose parameters are stacked, run by nnx.scan; where asked for, recomputed."""

    def __init__(self, rngs, recomputes=False):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def blocks(rngs):
            return nn.Block(WIDTH, 2, 16, rngs=rngs)

        self.embed = embedding(11, WIDTH, rngs)
        self.blocks = blocks(rngs)
        self.recomputes = recomputes

    def __call__(self, tokens):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return nnx.remat(type(block).__call__)(block, x) if self.recomputes else block(x)

        return run(self.embed(tokens), self.blocks)


def tokens():
    rng = np.random.default_rng(0)
    return {"tokens": rng.integers(0, 11, (ROWS, TOKENS)).astype(np.int32)}


def loss(model, batch):
    out = model(batch["tokens"])
    weights = jnp.cos(jnp.arange(out[0].size, dtype=out.dtype)).reshape(out[0].shape)
    return jnp.sum(weights * jnp.sin(out), axis=(1, 2))


@pytest.mark.parametrize("framework", ["nnx", pytest.param("linen", marks=SLOW)])
def test_every_layer(framework):
    if framework == "nnx":
        private = nn.privatize(EveryNNXLayer(nnx.Rngs(0)))
    else:
        module = EveryLinenLayer()
        private = nn.privatize(module, module.init(jax.random.key(0), tokens()["tokens"]))
    check_clipped_sum(
        private.loss(loss), private.params, tokens(), micro_batch_size=2, invariant=INVARIANT
    )


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, True])
def test_layers_under_scan(recomputes):
    private = nn.privatize(Scanned(nnx.Rngs(0), recomputes))
    check_clipped_sum(
        private.loss(loss), private.params, tokens(), micro_batch_size=2, invariant=INVARIANT
    )


def test_stacked_blocks_finish_in_their_rounds():
    """Each slice a clip group: nnx.scan of nnx.remat is one loop that clips all of its blocks."""
    private = nn.privatize(Scanned(nnx.Rngs(0), recomputes=True))
    groups, _ = dpsgd.per_layer_groups(private.params, 1.0, stacked=("blocks",))
    rows = dpsgd.coverage(private.loss(loss), private.params, tokens(), groups)
    hows = {row.path: row.how for row in rows}
    blocks = {path for path in hows if path.startswith("blocks/")}
    assert {path for path, how in hows.items() if how == "in its round"} == blocks
    assert len(blocks) > 8
    whole = dpsgd.coverage(private.loss(loss), private.params, tokens())
    assert not any(row.how == "in its round" for row in whole)


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW) for name in FAMILIES])
def test_every_family(name):
    """A GPT with a tied head, a padded BERT, a ViT, a Llama with GQA; a GPT in linen."""
    taken, family_loss, batch = FAMILIES[name]()
    private = nn.privatize(*taken)
    loss_fn = private.loss(family_loss)
    check_clipped_sum(loss_fn, private.params, batch, micro_batch_size=2, invariant=INVARIANT)
    rows = private.coverage(loss_fn, batch).trained
    assert [row.path for row in rows] == sorted(private.params)
    assert {row.how for row in rows if row.path.endswith("kernel")} == {"late"}
    if name == "gpt":  # one leaf for both uses of the table
        assert sum("embed" in row.path for row in rows) == 1


def test_the_oracle_sees_what_is_not_clipped(monkeypatch):
    """Negative control: with clipping taken out, the same check fails."""
    private = nn.privatize(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    batch = {"x": np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)}
    loss_fn = private.loss(lambda model, batch: jnp.sum(jnp.exp(model(batch["x"])), axis=1))
    check_clipped_sum(loss_fn, private.params, batch, micro_batch_size=4)
    monkeypatch.setattr(
        trees, "clip_scales", lambda squares, real: jnp.ones(squares.shape[:2]) * real[:, None]
    )
    with pytest.raises(AssertionError):
        check_clipped_sum(loss_fn, private.params, batch, micro_batch_size=4)


class Dropped(nnx.Module):
    """Dropout from integer bits: nnx.Dropout's mask is another in float64."""

    def __init__(self, rngs):
        self.linear, self.stream = nnx.Linear(WIDTH, 8, rngs=rngs), rngs.dropout.fork()

    def __call__(self, x):
        x = jnp.tanh(self.linear(x))
        return jnp.where(jax.random.bits(self.stream(), x.shape, jnp.uint32) >> 31, x, 0.0)


def test_dropout_with_a_key_an_example():
    """The mask follows the key, whichever way the examples are grouped."""
    private = nn.privatize(Dropped(nnx.Rngs(0)))
    loss_fn = private.loss(lambda model, b: jnp.sum(model(b["x"]) ** 2, axis=-1), rng_key="keys")
    batch = {
        "x": np.random.default_rng(0).standard_normal((6, WIDTH)).astype(np.float32),
        "keys": jax.random.split(jax.random.key(0), 6),
    }
    check_clipped_sum(loss_fn, private.params, batch, micro_batch_size=2)
