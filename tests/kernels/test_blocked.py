"""The blocked backend against a float64 oracle, jax.nn, and its own promises on memory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle

from dpfa_jax.attention import dot_product_attention
from dpfa_jax.kernels import masks, softmax_loop
from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.softmax_loop import Blocks

OPTIONS = {
    "none": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (7, 3)},
    "window and causal": {"local_window_size": 40, "is_causal": True},
    "lengths": {"lengths": True},
    "bias": {"bias": "NTS"},
    "bias by key": {"bias": "S"},
    "mask": {"mask": "NTS"},
    "mask by key, causal": {"mask": "S", "is_causal": True},
    "cap, scale": {"logits_soft_cap": 2.0, "scale": 0.7},
    "all": {
        "bias": "TS", "mask": "S", "is_causal": True, "local_window_size": (300, 2),
        "lengths": True, "logits_soft_cap": 3.0, "scale": 0.4,
    },
}  # fmt: skip


# The naive program's rounding is no finer for being optimised.
QUICKLY_COMPILED = {"xla_backend_optimization_level": 0}


def naive(query, key, value, bias, mask, *, scale, logits_soft_cap, **hiding):
    """Attention as a textbook writes it, in the arrays' own precision; None where nothing is."""
    groups = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + bias
    seen = jnp.asarray(oracle.visibility(logits.shape, mask=mask, **hiding))
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
    weights = jnp.where(seen.any(-1, keepdims=True), weights, 0).astype(value.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def check(rows, keys, heads, key_heads, size, dtype, options, seed=0, batch=2):
    rng = np.random.default_rng([seed, rows, keys])
    options = dict(options)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    query, cotangent = draw(batch, rows, heads, size), draw(batch, rows, heads, size)
    key, value = draw(batch, keys, key_heads, size), draw(batch, keys, key_heads, size)
    shapes = {"NTS": (1, heads, rows, keys), "TS": (batch, 1, rows, keys), "S": (batch, 1, 1, keys)}
    bias, mask = options.pop("bias", None), options.pop("mask", None)
    bias = None if bias is None else jnp.asarray(rng.standard_normal(shapes[bias]), jnp.float32)
    mask = None if mask is None else jnp.asarray(rng.random(shapes[mask]) < 0.7)
    lengths = {}
    if options.pop("lengths", False):
        lengths = {
            "query_lengths": rng.integers(0, rows + 1, batch).astype(np.int32),
            "key_lengths": rng.integers(0, keys + 1, batch).astype(np.int32),
        }
    window = options.pop("local_window_size", None)
    pair = (window, window) if isinstance(window, int) else window
    cap, scale = options.pop("logits_soft_cap", None), options.pop("scale", None)
    hiding = {"is_causal": options.pop("is_causal", False), "window": pair, **lengths}
    assert not options

    def ours(query, key, value, bias):
        return dot_product_attention(
            query, key, value, bias, mask, scale=scale, is_causal=hiding["is_causal"],
            query_seq_lengths=lengths.get("query_lengths"),
            key_value_seq_lengths=lengths.get("key_lengths"),
            local_window_size=window, logits_soft_cap=cap, implementation="blocked",
        )  # fmt: skip

    def plain(query, key, value, bias):
        return naive(query, key, value, bias, mask, scale=scale, logits_soft_cap=cap, **hiding)

    def all_of(f, **compiler):
        def run(*x):
            output, pull_back = jax.vjp(f, *x)
            return output, *pull_back(cotangent)

        compiled = jax.jit(run, compiler_options=compiler)
        return [y for y in compiled(query, key, value, bias) if y is not None]

    exact = oracle.attention(
        query, key, value, cotangent, bias=bias, scale=scale, soft_cap=cap, mask=mask, **hiding
    )
    exact = [*exact[:4], *([] if bias is None else [oracle.reduced_like(exact[4], bias.shape)])]
    names = ("output", "query", "key", "value", "bias")
    for name, a, b, c in zip(
        names, all_of(ours), all_of(plain, **QUICKLY_COMPILED), exact, strict=False
    ):
        assert a.dtype == b.dtype
        oracle.assert_within_budget(a, b, c, f"{name} {rows}x{keys} {dtype}")


QUICK = ("none", "mask by key, causal", "all")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS]
)
def test_every_option_in_one_block(name):
    """V8, V7: outputs and gradients within twice the naive error, ragged sizes, GQA."""
    check(13, 37, 4, 2, 8, "float32", OPTIONS[name])


