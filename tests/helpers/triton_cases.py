"""Calls that exercise the Triton kernels, in interpret mode and on a GPU alike."""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import attention_oracle as oracle

from dpfa_jax.attention import core
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, MemoryReadout, NoiseInputs

# b, n, t, s of a bias or mask: which axes are full.
AXES = {"BNTS": (1, 1, 1, 1), "NTS": (0, 1, 1, 1), "TS": (1, 0, 1, 1), "T": (1, 0, 1, 0),
        "S": (1, 0, 0, 1), "N": (0, 1, 0, 0)}  # fmt: skip
OPTIONS = {
    "none": {},
    "causal": {"is_causal": True},
    "window": {"window": (9, 3)},
    "window and causal": {"window": (70, 40), "is_causal": True},
    "lengths": {"lengths": True},
    "lengths, causal": {"lengths": True, "is_causal": True},
    "bias": {"bias": "BNTS"},
    "bias by row": {"bias": "T"},
    "bias by key": {"bias": "S"},
    "bias by head": {"bias": "N"},
    "mask": {"mask": "NTS"},
    "mask by key, causal": {"mask": "S", "is_causal": True},
    "cap, scale": {"cap": 2.0, "scale": 0.7},
    "cap, lengths": {"cap": 2.0, "lengths": True},
    "all": {"bias": "NTS", "mask": "TS", "is_causal": True, "window": (50, 2), "lengths": True,
            "cap": 3.0, "scale": 0.4},
}  # fmt: skip


def quickly(function):
    """`function`, compiled. On a CPU without optimisation: there the compiler takes most time."""
    if jax.default_backend() != "cpu":
        return jax.jit(function)
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def noise_inputs(batch, seed=0):
    words = np.random.default_rng(seed).integers(0, 2**32, (batch, 2), dtype=np.uint32)
    return NoiseInputs(
        jnp.asarray(words), jnp.arange(batch, dtype=jnp.uint32) + 5, jnp.full(batch, 3, jnp.uint32)
    )


def value_and_gradients(backend, spec, inputs, cotangent):
    """(output, lse, gradients of query, key, value, bias) by one compiled program."""
    return _value_and_gradients(backend, spec)(inputs, cotangent)


@functools.cache
def _value_and_gradients(backend, spec):
    def run(inputs, cotangent):
        def answer(query, key, value, bias):
            arrays = inputs._replace(query=query, key=key, value=value, bias=bias)
            return core.attend(backend, spec, arrays)

        (output, lse), pull = jax.vjp(answer, *inputs[:4])
        return output, lse, *pull((cotangent, jnp.zeros_like(lse)))

    return quickly(run)


def naive(spec, seen, query, key, value, bias):
    """Attention as a textbook writes it, products and weights in the inputs' precision."""
    groups = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    most = jax.lax.Precision.HIGHEST
    logits = jnp.einsum(
        "btnh,bsnh->bnts", query, key, preferred_element_type=jnp.float32, precision=most
    )
    logits = logits * spec.scale
    if spec.logits_soft_cap is not None:
        logits = spec.logits_soft_cap * jnp.tanh(logits / spec.logits_soft_cap)
    if bias is not None:
        logits = logits + bias
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
    weights = jnp.where(seen.any(-1, keepdims=True), weights, 0).astype(value.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, value, precision=most)


class Case(NamedTuple):
    """One call, what float64 makes of it, and what a textbook program does, in two orders."""

    spec: AttentionSpec
    inputs: AttentionInputs
    cotangent: jax.Array
    seen: np.ndarray
    naive: tuple[tuple[jax.Array | None, ...], ...]
    exact: tuple[np.ndarray | None, ...]
    bias_terms: np.ndarray | None


def case(shape, dtype, options, seed=0):
    """`shape`: batch, rows, keys, heads, key heads, head size.

    Rows and keys that nobody sees hold NaN, as do the cotangents of such rows.
    """
    batch, rows, keys, heads, key_heads, size = shape
    rng = np.random.default_rng([seed, rows, keys])
    options = dict(options)

    def draw(*shape, dtype=dtype):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    query, cotangent = (draw(batch, rows, heads, size) for _ in range(2))
    key, value = (draw(batch, keys, key_heads, size) for _ in range(2))
    full = (batch, heads, rows, keys)
    pick = lambda axes: tuple(n if on else 1 for n, on in zip(full, AXES[axes], strict=True))  # noqa: E731
    bias, mask = options.pop("bias", None), options.pop("mask", None)
    bias = None if bias is None else draw(*pick(bias), dtype=jnp.float32)
    mask = None if mask is None else jnp.asarray(rng.random(pick(mask)) < 0.7)
    lengths = {}
    if options.pop("lengths", False):
        lengths = {
            "query_lengths": jnp.asarray(rng.integers(0, rows + 1, batch), jnp.int32),
            "key_lengths": jnp.asarray(rng.integers(0, keys + 1, batch), jnp.int32),
        }
    is_causal, window = options.pop("is_causal", False), options.pop("window", None)
    scale = options.pop("scale", size**-0.5)
    spec = AttentionSpec(scale, is_causal, window, options.pop("cap", None))
    assert not options
    hiding = {"mask": mask, "is_causal": is_causal, "window": window, **lengths}
    seen = oracle.visibility(full, **hiding)
    exact = oracle.attention(
        query,
        key,
        value,
        cotangent,
        bias=bias,
        scale=scale,
        soft_cap=spec.logits_soft_cap,
        **hiding,
    )
    terms = None if bias is None else oracle.reduced_like(np.abs(exact[4]), bias.shape)
    exact = (*exact[:4], None if bias is None else oracle.reduced_like(exact[4], bias.shape))

    def textbook(seen, cotangent, *arrays):
        output, pull = jax.vjp(lambda *x: naive(spec, seen, *x), *arrays)
        return output, *pull(cotangent)

    run = quickly(textbook)

    def in_another_order(turn):
        """The same program; `turn` reverses keys and columns, and with them the order of sums."""
        per_pair = turn(jnp.asarray(seen), 3), None if bias is None else turn(bias, 3)
        arrays = [turn(x, 3) for x in (cotangent, query, turn(key, 1), turn(value, 1))]
        output, *found = run(per_pair[0], *arrays, per_pair[1])
        found[1:3] = (turn(x, 1) for x in found[1:3])
        d_bias = None if bias is None else turn(found[3], 3)
        return *(turn(x, 3) for x in (output, *found[:3])), d_bias

    orders = [in_another_order(turn) for turn in (lambda x, _: x, jnp.flip)]
    theirs = tuple(zip(*orders, strict=True))
    by_row, by_key = (jnp.asarray(seen.any(axes))[:, :, None, None] for axes in ((1, 3), (1, 2)))
    spoil = lambda x, keep: jnp.where(keep, x, jnp.nan).astype(dtype)  # noqa: E731
    inputs = AttentionInputs(
        spoil(query, by_row), spoil(key, by_key), spoil(value, by_key), bias, mask, **lengths
    )
    return Case(spec, inputs, spoil(cotangent, by_row), seen, theirs, exact, terms)


