import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from dpfa_jax.core import KeyReuseError
from dpfa_jax.noise import guard, insecure_test_key, new_noise_key
from dpfa_jax.noise.hazards import require_offsets_under_manual_mesh

pytestmark = pytest.mark.quickly_compiled

X, BATCH = jnp.ones(4), jnp.ones((3, 4))


def use(key, x, **uses):
    """Stands for a release: an answer that depends on the guarded key."""
    word = jax.random.key_data(guard(key, x, **uses))[..., :1].astype(jnp.float32)
    return x + word * jnp.ones_like(x)


def _loss(x, key):
    return (use(key, x) ** 2).sum()


@jax.custom_vjp
def _custom(key, x):
    return use(key, x)


_custom.defvjp(lambda key, x: (use(key, x), None), lambda _, cotangent: (None, cotangent))

ALLOWED = {
    "nested jit": lambda k: jax.jit(lambda k, x: jax.jit(use)(k, x))(k, X),
    "checkpoint": lambda k: jax.grad(lambda x, k: jax.checkpoint(use)(k, x).sum())(X, k),
    "eager grad, key closed over": lambda k: jax.grad(lambda x: _loss(x, k))(X),
    "jit grad": lambda k: jax.jit(lambda k, x: jax.value_and_grad(_loss)(x, k))(k, X),
    "linearize": lambda k: jax.linearize(lambda x: use(k, x), X)[1](X),
    "hessian": lambda k: jax.hessian(_loss)(X, k),
    "custom_vjp": lambda k: jax.jit(jax.grad(lambda x, k: _custom(k, x).sum()))(X, k),
    "vmap over keys": lambda k: jax.vmap(jax.jit(use))(jax.random.split(k, 3), BATCH),
    "vmap of grad over keys": lambda k: jax.vmap(jax.grad(_loss))(BATCH, jax.random.split(k, 3)),
    "nested vmap": lambda k: jax.vmap(jax.vmap(use))(
        jax.random.split(k, (2, 3)), jnp.ones((2, 3, 4))
    ),
    "vmap, other axis": lambda k: jax.vmap(use, (0, 1))(jax.random.split(k, 3), BATCH.T),
    "scan over keys": lambda k: jax.lax.scan(
        lambda c, k: (use(k, c), None), X, jax.random.split(k, 3)
    ),
    "scan, folded in": lambda k: jax.lax.scan(
        lambda c, i: (use(jax.random.fold_in(k, i), c), None), X, jnp.arange(3)
    ),
    "cond operand": lambda k: jax.lax.cond(X[0] > 0, use, lambda k, x: x, k, X),
}

REFUSED = {
    "vmap, key not mapped": lambda k: jax.vmap(use, (None, 0))(k, BATCH),
    "vmap, key closed over": lambda k: jax.vmap(lambda x: use(k, x))(BATCH),
    "vmap of jit": lambda k: jax.vmap(jax.jit(use), (None, 0))(k, BATCH),
    "jit of vmap": lambda k: jax.jit(jax.vmap(use, (None, 0)))(k, BATCH),
    "vmap of checkpoint": lambda k: jax.vmap(jax.checkpoint(use), (None, 0))(k, BATCH),
    "vmap of custom_vjp": lambda k: jax.vmap(_custom, (None, 0))(k, BATCH),
    "vmap of grad": lambda k: jax.vmap(jax.grad(_loss), (0, None))(BATCH, k),
    "inner vmap": lambda k: jax.vmap(jax.vmap(use, (None, 0)))(
        jax.random.split(k, 2), jnp.ones((2, 3, 4))
    ),
    "jit, key closed over": lambda k: jax.jit(lambda x: use(k, x))(X),
    "scan, key closed over": lambda k: jax.lax.scan(
        lambda c, _: (use(k, c), None), X, None, length=3
    ),
    "scan in jit, key closed over": lambda k: jax.jit(
        lambda k, x: jax.lax.scan(lambda c, _: (use(k, c), None), x, None, length=3)
    )(k, X),
    "scan of grad, key closed over": lambda k: jax.jit(
        lambda k, x: jax.lax.scan(lambda c, _: (jax.grad(_loss)(c, k), None), x, None, length=3)
    )(k, X),
    "while": lambda k: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: use(k, c), X),
    "fori_loop": lambda k: jax.lax.fori_loop(0, 3, lambda i, c: use(k, c), X),
    "map": lambda k: jax.lax.map(lambda c: use(k, c), BATCH),
    "checkpoint, key closed over": lambda k: jax.checkpoint(lambda c: use(k, c))(X),
    "cond, key closed over": lambda k: jax.lax.cond(X[0] > 0, lambda c: use(k, c), lambda c: c, X),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_one_use_is_allowed(name):
    """V11: what draws once a release passes, under every transformation."""
    jax.block_until_ready(ALLOWED[name](new_noise_key()))


