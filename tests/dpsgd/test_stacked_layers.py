"""Clip groups of slices, where parameters of all layers are stacked for `scan` (V8, V10, V23)."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import forced_devices
from helpers.clipping_oracle import QUICKLY_COMPILED, clipped_sum, gradients_by_grad
from helpers.dpsgd_cases import plan_of

from dpfa_jax import dpsgd
from dpfa_jax.clipping.trees import CLIP_MARGIN
from dpfa_jax.core import ArgumentError, CoverageError
from dpfa_jax.dpsgd.micro_batch import step_bytes
from dpfa_jax.dpsgd.parameters import leaf_groups
from dpfa_jax.dpsgd.rounds import columns_of
from dpfa_jax.noise import insecure_test_key
from dpfa_jax.release import AdaptiveClipping

pytestmark = pytest.mark.quickly_compiled

LAYERS, WIDTH, LENGTH, BATCH = 3, 8, 4, 6


def params_of(layers=LAYERS, width=WIDTH):
    rng = np.random.default_rng(0)
    shapes = {"in": (width, 2 * width), "out": (2 * width, width), "bias": (width,)}
    blocks = {name: rng.standard_normal((layers, *s)) * 0.3 for name, s in shapes.items()}
    tree = {"blocks": blocks, "head": rng.standard_normal((width, 5)) * 0.3}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def batch_of(rows=BATCH, length=LENGTH, width=WIDTH):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((rows, length, width)) * np.linspace(0.3, 3.0, rows)[:, None, None]
    return {"x": x.astype(np.float32)}


def block(x, weights):
    hidden = jnp.tanh(x @ weights["in"])
    return x + hidden @ weights["out"] + weights["bias"], None


def loss_by(around, params, batch):
    x, _ = jax.lax.scan(around(block), batch["x"], params["blocks"])
    return jnp.square(x @ params["head"]).mean(axis=(1, 2))


def loss_of_list(params, batch):
    x = batch["x"]
    for weights in params["blocks"]:
        x, _ = block(x, weights)
    return jnp.square(x @ params["head"]).mean(axis=(1, 2))


LOSSES = {
    "scan": functools.partial(loss_by, lambda f: f),
    "scan of checkpoint": functools.partial(loss_by, jax.checkpoint),
    "reversed": lambda p, b: loss_by(
        lambda f: f, p | {"blocks": jax.tree.map(lambda x: x[::-1], p["blocks"])}, b
    ),
}
LOSSES = {name: jax.tree_util.Partial(loss) for name, loss in LOSSES.items()}
STACKED = ("blocks",)
EACH = dpsgd.per_layer_groups(params_of(), 0.4, stacked=STACKED)
GROUPS = {
    "a slice each": EACH,
    "a layer each": dpsgd.per_layer_groups(params_of(), 0.4, depth=1, stacked=STACKED),
    "norms of their own": (EACH.groups, tuple(0.05 * (2 + i) for i in range(len(EACH.groups)))),
    "across layers": (
        (("head", "blocks/in/0", "blocks/in/2"), ("blocks/in/1", "blocks/out"), ("blocks/bias",)),
        (0.3, 0.2, 0.1),
    ),
}


def clipped_by_hand(rows, owners, norms, dtype):
    totals = [np.zeros(leaf.shape, dtype) for leaf in rows[0]]
    for row in rows:
        squares = np.zeros(len(norms), dtype)
        for leaf, owner in zip(row, owners, strict=True):
            if isinstance(owner, int):
                squares[owner] += np.sum(np.square(leaf))
            else:
                np.add.at(squares, list(owner), np.square(leaf).reshape(len(owner), -1).sum(1))
        scales = np.minimum(1.0, np.asarray(norms) * (1.0 - CLIP_MARGIN) / np.sqrt(squares))
        for total, leaf, owner in zip(totals, row, owners, strict=True):
            scale = scales[np.asarray(owner)].astype(dtype)
            total += scale.reshape(*scale.shape, *[1] * (leaf.ndim - scale.ndim)) * leaf
    return totals


@functools.cache
def rows_by_grad(loss, dtype):
    """The leaves of each example's gradient."""
    rows = gradients_by_grad(LOSSES[loss], params_of(), batch_of(), dtype)
    return [jax.tree.leaves(row) for row in rows]


