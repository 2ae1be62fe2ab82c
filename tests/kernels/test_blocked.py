"""The blocked backend against a float64 oracle, jax.nn, and its own promises on memory."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle

from dpfa_jax.attention import dot_product_attention
from dpfa_jax.kernels import masks, rectangles
from dpfa_jax.kernels.base import AttentionSpec
from dpfa_jax.kernels.rectangles import Blocks

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
    "cap, bias": {"logits_soft_cap": 2.0, "bias": "NTS", "mask": "S"},
    "all": {
        "bias": "TS", "mask": "S", "is_causal": True, "local_window_size": (300, 2),
        "lengths": True, "logits_soft_cap": 3.0, "scale": 0.4,
    },
}  # fmt: skip


# The naive program's rounding is no finer for being optimised.
QUICKLY_COMPILED = {"xla_backend_optimization_level": 0}
# The largest error of one draw is luck: often one logit that dominates its row decides it, and on
# equal root mean squares its ratio to the naive one ran from 0.4 to 3.9 over seeds. So the naive
# program's largest error is taken over several orders of the same sums.
ORDERS = 4


def naive(query, key, value, bias, seen, *, scale, logits_soft_cap):
    """Attention as a textbook writes it, in the arrays' own precision; None where nothing is."""
    groups = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, groups, axis=2), jnp.repeat(value, groups, axis=2)
    logits = jnp.einsum("btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32)
    logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
    weights = jnp.where(seen.any(-1, keepdims=True), weights, 0).astype(value.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, value)


def draw(seed, rows, keys, heads, key_heads, size, dtype, options, batch):
    """Arrays of one call and its cotangent; absent ones are None."""
    rng = np.random.default_rng([seed, rows, keys])
    shapes = {"NTS": (1, heads, rows, keys), "TS": (batch, 1, rows, keys), "S": (batch, 1, 1, keys)}
    queries, values = (batch, rows, heads, size), (batch, keys, key_heads, size)
    query, cotangent, key, value = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in (queries, queries, values, values)
    )
    bias = mask = lengths = None
    if "bias" in options:
        bias = jnp.asarray(rng.standard_normal(shapes[options["bias"]]), jnp.float32)
    if "mask" in options:
        mask = jnp.asarray(rng.random(shapes[options["mask"]]) < 0.7)
    if "lengths" in options:
        lengths = tuple(
            jnp.asarray(rng.integers(0, length + 1, batch), jnp.int32) for length in (rows, keys)
        )
    return (query, key, value, bias), mask, lengths, cotangent


def check(rows, keys, heads, key_heads, size, dtype, options, *, batch=2, seeds=1):
    """Ours and the naive program, in several orders of its sums, against float64."""
    window = options.get("local_window_size")
    pair = (window, window) if isinstance(window, int) else window
    scale, cap = options.get("scale"), options.get("logits_soft_cap")
    causal = options.get("is_causal", False)

    @jax.jit
    def ours(arrays, mask, lengths, cotangent):
        query_lengths, key_lengths = (None, None) if lengths is None else lengths
        output, pull_back = jax.vjp(
            lambda query, key, value, bias: dot_product_attention(
                query, key, value, bias, mask, scale=scale, is_causal=causal,
                query_seq_lengths=query_lengths, key_value_seq_lengths=key_lengths,
                local_window_size=window, logits_soft_cap=cap,
                implementation="blocked",
            ),
            *arrays,
        )  # fmt: skip
        return output, *pull_back(cotangent)

    # `seen` is an argument: as a constant, XLA would fold it for longer than all else takes.
    @functools.partial(jax.jit, compiler_options=QUICKLY_COMPILED)
    def plain(arrays, seen, cotangent):
        output, pull_back = jax.vjp(
            lambda *x: naive(*x, seen, scale=scale, logits_soft_cap=cap),
            *arrays,
        )
        return output, *pull_back(cotangent)

    def in_order(order, arrays, seen, cotangent):
        """The naive program with the numbers of a head in another order; results in the first."""
        *arrays, bias = arrays
        found = plain((*(x[..., order] for x in arrays), bias), seen, cotangent[..., order])
        back = np.argsort(order)
        return [*(x[..., back] for x in found[:4]), *found[4:]]

    orders = [np.random.default_rng(i).permutation(size) for i in range(ORDERS)]
    results = []
    for seed in range(seeds):
        arrays, mask, lengths, cotangent = draw(
            seed, rows, keys, heads, key_heads, size, dtype, options, batch
        )
        query_lengths, key_lengths = (None, None) if lengths is None else lengths
        hiding = {
            "mask": mask, "is_causal": causal, "window": pair,
            "query_lengths": query_lengths, "key_lengths": key_lengths,
        }  # fmt: skip
        seen = jnp.asarray(oracle.visibility((batch, heads, rows, keys), **hiding))
        *exact, d_logits = oracle.attention(
            *arrays[:3],
            cotangent,
            bias=arrays[3],
            scale=scale,
            soft_cap=cap,
            **hiding,
        )
        if arrays[3] is not None:
            exact.append(oracle.reduced_like(d_logits, arrays[3].shape))
        naives = zip(*(in_order(o, arrays, seen, cotangent) for o in orders), strict=True)
        found = [y for y in ours(arrays, mask, lengths, cotangent) if y is not None]
        results.append((found, list(naives)[: len(found)], exact))
    names = ("output", "query", "key", "value", "bias")
    for name, *draws in zip(names, *(zip(*d, strict=True) for d in results), strict=False):
        oracle.assert_within_budget(draws, f"{name} {rows}x{keys} {dtype}")