@pytest.mark.parametrize("name", REFUSED)
def test_planted_reuse_is_refused(name):
    """V11: reuse planted by vmap, scan and closure."""
    with pytest.raises(KeyReuseError, match="noise_key"):
        REFUSED[name](new_noise_key())


MADE_INSIDE = {
    "jit, indexed": lambda ks: jax.jit(lambda x: use(ks[1], x))(X),
    "scan, indexed": lambda ks: jax.lax.scan(lambda c, _: (use(ks[0], c), None), X, None, length=3),
    "scan, folded with a constant": lambda ks: jax.lax.map(
        lambda x: use(jax.random.fold_in(ks[2], 0), x), BATCH
    ),
    "scan of vmap": lambda ks: jax.lax.scan(
        lambda c, _: (jax.vmap(use)(jax.random.split(ks[0], 3), c), None), BATCH, None, length=2
    ),
}


@pytest.mark.parametrize("name", MADE_INSIDE)
def test_a_key_made_inside_from_what_is_closed_over_is_refused(name):
    """V11: every run of the function would draw the same noise."""
    with pytest.raises(KeyReuseError, match="made inside a traced function"):
        MADE_INSIDE[name](jax.random.split(new_noise_key(), 4))


def test_a_key_made_inside_from_an_argument_is_allowed():
    keys = jax.random.split(new_noise_key(), 4)
    found = jax.lax.map(lambda number: use(keys[number], X), jnp.arange(3))
    assert len(set(found[:, 0].tolist())) == 3


def test_second_eager_use_is_refused():
    """V11: the same key on two calls; (release_id, layer) tells uses apart; not for test keys."""
    key = new_noise_key()
    use(key, X, uses=(0, 0))
    use(key, X, uses=(0, 1))
    with pytest.raises(KeyReuseError) as caught:
        use(key, X, uses=(0, 1))
    assert all(str(word) not in str(caught.value) for word in jax.random.key_data(key).tolist())
    keys = new_noise_key((3,))
    jax.vmap(use)(keys, BATCH)
    with pytest.raises(KeyReuseError):
        use(keys[1], X)
    with pytest.raises(KeyReuseError):
        jax.vmap(use)(jnp.stack([key] * 3), BATCH)
    use(insecure_test_key(0), X)
    use(insecure_test_key(0), X)


