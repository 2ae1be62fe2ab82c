import jax
import jax.numpy as jnp
import pytest

from dpfa_jax.core import KeyReuseError
from dpfa_jax.noise import check_no_reuse, guard, insecure_test_key

X, KEY = jnp.ones(4), insecure_test_key(5)


def use(key, x, **uses):
    word = jax.random.key_data(guard(key, x, **uses))[..., :1].astype(jnp.float32)
    return x + word * jnp.ones_like(x)


def _scan(body, *init, xs=None, length=3):
    return jax.lax.scan(body, init, xs, length=None if xs is not None else length)[0]


_jitted = jax.jit(use)
REPEATED = {
    "constant carry": lambda k, x: _scan(lambda c, _: ((c[0], use(*c)), None), k, x),
    "swapped carries": lambda k, x: _scan(
        lambda c, _: ((c[1], c[0], use(c[0], c[2])), None), k, jax.random.fold_in(k, 9), x
    ),
    "constant folded in": lambda k, x: _scan(
        lambda c, _: ((use(jax.random.fold_in(k, 3), c[0]),), None), x
    ),
    "while, constant carry": lambda k, x: jax.lax.fori_loop(
        0, 3, lambda i, c: (c[0], use(*c)), (k, x)
    ),
    "inner scan over children of a constant": lambda k, x: _scan(
        lambda c, _: (
            (_scan(lambda c, k: ((use(k, c[0]),), None), c[0], xs=jax.random.split(k))[0],),
            None,
        ),
        x,
    ),
    "twice": lambda k, x: use(k, use(k, x)),
    "the same child twice": lambda k, x: use(
        jax.random.fold_in(k, 1), use(jax.random.fold_in(k, 1), x)
    ),
    "one compiled function twice": lambda k, x: _jitted(k, _jitted(k, x)),
    "twice below a gradient": lambda k, x: jax.grad(lambda x: use(k, use(k, x)).sum())(x),
    "a constant of the program": lambda k, x: use(jax.random.fold_in(KEY, 1), x),
}
SINGLE = {
    "two layers": lambda k, x: use(k, use(k, x, uses=(0, 1)), uses=(0, 2)),
    "scan over keys": lambda k, x: _scan(
        lambda c, k: ((use(k, c[0]),), None), x, xs=jax.random.split(k, 3)
    ),
    "loop index folded in": lambda k, x: _scan(
        lambda c, i: ((use(jax.random.fold_in(k, i), c[0]),), None), x, xs=jnp.arange(3)
    ),
    "key carried on": lambda k, x: _scan(
        lambda c, _: ((jax.random.split(c[0])[0], use(jax.random.split(c[0])[1], c[1])), None),
        k,
        x,
    ),
    "layer is the loop index": lambda k, x: _scan(
        lambda c, i: ((c[0], use(*c, uses=(0, i))), None), k, x, xs=jnp.arange(3)
    ),
    "two branches": lambda k, x: jax.lax.cond(x[0] > 0, use, lambda k, x: use(k, 2 * x), k, x),
    "recomputed below a gradient": lambda k, x: jax.grad(
        lambda x, k: (jax.checkpoint(lambda k, x: jnp.sin(use(k, x)))(k, x) ** 2).sum()
    )(x, k),
}


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_keys_are_found(name):
    """V11: reuse that only the whole program shows."""
    with pytest.raises(KeyReuseError):
        check_no_reuse(REPEATED[name])(KEY, X)


@pytest.mark.parametrize("name", SINGLE)
def test_single_uses_pass(name):
    """V11: no false alarm."""
    check_no_reuse(SINGLE[name])(KEY, X)
