"""What a step holds while it makes per-example gradients late, and in which order."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import clipping_oracle

from dpfa_jax.clipping.trees import CLIP_MARGIN
from dpfa_jax.dpsgd import clip_groups
from dpfa_jax.dpsgd.clipped_sum import split_gradient
from dpfa_jax.dpsgd.forms import Rows
from dpfa_jax.dpsgd.late_gradients import LateGradient

pytestmark = pytest.mark.quickly_compiled


def clipped_sum(*arguments, **named):
    return clipping_oracle.clipped_sum(*arguments, **named).gradients


def test_a_table_of_positions_costs_what_is_used_of_it():
    """Where a slice of a parameter is used, an example's gradient is of that slice alone."""
    width, rows, positions = 64, 16, 1024

    def temporary_bytes(used: int) -> int:
        def loss(params, batch):
            return jnp.sum((batch["x"] + params["places"][:used]) ** 3, axis=(1, 2))

        program = functools.partial(
            clipped_sum,
            loss,
            l2_clip_norms=(1.0,),
            leaf_groups=(0,),
            micro_batch_size=rows,
            per_example_bytes=2**30,
        )
        params = {"places": jnp.zeros((positions, width))}
        batch = {"x": jax.ShapeDtypeStruct((rows, used, width), jnp.float32)}
        real = jax.ShapeDtypeStruct((rows,), jnp.bool_)
        compiled = jax.jit(program).lower(params, batch, real).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    table = 4 * positions * width
    assert temporary_bytes(positions) >= rows * table  # the control: it would be seen
    assert temporary_bytes(8) < 2 * table


def test_a_cotangent_that_the_layer_below_reads_is_not_made_anew(monkeypatch):
    """Queries, keys and values of one product: a tail reads what the head puts in order, once."""
    width, heads = 16, 2

    def loss(params, batch):
        x = jnp.tanh(batch["x"] @ params["below"])
        made = (x @ params["all"]).reshape(*x.shape[:2], 3, heads, width // heads)
        query, key, value = jnp.moveaxis(made, 2, 0)
        return jnp.sum(jnp.tanh(query * key) * value, axis=(1, 2, 3))

    seen = {}
    made = LateGradient.made

    def noted(self, l2_clip_norm):
        seen[self.path] = self.tail.recomputes, [x.shape for x in self.values]
        return made(self, l2_clip_norm)

    monkeypatch.setattr(LateGradient, "made", noted)
    shape = jax.ShapeDtypeStruct
    params = {
        "below": shape((width, width), jnp.float32),
        "all": shape((width, 3 * width), jnp.float32),
    }
    program = functools.partial(
        clipped_sum,
        loss,
        l2_clip_norms=(1.0,),
        leaf_groups=(0, 0),
        micro_batch_size=4,
        per_example_bytes=2**20,
    )
    batch = {"x": shape((4, 64, width), jnp.float32)}
    text = str(jax.make_jaxpr(program)(params, batch, shape((4,), jnp.bool_)))
    anew, shapes = seen["all"]
    assert not anew
    assert (4, 1, 64, 3 * width) in shapes
    assert re.search(rf"f32\[4,1,64,{3 * width}\] = optimization_barrier", text)


def _block(params, x):
    return x + jnp.tanh(x @ params["up"]) @ params["down"]


def _stack(wrap):
    """Losses of four blocks, each wrapped (`jax.checkpoint`, or as it is), and their parameters."""

    def loss(params, batch):
        x = batch["x"]
        for name in ("l0", "l1", "l2", "l3"):
            x = wrap(_block)(params[name], x)
        return jnp.sum(x**2, axis=(1, 2))

    shape = jax.ShapeDtypeStruct
    block = {"up": shape((32, 128), jnp.float32), "down": shape((128, 32), jnp.float32)}
    return loss, dict.fromkeys(("l0", "l1", "l2", "l3"), block)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["kept", "checkpoint"])
