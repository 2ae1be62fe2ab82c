"""Plain attention under JAX's transformations, and where it must equal jax.nn."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.attention import dot_product_attention as attention

pytestmark = pytest.mark.quickly_compiled

BATCH, ROWS, KEYS, HEADS, KEY_HEADS, SIZE = 2, 5, 7, 4, 2, 8


def draw(*lead, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((ROWS, HEADS, SIZE), *((KEYS, KEY_HEADS, SIZE),) * 2)
    return tuple(jnp.asarray(rng.standard_normal((*lead, *s)), jnp.float32) for s in shapes)


close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "scale": 0.3}])
def test_residual_and_unbatched_inputs_as_jax_nn(options):
    """Log-sum-exp, its shape and dtype, and (T, N, H) inputs."""
    for arrays in (draw(BATCH), draw()):
        options["return_residual"] = True
        ours = attention(*arrays, **options)
        theirs = jax.jit(functools.partial(jax.nn.dot_product_attention, **options))(*arrays)
        for a, b in zip(ours, theirs, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            close(a, b)


def test_residual_has_no_gradient_as_in_jax_nn():
    arrays = draw(BATCH)

    def through_residual(f, q):
        return f(q, *arrays[1:], return_residual=True)[1].sum()

    assert not jax.grad(functools.partial(through_residual, attention))(arrays[0]).any()


def test_a_row_without_keys_is_zero_with_no_gradient():
    """V7: output 0, log-sum-exp -inf, gradients 0, whatever cotangent arrives."""
    arrays = draw(BATCH)
    call = functools.partial(attention, mask=jnp.zeros((1, 1, 1, KEYS), bool))
    output, lse = call(*arrays, return_residual=True)
    assert not output.any() and jnp.isneginf(lse).all()
    _, pull_back = jax.vjp(call, *arrays)
    for gradient in pull_back(jnp.full_like(output, jnp.nan)):
        assert not gradient.any()


QUICK, MORE = ((0, 0, 0), (None, 1, 3)), ((2, None, None), (3, 0, None))


@pytest.mark.parametrize("axes", [*QUICK, *(pytest.param(a, marks=pytest.mark.slow) for a in MORE)])
def test_vmap_over_any_axes(axes):
    """Outputs and gradients under vmap are those of single calls, for every mix of in_axes."""
    arrays = tuple(
        x if axis is None else jnp.stack([x, 2 * x, x - 1], axis)
        for x, axis in zip(draw(BATCH), axes, strict=True)
    )

    def loss(*x):
        return jnp.sum(jnp.sin(attention(*x, is_causal=True)))

    both = jax.value_and_grad(loss, argnums=(0, 1, 2))
    value, gradients = jax.vmap(both, in_axes=axes)(*arrays)
    for i in range(3):
        single = (
            x if axis is None else jnp.take(x, i, axis)
            for x, axis in zip(arrays, axes, strict=True)
        )
        one, its_gradients = both(*single)
        close(value[i], one, rtol=1e-4)
        for a, b in zip(gradients, its_gradients, strict=True):
            close(a[i], b)


def test_nested_vmap_with_bias_mask_and_lengths():
    """Every argument may carry its own mapped axis; per-example gradients come out apart."""
    arrays = draw(3, 2, BATCH)
    rng = np.random.default_rng(1)
    bias = jnp.asarray(rng.standard_normal((2, HEADS, ROWS, KEYS)), jnp.float32)
    mask = jnp.asarray(rng.random((3, 1, 1, KEYS)) < 0.7)
    lengths = jnp.asarray([[7, 3], [5, 0], [1, 6]], jnp.int32)

    def loss(q, k, v, bias, mask, lengths):
        out = attention(q, k, v, bias, mask, key_value_seq_lengths=lengths)
        return jnp.sum(out**2)

    gradient = jax.grad(loss, argnums=(0, 3))
    inner = jax.vmap(gradient, in_axes=(0, 0, 0, 0, None, None))
    outer = jax.jit(jax.vmap(inner, in_axes=(0, 0, 0, None, 0, 0)))
    d_query, d_bias = outer(*arrays, bias, mask, lengths)
    for i, j in ((0, 1), (1, 0), (2, 1)):
        one = gradient(*(x[i, j] for x in arrays), bias[j], mask[i], lengths[i])
        close(d_query[i, j], one[0])
        close(d_bias[i, j], one[1])


def test_scan_checkpoint_and_jit():
    """Layers by scan, recomputed by checkpoint: the same gradient as a plain loop."""
    query, key, value = draw(BATCH)
    weights = jnp.asarray([1.0, 0.5, -0.7])

    def layer(x, w):
        return x + w * attention(x, key, value, is_causal=True), None

    def scanned(x, weights):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2)

    def looped(x, weights):
        for w in weights:
            x, _ = layer(x, w)
        return jnp.sum(x**2)

    ours = jax.jit(jax.grad(scanned, argnums=(0, 1)))(query, weights)
    for a, b in zip(ours, jax.grad(looped, argnums=(0, 1))(query, weights), strict=True):
        close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_reference_backend_has_every_derivative():
    """jvp and second derivatives, against finite differences of first ones."""
    query, key, value = draw(1)
    call = functools.partial(attention, implementation="reference")
    direction = jnp.asarray(np.random.default_rng(2).standard_normal(query.shape), jnp.float32)

    def slope(q):
        return jax.grad(lambda q: jnp.sum(call(q, key, value) ** 2))(q)

    _, exact = jax.jvp(slope, (query,), (direction,))
    step = 1e-2
    numeric = (slope(query + step * direction) - slope(query - step * direction)) / (2 * step)
    np.testing.assert_allclose(exact, numeric, atol=2e-2 * float(jnp.abs(exact).max()))


def test_the_signature_is_that_of_jax_nn():
    """Names, order, kinds and defaults; what ours adds comes after, by keyword."""
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters.values()
    ours = list(inspect.signature(attention).parameters.values())
    shared, added = ours[: len(theirs)], ours[len(theirs) :]
    assert [(p.name, p.kind, p.default) for p in shared] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in added)


@pytest.mark.parametrize("scale", [np.float32(0.3), np.asarray(0.3), jnp.float32(0.3)])
def test_a_concrete_scale_may_be_an_array(scale):
    """As in jax.nn, which multiplies by whatever it is given."""
    arrays = draw(BATCH)
    want = attention(*arrays, scale=float(scale))
    np.testing.assert_array_equal(attention(*arrays, scale=scale), want)


def test_a_traced_scale_rounds_the_query_once():
    """Not the scale too, by which all logits of a call would be off together."""
    query, key, value = (x.astype(jnp.bfloat16) for x in draw(BATCH))
    found = jax.jit(lambda s: attention(query, key, value, scale=s))(0.3)
    scaled = (query.astype(jnp.float32) * 0.3).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found, attention(scaled, key, value, scale=1.0))
    assert not np.array_equal(scaled, query * jnp.bfloat16(0.3))


@pytest.mark.parametrize("implementation", ["blocked", "reference"])
def test_a_bias_hides_by_infinity_only(implementation):
    """The least finite number is a logit: a row of it alone is the mean, as in jax.nn."""
    query, key, value = draw(BATCH)
    call = functools.partial(attention, implementation=implementation)
    lowest = jnp.full((ROWS, KEYS), jnp.finfo(jnp.float32).min)
    mean = jnp.repeat(value.mean(axis=1, keepdims=True), HEADS // KEY_HEADS, axis=2)
    close(call(query, key, value, lowest), jnp.broadcast_to(mean, query.shape))
    assert not call(query, key, value, jnp.full((ROWS, KEYS), -jnp.inf)).any()


@pytest.mark.parametrize("lowest", [-1e9, -1e10])
@pytest.mark.parametrize("length", [12, 600])  # one block, several
def test_rows_that_see_padding_alone_as_in_jax_nn(length, lowest):
    """V6: the first keys have one large bias, and causality shows the first rows no other."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((1, length, 2, 4)), jnp.float32) for _ in range(4)]
    bias = jnp.where(jnp.arange(length) < length - 5, lowest, 0.0)[None, None, None]

    def gradients(call):
        def loss(query, key, value, bias):
            return jnp.vdot(call(query, key, value, bias, is_causal=True), arrays[3])

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays[:3], bias)

    ours = gradients(functools.partial(attention, implementation="blocked"))
    for mine, theirs in zip(ours, gradients(jax.nn.dot_product_attention), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-6 * float(jnp.linalg.norm(theirs)))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}])
def test_second_derivatives_of_the_blocked_backend(options):
    """Forward over reverse at more than a block; `reference` defines them."""
    rng = np.random.default_rng(0)
    x, along = (jnp.asarray(rng.standard_normal((1, 600, 1, 4)), jnp.float32) for _ in range(2))

    def second(implementation):
        def square(x):
            return (attention(x, x, x, implementation=implementation, **options) ** 2).sum()

        return jax.jit(lambda *pair: jax.jvp(jax.grad(square), pair[:1], pair[1:])[1])(x, along)

    want = second("reference")
    np.testing.assert_allclose(second("blocked"), want, atol=2e-5 * float(jnp.abs(want).max()))
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: attention(x, x, x), (x,), (along,))