QUICK = ("none", "all")


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
    monkeypatch.setattr(rectangles, "ONE_BLOCK", 16 * 32)
    monkeypatch.setattr(rectangles, "BLOCK_Q", 16)
    monkeypatch.setattr(rectangles, "BLOCK_KV", 32)
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


def test_many_heads_share_a_key():
    """V8: 32 query heads a key head; one sum over heads and rows would break the budget."""
    check(40, 48, 32, 1, 8, "float32", OPTIONS["causal"])


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 300), (300, 1)])
def test_least_sizes(rows, keys):
    """V7: m = 1, n = 1."""
    check(rows, keys, 2, 2, 4, "float32", {})


SHAPES = [
    *itertools.product((1, 63, 257, 1000), (1, 64, 511, 1537)),
    *itertools.product((1, 63, 257, 1000), (4096,)),
    *itertools.product((4096,), (1, 64, 511, 1537, 4096)),
]
HALF_SHAPES = [(1, 511), (63, 64), (257, 1), (257, 1537), (1000, 511), (4096, 64)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_grid(name, dtype):
    """V8 in full: T and S from 1 to 4096, ragged, every option and precision.

    The largest error is that of a few large weights: small calls are drawn six times, so that it is
    not one program's luck, the longest once.
    """
    for rows, keys in SHAPES if dtype == "float32" else HALF_SHAPES:
        batch = max(1, 32 // min(rows, keys))
        logits = batch * rows * keys
        seeds = 1 if logits > 1e6 else 2 if logits > 2e5 else 6
        check(rows, keys, 2, 1, 8, dtype, OPTIONS[name], batch=batch, seeds=seeds)


def test_budget_catches_a_wrong_kernel():
    """Negative control of `assert_within_budget`: bfloat16 logits, and one number that is wrong."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 16, 1, 8)), jnp.float32) for _ in range(3))
    exact = oracle.attention(q, k, v)
    coarse = dot_product_attention(q.astype(jnp.bfloat16).astype(jnp.float32), k, v)
    naive_output = jax.nn.dot_product_attention(q, k, v)
    with pytest.raises(AssertionError, match="rms"):
        oracle.assert_within_budget([(coarse, [naive_output], exact)])
    nearly = jnp.asarray(np.tile(exact, (64, 1, 1, 1)), jnp.float32)  # so many hide one in the rms
    exact = np.tile(exact, (64, 1, 1, 1))
    oracle.assert_within_budget([(nearly, [nearly], exact)])
    with pytest.raises(AssertionError, match="max"):
        oracle.assert_within_budget([(nearly.at[0, 3, 0, 2].add(1e-6), [nearly], exact)])


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