@pytest.mark.parametrize(
    "name",
    ["all", *(pytest.param(n, marks=pytest.mark.slow) for n in ("window and causal", "mask"))],
)
def test_every_kind_of_loop(name, monkeypatch):
    """V8: several ragged blocks of queries and of keys, made small so that few numbers do."""
    monkeypatch.setattr(softmax_loop, "ONE_BLOCK", 16 * 32)
    monkeypatch.setattr(softmax_loop, "BLOCK_Q", 16)
    monkeypatch.setattr(softmax_loop, "BLOCK_KV", 32)
    check(41, 107, 2, 1, 8, "float32", OPTIONS[name], batch=2)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision(dtype):
    """V8: half-precision inputs, in one block."""
    check(33, 65, 2, 1, 16, dtype, OPTIONS["causal"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["none", "all"])
def test_blocks_of_their_real_size(name, dtype):
    """V8: several blocks as they are shipped."""
    check(700, 1100, 2, 1, 8, dtype, OPTIONS[name], batch=1)


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 300), (300, 1)])
def test_least_sizes(rows, keys):
    """V7: m = 1, n = 1."""
    check(rows, keys, 2, 2, 4, "float32", {})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_grid(name, dtype):
    """V8 in full: T and S from 1 to 4096, ragged, every option and precision."""
    for rows, keys in itertools.product((1, 63, 257, 1000, 4096), (1, 64, 511, 1537, 4096)):
        # The largest error of a few numbers is luck: short calls get more batch rows.
        batch = max(1, 64 // min(rows, keys))
        check(rows, keys, 2, 1, 8, dtype, OPTIONS[name], batch=batch)


def test_budget_catches_a_wrong_kernel():
    """Negative control of `assert_within_budget`: bfloat16 logits are caught in float32."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 16, 1, 8)), jnp.float32) for _ in range(3))
    exact = oracle.attention(q, k, v)
    coarse = dot_product_attention(q.astype(jnp.bfloat16).astype(jnp.float32), k, v)
    with pytest.raises(AssertionError, match="rms"):
        oracle.assert_within_budget(coarse, jax.nn.dot_product_attention(q, k, v), exact)


def test_memory_at_16384():
    """Forward and backward take under 5 % of the naive program's temporary memory."""
    x = jax.ShapeDtypeStruct((1, 16384, 1, 64), jnp.float32)

    def temporary(f):
        gradient = jax.grad(lambda q, k, v: jnp.sum(f(q, k, v)), argnums=(0, 1, 2))
        return jax.jit(gradient).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(dot_product_attention) < 0.05 * temporary(jax.nn.dot_product_attention)


@pytest.mark.parametrize("causal, window", [(True, None), (False, (5, 2)), (True, (9, 4))])
def test_skipped_blocks_hold_nothing(causal, window):
    """A block is skipped only if none of its entries is visible, and most invisible ones are."""
    rows, keys, block_q, block_kv = 40, 56, 8, 8
    spec = AttentionSpec(1.0, is_causal=causal, local_window=window)
    seen = oracle.visibility((1, 1, rows, keys), is_causal=causal, window=window)[0, 0]
    blocks = seen.reshape(rows // block_q, block_q, keys // block_kv, block_kv).any(axis=(1, 3))
    for i in range(blocks.shape[0]):
        first, stop = masks.key_blocks(spec, jnp.int32(i * block_q), block_q, keys, block_kv)
        assert set(np.flatnonzero(blocks[i])) == set(range(int(first), int(stop)))
    for j in range(blocks.shape[1]):
        first, stop = masks.query_blocks(spec, jnp.int32(j * block_kv), block_kv, rows, block_q)
        assert set(np.flatnonzero(blocks[:, j])) == set(range(int(first), int(stop)))


def test_small_shapes_have_no_loop():
    """At T = S = 64 the program is straight-line: no loop to pay for."""
    assert Blocks.of(64, 64).is_single
    x = jnp.ones((1, 64, 2, 16))
    assert "while" not in str(jax.make_jaxpr(lambda q: dot_product_attention(q, q, q))(x))
