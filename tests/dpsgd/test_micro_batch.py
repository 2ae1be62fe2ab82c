"""The largest micro-batch is found from the compiler's figures, without running anything."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers.dpsgd_cases import plan_of

from dpfa_jax import dpsgd
from dpfa_jax.core import ArgumentError
from dpfa_jax.dpsgd import micro_batch
from dpfa_jax.noise.keys import new_noise_key

WIDTH, ROWS = 32, 8


def loss(params, batch):
    hidden = batch["x"]
    for _ in range(2):
        hidden = jnp.tanh(hidden @ params["kernel"])
    return hidden.sum(axis=(1, 2))


PLAN = plan_of(
    num_parameters=WIDTH**2,
    truncated_batch_size=ROWS,
    micro_batch_size=1,
    insecure_test_noise=False,
)
SHAPES = (
    {"kernel": jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)},
    {"x": jax.ShapeDtypeStruct((ROWS, 128, WIDTH), jnp.float32)},
)
CALL = (loss, *SHAPES, PLAN, optax.sgd(0.1))


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a step was run")

    monkeypatch.setattr(jax.stages.Compiled, "__call__", refuse)


@pytest.mark.slow
def test_figures_grow_with_the_micro_batch(nothing_runs, monkeypatch):
    """A limit just below what all rows need finds a smaller one; below what one needs, V23."""
    known = {}

    def remembered(loss_fn, params, batch, plan, *rest):
        size = plan.micro_batch_size
        if size not in known:
            known[size] = real(loss_fn, params, batch, plan, *rest)
        return known[size]

    real = micro_batch.step_bytes
    monkeypatch.setattr(micro_batch, "step_bytes", remembered)
    one, all_rows = (
        remembered(*CALL[:3], dataclasses.replace(PLAN, micro_batch_size=size), CALL[4])
        for size in (1, ROWS)
    )
    # Parameters, their copies and the batch are counted: they alone are more than the first.
    assert 4 * (2 * WIDTH**2 + ROWS * 128 * WIDTH) < one < 0.6 * all_rows
    assert dpsgd.largest_micro_batch(*CALL, memory_bytes=all_rows) == ROWS
    assert 1 <= dpsgd.largest_micro_batch(*CALL, memory_bytes=all_rows - 1) < ROWS
    with pytest.raises(ArgumentError, match=f"one example at a time needs {one} bytes") as error:
        dpsgd.largest_micro_batch(*CALL, memory_bytes=one - 1)
    assert error.value.parameter == "memory_bytes"


@pytest.mark.parametrize(
    ("limit", "expected"), [(24_000, 24), (23_999, 12), (8_000, 8), (1_000, 1), (5_999, 4)]
)
def test_the_search_is_short_and_exact(limit, expected, monkeypatch):
    """Of the eight divisors of 24 at most four are compiled, none twice."""
    compiled = []

    def counted(loss_fn, params, batch, plan, optimizer, donate_state):
        compiled.append(plan.micro_batch_size)
        return 1000 * plan.micro_batch_size

    monkeypatch.setattr(micro_batch, "step_bytes", counted)
    plan = plan_of(truncated_batch_size=24, micro_batch_size=1)
    call = (*CALL[:3], plan, CALL[4])
    assert dpsgd.largest_micro_batch(*call, memory_bytes=limit) == expected
    assert len(compiled) <= 4 and len(set(compiled)) == len(compiled)


def test_a_device_that_does_not_tell_its_memory_is_named(monkeypatch):
    """V23: the CPU tells none; a device that does is believed."""

    class Told:
        def memory_stats(self):
            return {"bytes_limit": 7}

    class Silent:
        def memory_stats(self):
            return None

    monkeypatch.setattr(micro_batch, "step_bytes", lambda *arguments: 7)
    monkeypatch.setattr(jax, "devices", lambda: [Silent()])
    with pytest.raises(ArgumentError, match="memory_bytes = None"):
        dpsgd.largest_micro_batch(*CALL)
    monkeypatch.setattr(jax, "devices", lambda: [Told()])
    assert dpsgd.largest_micro_batch(*CALL) == ROWS


def test_the_plans_own_limit_is_kept(monkeypatch):
    """A micro-batch whose gradients pass `per_example_bytes` does not fit; other errors pass on.

    The gradients of this loop exist for all rows at once and may fill the limit to the last byte.
    """

    def through_a_loop(params, batch):
        def body(hidden, _):
            return jnp.tanh(hidden @ params["kernel"]), None

        return jax.lax.scan(body, batch["x"], None, length=3)[0].sum(axis=(1, 2))

    def traced(loss_fn, params, batch, plan, optimizer, donate_state):
        dp = dpsgd.make_dp_step(loss_fn, optimizer, plan)
        real = jax.ShapeDtypeStruct((ROWS,), jnp.bool_)
        jax.eval_shape(dp.step, jax.eval_shape(dp.init, params), batch, real, new_noise_key())
        return 1

    monkeypatch.setattr(micro_batch, "step_bytes", traced)
    few = dataclasses.replace(PLAN, per_example_bytes=4 * 4 * WIDTH**2)
    found = dpsgd.largest_micro_batch(through_a_loop, *SHAPES, few, CALL[4], memory_bytes=2**40)
    assert found == 4
    with pytest.raises(ArgumentError, match="losses of shape"):
        dpsgd.largest_micro_batch(
            lambda p, b: loss(p, b).mean(), *SHAPES, PLAN, CALL[4], memory_bytes=2**40
        )
