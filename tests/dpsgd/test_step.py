"""The built step as a program: what it holds, what it returns, what does not change it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from helpers import forced_devices
from helpers.dpsgd_cases import batch_of, flat, loss_fn, params_of, plan_of, release_once, releasing

from dpfa_jax import dpsgd
from dpfa_jax.core import ArgumentError, KeyReuseError
from dpfa_jax.noise.keys import insecure_test_key, new_noise_key

pytestmark = pytest.mark.quickly_compiled


def primitives(jaxpr) -> list[str]:
    """Names of all primitives, those of inner programs included."""
    names = []
    for equation in jaxpr.eqns:
        names.append(equation.primitive.name)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    names += primitives(inner)
    return names


def built(optimizer=None, **changes):
    dp = dpsgd.make_dp_step(loss_fn, optimizer or optax.adam(0.1), plan_of(**changes))
    return dp, (dp.init(params_of()), batch_of(16), jnp.ones(16, bool), insecure_test_key(0))


def test_the_program_holds_one_noise_draw_a_parameter_and_no_callback():
    """V24. Controls: a callback in the loss and a second draw are counted."""
    dp, arguments = built()
    names = primitives(jax.make_jaxpr(dp.step)(*arguments).jaxpr)
    assert names.count("cos") == len(jax.tree.leaves(params_of()))
    assert not [name for name in names if "callback" in name or name == "outfeed"]
    text = jax.jit(dp.step).lower(*arguments).as_text()
    assert "callback" not in text and "outfeed" not in text

    def watched(params, batch):
        jax.debug.callback(lambda x: None, batch["x"])
        return loss_fn(params, batch)

    def twice(state, batch, is_real, noise_key):
        return dp.step(dp.step(state, batch, is_real, noise_key), batch, is_real, noise_key)

    spied = dpsgd.make_dp_step(watched, optax.adam(0.1), plan_of())
    assert [n for n in primitives(jax.make_jaxpr(spied.step)(*arguments).jaxpr) if "callback" in n]
    assert primitives(jax.make_jaxpr(twice)(*arguments).jaxpr).count("cos") == 2 * len(
        jax.tree.leaves(params_of())
    )


def test_every_result_is_computed_from_noised_sums_only():
    """V24: results are the state and nothing else, and each number of them moves with the noise."""
    dp, (state, batch, real, _) = built(noise_multiplier=64.0)
    one, other = (dp.step(state, batch, real, insecure_test_key(seed)) for seed in (0, 1))
    assert jax.tree.structure(one) == jax.tree.structure(state)
    moments = one.opt_state[0]
    for tree, twin in (
        (one.params, other.params),
        (moments.mu, other.opt_state[0].mu),
        (moments.nu, other.opt_state[0].nu),
    ):
        # mu tells more than params: Adam's first step keeps little but the sign.
        equal = np.mean(flat(tree) == flat(twin))
        assert equal < 0.75 if tree is one.params else equal < 0.1
    assert int(one.step) == 1 and int(moments.count) == 1


@pytest.mark.slow
def test_the_compiled_step_holds_no_more_gradients_than_the_plan_allows():
    """V24, by the compiled program's own figures; what is beside gradients is sums and noise."""
    width, rows = 512, 32
    one = 2 * 4 * width * width  # bytes of one example's gradient

    def loss(params, batch):
        hidden = jnp.tanh(batch @ params["a"])
        return jnp.sum((hidden @ params["b"]) ** 2, axis=(1, 2))

    params = {"a": jnp.zeros((width, width)), "b": jnp.zeros((width, width))}
    batch, real = jnp.zeros((rows, 4, width)), jnp.ones(rows, bool)

    def temporary_bytes(allowed: int) -> int:
        plan = plan_of(num_parameters=one // 4, truncated_batch_size=rows, micro_batch_size=rows)
        plan = dataclasses.replace(plan, per_example_bytes=allowed)
        dp = dpsgd.make_dp_step(loss, optax.adam(0.1), plan)
        lowered = jax.jit(dp.step).lower(dp.init(params), batch, real, insecure_test_key(0))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    all_of_them, four, one_parameter = (temporary_bytes(n) for n in (rows * one, 4 * one, one // 2))
    assert all_of_them > rows * one  # the control: it would be seen
    assert four < 3 * 4 * one
    assert one_parameter < 4 * one


def test_micro_batches_do_not_change_what_is_released():
    """V10: bit for bit where sums are exact (dyadic, unclipped), to one grid cell otherwise."""

    def linear(params, batch):
        return batch["x"] @ params["w"]

    rng = np.random.default_rng(0)
    batch = {"x": (rng.integers(-64, 64, (16, 25)) / 8).astype(np.float32)}
    real = np.arange(16) < 11

    def released(micro_batch_size, l2_clip_norm):
        plan = plan_of(micro_batch_size=micro_batch_size, l2_clip_norm=l2_clip_norm)
        params = {"w": jnp.zeros(25)}
        return release_once(plan, batch, real, loss=linear, params=params).vector, plan

    exact, _ = released(16, 1000.0)
    for micro_batch_size in (2, 8):
        np.testing.assert_array_equal(released(micro_batch_size, 1000.0)[0], exact)
    rounded, plan = released(16, 1.0)
    other, _ = released(4, 1.0)
    assert np.abs(other - rounded).max() <= plan.release.grids[0]
    assert np.mean(other != rounded) < 0.05


@pytest.mark.slow
def test_recomputation_changes_nothing():
    """V10: activation checkpointing in the loss, and jit around the step, keep the noise."""
    plan, batch, real = plan_of(l2_clip_norm=1e6), batch_of(16), np.zeros(16, bool)
    release = releasing(plan)
    plain = release(batch, real).vector
    again = release_once(plan, batch, real, loss=jax.checkpoint(loss_fn)).vector
    np.testing.assert_array_equal(again, plain)
    assert np.any(release(batch, real, step_number=1).vector != plain)
    assert np.any(release(batch, real, seed=1).vector != plain)


def test_groups_get_their_own_noise_and_clip():
    """Per-group clip norms and shares: deviations of an empty batch follow the release."""
    plan = plan_of(
        l2_clip_norm=(1.0, 4.0), noise_shares=(1.0, 8.0), groups=(("bias", "head"), ("kernel",))
    )
    draws = release_once(plan, batch_of(16), np.zeros(16, bool)).vector
    small, large = draws[:5], draws[5:]
    for numbers, stddev, cell in zip(
        (small, large), plan.release.noise_stddevs, plan.release.grids, strict=True
    ):
        np.testing.assert_array_equal(numbers / cell, np.round(numbers / cell))
        chi2 = np.sum((numbers / stddev) ** 2)
        assert 0.1 * numbers.size < chi2 < 3.5 * numbers.size


def test_noisy_sum_stands_alone_in_an_optax_chain():
    """It is the step's own noise: chained before an optimizer it gives the same parameters."""
    plan = plan_of()
    dp = dpsgd.make_dp_step(loss_fn, optax.sgd(0.5), plan)
    chain = optax.chain(dpsgd.noisy_sum(plan), optax.sgd(0.5))
    params, key = params_of(), insecure_test_key(5)
    stepped = dp.step(dp.init(params), batch_of(16), jnp.zeros(16, bool), key).params
    sums = jax.tree.map(jnp.zeros_like, params)
    updates, _ = chain.update(sums, chain.init(params), params, noise_key=key)
    np.testing.assert_array_equal(flat(optax.apply_updates(params, updates)), flat(stepped))
    with pytest.raises(ArgumentError, match="noise_key"):
        chain.update(sums, chain.init(params), params)


def test_reused_keys_are_refused_under_every_transform():
    """V11: vmap, closure by jit, closure by scan; the key as an argument passes."""
    dp, (state, batch, real, _) = built(insecure_test_noise=False)
    key = new_noise_key()
    states = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    with pytest.raises(KeyReuseError):
        jax.vmap(lambda state: dp.step(state, batch, real, key))(states)
    with pytest.raises(KeyReuseError):
        jax.jit(lambda state: dp.step(state, batch, real, key))(state)
    with pytest.raises(KeyReuseError):
        jax.lax.scan(lambda s, _: (dp.step(s, batch, real, key), None), state, None, length=2)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.lbfgs(),
        optax.polyak_sgd(),
        optax.contrib.reduce_on_plateau(),
        optax.contrib.sophia(1e-3),
    ],
)
def test_an_optimizer_that_wants_the_loss_is_refused_before_the_first_step(optimizer):
    """V23: the loss is private."""
    with pytest.raises(ArgumentError, match=r"value|obj_fn") as error:
        built(optimizer)
    assert error.value.parameter == "optimizer" and "loss is private" in error.value.advice


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from helpers.dpsgd_cases import *
from helpers.dpsgd_cases import reader
from dpfa_jax.core import ArgumentError

def linear(params, batch):
    return batch["x"] @ params["w"]

rng = np.random.default_rng(0)
batch = {"x": (rng.integers(-64, 64, (16, 25)) / 8).astype(np.float32)}
real = np.arange(16) < 11
for clip in CLIPS:
    found = []
    for devices in DEVICES:
        key = insecure_test_key(0)
        for kind in (AxisType.Explicit, AxisType.Auto)[devices == 1:]:
            mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,))
            place = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))
            plan = plan_of(l2_clip_norm=clip, micro_batch_size=8)
            dp = dpsgd.make_dp_step(linear, reader(), plan)
            state = dp.init(place({"w": jnp.zeros(25)}, P()))
            split = place((batch, real), P("data"))
            out = dp.step(state, *split, key)
            found.append(np.asarray(out.opt_state["w"]))
            assert jax.typeof(out.params["w"]).sharding == jax.typeof(state.params["w"]).sharding
            again = jax.jit(dp.step)(out, *split, key)  # a state that a step gave, traced
            assert again.params["w"].sharding.is_fully_replicated
        if devices == 1:
            continue
        plan = plan_of(l2_clip_norm=clip, micro_batch_size=2)
        dp = dpsgd.make_dp_step(linear, reader(), plan, axis_name="data")
        sharded = jax.shard_map(dp.step, mesh=mesh, in_specs=(P(), P("data"), P("data"), P()),
                                out_specs=P())
        found.append(np.asarray(jax.jit(sharded)(state, batch, real, key).opt_state["w"]))
    for other in found[1:]:
        if clip == 1000.0:
            np.testing.assert_array_equal(other, found[0])
        else:
            assert np.abs(other - found[0]).max() <= plan.release.grids[0] / 8
            assert np.mean(other != found[0]) <= 0.08
    unnamed = dpsgd.make_dp_step(linear, reader(), plan_of())
    try:
        jax.jit(jax.shard_map(unnamed.step, mesh=mesh, in_specs=(P(), P("data"), P("data"), P()),
                              out_specs=P(), check_vma=False))(state, batch, real, key)
    except ArgumentError as error:
        assert error.parameter == "axis_name"
    else:
        raise AssertionError("noise before the all-reduce was not refused")
    few = jax.tree.map(lambda x: x[:2], (batch, real))
    try:
        jax.jit(jax.shard_map(dp.step, mesh=mesh, in_specs=P(), out_specs=P()))(state, *few, key)
    except ArgumentError as error:
        assert error.parameter == "batch/x" and "once a shard" in str(error)
    else:
        raise AssertionError("examples that every shard holds were not refused")
    for spec, rows in ((P(), few), (P("data"), (batch, real))):
        blind = jax.shard_map(dp.step, mesh=mesh, in_specs=(P(), spec, spec, P()), out_specs=P(),
                              check_vma=False)
        for run in (blind, jax.jit(blind)):
            try:
                run(state, *rows, key)
            except ArgumentError as error:
                assert error.parameter == "axis_name" and "check_vma=False" in error.advice
            else:
                raise AssertionError("shards of which nothing is known were not refused")
print("all equal")
"""


@pytest.mark.parametrize(
    ("clips", "devices"),
    [((1000.0,), (1, 8)), pytest.param((1000.0, 1.0), (1, 2, 8), marks=pytest.mark.slow)],
)
def test_sharding_does_not_change_what_is_released(clips, devices):
    """V10: 1, 2 and 8 devices, by jit and by shard_map: psum first, one noise; else refused.

    So are examples that each shard holds, and any where types do not tell (check_vma=False).
    """
    program = f"CLIPS, DEVICES = {clips}, {devices}\n{SHARDED}"
    is_optimised = len(clips) > 1  # in the long suite
    assert forced_devices.printed(8, "-c", program, is_optimised=is_optimised) == "all equal"
