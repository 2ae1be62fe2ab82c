"""Both private releases through the public function."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import attention_oracle as oracle
from helpers.barriers import without_a_barrier

from dpfa_jax.attention import dp_attention
from dpfa_jax.core import ArgumentError, KeyReuseError, PrivateAutodiffError
from dpfa_jax.kernels import epilogue
from dpfa_jax.noise import (
    attention_noise,
    bind,
    insecure_test_key,
    key_words,
    new_noise_key,
    snap,
)
from dpfa_jax.release import ExampleRelease, RecordRelease

pytestmark = pytest.mark.quickly_compiled

BATCH, ROWS, KEYS, HEADS, KEY_HEADS, SIZE = 3, 5, 11, 4, 2, 8
EXAMPLE = ExampleRelease(0.5, 1.0, ROWS, HEADS, SIZE, insecure_test_noise=True)
WHOLE = dataclasses.replace(EXAMPLE, clip="example")
SUM = RecordRelease(1.0, 1.0, 1.0, ROWS, HEADS, SIZE, insecure_test_noise=True)
RATIO = dataclasses.replace(SUM, form="ratio", relation="substitute", memory_length=KEYS)
RELEASES = {"example": EXAMPLE, "whole": WHOLE, "sum": SUM, "ratio": RATIO}
KEY = insecure_test_key(7)


def draw(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = ((BATCH, ROWS, HEADS, SIZE), *((BATCH, KEYS, KEY_HEADS, SIZE),) * 2)
    return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)


def noise(release, columns=SIZE, release_id=0, layer=0):
    words = jnp.broadcast_to(bind(key_words(KEY), release_id, layer), (BATCH, 2))
    start = jnp.zeros(BATCH, jnp.uint32)
    z = attention_noise(
        words, jnp.arange(BATCH, dtype=jnp.uint32), start,
        heads=HEADS, row_start=0, rows=ROWS, columns=columns,
    )  # fmt: skip
    return np.asarray(z, np.float64) * np.asarray(release.noise_stddevs)[:, None]


def expected(release, query, key, value):
    """The release from its definition, in float64, before the snap; sum form: (N, Z)."""
    if isinstance(release, ExampleRelease):
        output = oracle.attention(query, key, value)
        axes = (-1,) if release.clip == "row" else (1, 2, 3)
        norm = np.sqrt((output**2).sum(axes, keepdims=True))
        return output * np.minimum(1, release.l2_clip_norm / norm) + noise(release)
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    k, v = (np.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (k, v))
    v = v * np.minimum(1, release.value_clip_norm / np.linalg.norm(v, axis=-1, keepdims=True))
    logits = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(SIZE)
    low = -release.logit_bound if release.form == "ratio" else -np.inf
    e = np.exp(np.clip(logits, low, release.logit_bound) - release.logit_bound)
    total, weight = np.einsum("bnts,bsnh->btnh", e, v), np.einsum("bnts->btn", e)[..., None]
    if release.form == "ratio":
        return total / weight + noise(release)
    return np.concatenate([total, release.kappa * weight], -1) + noise(release, SIZE + 1)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("name", RELEASES)
def test_follows_its_definition_on_the_public_grid(name, backend):
    """V12, V10: clip, noise of the declared counters, snap; every number lies on the grid."""
    release, arrays = RELEASES[name], draw()
    answer = dp_attention(*arrays, release=release, noise_key=KEY, implementation=backend)
    answer = np.asarray(answer, np.float64)
    grid = np.asarray(release.grids)[:, None]
    want = expected(release, *arrays)
    if name == "sum":
        snapped = np.round(want / grid) * grid
        normaliser = np.maximum(snapped[..., -1:] / release.kappa, release.floor)
        want = snapped[..., :-1] / normaliser
        # One grid cell may round the other way where float32 meets its edge.
        assert np.mean(np.abs(answer - want) > 1e-5) < 0.01
    else:
        np.testing.assert_array_equal(answer, np.round(answer / grid) * grid)
        assert (np.abs(answer - want) <= 0.501 * grid).all()


def test_heads_share_one_gaussian_and_keep_their_own_noise():
    """Per-head noise and grids follow the release's shares."""
    release = dataclasses.replace(EXAMPLE, noise_shares=(1.0, 2.0, 4.0, 8.0))
    arrays = draw()
    answer = np.asarray(dp_attention(*arrays, release=release, noise_key=KEY))
    cell = np.asarray(release.grids)[:, None]
    assert (np.abs(answer - expected(release, *arrays)) <= 0.501 * cell).all()