def test_groups_are_summed_as_the_backward_pass_gets_to_them(wrap):
    """The last layer first, also where its gradients leave a recomputed block."""
    loss, params = _stack(wrap)
    example = {"x": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
    _, *tails = split_gradient(loss, params, example).tails
    layers = [max(down.ready, up.ready) for down, up in zip(tails[::2], tails[1::2], strict=True)]
    assert layers == sorted(layers, reverse=True) and len(set(layers)) == 4


def test_flat_clipping_waits_for_nothing_before_its_products():
    """A barrier around all that a group is made from would hold it until the last is there."""
    loss, params = _stack(jax.checkpoint)
    program = functools.partial(
        clipped_sum,
        loss,
        l2_clip_norms=(1.0,),
        leaf_groups=(0,) * 8,
        micro_batch_size=4,
        per_example_bytes=2**30,
    )
    batch = {"x": jax.ShapeDtypeStruct((4, 64, 32), jnp.float32)}
    real = jax.ShapeDtypeStruct((4,), jnp.bool_)
    equations = jax.make_jaxpr(program)(params, batch, real).jaxpr.eqns
    held = [len(x.outvars) for x in equations if x.primitive.name == "optimization_barrier"]
    assert held and max(held) <= 2  # one product's, never those of eight


def test_tables_stay_rows_inside_shard_map(monkeypatch):
    """Zeros are known there too, where JAX marks them as varying over the mesh."""
    seen = {}
    made = LateGradient.made

    def noted(self, l2_clip_norm):
        seen[self.path] = type(self.tail.form), self.tail.made.shape
        return made(self, l2_clip_norm)

    monkeypatch.setattr(LateGradient, "made", noted)

    def loss(params, batch):
        x = params["embedding"][batch["t"]] + params["places"][:6]
        return jnp.sum(jnp.tanh(x @ params["kernel"]), axis=(1, 2))

    rng = np.random.default_rng(0)
    shapes = {"embedding": (40, 8), "kernel": (8, 8), "places": (20, 8)}
    params = {name: rng.standard_normal(x).astype(np.float32) for name, x in shapes.items()}
    batch, real = {"t": rng.integers(0, 40, (4, 6))}, np.ones(4, bool)
    program = functools.partial(
        clipped_sum, loss, l2_clip_norms=(0.5,), leaf_groups=(0, 0, 0), micro_batch_size=4,
        per_example_bytes=2**20,
    )  # fmt: skip
    expected = jax.jit(program)(params, batch, real)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")

    def on_a_shard(params, batch, real):
        return jax.tree.map(lambda x: jax.lax.psum(x, "data"), program(params, batch, real))

    seen.clear()
    run = jax.shard_map(on_a_shard, mesh=mesh, in_specs=(whole, split, split), out_specs=whole)
    found = jax.jit(run)(params, batch, real)
    assert seen["embedding"][0] is Rows and seen["places"][1] == (6, 8)
    for name, x in found.items():
        np.testing.assert_allclose(x, expected[name], atol=2e-6)


def test_what_several_gradients_are_made_from_is_counted_once(monkeypatch):
    """Queries, keys and values of one input, the second of two groups."""
    seen = []
    count = clip_groups.source_bytes
    monkeypatch.setattr(
        clip_groups,
        "source_bytes",
        lambda parts: seen.append(count(parts)) or count(parts),
    )

    def loss(params, batch):
        query, key, value = (jnp.tanh(batch["x"] @ params[n]) for n in ("k", "q", "v"))
        return jnp.sum((query * key * value) @ params["o"], axis=(1, 2))

    square = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    program = functools.partial(
        clipped_sum,
        loss,
        l2_clip_norms=(1.0, 1.0),
        leaf_groups=(0, 1, 0, 0),
        micro_batch_size=4,
        per_example_bytes=None,
    )
    batch = {"x": jax.ShapeDtypeStruct((4, 100, 32), jnp.float32)}
    jax.eval_shape(program, dict.fromkeys("koqv", square), batch, jax.ShapeDtypeStruct((4,), bool))
    one = 4 * 100 * 32 * 4
    assert sorted(seen) == [one, 4 * one]  # the input of o; x and three cotangents


@pytest.mark.parametrize("allowed", [2**20, 600])
def test_a_gradient_of_no_numbers(allowed):
    """An empty slice, made once and made twice."""

    def loss(params, batch):
        return jnp.sum(batch["x"] @ params["k"] @ params["v"], axis=(1, 2)) + jnp.sum(
            params["w"][:0]
        )

    params = {n: jnp.eye(8) for n in ("k", "v")} | {"w": jnp.ones((5, 8))}
    batch = {"x": jnp.ones((4, 32, 8))}
    found = clipped_sum(
        loss, params, batch, jnp.ones(4, bool), l2_clip_norms=(1.0,), leaf_groups=(0, 0, 0),
        micro_batch_size=4, per_example_bytes=allowed,
    )  # fmt: skip
    assert not found["w"].any()
    norm = np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in found.values()))
    assert 4.0 * (1.0 - 2 * CLIP_MARGIN) <= norm <= 4.0
