"""What would let one example reach another's gradient is refused by name (V11, V23)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.clipping_oracle import clipped_sum
from jax.extend.random import define_prng_impl
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpfa_jax.core import CoverageError
from dpfa_jax.dpsgd.coverage import coverage
from dpfa_jax.kernels import pieces

pytestmark = pytest.mark.quickly_compiled

PARAMS = {"w": jnp.ones((3,))}
BATCH = {"x": jnp.ones((4, 3))}


def clipped(loss):
    def run(params, batch):
        return clipped_sum(
            loss, params, batch, batch["x"][:, 0] > 0, l2_clip_norms=(1.0,), leaf_groups=(0,),
            micro_batch_size=2, per_example_bytes=None,
        ).gradients  # fmt: skip

    return run


def on_mesh(loss, **options):
    """The clipped sum as a shard of a mesh with two axes sees it, added over the data axis."""
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "model"))

    def run(params, batch):
        return jax.tree.map(lambda x: jax.lax.psum(x, "data"), clipped(loss)(params, batch))

    shard = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), **options)
    return jax.jit(shard)(PARAMS, BATCH)


def loss_with(mix):
    def loss(params, batch):
        return jnp.tanh(mix(batch["x"] * params["w"]).sum(axis=-1))

    return loss


def identity(x):
    return x


COLLECTIVES = {
    "psum": lambda x: jax.lax.psum(x, "data"),
    "pmean": lambda x: x - jax.lax.pmean(x, "data"),
    "all_gather": lambda x: jax.lax.all_gather(x, "data").sum(axis=0),
    "ppermute": lambda x: jax.lax.ppermute(x, "data", [(0, 0)]),
    "in a loop": lambda x: jax.lax.scan(
        lambda c, _: (c + jax.lax.psum(x, "data"), None), x * 0.0, None, length=2
    )[0],
    "under checkpoint": jax.checkpoint(lambda x: x - jax.lax.pmean(x, "data")),
}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_a_collective_over_shards_of_the_batch_is_refused(name):
    """Examples on other devices would move an example's clipped gradient."""
    with pytest.raises(CoverageError, match=r"loss_fn: .* over the axis 'data'"):
        on_mesh(loss_with(COLLECTIVES[name]))
    on_mesh(loss_with(identity))  # control


def test_a_shard_may_hold_keys_and_columns_of_no_numbers():
    """Each example's own dropout, say. The same sum as of the whole batch."""

    def loss(params, batch):
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (3,)))(batch["key"])
        return (jnp.where(kept, batch["x"], 0.0) @ params["w"]) ** 2 + batch["none"].sum(axis=1)

    keys = jax.random.split(jax.random.key(0), 4)
    batch = {"x": jnp.ones((4, 3)), "key": keys, "none": jnp.ones((4, 0))}
    mesh = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    shard = jax.shard_map(
        lambda *given: jax.lax.psum(clipped(loss)(*given), "data"),
        mesh=mesh, in_specs=(P(), P("data")), out_specs=P(),
    )  # fmt: skip
    found, whole = (jax.jit(run)(PARAMS, batch)["w"] for run in (shard, clipped(loss)))
    np.testing.assert_array_equal(found, whole)
    assert np.linalg.norm(whole) > 0.9


def test_an_axis_that_holds_one_example_may_be_summed_over():
    """Tensor parallelism; where types do not tell which axis holds what, it is refused."""

    def parallel(x):
        own = jax.lax.pcast(x, "model", to="varying")
        return jax.lax.psum(own, "model")

    alone = clipped(loss_with(identity))(PARAMS, BATCH)
    found = on_mesh(loss_with(parallel))
    np.testing.assert_allclose(found["w"], alone["w"], rtol=1e-6)
    with pytest.raises(CoverageError, match="over the axis 'model'"):
        on_mesh(loss_with(lambda x: jax.lax.psum(x, "model")), check_vma=False)


@pytest.mark.parametrize("method", ["broadcast_all", "expand_dims", "sequential"])
def test_a_callback_sees_one_example_at_a_time(method):
    @jax.custom_jvp
    def doubled(x):
        return jax.pure_callback(lambda x: 2 * np.asarray(x), x, x, vmap_method=method)

    doubled.defjvp(lambda primals, tangents: (doubled(primals[0]), 2 * tangents[0]))
    if method == "sequential":
        jax.block_until_ready(clipped(loss_with(doubled))(PARAMS, BATCH))
        return
    with pytest.raises(CoverageError, match="'pure_callback' could see several examples"):
        clipped(loss_with(doubled))(PARAMS, BATCH)
    with pytest.raises(CoverageError, match="pure_callback"):
        coverage(loss_with(doubled), PARAMS, BATCH)


def mean_of_the_batch(axis_size, in_batched, x):
    return x * 0 + x.mean(axis=0), True


class Rule:
    __call__ = staticmethod(mean_of_the_batch)


RULES = {
    "a function": mean_of_the_batch,
    "a partial": functools.partial(mean_of_the_batch),
    "a name of JAX's": jax.tree_util.Partial(mean_of_the_batch),
    "another name of JAX's": functools.wraps(jnp.sum)(lambda *a: mean_of_the_batch(*a)),
    "an object": Rule(),
    "a derivative of one": mean_of_the_batch,
}


@pytest.mark.parametrize("kind", RULES)
def test_a_rule_for_batches_that_is_not_known_is_refused(kind):
    """What it does with a batch shows in no program of one example."""

    @jax.custom_batching.custom_vmap
    def same(x):
        return x * 1.0

    same.def_vmap(RULES[kind])

    @jax.custom_vjp
    def mixed(x):
        return jax.jvp(same, (x,), (x,))[1] if kind == "a derivative of one" else same(x)

    mixed.defvjp(lambda x: (mixed(x), None), lambda _, cotangent: (cotangent,))
    for run in (
        lambda loss: clipped(loss)(PARAMS, BATCH),
        lambda loss: coverage(loss, PARAMS, BATCH),
    ):
        with pytest.raises(CoverageError, match="custom_vmap of 'same'"):
            run(loss_with(mixed))