@pytest.mark.parametrize("name", ["example", pytest.param("whole", marks=pytest.mark.slow)])
def test_gradient_passes_clip_and_attention(name):
    """V8: the derivative of the clipped output; none through noise and snap."""
    release, arrays = RELEASES[name], draw(1)
    cotangent = jnp.asarray(np.random.default_rng(2).standard_normal(arrays[0].shape), jnp.float32)

    def private(*x):
        return jnp.vdot(dp_attention(*x, release=release, noise_key=KEY), cotangent)

    gradients = jax.grad(private, argnums=(0, 1, 2))(*arrays)
    output = oracle.attention(*arrays)
    axes = (-1,) if release.clip == "row" else (1, 2, 3)
    norm = np.sqrt((output**2).sum(axes, keepdims=True))
    g, unit = np.asarray(cotangent, np.float64), output / norm
    shrunk = release.l2_clip_norm / norm * (g - unit * (unit * g).sum(axes, keepdims=True))
    assert (norm > release.l2_clip_norm).any()
    through = np.where(norm > release.l2_clip_norm, shrunk, g)
    for ours, exact in zip(gradients, oracle.attention(*arrays, through)[1:4], strict=True):
        np.testing.assert_allclose(ours, exact, atol=3e-6)


def _refused(transform):
    arrays = draw()

    def answer(query):
        return jnp.sum(dp_attention(query, *arrays[1:], release=SUM, noise_key=KEY))

    def one(query, key, value, noise_key):
        return jnp.sum(dp_attention(query, key, value, release=SUM, noise_key=noise_key))

    ones = jnp.ones_like(arrays[0])
    return {
        "grad": lambda: jax.grad(answer)(arrays[0]),
        "vjp": lambda: jax.vjp(answer, arrays[0]),
        "jvp": lambda: jax.jvp(answer, (arrays[0],), (ones,)),
        "linearize": lambda: jax.linearize(answer, arrays[0]),
        "vmap of grad": lambda: jax.vmap(jax.grad(one))(*arrays, jax.random.split(KEY, BATCH)),
        "grad of jit": lambda: jax.grad(jax.jit(one))(*arrays, KEY),
    }[transform]


@pytest.mark.parametrize(
    "transform", ["grad", "vjp", "jvp", "linearize", "vmap of grad", "grad of jit"]
)
def test_memory_refuses_autodiff(transform):
    """V17: 6 of 6."""
    with pytest.raises(PrivateAutodiffError, match="no derivative"):
        _refused(transform)()


