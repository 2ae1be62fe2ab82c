"""V11: one key under several names, or at several places of an array, in one traced program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dpfa_jax.core import KeyReuseError
from dpfa_jax.noise import check_no_reuse, guard, insecure_test_key, new_noise_key

X, BATCH = jnp.ones(4), jnp.ones((3, 4))
NAMES = ("release_id", "layer", "batch_start")


def use(key, x, release_id=0, layer=0, start=0, size=4):
    """Stands for a release: an answer that depends on the guarded key."""
    key = guard(key, x, uses=(release_id, layer), spans=((start, size),), names=NAMES)
    return x + jax.random.key_data(key)[..., :1].astype(jnp.float32) * jnp.ones_like(x)


def _wrap_again(key):
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=jax.random.key_impl(key))


# What makes an array of three keys of one: each place would draw the same.
REPEATED = {
    "broadcast": lambda k: jnp.broadcast_to(k, (3,)),
    "stack": lambda k: jnp.stack([k] * 3),
    "concatenate": lambda k: jnp.concatenate([k[None]] * 3),
    "stack of aliases": lambda k: jnp.stack([k, jax.random.clone(k), jax.random.split(k)[0]]),
    "two of three": lambda k: jnp.stack([*jax.random.split(k), jax.random.fold_in(k, 1)]),
    "repeat": lambda k: jnp.repeat(k, 3),
    "repeat each": lambda k: jnp.repeat(jax.random.split(k), 2)[:3],
    "tile": lambda k: jnp.tile(k, 3),
    "full": lambda k: jnp.full((3,), k),
    "picked": lambda k: jax.random.split(k)[jnp.zeros(3, int)],
    "broadcast words": lambda k: jax.random.wrap_key_data(
        jnp.broadcast_to(jax.random.key_data(k), (3, 2)), impl=jax.random.key_impl(k)
    ),
    "folded alike": lambda k: jax.vmap(lambda k: jax.random.fold_in(k, 1))(
        jnp.broadcast_to(k, (3,))
    ),
}
DISTINCT = {
    "split": lambda k: jax.random.split(k, 3),
    "stack": lambda k: jnp.stack([*jax.random.split(k, 3)]),
    "concatenate": lambda k: jnp.concatenate([jax.random.split(k), jax.random.fold_in(k, 2)[None]]),
    "folded": lambda k: jax.vmap(jax.random.fold_in)(jnp.broadcast_to(k, (3,)), jnp.arange(3)),
    "folded, summed": lambda k: jax.vmap(jax.random.fold_in, (None, 0))(
        k, jnp.cumsum(jnp.ones(3, int))
    ),
    "reshaped": lambda k: jax.random.split(k, (3, 1)).reshape(1, 3)[0],
    "picked": lambda k: jax.random.split(k, 5)[jnp.arange(3)],
}
# Two uses of one key under two names.
TWICE = {
    "clone": lambda k: (k, jax.random.clone(k)),
    "reshape": lambda k: (k, k.reshape(1)[0]),
    "squeeze": lambda k: (k, jnp.squeeze(k[None, None])),
    "words": lambda k: (k, _wrap_again(k)),
    "fold_in": lambda k: (jax.random.fold_in(k, 1), jax.random.fold_in(k, 1)),
    "split": lambda k: (jax.random.split(k)[0], jax.random.split(k, 3)[0]),
    "split, unpacked": lambda k: (next(iter(jax.random.split(k))), jax.random.split(k)[0]),
    "split and fold_in": lambda k: (jax.random.split(k)[1], jax.random.fold_in(k, 1)),
    "stacked": lambda k: (k, jnp.stack([jax.random.split(k)[0], k])[1]),
    "traced": lambda k: tuple(jax.random.fold_in(k, jax.random.key_data(k)[0]) for _ in range(2)),
    "slices": lambda k: (jax.random.split(k, 4)[1:3][1], jax.random.fold_in(k, 2)),
    "computed": lambda k: (jax.random.fold_in(k, jnp.uint32(3) * 2), jax.random.fold_in(k, 6)),
    "by an inner function": lambda k: (k, jax.jit(jax.random.clone)(k)),
}
PAIRS = {  # arguments a, b of a program, which may be equal
    "layers": (("layer",), lambda a, b: ({"layer": a}, {"layer": b})),
    "a literal": (("release_id",), lambda a, b: ({}, {"release_id": a})),
    "starts": (("batch_start",), lambda a, b: ({"start": a}, {"start": b})),
    "starts, too near": (None, lambda a, b: ({"start": a}, {"start": a + 3})),
    "two numbers": (
        ("release_id", "layer"),
        lambda a, b: ({"layer": a, "release_id": b}, {"layer": b, "release_id": a}),
    ),
    "of 8 bits": (
        ("layer",),
        lambda a, b: tuple({"layer": a.astype(jnp.int8) + jnp.int8(n)} for n in (100, -100)),
    ),
}
APART = {
    "next layer": lambda a, b: ({"layer": a}, {"layer": a + 1}),
    "two layers a block": lambda a, b: ({"layer": 2 * a}, {"layer": 2 * a + 1}),
    "signed": lambda a, b: ({"layer": a.astype(jnp.int32)}, {"layer": a - 1}),
    "a literal differs": lambda a, b: ({"release_id": 1, "layer": a}, {"layer": b}),
    "next rows": lambda a, b: ({"start": a}, {"start": a + 4}),
}


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("traced", [use, jax.jit(use)], ids=["plain", "jit"])
def test_a_repeated_key_is_refused(name, traced):
    """V11: under vmap when it is traced; in scans and inner functions by the reader."""

    def mapped(key, x):
        return jax.vmap(traced)(REPEATED[name](key), x)

    def scanned(key, x):
        return jax.lax.scan(lambda c, a: (c, traced(*a)), 0, (REPEATED[name](key), x))[1]

    if traced is use:
        with pytest.raises(KeyReuseError, match=r"charge\(ledger, release, count=size\)"):
            jax.jit(mapped)(new_noise_key(), BATCH)
        jax.eval_shape(mapped, insecure_test_key(0), BATCH)
    with pytest.raises(KeyReuseError, match="every element would get the same noise"):
        check_no_reuse(mapped)(insecure_test_key(0), BATCH)
    if "two" not in name and "each" not in name:
        with pytest.raises(KeyReuseError, match="iterations of a loop"):
            check_no_reuse(scanned)(insecure_test_key(0), BATCH)


@pytest.mark.parametrize("name", DISTINCT)
def test_different_keys_pass(name):
    """V11: no false alarm."""

    def mapped(key, x):
        return jax.vmap(use)(DISTINCT[name](key), x)

    def scanned(key, x):
        return jax.lax.scan(lambda c, a: (c, use(*a)), 0, (DISTINCT[name](key), x))[1]

    found = jax.jit(mapped)(new_noise_key(), BATCH)
    assert len(set(found[:, 0].tolist())) == 3
    for program in (mapped, scanned):
        check_no_reuse(program)(insecure_test_key(0), BATCH)


def test_one_key_for_several_layers_of_a_vmap():
    """V11: numbers that are mapped along tell the places apart."""

    def program(key, layers):
        call = jax.vmap(lambda k, layer: use(k, X, layer=layer))
        return call(jnp.broadcast_to(key, (3,)), layers)

    for layers, is_refused in ((jnp.arange, False), (jnp.zeros, True)):

        def made(key, layers=layers):
            return program(key, layers(3).astype(int))

        for check in (jax.jit(made), check_no_reuse(made)):
            if is_refused:
                with pytest.raises(KeyReuseError, match="every element"):
                    check(new_noise_key())
            else:
                check(new_noise_key())


@pytest.mark.parametrize("name", TWICE)
def test_one_key_under_two_names_is_refused(name):
    def program(key, x):
        first, second = TWICE[name](key)
        return use(first, x) - use(second, 2 * x)

    for check in (jax.jit(program), check_no_reuse(program)):
        with pytest.raises(KeyReuseError, match="two answers of one program"):
            check(new_noise_key(), X)


@pytest.mark.parametrize("name", PAIRS)
def test_numbers_that_may_be_equal_are_refused(name):
    """V11: the numbers are named."""
    numbers, kinds = PAIRS[name]

    def program(key, a, b):
        first, second = kinds(a, b)
        return use(key, X, **first) - use(key, 2 * X, **second)

    text = f"only {' or '.join(numbers)} could" if numbers else "two answers"
    for check in (jax.jit(program), check_no_reuse(program)):
        with pytest.raises(KeyReuseError, match=text):
            check(new_noise_key(), jnp.uint32(1), jnp.uint32(2))


@pytest.mark.parametrize("name", APART)
def test_numbers_that_surely_differ_pass(name):
    def program(key, a, b):
        first, second = APART[name](a, b)
        return use(key, X, **first) - use(key, 2 * X, **second)

    for check in (jax.jit(program), check_no_reuse(program)):
        check(new_noise_key(), jnp.uint32(1), jnp.uint32(1))


def _layers(*of):
    """A scan over layers under one key: uses of layer of(i) for each function."""

    def program(key):
        def body(c, i):
            k, x = c
            for layer in of:
                x = use(k, x, layer=layer(i))
            return (k, x), None

        return jax.lax.scan(body, (key, X), jnp.arange(3))[0][1]

    return program


IN_A_LOOP = {
    "layer is the index": (_layers(lambda i: i), True),
    "two layers a block": (_layers(lambda i: 2 * i, lambda i: 2 * i + 1), True),
    "far layers": (_layers(lambda i: i, lambda i: i + 3), True),
    "the next layer, which comes again": (_layers(lambda i: i, lambda i: i + 1), False),
    "half the index": (_layers(lambda i: i // 2), False),
    "the same parity": (_layers(lambda i: i % 2), False),
    "nothing of the index": (_layers(lambda i: i * 0 + 1), False),
    "index, then a literal": (lambda k: use(k, _layers(lambda i: i)(k), layer=3), True),
    "index, then a literal of it": (lambda k: use(k, _layers(lambda i: i)(k), layer=2), False),
    "two loops": (lambda k: _layers(lambda i: i)(k) + _layers(lambda i: i)(k), False),
    "two loops, other layers": (
        lambda k: _layers(lambda i: i)(k) + _layers(lambda i: i + 3)(k),
        True,
    ),
    "keys folded by half the index": (
        lambda k: jax.lax.map(lambda i: use(jax.random.fold_in(k, i // 2), X), jnp.arange(4)),
        False,
    ),
    "two loops over one array": (
        lambda k: [jax.lax.map(lambda k: use(k, X), jax.random.split(k, 3)) for _ in range(2)],
        False,
    ),
    "a loop and one of its keys": (
        lambda k: [
            jax.lax.map(lambda k: use(k, X), jax.random.split(k, 3)),
            use(jax.random.split(k, 3)[1], X),
        ],
        False,
    ),
    "a loop and another key": (
        lambda k: [
            jax.lax.map(lambda k: use(k, X), jax.random.split(k, 3)),
            use(jax.random.split(k, 4)[3], X),
        ],
        True,
    ),
    "an effect beside it": (lambda k: (jax.debug.print("{}", X), use(k, X))[1], True),
    "either of two keys": (
        lambda k: jax.lax.map(
            lambda a: use(jax.lax.cond(a[0] > 1, lambda a, b: a, lambda a, b: b, *a[1]), X),
            (jnp.arange(3), [jnp.broadcast_to(k, (3,)) for k in jax.random.split(k)]),
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", IN_A_LOOP)
def test_uses_in_loops(name):
    """V11: a loop's own index tells its iterations apart; what collapses it does not."""
    program, is_fine = IN_A_LOOP[name]
    if is_fine:
        check_no_reuse(program)(insecure_test_key(0))
    else:
        with pytest.raises(KeyReuseError, match=r"iterations of a loop|two answers"):
            check_no_reuse(program)(insecure_test_key(0))


