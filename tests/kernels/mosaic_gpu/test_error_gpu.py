"""Errors of the Hopper kernels on the device against the naive ones: V6, V8.

python -m pytest -m gpu tests/kernels/mosaic_gpu    (-n 8 where pytest-xdist is installed)
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle
from helpers import growing_logits
from helpers.hopper_cases import (
    BACKEND,
    BACKWARD,
    CASES,
    FUSED,
    distance,
    draw,
    naive,
    use_tiles,
    value_and_gradients,
)

from dpfa_jax.attention import core
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec
from dpfa_jax.kernels.mosaic_gpu.tiles import (
    MAX_HEAD_SIZE_ONE_WARPGROUP,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kernels", BACKWARD)
@pytest.mark.parametrize("case", CASES)
def test_error_is_within_twice_the_naive_one(case, kernels, monkeypatch):
    """V7, V8: output and gradients against float64; hidden slots hold NaN."""
    backend, tiles_of, deterministic = BACKWARD[kernels]
    use_tiles(monkeypatch, tiles_of)
    (batch, rows, keys, heads, kv_heads, size), options, dtype = CASES[case]
    if backend is FUSED and size > MAX_HEAD_SIZE_ONE_WARPGROUP:
        pytest.skip("one backward pass serves this head size")
    options = dict(options)
    rng = np.random.default_rng(1)
    query, cotangent = (draw(rng, (batch, rows, heads, size), dtype) for _ in range(2))
    key, value = (draw(rng, (batch, keys, kv_heads, size), dtype) for _ in range(2))
    lengths = {}
    if (given := options.pop("lengths", False)) is not False:
        drawn = (rng.integers(0, rows, batch), rng.integers(1, keys, batch))
        lengths = {
            "query_lengths": drawn[0] if given is True else np.asarray(given[0]),
            "key_lengths": drawn[1] if given is True else np.asarray(given[1]),
        }
    spec = AttentionSpec(size**-0.5, deterministic=deterministic, **options)
    clean = AttentionInputs(query, key, value)
    inputs = clean._replace(**{name: jnp.asarray(x, jnp.int32) for name, x in lengths.items()})
    if lengths:
        is_row = jnp.arange(rows)[None, :] < inputs.query_lengths[:, None]
        is_key = jnp.arange(keys)[None, :] < inputs.key_lengths[:, None]
        inputs = inputs._replace(
            query=jnp.where(is_row[..., None, None], query, jnp.nan),
            key=jnp.where(is_key[..., None, None], key, jnp.nan),
            value=jnp.where(is_key[..., None, None], value, jnp.nan),
        )
    assert BACKEND.cannot(spec, inputs, "gpu") is None
    output, lse, *gradients = value_and_gradients(spec, inputs, cotangent, backend)
    expected = oracle.attention(
        *clean[:3],
        cotangent,
        scale=spec.scale,
        soft_cap=spec.logits_soft_cap,
        is_causal=spec.is_causal,
        window=spec.local_window,
        **lengths,
    )
    theirs, pull = jax.vjp(lambda *x: naive(spec, lengths, *x), query, key, value)
    # Where a gradient cancels to nothing, float32 leaves 2^-24 of each product in the sum.
    largest = [np.abs(np.asarray(x, np.float64)).max() for x in clean]
    products = size * spec.scale * np.linalg.norm(np.asarray(cotangent, np.float64))
    floor = 2.0**-24 * products * largest[2] * max(largest[:2])
    for mine, other, exact in zip(
        (output, *gradients), (theirs, *pull(cotangent)), expected[:4], strict=True
    ):
        assert distance(mine, exact) <= 2 * distance(other, exact) + floor
    seen = oracle.visibility(
        (batch, heads, rows, keys), is_causal=spec.is_causal, window=spec.local_window, **lengths
    )
    is_empty = ~seen.any(-1).swapaxes(1, 2)
    assert np.array_equal(np.isneginf(np.asarray(lse)), is_empty)
    assert not np.any(np.asarray(output, np.float32)[is_empty])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_logits_that_grow_along_the_keys(size, is_causal, dtype):
    """V7, V8: rows of one warp that take new maxima in each step, in some, in the first alone."""
    length = 2000  # causal tiles have 8 steps of 128 keys on average
    inputs = growing_logits.inputs(length, length, size, dtype)
    spec = growing_logits.spec(is_causal=is_causal)
    assert BACKEND.cannot(spec, inputs, "gpu") is None
    output, lse = jax.jit(lambda x: core.attend(BACKEND, spec, x))(inputs)
    exact, exact_lse = growing_logits.expected(inputs, is_causal=is_causal)
    theirs = naive(spec, {}, *inputs[:3])
    for growth in range(len(growing_logits.GROWTHS)):
        rows = (slice(None), slice(growth, None, len(growing_logits.GROWTHS)))
        assert distance(output[rows], exact[rows]) <= 2 * distance(theirs[rows], exact[rows])
    difference = np.abs(np.asarray(lse) - np.swapaxes(exact_lse, 1, 2))
    assert difference.max() < growing_logits.lse_slack(size, length)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_row_depends_on_no_other(size, is_causal):
    """Weights made again for a neighbour's sake, by code of their own, have the bits as before."""
    length = 2100
    inputs = growing_logits.inputs(length, length, size, jnp.bfloat16)
    is_calm = np.resize(np.abs(growing_logits.GROWTHS) < 1, length)
    calm = inputs.query * jnp.asarray(is_calm, jnp.bfloat16)[None, :, None, None]
    spec = growing_logits.spec(is_causal=is_causal)
    run = jax.jit(lambda x: core.attend(BACKEND, spec, x))
    beside, alone = (run(x) for x in (inputs, inputs._replace(query=calm)))
    for one, other in zip(beside, alone, strict=True):  # output, lse
        one, other = (np.asarray(x[0, :, 0], np.float32).reshape(length, -1) for x in (one, other))
        same = np.all(one == other, axis=1)
        assert np.all(same[is_calm])
        assert not np.all(same[~is_calm])  # negative control: those were changed