@pytest.mark.parametrize(
    "name",
    ["example", *(pytest.param(n, marks=pytest.mark.slow) for n in RELEASES if n != "example")],
)
def test_noise_follows_global_indices(name):
    """V10: the same bits from one call, from its parts by batch and head, and jitted."""
    release, arrays = RELEASES[name], draw(3)
    call = functools.partial(dp_attention, release=release)
    whole = np.asarray(call(*arrays, noise_key=KEY))
    parts = [
        call(*(x[i : i + 1] for x in arrays), noise_key=KEY, batch_start=i) for i in range(BATCH)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(jax.jit(lambda k, *x: call(*x, noise_key=k))(KEY, *arrays), whole)
    if name != "whole":
        halves = [
            call(
                arrays[0][:, :, 2 * h : 2 * h + 2], *(x[:, :, h : h + 1] for x in arrays[1:]),
                noise_key=KEY, head_start=2 * h,
            )
            for h in range(2)
        ]  # fmt: skip
        np.testing.assert_array_equal(np.concatenate(halves, 2), whole)
    other = np.asarray(call(*arrays, noise_key=KEY, release_id=1))
    assert not np.array_equal(other, whole)


@pytest.mark.parametrize("name", ["example", "sum"])
def test_one_example_does_not_touch_another(name):
    """V6: example i is bitwise unchanged when j changes, NaN included."""
    release, arrays = RELEASES[name], draw(4)
    call = functools.partial(dp_attention, release=release, noise_key=KEY)
    first = np.asarray(call(*arrays))
    changed = [x.at[1].set(jnp.nan) for x in arrays]
    second = np.asarray(call(*changed))
    np.testing.assert_array_equal(first[[0, 2]], second[[0, 2]])
    assert np.isfinite(second).all()


@pytest.mark.parametrize("name", ["example", "sum"])
def test_hidden_rows_get_noise(name):
    """V7: fully masked and padded rows are finite, non-zero, and noised like any other."""
    release, arrays = RELEASES[name], draw(5)
    lengths = jnp.asarray([0, 2, ROWS], jnp.int32)
    answer = np.asarray(
        dp_attention(
            *arrays,
            release=release,
            noise_key=KEY,
            query_seq_lengths=lengths,
            mask=jnp.zeros((1, 1, 1, KEYS), bool),
        )
    )
    assert np.isfinite(answer).all()
    assert (answer != 0).mean() > 0.9
    if name == "example":
        assert (np.abs(answer - noise(release)) <= 0.501 * np.asarray(release.grids)[:, None]).all()


def test_no_noise_twice():
    """V11: an unbatched key under vmap, a closed-over key, and a second eager use are refused."""
    release = dataclasses.replace(EXAMPLE, insecure_test_noise=False)
    arrays, secret = draw(6), new_noise_key()
    mapped, closed = new_noise_key(), new_noise_key()
    call = functools.partial(dp_attention, release=release)
    with pytest.raises(KeyReuseError):
        jax.vmap(lambda *x: call(*x, noise_key=mapped))(*arrays)
    with pytest.raises(KeyReuseError):
        jax.jit(lambda *x: call(*x, noise_key=closed))(*arrays)
    call(*arrays, noise_key=secret)
    call(*arrays, noise_key=secret, layer=1)
    with pytest.raises(KeyReuseError):
        call(*arrays, noise_key=secret)


@pytest.mark.parametrize("name", RELEASES)
def test_lowered_program(name):
    """V24: one result, no host callback, no second noise draw."""
    release, arrays = RELEASES[name], draw(8)
    jaxpr = jax.make_jaxpr(lambda k, *x: dp_attention(*x, release=release, noise_key=k))(
        KEY, *arrays
    )
    assert [v.aval.shape for v in jaxpr.jaxpr.outvars] == [arrays[0].shape]
    text = str(jaxpr)
    assert "callback" not in text
    # A normal pair takes one cosine; nothing else here does.
    assert text.count(" cos ") == 1
    negative = jax.make_jaxpr(
        lambda k, *x: sum(dp_attention(*x, release=release, noise_key=k, layer=i) for i in (0, 1))
    )(KEY, *arrays)
    assert negative.jaxpr.outvars and str(negative).count("dpfa_guard_noise_key") == 2


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("name", RELEASES)
def test_an_answer_is_one_value_for_all_readers(name, backend, monkeypatch):
    """V12: XLA may compute a fused value anew, rounded another way, for each that reads it."""
    part = "example" if name in ("example", "whole") else "memory"
    last, found = getattr(epilogue, part), []

    def watched(readout, answer, noise):
        parts, structure = jax.tree.flatten(answer)

        def of(*parts):
            return last(readout, jax.tree.unflatten(structure, parts), noise)

        found.append(without_a_barrier(of, *parts))
        with monkeypatch.context() as patch:
            patch.setattr(epilogue, "snap_once", snap)
            patch.setattr(jax.lax, "optimization_barrier", lambda x: x)
            found.append(without_a_barrier(of, *parts))
        return last(readout, answer, noise)

    monkeypatch.setattr(epilogue, part, watched)
    call = functools.partial(dp_attention, *draw(4), scale=0.123)  # no other test has traced it
    call(release=RELEASES[name], noise_key=KEY, implementation=backend)
    assert found[0] == set() and "input" in found[1]


@pytest.mark.parametrize("name", ["example", "sum"])
def test_a_traced_index_beyond_the_release_answers_nothing(name):
    """V11: one charge pays for its own heads; others would be answers that nobody paid for."""
    arrays = (draw(9)[0][:, :, :2], *(x[:, :, :1] for x in draw(9)[1:]))

    @jax.jit
    def answer(key, batch_start, head_start):
        return dp_attention(
            *arrays, release=RELEASES[name], noise_key=key,
            batch_start=batch_start, head_start=head_start,
        )  # fmt: skip

    last = 2**20 - BATCH
    for batch_start, head_start in ((0, 0), (0, 2), (last, 1), (jnp.uint8(3), jnp.int16(2))):
        assert np.isfinite(answer(KEY, batch_start, head_start)).all()
    for batch_start, head_start in ((0, 3), (0, HEADS), (0, -1), (last + 1, 0), (-1, 0)):
        assert np.isnan(answer(KEY, batch_start, head_start)).all()
    with jax.enable_x64(True):
        assert np.isnan(answer(KEY, 0, jnp.int64(2**32))).all()


@pytest.mark.parametrize("name", ["release_id", "layer"])
def test_a_traced_negative_use_answers_nothing(name):
    """V11: without tracing it is refused; as 32 bits it would be the noise of a large number."""

    @jax.jit
    def call(number):
        return dp_attention(
            *draw(), release=EXAMPLE, noise_key=insecure_test_key(0), **{name: number}
        )

    assert jnp.isnan(call(jnp.int32(-1))).all()
    assert (call(jnp.int32(3)) == call(jnp.uint32(3))).all()


@pytest.mark.parametrize("name", RELEASES)
def test_float16_holds_the_largest_noise_that_is_taken(name):
    """A release just below the bound is finite, where every normal were the sampler's largest."""
    release = RELEASES[name]
    arrays = tuple(x.astype(jnp.float16) for x in draw(10))
    tail = release.record().tail

    def largest(release):
        floor = release.floor if name == "sum" else 1.0
        return tail * max(release.noise_stddevs) / floor

    louder = dataclasses.replace(release, noise_multiplier=0.95 * 65504 / largest(release))
    assert np.isfinite(dp_attention(*arrays, release=louder, noise_key=KEY)).all()
    assert largest(louder) + 1.0 + max(louder.grids) < np.finfo(np.float16).max
    louder = dataclasses.replace(louder, noise_multiplier=1.06 * louder.noise_multiplier)
    with pytest.raises(ArgumentError, match="beyond the largest float16"):
        dp_attention(*arrays, release=louder, noise_key=KEY)