def summed(loss, params, batch, real, groups, norms, micro_batch_size=BATCH, memory=2**24):
    whole = functools.partial(
        clipped_sum,
        loss,
        l2_clip_norms=norms,
        leaf_groups=leaf_groups(params, groups),
        micro_batch_size=micro_batch_size,
        per_example_bytes=memory,
    )
    return jax.jit(whole, compiler_options=QUICKLY_COMPILED)(params, batch, jnp.asarray(real))


@pytest.mark.parametrize(
    ("loss", "kind", "memory"),
    [
        ("scan", "a layer each", 1500),  # of one example: twice
        ("reversed", "norms of their own", 2**24),
        ("scan of checkpoint", "across layers", 4000),
        *(
            pytest.param(loss, kind, memory, marks=pytest.mark.slow)
            for loss in LOSSES
            for kind in GROUPS
            for memory in (2**24, None, 4000)
        ),
    ],
)
def test_sums_equal_the_float64_oracle(loss, kind, memory):
    """V8: each slice clipped on its own; a ragged batch in micro-batches; error twice the naive."""
    params, batch, real = params_of(), batch_of(), np.arange(BATCH) < BATCH - 1
    groups, norms = GROUPS[kind]
    owners = leaf_groups(params, groups)

    exact, naive = (
        clipped_by_hand(rows_by_grad(loss, dtype)[:-1], owners, norms, dtype)
        for dtype in (np.float64, np.float32)
    )
    found = summed(LOSSES[loss], params, batch, real, groups, norms, 3, memory).gradients
    size = np.sqrt(sum(np.sum(leaf**2) for leaf in exact))
    rows, one_norm = rows_by_grad(loss, np.float64)[:-1], (np.hypot.reduce(norms),)
    whole = clipped_by_hand(rows, (0,) * len(owners), one_norm, np.float64)
    for leaf, right, rough, flat in zip(
        *map(jax.tree.leaves, (found, exact, naive, whole)), strict=True
    ):
        error = np.linalg.norm(np.asarray(leaf, np.float64) - right)
        assert error <= 2.0 * max(np.linalg.norm(rough - right), 2.0**-22 * size)
        assert np.linalg.norm(flat - right) > 100 * error  # the control


def test_slices_are_the_layers_of_a_list():
    """Stacked or in a list: the same clip norms, the same sums, the same counts."""
    params, batch, real = params_of(), batch_of(), np.ones(BATCH, bool)
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(LAYERS)]
    listed = params | {"blocks": layers}
    each = dpsgd.per_layer_groups(params, 8.0, stacked=STACKED)  # some are clipped
    apart = dpsgd.per_layer_groups(listed, 8.0)
    assert sorted(each.l2_clip_norms) == sorted(apart.l2_clip_norms)
    found = summed(LOSSES["scan of checkpoint"], params, batch, real, *each)
    expected = summed(loss_of_list, listed, batch, real, *apart)
    stacked = jax.tree.map(lambda *x: np.stack(x), *expected.gradients["blocks"])
    for leaf, right in zip(
        jax.tree.leaves(found.gradients["blocks"]), jax.tree.leaves(stacked), strict=True
    ):
        np.testing.assert_allclose(leaf, right, rtol=2e-5, atol=1e-6)
    counts = dict(zip(apart.groups, np.asarray(expected.centred_counts), strict=True))
    for (path,), count in zip(each.groups, found.centred_counts, strict=True):
        name, _, layer = path.rpartition("/")
        twin = path if path == "head" else f"blocks/{layer}/{name.removeprefix('blocks/')}"
        assert counts[(twin,)] == count
    assert len(set(counts.values())) > 1


