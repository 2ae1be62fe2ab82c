"""Inside shard_map one answer is released, or none: V10, V11, V23."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.dpsgd_cases import plan_of
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dpfa_jax import dpsgd
from dpfa_jax.core import ArgumentError
from dpfa_jax.noise import insecure_test_key

pytestmark = pytest.mark.quickly_compiled

ROWS, WIDTH = 8, 4
PLAN = plan_of(num_parameters=WIDTH, truncated_batch_size=ROWS, micro_batch_size=ROWS)
SUMS = {"w": jnp.arange(WIDTH, dtype=jnp.float32)}


def on_mesh(function, in_specs, arguments, **options):
    """On one device: types tell the same as on many."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=P(), **options)
    return jax.jit(mapped)(*arguments)


def stepped(batch_spec, params_spec=None, fold=None):
    def loss(params, batch):
        return jnp.square(batch["x"] @ params["w"])

    dp = dpsgd.make_dp_step(loss, optax.sgd(1.0), PLAN, axis_name="data")

    def step(params, batch, real, key):
        key = key if fold is None else jax.random.fold_in(key, jax.lax.axis_index(fold))
        after = dp.step(dp.init(SUMS)._replace(params=params), batch, real, key).params
        return jax.lax.pmean(after, tuple(jax.typeof(after["w"]).manual_axis_type.varying))

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((ROWS, WIDTH)), jnp.float32)
    arguments = SUMS, {"x": x}, jnp.ones(ROWS, bool), insecure_test_key(0)
    return on_mesh(step, (params_spec or P(), batch_spec, batch_spec, P()), arguments)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_spec": P(("data", "model"))},  # two sums, one noise
        {"batch_spec": P("data"), "params_spec": P("model")},  # each shard clips its own part
        {"batch_spec": P("data"), "fold": "model"},  # several noises for one charge
        {"batch_spec": P("data"), "fold": "data"},
    ],
)
def test_what_differs_over_an_axis_that_is_not_added_over_is_refused(wrong):
    with pytest.raises(ArgumentError, match="not the same on every shard of"):
        stepped(**wrong)


def test_what_is_the_same_on_all_shards_is_released():
    """The control."""
    assert np.isfinite(stepped(P("data"))["w"]).all()


def noised(sums, key):
    noise = dpsgd.noisy_sum(PLAN)
    return noise.update(sums, noise.init(SUMS), noise_key=key)[0]


def test_sums_of_shards_are_not_noised_apart():
    """`noisy_sum` on its own: only what all shards have; nothing where types do not tell."""
    key = insecure_test_key(1)
    with pytest.raises(ArgumentError, match=r"updates/w = .*not the same on every shard"):
        on_mesh(lambda *a: jax.lax.pmean(noised(*a), "data"), ({"w": P("data")}, P()), (SUMS, key))
    with pytest.raises(ArgumentError, match="without check_vma=False"):
        on_mesh(noised, (P(), P()), (SUMS, key), check_vma=False)
    whole = on_mesh(
        lambda sums, key: noised(jax.lax.psum(sums, "data"), key),
        ({"w": P("data")}, P()),
        (SUMS, key),
    )
    np.testing.assert_array_equal(whole["w"], noised(SUMS, key)["w"])
