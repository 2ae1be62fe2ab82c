"""A whole private step with the Hopper kernels: attention, products of gradients, noise (V10)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.dpsgd_cases import plan_of
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dpfa_jax import dot_product_attention, dpsgd
from dpfa_jax.noise import insecure_test_key

LAYERS, WIDTH, HEADS, LENGTH, ROWS = 3, 256, 4, 512, 8


def params_of():
    rng = np.random.default_rng(0)
    shapes = {"qkv": (WIDTH, 3 * WIDTH), "out": (WIDTH, WIDTH), "scale": (WIDTH,)}
    blocks = {name: 0.05 * rng.standard_normal((LAYERS, *s)) for name, s in shapes.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"blocks": blocks})


def block(x, weights):
    qkv = (x * (1.0 + weights["scale"].astype(x.dtype))) @ weights["qkv"].astype(x.dtype)
    query, key, value = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, HEADS, -1), 2, 0)
    mixed = dot_product_attention(query, key, value, is_causal=True).reshape(x.shape)
    return x + mixed @ weights["out"].astype(x.dtype), None


def loss_fn(params, batch):
    x, _ = jax.lax.scan(jax.checkpoint(block), batch["x"].astype(jnp.bfloat16), params["blocks"])
    return jnp.square(x.astype(jnp.float32)).mean(axis=(1, 2))


def steps(**options):
    """(step of the whole batch, the same under shard_map with checked types), and a call's inputs.

    `options`: of `jax.make_mesh`.
    """
    params = params_of()
    groups, norms = dpsgd.per_layer_groups(params, 1.0, stacked=("blocks",))
    plan = plan_of(
        l2_clip_norm=norms,
        groups=groups,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        truncated_batch_size=ROWS,
        micro_batch_size=ROWS,
        noise_multiplier=1e-3,
    )
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,), **options)
    plan_a_shard = plan_of(
        l2_clip_norm=norms,
        groups=groups,
        num_parameters=plan.release.num_parameters,
        truncated_batch_size=ROWS,
        micro_batch_size=ROWS // mesh.size,
        noise_multiplier=1e-3,
    )
    whole = dpsgd.make_dp_step(loss_fn, optax.sgd(0.1), plan)
    part = dpsgd.make_dp_step(loss_fn, optax.sgd(0.1), plan_a_shard, axis_name="data")
    specs = (P(), P("data"), P("data"), P())
    sharded = jax.jit(jax.shard_map(part.step, mesh=mesh, in_specs=specs, out_specs=P()))
    x = np.random.default_rng(1).standard_normal((ROWS, LENGTH, WIDTH)).astype(np.float32)
    inputs = {"x": x}, jnp.arange(ROWS) < ROWS - 1, insecure_test_key(0)
    return whole, sharded, (whole.init(params), *inputs)


@pytest.mark.gpu
def test_shards_release_what_the_whole_batch_does():
    """By shard_map with checked types, on all devices there are: kernels take and give them."""
    whole, sharded, inputs = steps()
    text = sharded.lower(*inputs).as_text()
    assert text.count("custom_call @mosaic_gpu") >= 4  # attention there and back, products, noise
    one, other = whole.step(*inputs), sharded(*inputs)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        moved = np.abs(np.asarray(a - b)).max()
        assert moved <= 2e-3 * np.abs(np.asarray(a)).max(), moved
