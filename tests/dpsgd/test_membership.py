"""V14: membership inference on trained models. No evidence of privacy: a better attack may find
more. It can only refute the claim, and does where noise or clipping is left out.
"""

import math
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.dpsgd_cases import plan_of
from helpers.privacy_bounds import (
    ALPHA,
    auc,
    auc_bounds,
    claimed_epsilon,
    claimed_largest_auc,
    largest_auc,
    one_run_epsilon_lower_bound,
)
from scipy import stats

from dpfa_jax import dot_product_attention, dpsgd
from dpfa_jax.accounting.losses import gaussian_delta_at
from dpfa_jax.clipping import trees
from dpfa_jax.noise import fields
from dpfa_jax.noise.keys import insecure_test_key

EXAMPLES, FEATURES = 32, 64
WORDS, LENGTH, WIDTH = 64, 6, 8
MOST = float(stats.norm.cdf(math.sqrt(0.5)))  # Phi(mu / sqrt(2)) of mu = 1
CANARIES, TEXTS, GUESSES, DELTA = 1000, 64, 300, 3e-6


def linear_loss(params, batch):
    return jax.nn.softplus(-batch["y"] * (batch["x"] @ params["w"]))


def linear_start() -> dict:
    return {"w": jnp.zeros(FEATURES)}


def transformer_loss(params, batch):
    x = params["words"][batch["x"]] + params["places"]
    query, key, value = (x[:, :, None] @ params[name] for name in ("query", "key", "value"))
    x = x + dot_product_attention(query, key, value)[:, :, 0]
    x = x + jax.nn.gelu(x @ params["up"]) @ params["down"]
    return jax.nn.softplus(-batch["y"] * (x.mean(axis=1) @ params["head"]))


def transformer_start() -> dict:
    rng = np.random.default_rng(0)
    shapes = {
        "words": (WORDS, WIDTH), "places": (LENGTH, WIDTH), "query": (WIDTH, WIDTH),
        "key": (WIDTH, WIDTH), "value": (WIDTH, WIDTH), "up": (WIDTH, 2 * WIDTH),
        "down": (2 * WIDTH, WIDTH), "head": (WIDTH,),
    }  # fmt: skip
    return {
        name: jnp.asarray(rng.standard_normal(shape) / math.sqrt(WIDTH), jnp.float32)
        for name, shape in shapes.items()
    }


def examples_for(model: str, rng: np.random.Generator, rows: int = EXAMPLES) -> dict:
    """Labels are coin flips, so whatever is learnt of an example is its membership."""
    if model == "linear":
        x = rng.standard_normal((rows, FEATURES)).astype(np.float32) / math.sqrt(FEATURES)
    else:
        x = rng.integers(0, WORDS, (rows, LENGTH)).astype(np.int32)
    return {"x": x, "y": rng.choice([-1.0, 1.0], rows).astype(np.float32)}


