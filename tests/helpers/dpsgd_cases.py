"""A small model with known gradients, and the checks that every build of the step must pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpfa_jax import dpsgd
from dpfa_jax.core import CoverageError
from dpfa_jax.noise.keys import insecure_test_key
from dpfa_jax.release import TrainingRelease

PARAMETERS = 5 * 4 + 4 + 1


def params_of(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "bias": jnp.asarray(0.1, jnp.float32),
        "head": jnp.asarray(rng.standard_normal(4), jnp.float32),
        "kernel": jnp.asarray(rng.standard_normal((5, 4)), jnp.float32),
    }


def batch_of(rows: int, seed: int = 1, scale: float = 1.0) -> dict:
    rng = np.random.default_rng(seed)
    x = (scale * rng.standard_normal((rows, 5))).astype(np.float32)
    return {"x": x, "y": rng.standard_normal(rows).astype(np.float32)}


def loss_fn(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["kernel"])
    return 0.5 * (hidden @ params["head"] + params["bias"] - batch["y"]) ** 2


def clipped_by_hand(params, batch, is_real, l2_clip_norm: float, dtype) -> np.ndarray:
    """(rows, PARAMETERS) clipped gradients by the chain rule in numpy, in `dtype`."""
    kernel, head, bias = (np.asarray(params[k], dtype) for k in ("kernel", "head", "bias"))
    rows = []
    for x, y, real in zip(batch["x"].astype(dtype), batch["y"].astype(dtype), is_real, strict=True):
        hidden = np.tanh(x @ kernel)
        error = hidden @ head + bias - y
        parts = (error, error * hidden, np.outer(x, error * head * (1 - hidden**2)))
        row = np.concatenate([np.ravel(part) for part in parts]).astype(dtype)
        norm = np.sqrt(np.sum(row * row, dtype=dtype))
        rows.append(row * min(dtype(1), dtype(l2_clip_norm) / norm) * dtype(real))
    return np.stack(rows)


def flat(tree) -> np.ndarray:
    """All leaves as one float64 vector, in `jax.tree.leaves` order."""
    return np.concatenate(
        [np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)]
    )


def plan_of(**changes) -> dpsgd.DPSGDPlan:
    """A plan of 16 rows, one micro-batch, for the small model, with test noise."""
    fields = {"steps": 1000, "delta": 1e-5, "micro_batch_size": 16, "groups": None}
    fields |= {name: changes.pop(name) for name in tuple(changes) if name in fields}
    release = {
        "l2_clip_norm": 1.0,
        "noise_multiplier": 1.0,
        "dataset_size": 1000,
        "expected_batch_size": 8,
        "num_parameters": PARAMETERS,
        "truncated_batch_size": 16,
        "insecure_test_noise": True,
    }
    return dpsgd.DPSGDPlan(TrainingRelease(**release | changes), **fields)


@dataclasses.dataclass(frozen=True)
class Released:
    """What one step of plain descent released: noised sums, in the units of the clip norm."""

    plan: dpsgd.DPSGDPlan
    sums: dict

    @property
    def vector(self) -> np.ndarray:
        return flat(self.sums)


def releasing(plan, *, loss=loss_fn, params=None):
    """(batch, is_real) -> `Released`, by one built step, which is compiled once."""
    params = params_of() if params is None else params
    dp = dpsgd.make_dp_step(loss, reader(), plan)
    expected = plan.release.expected_batch_size

    def release(batch, is_real, *, seed=0, step_number=0):
        state = dp.init(params)._replace(step=np.asarray(step_number, np.int32))
        state = dp.step(state, batch, jnp.asarray(is_real), insecure_test_key(seed))
        return Released(plan, jax.tree.map(lambda mean: mean * expected, state.opt_state))

    return release


def release_once(plan, batch, is_real, *, loss=loss_fn, params=None):
    return releasing(plan, loss=loss, params=params)(batch, is_real)


def reader() -> optax.GradientTransformation:
    """Keeps the released gradient as its state and moves nothing, so no rounding hides it."""

    def update(means, state, params=None):
        del state, params
        return jax.tree.map(jnp.zeros_like, means), means

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def check_clipped_sum() -> None:
    """The sum is that of clipped examples, before noise (noise is small against the clip norm)."""
    plan = plan_of(noise_multiplier=2.0**-12)
    batch, real = batch_of(16), np.arange(16) < 13
    found = release_once(plan, batch, real).vector
    expected = clipped_by_hand(params_of(), batch, real, 1.0, np.float64).sum(axis=0)
    np.testing.assert_allclose(found, expected, atol=13 * 7e-5 + 8 * 2.0**-12)


def check_one_example_moves_the_sum_by_at_most_the_clip_norm() -> None:
    """Same noise with and without an example: the released sums differ by the clip norm at most."""
    plan = plan_of(noise_multiplier=2.0**-8)
    batch, real = batch_of(16), np.arange(16) < 13
    batch["y"] *= 100.0
    release = releasing(plan)
    with_it = release(batch, real).vector
    without = release(batch, real & (np.arange(16) != 4)).vector
    slack = np.sqrt(PARAMETERS) * plan.release.grids[0]
    assert np.linalg.norm(with_it - without) <= 1.0 + slack


def check_non_finite_examples_count_as_zero() -> None:
    """An example with NaN or infinity leaves exactly the release of its absence."""
    plan = plan_of()
    batch, real = batch_of(16), np.arange(16) < 13
    release = releasing(plan)
    without = release(batch, real & (np.arange(16) > 2)).vector
    batch["x"][0], batch["x"][1], batch["y"][2] = np.nan, np.inf, -np.inf
    np.testing.assert_array_equal(release(batch, real).vector, without)


def check_padding_counts_as_zero() -> None:
    """What a padding row holds is not seen."""
    plan = plan_of()
    batch, real = batch_of(16), np.arange(16) < 13
    release = releasing(plan)
    expected = release(batch, real).vector
    batch["x"][13:] = [[3.0], [np.nan], [np.inf]]
    np.testing.assert_array_equal(release(batch, real).vector, expected)


def check_a_mask_is_drawn_by_its_own_key() -> None:
    """What a padding row's random key is is not seen; generators that would show it are refused."""

    def dropped_out(params, batch):
        def kept(seed):
            return jax.random.bernoulli(jax.random.key(seed, impl=impl), 0.5, (5,))

        return loss_fn(params, batch | {"x": batch["x"] * jax.vmap(kept)(batch["seed"])})

    plan, real = plan_of(), np.arange(16) > 2
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        release = releasing(plan, loss=dropped_out)
        batch = batch_of(16) | {"seed": np.arange(16, dtype=np.uint32)}
        try:
            expected = release(batch, real).vector
        except CoverageError:
            assert impl != "threefry2x32"
            continue
        batch["seed"][0] = 99
        np.testing.assert_array_equal(release(batch, real).vector, expected)