def test_an_example_that_is_not_finite_in_one_layer_is_left_out_of_its_groups():
    """And padding counts for nothing, whatever it holds."""
    params, batch, real = params_of(), batch_of(), np.arange(BATCH) < BATCH - 1
    groups, norms = EACH
    batch["poison"] = np.zeros((BATCH, LAYERS), np.float32)
    batch["poison"][1, 2] = np.nan
    batch["poison"][-1] = np.inf

    @jax.custom_vjp
    def poisoned(weights, by):
        return weights

    poisoned.defvjp(lambda weights, by: (weights, by), lambda by, d: (d + by, None))

    def loss(params, batch):
        def body(x, layer):
            weights, by = layer
            return block(x, weights | {"bias": poisoned(weights["bias"], by)})

        x, _ = jax.lax.scan(body, batch["x"], (params["blocks"], batch["poison"][0]))
        return jnp.square(x @ params["head"]).mean(axis=(1, 2))

    found = summed(loss, params, batch, real, groups, norms)
    all_but_one = real & (np.arange(BATCH) != 1)
    clean = summed(LOSSES["scan"], params, batch, real, groups, norms).gradients
    without = summed(LOSSES["scan"], params, batch, all_but_one, groups, norms).gradients
    expected = jax.tree.map(np.array, clean)
    expected["blocks"]["bias"][2] = without["blocks"]["bias"][2]
    for leaf, right in zip(*map(jax.tree.leaves, (found.gradients, expected)), strict=True):
        np.testing.assert_allclose(leaf, right, rtol=2e-5, atol=1e-6)
    assert np.abs(without["blocks"]["bias"][2] - clean["blocks"]["bias"][2]).max() > 1e-3