def numbers_in(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


# Model: (loss, start, optimizer, steps, expected batch size, noise multiplier).
MODELS = {
    "linear": (linear_loss, linear_start, optax.sgd(16.0), 20, EXAMPLES, math.sqrt(20.0)),
    "transformer": (transformer_loss, transformer_start, optax.adam(0.02), 60, 16, 4.0),
}


def plan_for(model: str) -> dpsgd.DPSGDPlan:
    _, start, _, steps, expected_batch_size, noise_multiplier = MODELS[model]
    return plan_of(
        noise_multiplier=noise_multiplier, num_parameters=numbers_in(start()), steps=steps,
        dataset_size=EXAMPLES, expected_batch_size=expected_batch_size,
        truncated_batch_size=EXAMPLES, micro_batch_size=EXAMPLES,
    )  # fmt: skip


def losses_of_models(model: str, models: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(losses, is_member), both (models, EXAMPLES): one set of examples, coins for each model.

    Batches are the plan's own; an example that is no member is drawn like the others and left out.
    """
    loss, start, optimizer, *_ = MODELS[model]
    plan = plan_for(model)
    dp = dpsgd.make_dp_step(loss, optimizer, plan)
    rng = np.random.default_rng(seed)
    examples = examples_for(model, rng)
    is_member = rng.random((models, EXAMPLES)) < 0.5
    drawn = np.stack([np.stack([*plan.index_batches(rng)]) for _ in range(models)])

    @jax.jit
    def train(examples, drawn, is_member, noise_keys):
        def one(_, inputs):
            drawn, is_member, noise_keys = inputs

            def body(state, inputs):
                indices, noise_key = inputs
                batch = jax.tree.map(lambda leaf: leaf[indices], examples)
                is_real = (indices >= 0) & is_member[indices]
                return dp.step(state, batch, is_real, noise_key), None

            state, _ = jax.lax.scan(body, dp.init(start()), (drawn, noise_keys))
            return None, loss(state.params, examples)

        return jax.lax.scan(one, None, (drawn, is_member, noise_keys))[1]

    keys = insecure_test_key(seed, (models, plan.steps))
    return np.asarray(train(examples, drawn, is_member, keys), np.float64), is_member


def likelihood_ratios(losses: np.ndarray, is_member: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scores, is_member) of the second half of the models; the first half taught the attack.

    Source: Carlini et al., "Membership inference attacks from first principles" (2022): normal
    log-odds of the label, a mean for each example in and out, one variance. Everything the attack
    knows is independent of the models it is used on, so each example's ROC curve, and by convexity
    the pooled one, obeys the claim.
    """
    log_odds = -losses - np.log(-np.expm1(-losses))
    half = len(losses) // 2
    known, known_member, asked = log_odds[:half], is_member[:half], log_odds[half:]
    means = [np.mean(known, axis=0, where=side) for side in (known_member, ~known_member)]
    residuals = known - np.where(known_member, *means)
    ratios = (asked - means[1]) ** 2 - (asked - means[0]) ** 2
    return ratios / (2.0 * residuals.var()), is_member[half:]


def noise_times(factor: float):
    noise = fields.parameter_noise
    return mock.patch.object(fields, "parameter_noise", lambda *a: factor * noise(*a))


@pytest.mark.parametrize(
    ("model", "models"),
    [
        ("linear", 60),
        pytest.param("linear", 600, marks=pytest.mark.slow),
        pytest.param("transformer", 128, marks=pytest.mark.slow),
    ],
)
def test_membership_inference_stays_below_the_gaussian_maximum(model, models):
    """V14: upper bound of the AUC <= the largest that the claim allows; without noise it is above.

    Phi(mu / sqrt(2)) where every example is in every batch; sampled, 1 - int f of the accountant's
    curve, which is less than that of any Gaussian above the curve.
    """
    plan = plan_for(model)
    most = MOST if models == 60 else claimed_largest_auc(plan.release, plan.steps)
    assert most == pytest.approx(MOST, abs=0.01)
    attacked = auc_bounds(*likelihood_ratios(*losses_of_models(model, models, 1)))
    assert attacked[1] <= most
    with noise_times(0.0):
        attacked = auc_bounds(*likelihood_ratios(*losses_of_models(model, models, 2)))
    assert attacked[0] > most + 0.05


def right_guesses(plan: dpsgd.DPSGDPlan, seed: int) -> int:
    """Of GUESSES about CANARIES examples, each in or out of one training run by a coin of its own.

    A canary's gradient is one number of the model that no text and no other canary moves, far
    beyond the clip norm. Guessed from the last iterate alone: the highest are in, the lowest out.
    """

    def loss(params, batch):
        words = {name: leaf for name, leaf in params.items() if name != "canaries"}
        size = 50.0 * params["canaries"][batch["canary"]]
        return jnp.where(batch["canary"] < 0, transformer_loss(words, batch), size)

    rng = np.random.default_rng(seed)
    is_in = rng.random(CANARIES) < 0.5
    examples = examples_for("transformer", rng, TEXTS + CANARIES)
    examples["canary"] = np.concatenate([np.full(TEXTS, -1), np.arange(CANARIES)]).astype(np.int32)
    stays = np.concatenate([np.ones(TEXTS, bool), is_in])
    dp = dpsgd.make_dp_step(loss, optax.sgd(0.5), plan)
    state = dp.init(transformer_start() | {"canaries": jnp.zeros(CANARIES)})
    keys = insecure_test_key(seed, (plan.steps,))
    for indices, noise_key in zip(plan.index_batches(rng), keys, strict=True):
        batch, is_real = dpsgd.take_batch(examples, indices)
        is_member = is_real & stays[indices]
        state = dp.step(state, batch, jnp.asarray(is_member), noise_key)
    ranked = is_in[np.argsort(np.asarray(state.params["canaries"]))]  # descent: members are lowest
    return int(ranked[: GUESSES // 2].sum() + (~ranked[-(GUESSES // 2) :]).sum())


def unclipped():
    squares = trees.squared_norms
    return mock.patch.object(trees, "squared_norms", lambda gradient, _: squares(gradient, 1e6))


@pytest.mark.slow
def test_one_run_with_many_canaries_shows_no_more_than_claimed():
    """V14: one transformer trained on Poisson batches; a fifth of the noise, or no clipping, and
    the bound is above the claim.
    """
    rows = TEXTS + CANARIES
    plan = plan_of(
        noise_multiplier=4.0, num_parameters=numbers_in(transformer_start()) + CANARIES, steps=16,
        dataset_size=rows, expected_batch_size=rows // 2, truncated_batch_size=rows,
        micro_batch_size=rows // 8,
    )  # fmt: skip
    claimed = claimed_epsilon(plan.release, plan.steps, DELTA)

    def bound(seed: int) -> float:
        right = right_guesses(plan, seed)
        return one_run_epsilon_lower_bound(right, GUESSES, CANARIES, DELTA)

    assert 0.0 < bound(1) <= claimed
    for defect in (noise_times(0.2), unclipped()):
        with defect:
            assert bound(2) > claimed


def test_the_bounds_are_met_by_what_they_are_tight_for():
    """Controls of the yardsticks: a Gaussian's curve, randomised response, equal neighbours."""
    curve = np.linspace(0.0, 8.0, 200)
    for mu in (0.2, 1.0, 3.0):
        most = largest_auc(curve, [gaussian_delta_at(mu, epsilon) for epsilon in curve])
        assert 0.0 <= most - stats.norm.cdf(mu / math.sqrt(2.0)) < 1e-3
    # Each of 400 coins told truly with e / (1 + e): the bound passes 1 as rarely as it says.
    chance = stats.binom(400, 1.0 / (1.0 + math.exp(-1.0)))
    refuting = int(chance.isf(ALPHA)) + 1
    assert 0.3 * ALPHA < chance.sf(refuting - 1) <= ALPHA
    borne, refuted = (
        one_run_epsilon_lower_bound(right, 400, 400, 0.0) for right in (refuting - 1, refuting)
    )
    assert borne <= 1.0 < refuted
    assert one_run_epsilon_lower_bound(refuting, 400, 1000, 1e-5) < refuted
    rng = np.random.default_rng(0)
    is_member = rng.random((200, 8)) < 0.5
    low, high = auc_bounds(rng.standard_normal((200, 8)), is_member)
    assert low < 0.5 < high < low + 0.1
    shifted = rng.standard_normal((200, 8)) + is_member
    assert auc(shifted.ravel(), is_member.ravel()) == pytest.approx(MOST, abs=0.03)
    low, high = auc_bounds(shifted, is_member)
    assert low < MOST < high < low + 0.1