def check_noise_on_every_number() -> None:
    """An empty batch releases pure noise of the planned deviation on every parameter."""
    plan = plan_of()
    draws = _noises(plan, 400)
    deviations = draws.std(axis=0)
    # 400 draws: a deviation's own is 1 / sqrt(800); 4.4 of them is 1e-5, over 25 parameters.
    assert np.all(np.abs(deviations - 1.0) < 4.4 / np.sqrt(800.0)), deviations


def check_noise_differs_between_steps_and_numbers() -> None:
    """V11: under one key no two steps and no two parameters share their noise."""
    draws = _noises(plan_of(), 400)
    correlation = np.corrcoef(np.concatenate([draws[:-1], draws[1:]], axis=1).T)
    off_diagonal = correlation[~np.eye(len(correlation), dtype=bool)]
    assert np.all(np.abs(off_diagonal) < 5.2 / np.sqrt(399.0)), np.abs(off_diagonal).max()
    assert len(np.unique(draws[:, 1])) > 50


def check_released_values_lie_on_the_grid() -> None:
    """V12: every released sum is a multiple of the public grid."""
    plan = plan_of(expected_batch_size=8)
    cells = release_once(plan, batch_of(16), np.ones(16, bool)).vector / plan.release.grids[0]
    np.testing.assert_array_equal(cells, np.round(cells))


def check_division_by_the_expected_batch_size() -> None:
    """The same example weighs the same whatever the number of others."""
    plan = plan_of(noise_multiplier=2.0**-12)
    batch = batch_of(16, scale=30.0)
    batch = {name: np.repeat(value[:1], 16, axis=0) for name, value in batch.items()}
    release = releasing(plan)
    one, four = (np.linalg.norm(release(batch, np.arange(16) < n).vector) for n in (1, 4))
    assert abs(one - 1.0) < 0.02 and abs(four - 4.0) < 0.02, (one, four)


def _noises(plan, steps: int) -> np.ndarray:
    """(steps, PARAMETERS) released sums of empty batches under one key."""
    dp = dpsgd.make_dp_step(loss_fn, reader(), plan)

    @jax.jit
    def run(state, batch, noise_key):
        def body(carry, _):
            state, noise_key = carry
            state = dp.step(state, batch, jnp.zeros(16, bool), noise_key)
            return (state, noise_key), state.opt_state

        return jax.lax.scan(body, (state, noise_key), None, length=steps)[1]

    released = run(dp.init(params_of()), batch_of(16), insecure_test_key(3))
    expected = plan.release.expected_batch_size
    return np.concatenate(
        [np.asarray(leaf).reshape(steps, -1) for leaf in jax.tree.leaves(released)], axis=1
    ) * float(expected)
