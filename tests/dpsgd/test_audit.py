"""White-box audit of the built step (V13, V14): no more is seen of a canary than is claimed."""

import pytest
from helpers.canary import KINDS, batches_with_the_canary, canary_plan, scores
from helpers.privacy_bounds import mu_lower_bound

from dpfa_jax.noise import fields

CLAIMED_MU = 2.0  # 1 / noise multiplier, all that one turn of an example shows
THRESHOLD = 0.5  # pre-registered: half way between absence (0) and presence (1)


def bound(kind: str, turns: int, seed: int) -> float:
    plan = canary_plan(
        kind,
        noise_multiplier=1.0 / CLAIMED_MU,
        steps=turns * len(KINDS[kind].get("noise_strategy", (1.0,))),
    )
    runs = [batches_with_the_canary(plan, is_present) for is_present in (True, False)]
    return mu_lower_bound(*scores(plan, runs, seed), THRESHOLD)


@pytest.mark.parametrize(
    ("kind", "turns"),
    [
        ("flat", 2_000),
        pytest.param("flat", 100_000, marks=pytest.mark.slow),
        *(pytest.param(kind, 10_000, marks=pytest.mark.slow) for kind in KINDS),
    ],
)
def test_a_canary_shows_no_more_than_claimed(kind, turns, monkeypatch):
    """V14: the lower bound on mu stays below the claim, near it; noise x 0.8 goes above.

    One flat clip norm, per-layer groups with noise of their own, adaptive norms with their counts,
    and correlated noise, where a turn is the steps between two of an example's batches.
    """
    assert 0.8 * CLAIMED_MU < bound(kind, turns, 1) <= CLAIMED_MU
    noise = fields.parameter_noise
    monkeypatch.setattr(fields, "parameter_noise", lambda *a: 0.8 * noise(*a))
    assert bound(kind, turns, 3) > CLAIMED_MU