def check(backend, shape, dtype, options, draws=1):
    """V6, V7, V8: outputs and gradients within twice the naive error of float64.

    The largest error of one draw is noise of a factor of four: more draws pool it.
    """
    label, pooled = f"{shape} {dtype}", collections.defaultdict(list)
    for seed in range(draws):
        with jax.default_device(jax.devices("cpu")[0]):
            given = case(shape, dtype, options, seed)
        # Made on the CPU, where nothing is rounded to tf32 nor tuned; run where we are.
        inputs, cotangent = jax.tree.map(np.asarray, (given.inputs, given.cotangent))
        inputs, cotangent = jax.tree.map(jnp.asarray, (inputs, cotangent))
        assert backend.cannot(given.spec, inputs, jax.default_backend()) is None
        judge(given, value_and_gradients(backend, given.spec, inputs, cotangent), label, pooled)
    for name, results in pooled.items():
        oracle.assert_within_budget(results, f"{name} {label}")


def judge(given, found, label, pooled):
    """Judges what one draw shows and adds the rest to `pooled`; `found`: `value_and_gradients`."""
    output, lse, *gradients = found
    names = ("output", "query", "key", "value", "bias")
    for name, a, b, c in zip(names, (output, *gradients), given.naive, given.exact, strict=True):
        if name == "bias" and a is not None and a.shape[3] == 1:
            # The gradient of what all keys of a row share is 0: what is left is the rounding of
            # output times cotangent, from an output in the inputs' dtype.
            unit = float(jnp.finfo(given.inputs.query.dtype).eps)
            away = np.abs(np.asarray(a, np.float64) - c)
            assert np.all(away <= 2 * unit * given.bias_terms), label
        elif name in ("query", "key") and given.seen.shape[3] == 1:
            # Of one key the weight is 1 and the gradient 0, but for the rounding of two sums.
            largest = [np.abs(np.asarray(x, np.float64)).max() for x in given.exact[:1]]
            products = np.abs(np.asarray(given.cotangent, np.float64)).sum(-1).max() * largest[0]
            factor = np.abs(np.asarray(given.inputs[names.index(name) % 2], np.float64)).max()
            rows = given.seen.shape[2] if name == "key" else 1
            unit = float(jnp.finfo(a.dtype).eps)
            assert np.abs(np.asarray(a, np.float64)).max() <= rows * unit * products * factor, label
        elif a is not None:
            pooled[name].append((a, b, c))
    is_empty = ~given.seen.any(-1).swapaxes(1, 2)
    np.testing.assert_array_equal(np.isneginf(np.asarray(lse)), is_empty)
    assert not np.any(np.asarray(output, np.float32)[is_empty])


def masked_change(backend, dtype, *, keys, bound):
    """How far masking the heaviest record moves N of a memory without noise, and its bound C.

    The floor is a power of two above every sum, so that the answer is N over it. Values of the
    first half of the keys point one way, those of the second the other.
    """
    size, clip, floor = 16, 1.0, 2.0 ** np.ceil(np.log2(keys))
    bound = float(jnp.bfloat16(bound))  # keys must reach it in their own dtype
    readout = MemoryReadout("sum", bound, clip, clip, floor, (2.0**-40,), (2.0**-24,))
    rng = np.random.default_rng(keys)
    query, key = np.zeros((1, 1, 1, size)), np.zeros((1, keys, 1, size))
    query[..., 0] = 1.0
    key[..., 0] = rng.uniform(-bound, bound, (1, keys, 1))
    value = np.zeros((1, keys, 1, size))
    value[:, : keys // 2, :, 0], value[:, keys // 2 :, :, 0] = clip, -clip
    place = keys // 3
    key[0, place, 0, 0] = bound
    inputs = AttentionInputs(
        *(jnp.asarray(x, dtype) for x in (query, key, value)), noise=noise_inputs(1)
    )
    spec = AttentionSpec(1.0, readout=readout)
    run = jax.jit(lambda inputs: backend.forward(spec, inputs).output)
    mask = jnp.ones((1, 1, 1, keys), bool)
    sums = [
        np.asarray(run(inputs._replace(mask=m)), np.float64)[0, 0, 0] * floor
        for m in (mask, mask.at[..., place].set(False))
    ]
    assert np.abs(sums).max() > 1.0, "the sums are too small to show anything"
    return np.linalg.norm(sums[0] - sums[1]), clip