@pytest.mark.parametrize(
    ("second", "is_same"),
    [
        ({"uses": (1, 0)}, True),
        ({"uses": (1, 1)}, False),
        ({"uses": (1, 0), "spans": ((2, 2),)}, True),
        ({"uses": (1, 0), "spans": ((4, 2),)}, False),
        ({"uses": (1, "layer")}, True),
        ({"uses": (1, "layer + 1")}, False),
    ],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_second_use_in_one_program_is_refused(second, is_same, mapped):
    """V11: two answers of one traced program, of one key; layers and parts tell uses apart."""

    def program(key, layer):
        known = {"layer": layer, "layer + 1": layer + 1}

        def once(key, shift=0.0, **use_of):
            uses = tuple(known.get(use, use) for use in use_of.pop("uses"))
            return use(key, X + shift, uses=uses, **use_of)

        first = {"uses": second["uses"] if "layer" in second["uses"] else (1, 0)}
        if "spans" in second:
            first["spans"] = ((0, 3),)
        if "layer + 1" in second["uses"]:
            first["uses"] = (1, "layer")
        if mapped:
            answers = [jax.vmap(lambda k, u=u: once(k, **u))(key) for u in (first, second)]
        else:
            answers = [once(key, **first), once(key, 1.0, **second)]
        return answers

    key = jax.random.split(new_noise_key(), 3) if mapped else new_noise_key()
    run = jax.jit(program)
    if is_same:
        with pytest.raises(KeyReuseError, match="two answers of one program"):
            run(key, jnp.uint32(0))
    else:
        run(key, jnp.uint32(0))
        run(key, jnp.uint32(0))  # not traced anew: nothing to see
    test_key = insecure_test_key(0, (3,) if mapped else ())
    run(test_key, jnp.uint32(0))


def test_parts_of_one_answer_may_not_overlap():
    """V11: batch rows and heads drawn under one key; a row number is not a call number."""
    key = new_noise_key()
    use(key, X, spans=((0, 32), (0, 4)))
    use(key, X, spans=((32, 32), (0, 4)))
    use(key, X, spans=((0, 32), (4, 4)))
    use(key, X, uses=(1, 0), spans=((0, 32), (0, 4)))
    for spans in (((1, 32), (0, 4)), ((63, 1), (3, 4)), ((0, 1), (7, 1))):
        with pytest.raises(KeyReuseError, match="overlapping"):
            use(key, X, spans=spans)
    keys = new_noise_key((3,))
    jax.vmap(lambda k, i: use(k, X, spans=((i, 2),)))(keys, jnp.arange(3))
    with pytest.raises(KeyReuseError, match="overlapping"):
        use(keys[1], X, spans=((2, 5),))
    same = jnp.stack([new_noise_key()] * 2)
    with pytest.raises(KeyReuseError, match="overlapping"):
        jax.vmap(lambda k, i: use(k, X, spans=((i, 2),)))(same, jnp.arange(2))


@pytest.mark.parametrize("check_vma", [True, False])
def test_local_counters_under_shard_map_are_refused(check_vma):
    """V11: the fourth plant. (How the axis is found does not depend on the number of devices.)"""
    axis = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def answer(start):
        def local(key, x):
            offset = start()
            require_offsets_under_manual_mesh(key, x, batch_start=offset, head_start=0)
            return use(key, x)

        specs = {"mesh": axis, "in_specs": (P(), P("d")), "out_specs": P("d")}
        return jax.shard_map(local, check_vma=check_vma, **specs)

    for wrap in (lambda f: f, jax.jit):
        wrap(answer(lambda: "d"))(new_noise_key(), BATCH)
        for wrong in (lambda: None, lambda: 0, lambda: jax.lax.axis_index("d")):
            with pytest.raises(KeyReuseError, match="batch_start"):
                wrap(answer(wrong))(new_noise_key(), BATCH)
    require_offsets_under_manual_mesh(new_noise_key(), X, batch_start=None, head_start=None)


def test_shard_map_closure_is_refused():
    """V11."""
    axis = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    key = new_noise_key()
    with pytest.raises(KeyReuseError):
        jax.shard_map(lambda x: use(key, x), mesh=axis, in_specs=P("d"), out_specs=P("d"))(BATCH)


def test_one_key_for_many_mapped_uses_is_refused():
    """V11: an eager vmap over release ids with one key is an error of the library's own."""
    with pytest.raises(KeyReuseError, match="under vmap"):
        jax.vmap(lambda release_id: use(new_noise_key(), X, uses=(release_id, 0)))(jnp.arange(3))


def test_one_key_a_shard_needs_no_offsets():
    """V11: as the errors advise; a key that is only marked as varying is one key on all shards."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def answer(own, spec, **options):
        def local(key, x):
            key = own(key)
            require_offsets_under_manual_mesh(key, x, batch_start=None, head_start=None)
            return use(key, x)

        specs = {"mesh": mesh, "in_specs": (spec, P("d")), "out_specs": P("d")}
        return jax.jit(jax.shard_map(local, **specs, **options))

    answer(lambda keys: keys[0], P("d"))(new_noise_key((1,)), BATCH)
    answer(lambda key: jax.random.fold_in(key, jax.lax.axis_index("d")), P())(
        new_noise_key(), BATCH
    )
    with pytest.raises(KeyReuseError, match="check_vma=False hide"):
        answer(lambda keys: keys[0], P("d"), check_vma=False)(new_noise_key((1,)), BATCH)
    with pytest.raises(KeyReuseError, match="every shard would count from 0"):
        answer(lambda key: jax.lax.pcast(key, "d", to="varying"), P())(new_noise_key(), BATCH)
    with pytest.raises(KeyReuseError, match="every shard would count from 0"):
        answer(lambda key: key, P())(new_noise_key(), BATCH)