def test_known_rules_for_batches_pass():
    """One example at a time; a kernel's own, that folds rows into its batch."""

    def differentiable(function):
        same = jax.custom_vjp(lambda x: function(x))
        same.defvjp(lambda x: (function(x), None), lambda _, cotangent: (cotangent,))
        return same

    alone = clipped(loss_with(identity))(PARAMS, BATCH)
    walked = jax.custom_batching.sequential_vmap(lambda x: x * 1.0)
    folded = pieces.fold_vmap(lambda x: (x * 1.0,))
    for known in (walked, lambda x: folded(x)[0]):
        found = clipped(loss_with(differentiable(known)))(PARAMS, BATCH)
        np.testing.assert_allclose(found["w"], alone["w"], rtol=1e-6)


def test_a_foreign_function_sees_one_example_at_a_time():
    def foreign(method):
        @jax.custom_vjp
        def call(x):
            result = jax.ShapeDtypeStruct(x.shape, x.dtype)
            return jax.ffi.ffi_call("nowhere", result, vmap_method=method)(x)

        call.defvjp(lambda x: (call(x), None), lambda _, cotangent: (cotangent,))
        return call

    coverage(loss_with(foreign("sequential")), PARAMS, BATCH)
    with pytest.raises(CoverageError, match="'ffi_call' could see several examples"):
        coverage(loss_with(foreign("broadcast_all")), PARAMS, BATCH)


def own_generator():
    """A key type of one's own; what it does under vmap nobody knows."""
    return define_prng_impl(
        key_shape=(4,),
        seed=lambda seed: jnp.full(4, seed, jnp.uint32),
        split=lambda key, shape: jnp.broadcast_to(key, (*shape, 4)),
        random_bits=lambda key, width, shape: jax.random.bits(
            jax.random.wrap_key_data(key, impl="rbg"), shape, jnp.uint32
        ),
        fold_in=lambda key, data: key ^ data,
        name="dpfa_test_own_generator",
        tag="dpfa_own",
    )


def words(x):
    return jax.lax.bitcast_convert_type(jnp.resize(x, 4), jnp.uint32)


def of_key(impl):
    return lambda x: jax.random.uniform(jax.random.wrap_key_data(words(x), impl=impl), (3,))


DRAWS = {
    "rbg": of_key("rbg"),
    "unsafe_rbg": of_key("unsafe_rbg"),
    "a generator of one's own": lambda x: of_key(own_generator())(x),
    "a seed": lambda x: jax.random.uniform(jax.random.key(words(x)[0], impl="rbg"), (3,)),
    "gamma": lambda x: jax.random.gamma(jax.random.wrap_key_data(words(x), impl="rbg"), 2.0, (3,)),
    "folded": lambda x: jax.random.key_data(
        jax.random.fold_in(jax.random.key(0, impl="unsafe_rbg"), words(x)[0])
    )[:3].astype(jnp.float32),
    "the primitive": lambda x: jax.lax.rng_bit_generator(words(x), (3,))[1].astype(jnp.float32),
    "in a loop": lambda x: jax.lax.map(lambda _: of_key("rbg")(x), jnp.arange(2)).sum(axis=0),
    "in a branch": lambda x: jax.lax.cond(x[0] > 0, of_key("rbg"), jnp.zeros_like, x),
    "under checkpoint": jax.checkpoint(of_key("rbg")),
    "by rows": lambda x: jax.custom_batching.sequential_vmap(of_key("rbg"))(x),
    "without a key": lambda x: jax.lax.rng_uniform(x[0], x[0] + 1.0, (3,)),
}


def dropped_by(draw):
    def loss(params, batch):
        return jnp.tanh((draw(batch["x"][0]) * params["w"]).sum(keepdims=True))

    return loss


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_that_another_row_may_draw_are_refused(name):
    """Under vmap JAX draws for a whole batch of "rbg" keys from that of its first row."""
    with pytest.raises(CoverageError, match=r"'r\w+_\w+'.* other rows of its batch"):
        clipped(dropped_by(DRAWS[name]))(PARAMS, BATCH)


def test_raw_words_under_another_default_generator_are_refused():
    loss = dropped_by(lambda x: jax.random.uniform(words(x), (3,)))
    with (
        jax.default_prng_impl("rbg"),
        pytest.raises(CoverageError, match=r"'random_wrap' of a key<rbg>"),
    ):
        clipped(loss)(PARAMS, BATCH)


def test_threefry_keys_draw_alone_what_they_draw_in_a_batch():
    """The control; with keys of another kind in the batch that nothing draws from."""

    def drawn(x):
        key = jax.random.wrap_key_data(words(x)[:2], impl="threefry2x32")
        return 0.1 * jax.random.gamma(jax.random.fold_in(key, 1), 2.0, (3,))  # tanh far from 1

    batch = {
        "x": 1.0 + jnp.arange(12.0).reshape(4, 3),
        "unused": jax.random.split(jax.random.key(0, impl="rbg"), 4),
    }
    together, alone = (
        clipped_sum(
            dropped_by(drawn), PARAMS, batch, jnp.ones(4, bool), l2_clip_norms=(1.0,),
            leaf_groups=(0,), micro_batch_size=size, per_example_bytes=None,
        ).gradients["w"]
        for size in (4, 1)
    )  # fmt: skip
    np.testing.assert_allclose(together, alone, rtol=1e-6)