def test_a_step_holds_one_layer_at_a_time():
    """Compiled memory figures: an ordinary step's; as one group a leaf, all layers are held."""
    layers, width, rows = 8, 64, 8
    params, batch = params_of(layers, width), batch_of(rows, 256, width)
    loss = LOSSES["scan of checkpoint"]

    def ordinary(params, batch):
        gradients = jax.grad(lambda p: loss(p, batch).mean())(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    figures = jax.jit(ordinary).lower(params, batch).compile().memory_analysis()
    base = (
        figures.temp_size_in_bytes + figures.argument_size_in_bytes + figures.output_size_in_bytes
    )

    def needed(stacked):
        groups, norms = dpsgd.per_layer_groups(params, 1.0, stacked=stacked)
        plan = plan_of(
            l2_clip_norm=norms,
            groups=groups,
            num_parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
            truncated_batch_size=rows,
            micro_batch_size=rows,
        )
        return step_bytes(loss, params, batch, plan, optax.sgd(0.1)) / base

    assert needed(STACKED) <= 1.15
    assert needed(()) >= 3.0


@pytest.mark.parametrize("adapts", [pytest.param(False, marks=pytest.mark.slow), True])
def test_noise_and_norms_of_each_slice_are_its_own(adapts):
    """An empty batch: deviations by slice as released. Adaptive norms follow a slice's count."""
    params = params_of(LAYERS, 32)
    groups, norms = dpsgd.per_layer_groups(params, 0.4, stacked=STACKED)
    plan = plan_of(
        l2_clip_norm=norms,
        groups=groups,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        noise_shares=tuple(4.0**i for i in range(len(groups))),
        adaptive_clipping=AdaptiveClipping(budget_share=0.9) if adapts else None,
    )
    batch = batch_of(plan.capacity, LENGTH, 32)
    dp = dpsgd.make_dp_step(LOSSES["scan"], optax.sgd(1.0), plan)
    state = dp.init(params)
    nobody = jnp.zeros(plan.capacity, bool)
    after = dp.step(state, batch, nobody, insecure_test_key(0))
    stddevs = dict(zip(groups, plan.release.noise_stddevs, strict=False))
    divisor = plan.release.expected_batch_size
    for name, leaf in params["blocks"].items():
        for layer in range(LAYERS):
            noise = (after.params["blocks"][name] - leaf)[layer] * divisor
            found = float(jnp.std(noise) / stddevs[(f"blocks/{name}/{layer}",)])
            assert abs(found - 1.0) < 4.0 / np.sqrt(2 * noise.size), (name, layer, found)
    if adapts:
        small = jax.tree.map(lambda leaf: leaf.at[0].multiply(1e-6), params["blocks"])
        state = dp.init(params | {"blocks": small | {"bias": params["blocks"]["bias"]}})
        everybody = jnp.ones(plan.capacity, bool)
        moved = dp.step(state, batch, everybody, insecure_test_key(1)).l2_clip_norms
        ratios = dict(zip(groups, np.asarray(moved) / np.asarray(norms), strict=True))
        assert ratios[("blocks/in/0",)] < 0.99 < 1.01 < ratios[("blocks/in/1",)], ratios


def test_a_model_may_be_stacked_whole():
    """No parameter beside those of the loop: nothing is left for the end."""
    params = {"blocks": params_of()["blocks"]}

    def loss(params, batch):
        return LOSSES["scan"](params | {"head": jnp.ones((WIDTH, 5))}, batch)

    groups, norms = dpsgd.per_layer_groups(params, 0.4, stacked=STACKED)
    found = summed(loss, params, batch_of(), np.ones(BATCH, bool), groups, norms)
    with_head = params_of() | {"head": jnp.ones((WIDTH, 5))}
    both, their_norms = (*groups, ("head",)), (*norms, 1.0)
    expected = summed(
        LOSSES["scan"], with_head, batch_of(), np.ones(BATCH, bool), both, their_norms
    )
    for leaf, right in zip(
        jax.tree.leaves(found.gradients["blocks"]),
        jax.tree.leaves(expected.gradients["blocks"]),
        strict=True,
    ):
        np.testing.assert_allclose(leaf, right, rtol=2e-5, atol=1e-6)


def test_a_loop_before_the_loss_finishes_nothing():
    """Gradients that a fused forward pass makes: whether an example counts is not known yet."""

    @jax.custom_vjp
    def fused(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    def forward(weights, x):
        def body(x, w):
            out = jnp.tanh(x @ w)
            return out, jnp.einsum("bti,bto->io", x, out)

        return jax.lax.scan(body, x, weights)

    fused.defvjp(forward, lambda made, d: (made, 0 * d))
    params = {"blocks": jnp.ones((LAYERS, WIDTH, WIDTH)), "head": jnp.ones(WIDTH)}

    def loss(params, batch):
        return (fused(params["blocks"], batch["x"]) @ params["head"]).mean(axis=1)

    groups, norms = dpsgd.per_layer_groups(params, 0.3, stacked=STACKED)
    real = np.ones(BATCH, bool)
    found = summed(loss, params, batch_of(), real, groups, norms).gradients["blocks"]
    each = [
        np.asarray(forward(params["blocks"], row[None])[1], np.float64) for row in batch_of()["x"]
    ]
    norm = dict(zip(groups, norms, strict=True))[("blocks/0",)]
    lengths = [np.linalg.norm(one.reshape(LAYERS, -1), axis=1) for one in each]
    scales = [np.minimum(1.0, norm * (1.0 - CLIP_MARGIN) / length) for length in lengths]
    expected = sum(one * scale[:, None, None] for one, scale in zip(each, scales, strict=True))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_which_groups_a_loop_can_finish():
    """Those of slices with one number, and of nothing else."""
    assert columns_of([0, (1, 2), (3, 4), (3, 4)]) == [(1,), (2, 3)]
    assert columns_of([0, (0, 1), (2, 2, 3), (4, 5), (5, 4)]) == []


def test_names_of_slices(monkeypatch):
    """V23: stacked groups name slices; what covers nothing, or is uncovered, is named."""
    params = params_of()
    assert ("blocks/out/2",) in EACH.groups and ("head",) in EACH.groups
    assert np.sum(np.square(EACH.l2_clip_norms)) == pytest.approx(0.16, rel=1e-12)
    layers = GROUPS["a layer each"].groups
    assert ("blocks/bias/1", "blocks/in/1", "blocks/out/1") in layers and len(layers) == 4
    assert leaf_groups(params, layers) == ((0, 1, 2),) * 3 + (3,)
    whole = (("blocks/bias/0", "blocks/bias/1", "blocks/bias/2", "blocks/in", "blocks/out"),)
    assert leaf_groups(params, (*whole, ("head",))) == (0, 0, 0, 1)
    with pytest.raises(CoverageError, match="blocks/out/2"):
        leaf_groups(params, tuple(group for group in EACH.groups if group != ("blocks/out/2",)))
    with pytest.raises(ArgumentError, match="'blocks/out/3'"):
        leaf_groups(params, (*EACH.groups, ("blocks/out/3",)))
    with pytest.raises(ArgumentError, match="is under groups"):
        leaf_groups(params, (*EACH.groups, ("blocks/out",)))
    for stacked, match in (("blocks", "not a tuple"), (("layers",), "covers none")):
        with pytest.raises(ArgumentError, match=match) as error:
            dpsgd.per_layer_groups(params, 1.0, stacked=stacked)
        assert error.value.parameter == "stacked"
    with pytest.raises(ArgumentError, match="no leading axis"):
        dpsgd.per_layer_groups({"scale": jnp.ones(())}, 1.0, stacked=("scale",))
    arguments = {"epsilon": 1.0, "delta": 1e-5, "dataset_size": 1000, "expected_batch_size": 64}
    with pytest.raises(ArgumentError, match='clipping="per_layer"'):
        dpsgd.DPSGDPlan.calibrated(
            **arguments, steps=3, l2_clip_norm=1.0, params=params, stacked=STACKED
        )
    # Names need no noise multiplier, which takes seconds to find.
    found = lambda release, **_: types.SimpleNamespace(release=release)  # noqa: E731
    monkeypatch.setattr("dpfa_jax.accounting.calibrate", found)
    plan = dpsgd.DPSGDPlan.calibrated(
        **arguments, steps=3, l2_clip_norm=0.4, params=params, clipping="per_layer", stacked=STACKED
    )
    assert (plan.groups, plan.release.l2_clip_norms) == (EACH.groups, EACH.l2_clip_norms)


SHARDED = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dpsgd.test_stacked_layers import *
params, batch, real = params_of(), batch_of(8), jnp.arange(8) < 7
whole = functools.partial(
    clipped_sum, LOSSES["scan of checkpoint"], l2_clip_norms=EACH.l2_clip_norms,
    leaf_groups=leaf_groups(params, EACH.groups), micro_batch_size=2, per_example_bytes=1500)
one = jax.jit(whole)(params, batch, real)
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
split = jax.device_put((batch, real), NamedSharding(mesh, P("data")))
by_map = jax.jit(jax.shard_map(
    lambda *a: jax.lax.psum(whole(*a), "data"), mesh=mesh,
    in_specs=(P(), P("data"), P("data")), out_specs=P()))(params, *split)
automatic = jax.jit(functools.partial(
    clipped_sum, LOSSES["scan of checkpoint"], l2_clip_norms=EACH.l2_clip_norms,
    leaf_groups=leaf_groups(params, EACH.groups), micro_batch_size=8, per_example_bytes=2**20,
))(params, *split)
for found in (by_map, automatic):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
print("all equal")
"""


def test_shards_clip_inside_their_loops():
    """V10: by shard_map and by jit with sharded rows, on four devices."""
    assert forced_devices.printed(4, "-c", SHARDED) == "all equal"
