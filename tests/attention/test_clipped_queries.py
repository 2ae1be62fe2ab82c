"""`ExampleRelease.query_key_clip_norm`: part of the released function, with its gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.attention import dp_attention
from dpfa_jax.clipping.rows import clip_rows_stored
from dpfa_jax.kernels import dispatch
from dpfa_jax.noise import insecure_test_key
from dpfa_jax.release import ExampleRelease

pytestmark = pytest.mark.quickly_compiled

RELEASE = ExampleRelease(10.0, 2.0**-14, 5, 2, 8, insecure_test_noise=True)
CLIPPED = dataclasses.replace(RELEASE, query_key_clip_norm=1.5)
KEY = insecure_test_key(3)
# Programs this small: the compiler would take most of the time.
QUICKLY = {"xla_backend_optimization_level": 0}
attend = jax.jit(dp_attention, static_argnames="release", compiler_options=QUICKLY)


def draw(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((3, 5, 2, 8)), dtype) for _ in range(3))


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
def test_equals_the_release_of_clipped_rows(dtype):
    """V4: rows as stored; a row that is not finite counts as zero; the sensitivity is the same."""
    query, key, value = draw(dtype)
    query = query.at[0, 0].set(jnp.nan)
    key = key.at[1, 2, 0, 3].set(jnp.inf)
    answer = attend(query, key, value, release=CLIPPED, noise_key=KEY)
    clip = jax.jit(clip_rows_stored, static_argnums=1, compiler_options=QUICKLY)
    short = [clip(x, 1.5) for x in (query, key)]
    expected = attend(*short, value, release=RELEASE, noise_key=KEY)
    assert np.array_equal(answer, expected)
    assert np.all(np.isfinite(np.asarray(answer, np.float32)))
    assert CLIPPED.record() == RELEASE.record()
    # Negative control: these rows are long enough for the clip to matter.
    other = attend(query, key, value, release=RELEASE, noise_key=KEY)
    assert not np.array_equal(answer, other)


def test_gradient_passes_through_the_clip():
    """V8: against differences of the released function, whose noise is the same at each point."""
    arrays = draw()
    release = dataclasses.replace(CLIPPED, noise_multiplier=2.0**-22)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(arrays[0].shape), jnp.float32)

    def function(query, key, noise_key):
        answer = dp_attention(query, key, arrays[2], release=release, noise_key=noise_key)
        return jnp.sum(answer * weight)

    both = jax.jit(jax.value_and_grad(function, argnums=(0, 1)), compiler_options=QUICKLY)
    loss = lambda *x: both(*x, KEY)[0]  # noqa: E731
    gradients = both(*arrays[:2], KEY)[1]
    rng, step = np.random.default_rng(2), 2.0**-6
    for place, gradient in enumerate(gradients):
        along = jnp.asarray(rng.standard_normal(arrays[0].shape), jnp.float32)
        ends = [
            loss(*(x + sign * step * along * (i == place) for i, x in enumerate(arrays[:2])))
            for sign in (1, -1)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs(slope - jnp.sum(gradient * along)) < 5e-3 * jnp.linalg.norm(gradient)
        # The clip removes what points along a row that it shortens.
        rows = arrays[place]
        is_long = jnp.linalg.norm(rows, axis=-1) > 1.5
        assert is_long.any()
        radial = jnp.sum(gradient * rows, axis=-1)
        assert jnp.abs(jnp.where(is_long, radial, 0.0)).max() < 1e-5


def test_tells_the_kernel_the_largest_logit(monkeypatch):
    """scale C^2: what a kernel needs to do without a running maximum."""
    seen = []
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda spec, *x: seen.append(spec) or choose(spec, *x))
    for release in (CLIPPED, RELEASE):
        jax.eval_shape(
            functools.partial(dp_attention, release=release, scale=0.25), *draw(), noise_key=KEY
        )
    assert [spec.largest_logit for spec in seen] == [0.25 * 1.5**2, None]
