"""White-box audit of the built step (V13, V14): no more is seen of a canary than is claimed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.dpsgd_cases import plan_of
from scipy import stats

from dpfa_jax import dpsgd
from dpfa_jax.noise import fields
from dpfa_jax.noise.keys import insecure_test_key

ALPHA = 1e-3
CLAIMED_MU = 2.0  # clip norm / noise deviation
THRESHOLD = 0.5  # pre-registered: half way between absence (0) and presence (1), in clip norms


def scores(present: bool, steps: int, seed: int) -> np.ndarray:
    """The released sums along the canary's gradient, one for each step, in clip norms."""
    plan = plan_of(
        noise_multiplier=1.0 / CLAIMED_MU, num_parameters=6, steps=steps, micro_batch_size=16
    )
    direction = jnp.asarray([3.0, -1.0, 0.5, 0.0, 2.0, 1.0])

    def loss(params, batch):
        return batch["size"] * (params["w"] @ direction)

    dp = dpsgd.make_dp_step(loss, optax.sgd(-float(plan.release.expected_batch_size)), plan)
    batch = {"size": jnp.zeros(16).at[3].set(50.0 if present else 0.0)}

    @jax.jit
    def run(state, noise_keys):
        def body(state, noise_key):
            following = dp.step(state._replace(params=zero), batch, jnp.ones(16, bool), noise_key)
            return following, following.params["w"]

        zero = {"w": jnp.zeros(6)}
        return jax.lax.scan(body, state, noise_keys)[1]

    sums = run(dp.init({"w": jnp.zeros(6)}), insecure_test_key(seed, (steps,)))
    return np.asarray(sums, np.float64) @ np.asarray(direction / jnp.linalg.norm(direction))


def mu_lower_bound(present: np.ndarray, absent: np.ndarray) -> float:
    """Clopper-Pearson bounds of both error rates, ALPHA in all, turned into a Gaussian mu."""

    def rate_bound(hits: int, runs: int) -> float:
        return float(stats.beta.ppf(ALPHA / 2.0, hits, runs - hits + 1)) if hits else 0.0

    found = rate_bound(int((present > THRESHOLD).sum()), len(present))
    quiet = rate_bound(int((absent <= THRESHOLD).sum()), len(absent))
    return float(stats.norm.ppf(found) + stats.norm.ppf(quiet))


@pytest.mark.parametrize("steps", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_canary_shows_no_more_than_claimed(steps, monkeypatch):
    """V14: the lower bound on mu stays below the claim, near it; noise x 0.8 goes above."""
    bound = mu_lower_bound(scores(True, steps, 1), scores(False, steps, 2))
    assert 0.8 * CLAIMED_MU < bound <= CLAIMED_MU
    noise = fields.parameter_noise
    monkeypatch.setattr(fields, "parameter_noise", lambda *a: 0.8 * noise(*a))
    assert mu_lower_bound(scores(True, steps, 3), scores(False, steps, 4)) > CLAIMED_MU
