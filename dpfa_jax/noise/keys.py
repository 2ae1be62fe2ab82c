"""Noise keys: 64 bits of OS entropy in a key type of their own.

A JAX key made by `jax.random.key(int)` has another type, so it cannot be passed by accident, under
jit neither. Messages never show a key's words.
"""

import functools
import math
import os
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl, threefry_prng_impl
from jaxtyping import Array, Key, UInt32

from dpfa_jax.core import (
    GENERATORS,
    INSECURE_TEST,
    THREEFRY,
    ArgumentError,
    Generator,
    KeyReuseError,
    checks,
)


def _refuse_seed(seed: Array) -> Array:
    raise ArgumentError(
        "seed", "<hidden>", "a noise key has no seed", "Call new_noise_key(), which asks the OS."
    )


def _key_type(name: str, tag: str) -> Hashable:
    return define_prng_impl(
        key_shape=threefry_prng_impl.key_shape,
        seed=_refuse_seed,
        split=threefry_prng_impl.split,
        random_bits=threefry_prng_impl.random_bits,
        fold_in=threefry_prng_impl.fold_in,
        name=name,
        tag=tag,
    )


_NOISE = _key_type("dpfa_noise", "dpfa")
_TEST = _key_type("dpfa_insecure_test", "dpfa_test")
_GENERATORS = {_NOISE: THREEFRY, _TEST: INSECURE_TEST}


def new_noise_key(shape: tuple[int, ...] = ()) -> Key[Array, "..."]:
    """Fresh noise keys from the operating system's entropy, 64 bits each.

    Words are those of jax's threefry2x32: statistically strong, without a known break, but never
    offered as a cipher. `jax.random.split` and `fold_in` work on the keys.

    Errors: KeyReuseError under jit and its like: the compiled program would hold one key forever.
    """
    words = np.frombuffer(os.urandom(8 * math.prod(shape)), np.uint32).reshape(*shape, 2)
    noise_key = jax.random.wrap_key_data(jnp.asarray(words), impl=_NOISE)
    if isinstance(noise_key, jax.core.Tracer):
        raise KeyReuseError(
            "new_noise_key() inside a traced function: the compiled program would use this one key "
            "in every call. Make the key outside and pass it as an argument."
        )
    return noise_key


def insecure_test_key(seed: int, shape: tuple[int, ...] = ()) -> Key[Array, "..."]:
    """Reproducible keys for tests. They protect nobody, and every record made with them says so.

    Errors: ArgumentError for a seed outside 0 .. 2^63 - 1.
    """
    seed = checks.count("seed", seed, minimum=0, maximum=2**63 - 1)
    words = np.asarray([seed >> 32, seed & 0xFFFFFFFF], np.uint32)
    noise_key = jax.random.wrap_key_data(jnp.asarray(words), impl=_TEST)
    return jax.random.split(noise_key, shape) if shape else noise_key


def generator_of(noise_key: Key[Array, "..."]) -> Generator:
    """The generator that this key drives, by its short form: secret, or of a test seed.

    Errors: ArgumentError if it is no noise key.
    """
    return _generator("noise_key", noise_key)


def require_key(parameter: str, noise_key: object, generator_name: str) -> None:
    """Refuses all but a noise key of the kind, secret or test, that the release names.

    Errors: ArgumentError for None, an int, raw words, a `jax.random.key`, a test key where the
    release promises secret noise, and the reverse.
    """
    generator = _generator(parameter, noise_key)
    if generator.is_secret == GENERATORS[generator_name].is_secret:
        return
    if generator.is_secret:
        problem = f"a secret key, but the release names {generator_name}"
        advice = "Pass insecure_test_key(seed), or make the release without insecure_test_noise."
    else:
        problem = f"a test key, which protects nobody, but the release names {generator_name}"
        advice = "Pass the key that charge() or new_noise_key() returns."
    raise ArgumentError(parameter, _Shown(noise_key), problem, advice)


def key_words(noise_key: Key[Array, "..."]) -> UInt32[Array, "... 2"]:
    """The words of noise keys, for counters and kernels. Errors: ArgumentError if it is none."""
    _generator("noise_key", noise_key)
    return jax.random.key_data(noise_key)


def is_key_array(value: object) -> bool:
    """Whether `value` is an array of typed JAX keys of any kind."""
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def is_threefry(dtype: object) -> bool:
    """Whether typed keys of `dtype` draw with threefry2x32: noise keys, and plain ones of JAX's.

    Of these each draws under vmap what it draws alone. JAX draws for a whole batch of "rbg" keys
    from the first of them.
    """
    return dtype in _threefry_types()


@functools.cache
def _threefry_types() -> frozenset[object]:
    words = jax.ShapeDtypeStruct(threefry_prng_impl.key_shape, np.uint32)
    return frozenset(
        jax.eval_shape(functools.partial(jax.random.wrap_key_data, impl=impl), words).dtype
        for impl in ("threefry2x32", *_GENERATORS)
    )


def _generator(parameter: str, noise_key: object) -> Generator:
    if isinstance(noise_key, jax.Array) and is_key_array(noise_key):
        generator = _GENERATORS.get(jax.random.key_impl(noise_key))
        if generator is not None:
            return generator
        problem = "a JAX key of another kind; jax.random.key(int) keeps 32 bits of a guessable seed"
    elif noise_key is None:
        problem = "no key"
    elif isinstance(noise_key, int):
        problem = "a seed where a noise key is due"
    else:
        problem = "not a noise key"
    raise ArgumentError(
        parameter,
        _Shown(noise_key),
        problem,
        "Pass the key that charge() or new_noise_key() returns (in tests insecure_test_key).",
    )


class _Shown:
    """Stands for a rejected value in a message: its type, never its contents."""

    def __init__(self, value: object):
        dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
        name = type(value).__name__ if dtype is None else f"{dtype}{list(shape or ())}"
        self._text = "None" if value is None else f"<{name}>"

    def __repr__(self) -> str:
        return self._text
