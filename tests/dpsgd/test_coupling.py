"""What would let one example reach another's gradient is refused by name (V11, V23)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from dpfa_jax.core import CoverageError
from dpfa_jax.dpsgd import clipped_sum as module
from dpfa_jax.dpsgd.coverage import coverage

PARAMS = {"w": jnp.ones((3,))}
BATCH = {"x": jnp.ones((4, 3))}


def clipped(loss):
    def run(params, batch):
        return module.clipped_sum(
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
