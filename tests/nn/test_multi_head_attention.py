"""The drop-in layer, its release, and the adapter that serves nnx and linen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from dpfa_jax.nn import Decoder, Encoder, MultiHeadAttention, attention_fn
from dpfa_jax.noise import insecure_test_key
from dpfa_jax.release import ExampleRelease

pytestmark = pytest.mark.quickly_compiled

SLOW = pytest.mark.slow
RELEASE = ExampleRelease(
    1.0, 2.0, query_length=5, num_heads=4, head_dim=4, insecure_test_noise=True
)


def inputs(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def padding_mask(length, real):
    return (jnp.arange(length) < real)[None, None, None, :]


# Each costs two compilations of a whole layer; the quick suite keeps one.
KINDS = tuple(
    pytest.param(kv, causal, marks=() if (kv, causal) == (2, True) else SLOW)
    for kv in (4, 2, 1)
    for causal in (False, True)
)


@pytest.mark.parametrize(("kv_heads", "causal"), KINDS)
def test_equals_the_base_class(kv_heads, causal):
    """V8: values and parameter gradients, with GQA, a mask and further batch axes."""
    options = {"num_kv_heads": kv_heads, "decode": False, "normalize_qk": True}
    ours = MultiHeadAttention(4, 16, rngs=nnx.Rngs(0), **options)
    base = nnx.MultiHeadAttention(4, 16, rngs=nnx.Rngs(0), **options)
    assert isinstance(ours, nnx.MultiHeadAttention)
    x, mask = inputs(2, 3, 5, 16), padding_mask(5, 4)[None]

    def loss(layer):
        return (layer(x, mask=mask, is_causal=causal) ** 2).sum()

    value_and_grad = nnx.jit(nnx.value_and_grad(loss))
    (one, grads), (other, expected) = value_and_grad(ours), value_and_grad(base)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_serves_linen_whose_mask_is_float():
    x = inputs(2, 5, 16)
    mask = linen.make_attention_mask(jnp.ones((2, 5)), jnp.array([[1, 1, 1, 0, 0], [1] * 5]))
    assert mask.dtype == jnp.float32
    ours = linen.MultiHeadDotProductAttention(num_heads=4, attention_fn=attention_fn)
    base = linen.MultiHeadDotProductAttention(num_heads=4)
    params = base.init(jax.random.key(0), x, mask=mask)
    np.testing.assert_allclose(
        ours.apply(params, x, mask=mask), base.apply(params, x, mask=mask), rtol=1e-4, atol=1e-5
    )


def test_what_cannot_be_honoured_is_refused():
    """V23."""
    layer = MultiHeadAttention(
        4, 16, dropout_rate=0.1, deterministic=False, decode=False, rngs=nnx.Rngs(0)
    )
    with pytest.raises(ValueError, match="dropout_rate"):
        layer(inputs(2, 5, 16))
    plain = MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="sow_weights"):
        plain(inputs(2, 5, 16), sow_weights=True)
    with pytest.raises(ValueError, match="no release"):
        plain(inputs(2, 5, 16), noise_key=insecure_test_key(0))


def released_layer(layer=0, **options):
    return MultiHeadAttention(4, 16, release=RELEASE, layer=layer, rngs=nnx.Rngs(0), **options)


def test_release_is_noised_by_key_and_layer():
    x = inputs(2, 5, 16)
    one = released_layer()(x, noise_key=insecure_test_key(1))
    np.testing.assert_array_equal(one, released_layer()(x, noise_key=insecure_test_key(1)))
    for other in (
        released_layer()(x, noise_key=insecure_test_key(2)),
        released_layer(layer=1)(x, noise_key=insecure_test_key(1)),
        released_layer()(x, noise_key=insecure_test_key(1), release_id=1),
    ):
        assert (jnp.abs(one - other) > 1e-3).mean() > 0.9
    # Nothing but noise survives where the noise is 16 times the signal's largest norm.
    clean = MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0))(x)
    assert jnp.std(one) > 3 * jnp.std(clean)


def test_release_fails_closed():
    """V23: each refusal names its parameter."""
    x, key = inputs(2, 5, 16), insecure_test_key(3)
    with pytest.raises(ValueError, match="noise_key = None"):
        released_layer()(x)
    with pytest.raises(ValueError, match="noise_key"):
        released_layer()(x, noise_key=jax.random.key(0))
    with pytest.raises(ValueError, match="layer = None"):
        released_layer(layer=None)
    with pytest.raises(ValueError, match="dropout_rate"):
        released_layer(dropout_rate=0.5)
    with pytest.raises(ValueError, match="attention_fn"):
        released_layer(attention_fn=attention_fn)
    with pytest.raises(ValueError, match="num_heads = 2"):
        MultiHeadAttention(2, 16, release=RELEASE, layer=0, rngs=nnx.Rngs(0))
    for option in ({"decode": True}, {"sow_weights": True}):
        with pytest.raises(ValueError, match=next(iter(option))):
            released_layer()(x, noise_key=key, **option)


@SLOW
@pytest.mark.parametrize("stack", [Decoder, Encoder])
def test_stacks_couple_no_examples(stack):
    """V6, through nnx.split and merge under jit."""
    graph, state = nnx.split(stack(16, 4, 32, 2, num_kv_heads=2, rngs=nnx.Rngs(0)))
    call = jax.jit(lambda state, x, real: nnx.merge(graph, state)(x, real))
    x, real = inputs(3, 5, 16), jnp.arange(5)[None] < jnp.array([[5], [3], [1]])
    out = call(state, x, real)
    np.testing.assert_array_equal(out[0], call(state, x.at[1].set(jnp.nan), real)[0])
    # Padding is never attended to.
    np.testing.assert_array_equal(out[1, :3], call(state, x.at[1, 3:].set(7.0), real)[1, :3])


def test_the_decoder_sees_no_later_position_and_the_encoder_does():
    x = inputs(1, 5, 16)
    changed = x.at[0, 4].set(3.0)
    decoder, encoder = (
        functools.partial(nnx.jit(stack.__call__), stack(16, 4, 32, 1, rngs=nnx.Rngs(0)))
        for stack in (Decoder, Encoder)
    )
    np.testing.assert_array_equal(decoder(x)[0, :4], decoder(changed)[0, :4])
    assert (encoder(x)[0, :4] != encoder(changed)[0, :4]).any()
