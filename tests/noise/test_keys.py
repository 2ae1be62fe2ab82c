import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.core import INSECURE_TEST, THREEFRY, ArgumentError, KeyReuseError
from dpfa_jax.noise import (
    generator_of,
    insecure_test_key,
    key_words,
    new_noise_key,
    parameter_noise,
    require_key,
)


def test_fresh_keys_hold_64_bits():
    """No two of 4096 keys agree, and every one of the 64 bits takes both values evenly."""
    words = np.asarray(key_words(new_noise_key((4096,))))
    assert len(np.unique(words, axis=0)) == 4096
    ones = np.unpackbits(words.view(np.uint8), axis=None).reshape(4096, 64).mean(0)
    assert np.abs(ones - 0.5).max() < 6 * 0.5 / 64


def test_jax_functions_keep_the_kind_of_key():
    """split and fold_in give the words of jax's threefry keys in the library's own type."""
    key = insecure_test_key(7)
    plain = jax.random.wrap_key_data(key_words(key), impl="threefry2x32")
    for derive in (lambda k: jax.random.split(k, 3), lambda k: jax.random.fold_in(k, 5)):
        assert derive(key).dtype == key.dtype
        assert (jax.random.key_data(derive(key)) == jax.random.key_data(derive(plain))).all()
    assert generator_of(jax.random.split(new_noise_key())) is THREEFRY
    assert generator_of(key) is INSECURE_TEST
    assert (key_words(insecure_test_key(2**40 + 3)) == jnp.asarray([256, 3], jnp.uint32)).all()


@pytest.mark.parametrize(
    "wrong",
    [None, 0, np.uint32([1, 2]), jnp.zeros(2, jnp.uint32), "key", jax.random.key(0)],
    ids=["none", "seed", "numpy words", "raw words", "text", "jax key"],
)
def test_what_is_no_noise_key_is_refused(wrong):
    """V23: named parameter, no contents; inside jit too."""
    for check in (
        lambda k: require_key("noise_key", k, THREEFRY.name),
        generator_of,
        key_words,
        lambda k: parameter_noise(k, 0, (2,)),
    ):
        with pytest.raises(ArgumentError, match="noise_key") as caught:
            check(wrong)
        assert "[1 2]" not in str(caught.value)
    if isinstance(wrong, jax.Array):
        with pytest.raises(ArgumentError, match="noise_key"):
            jax.jit(key_words)(wrong)


def test_generator_must_be_the_one_of_the_release():
    """V23: a test key is refused where the release promises secret noise, and the reverse."""
    require_key("noise_key", new_noise_key(), THREEFRY.name)
    require_key("noise_key", insecure_test_key(0), INSECURE_TEST.name)
    for key, name in ((insecure_test_key(0), THREEFRY.name), (new_noise_key(), INSECURE_TEST.name)):
        with pytest.raises(ArgumentError) as caught:
            require_key("noise_key", key, name)
        assert all(str(word) not in str(caught.value).split() for word in key_words(key).tolist())


def test_a_noise_key_has_no_seed():
    """V11: no small integer becomes a noise key; none is made inside a compiled program."""
    impl = jax.random.key_impl(new_noise_key())
    with pytest.raises(ArgumentError, match="seed"):
        jax.random.key(0, impl=impl)
    with pytest.raises(KeyReuseError):
        jax.jit(lambda x: x + key_words(new_noise_key())[0])(jnp.uint32(1))
    for seed in (-1, 2**63, 1.0, True):
        with pytest.raises(ArgumentError, match="seed"):
            insecure_test_key(seed)
