"""V11: keys cut out of arrays, numbers from an outer program, and loops that hand a key on."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from dpfa_jax.core import KeyReuseError
from dpfa_jax.noise import check_no_reuse, guard, new_noise_key

fold_in, split = jax.random.fold_in, jax.random.split
KEYS = split(new_noise_key(), 4)
X, BATCH = jnp.ones(4), jnp.ones((3, 4))
NAMES = ("release_id", "layer", "batch_start")


def use(key, x, release_id=0, layer=0, start=0):
    """Stands for a release of four rows."""
    key = guard(key, x, uses=(release_id, layer), spans=((start, 4),), names=NAMES)
    return x + jax.random.key_data(key)[..., :1].astype(jnp.float32) * jnp.ones_like(x)


def mapped(keys, layers=None):
    """Answers of several keys, of one layer or one each."""
    layers = jnp.zeros(keys.shape, int) if layers is None else layers
    return jax.vmap(lambda key, layer: use(key, X, layer=layer))(keys, layers)


def iterated(body, carry, length=3):
    return lax.scan(lambda c, i: body(c, i), carry, jnp.arange(length))


def every(count):
    """A scan whose iteration gives `count` answers, each its own layer."""

    def body(key, i):
        return key, sum(use(key, X, layer=count * i + n) for n in range(count))

    return lambda keys: iterated(body, keys[0])


# Traced numbers of a program around, closed over by one inside.
CLOSED_OVER = {
    "checkpoint": lambda ks, n: jax.checkpoint(lambda k: use(k, X, layer=n))(ks[0]),
    "jit": lambda ks, n: jax.jit(lambda k: use(k, X, release_id=n))(ks[0]),
    "map": lambda ks, n: lax.map(lambda k: use(fold_in(k, n), X), ks),
    "cond": lambda ks, n: lax.cond(n > 2, lambda k: use(k, X, start=n), lambda k: X, ks[0]),
    "two numbers": lambda ks, n: jax.checkpoint(
        lambda k: use(k, X, layer=n) + use(k, X, layer=n + 1)
    )(ks[0]),
}
ACCEPTED = {
    "slices": lambda ks: (mapped(ks[:2]), mapped(ks[2:])),
    "a slice and the last": lambda ks: (mapped(ks[:-1]), use(ks[-1], X)),
    "layers of an array": lambda ks: [use(ks[0], X, layer=n) for n in jnp.arange(3)],
    "three an iteration": every(3),
    "five an iteration": every(5),
    "two scans, even and odd": lambda ks: [
        iterated(lambda k, i, odd=odd: (k, use(k, X, layer=2 * i + odd)), ks[0]) for odd in (0, 1)
    ],
}
# Seen where a function is traced, and by the reader.
REFUSED = {
    "the same slice of a stack": lambda ks: [
        mapped(jnp.stack([fold_in(ks[0], i) for i in range(4)])[1:]) for _ in range(2)
    ],
    "layers out of line": lambda ks: [
        mapped(jnp.broadcast_to(ks[0], (3,)), jnp.arange(3) + n) for n in (0, 1)
    ],
    "keys out of line": lambda ks: (
        mapped(ks[:2], jnp.arange(2)), mapped(ks[1:3], jnp.arange(2) + 1)
    ),
    "the largest of two parts": lambda ks: [
        use(ks[0], X, layer=jax.random.key_data(ks)[:, 0][:end].max() + 3 - end) for end in (2, 3)
    ],
}  # fmt: skip
# Seen by the reader alone.
REFUSED_IN_LOOPS = {
    "changed under a condition": lambda ks: iterated(
        lambda k, i: (jnp.where(i > 1, fold_in(k, 1), k), use(k, X)), ks[0]
    ),
    "changed in a branch": lambda ks: iterated(
        lambda k, i: (lax.cond(i > 1, lambda k: split(k)[0], lambda k: k, k), use(k, X)), ks[0]
    ),
    "a layer that wraps around": lambda ks: lax.scan(
        lambda k, n: (k, use(k, X, layer=3 * n + 1) + use(k, X, layer=3 * n)),
        ks[0],
        jnp.array([0, 1431655765], jnp.uint32),  # thrice that and 1 is 0
    ),
    "in the condition": lambda ks: lax.while_loop(
        lambda c: use(c[0], X).sum() < c[1], lambda c: (c[0], c[1] + 1), (ks[0], 0)
    ),
    "two loops over one array": lambda ks: jax.jit(
        lambda k: lax.map(
            lambda i: lax.map(
                lambda j: (
                    use(fold_in(fold_in(k, i), j), X, layer=i)
                    + use(fold_in(fold_in(k, i), j), X, layer=j + 1)
                ),
                jnp.arange(3),
            ),
            jnp.arange(3),
        )
    )(ks[0]),
    "by rows": lambda ks: jax.vmap(
        jax.custom_batching.sequential_vmap(lambda k, x: use(k, x)), (None, 0)
    )(ks[0], BATCH),
}


@pytest.mark.parametrize("name", CLOSED_OVER)
def test_numbers_of_a_program_around_may_be_closed_over(name):
    jax.make_jaxpr(CLOSED_OVER[name])(KEYS, 1)
    check_no_reuse(CLOSED_OVER[name])(KEYS, 1)


@pytest.mark.parametrize("name", ACCEPTED)
def test_different_keys_and_layers_are_accepted(name):
    jax.make_jaxpr(ACCEPTED[name])(KEYS)
    check_no_reuse(ACCEPTED[name])(KEYS)


@pytest.mark.parametrize("name", REFUSED)
def test_one_key_of_two_arrays_is_refused(name):
    for read in (jax.make_jaxpr, check_no_reuse):
        with pytest.raises(KeyReuseError):
            read(REFUSED[name])(KEYS)


@pytest.mark.parametrize("name", REFUSED_IN_LOOPS)
def test_the_reader_refuses_one_key_of_a_loop(name):
    with pytest.raises(KeyReuseError):
        check_no_reuse(REFUSED_IN_LOOPS[name])(KEYS)