def test_equal_keys_among_the_arguments_are_found():
    keys = new_noise_key((2,))
    check_no_reuse(jax.vmap(use))(keys, BATCH[:2])
    check_no_reuse(lambda a, b: use(a, use(b, X)))(keys[0], keys[1])
    with pytest.raises(KeyReuseError):
        check_no_reuse(jax.vmap(use))(keys[jnp.array([1, 1])], BATCH[:2])
    with pytest.raises(KeyReuseError):
        check_no_reuse(lambda a, b: use(a, use(b, X)))(keys[0], keys[0])


def _on_shards(answer, key_spec):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(answer, mesh=mesh, in_specs=(key_spec, P("d")), out_specs=P("d"))


SHARDS = {
    "stacked": (lambda k: jnp.stack([k] * 2), P("d"), lambda k: k[0], False),
    "marked as varying": (lambda k: k, P(), lambda k: jax.lax.pcast(k, "d", to="varying"), False),
    "split": (lambda k: jax.random.split(k), P("d"), lambda k: k[0], True),
    "folded": (lambda k: k, P(), lambda k: jax.random.fold_in(k, jax.lax.axis_index("d")), True),
    "folded by half": (
        lambda k: k,
        P(),
        lambda k: jax.random.fold_in(k, jax.lax.axis_index("d") // 2),
        False,
    ),
}


@pytest.mark.parametrize("name", SHARDS)
def test_one_key_on_all_shards_is_found(name):
    """V11: whatever the key's type says. (The number of devices does not matter.)"""
    make, spec, own, is_fine = SHARDS[name]

    def program(key):
        return _on_shards(lambda key, x: use(own(key), x), spec)(make(key), BATCH)

    if is_fine:
        check_no_reuse(program)(insecure_test_key(0))
    else:
        with pytest.raises(KeyReuseError, match="all shards of mesh axes"):
            check_no_reuse(program)(insecure_test_key(0))


def test_a_key_guarded_again_for_the_same_answer():
    """A training step guards its key, then its compiled part does: one answer."""
    inner = jax.jit(lambda key, x: use(key, x))

    def program(key, answers):
        key = guard(key, X, uses=(0, 0), spans=((0, 4),), is_answer=False)
        return [inner(key, X) for _ in range(answers)]

    check_no_reuse(lambda key: program(key, 1))(insecure_test_key(0))
    with pytest.raises(KeyReuseError, match="two answers"):
        check_no_reuse(lambda key: program(key, 2))(insecure_test_key(0))
