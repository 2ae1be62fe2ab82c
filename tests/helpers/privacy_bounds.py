"""What an attack's success says about a mechanism, and how much success a claim allows.

All bounds hold with confidence 1 - alpha; an attack can refute a claim, never confirm one.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from dpfa_jax.accounting.guarantee import answers_epsilon
from dpfa_jax.accounting.losses import FINE
from dpfa_jax.release import TrainingRelease

ALPHA = 1e-3


def rate_at_least(hits: int, runs: int, alpha: float = ALPHA) -> float:
    """Lower confidence bound of a probability (Clopper and Pearson 1934)."""
    return float(stats.beta.ppf(alpha, hits, runs - hits + 1)) if hits else 0.0


def mu_lower_bound(
    present: np.ndarray, absent: np.ndarray, threshold: float = 0.0, alpha: float = ALPHA
) -> float:
    """Of any mu-GDP mechanism (Dong, Roth and Su 2022), from scores on both neighbours.

    The threshold is fixed before the scores are seen. Both error rates are bounded, `alpha` in all.
    """
    found = rate_at_least(int((present > threshold).sum()), len(present), alpha / 2.0)
    quiet = rate_at_least(int((absent <= threshold).sum()), len(absent), alpha / 2.0)
    return float(stats.norm.ppf(found) + stats.norm.ppf(quiet))


def epsilon_lower_bound(
    present: np.ndarray, absent: np.ndarray, threshold: float, delta: float, alpha: float = ALPHA
) -> float:
    """Of any (epsilon, delta)-private mechanism: P(present) <= e^epsilon P(absent) + delta."""
    found = rate_at_least(int((present > threshold).sum()), len(present), alpha / 2.0)
    false = 1.0 - rate_at_least(int((absent <= threshold).sum()), len(absent), alpha / 2.0)
    return math.log(max(found - delta, 1e-12) / false)


def one_run_p_value(
    correct: int, guesses: int, canaries: int, epsilon: float, delta: float
) -> float:
    """Largest chance of `correct` or more right ones of `guesses`, under (epsilon, delta).

    `canaries` examples were included by fair coins of their own, all in one run, and the attacker
    guessed the coins of `guesses` of them and abstained from the others.
    Source: Steinke, Nasr and Jagielski, "Privacy auditing with one (1) training run" (2023),
    theorem 5.2: f(v) + 2 m delta max_i (f(v - i) - f(v)) / i, f the tail of a binomial.
    """
    right = 1.0 / (1.0 + math.exp(-epsilon))
    tail = stats.binom.sf(np.arange(correct, -1, -1) - 1, guesses, right)  # f(v), f(v - 1) ..
    rise = ((tail[1:] - tail[0]) / np.arange(1, correct + 1)).max() if correct else 0.0
    return float(min(1.0, tail[0] + 2.0 * canaries * delta * rise))


def one_run_epsilon_lower_bound(
    correct: int, guesses: int, canaries: int, delta: float, alpha: float = ALPHA
) -> float:
    """The largest epsilon that `correct` right guesses refute, by bisection from below; 0: none."""
    if one_run_p_value(correct, guesses, canaries, 0.0, delta) > alpha:
        return 0.0
    low, high = 0.0, 1.0
    while one_run_p_value(correct, guesses, canaries, high, delta) <= alpha:
        low, high = high, 2.0 * high
    for _ in range(40):
        middle = 0.5 * (low + high)
        refuted = one_run_p_value(correct, guesses, canaries, middle, delta) <= alpha
        low, high = (middle, high) if refuted else (low, middle)
    return low


def largest_auc(epsilons: Sequence[float], deltas: Sequence[float]) -> float:
    """The largest area under any attack's ROC curve, given points of a privacy curve.

    Each (epsilon, delta), in both directions of neighbours, keeps the miss rate at false-alarm rate
    a above f(a) = max(0, 1 - delta - e^epsilon a, e^-epsilon (1 - delta - a)) (Wasserman and Zhou
    2010; Kairouz et al. 2015), and the area is at most 1 - int f. Of mu-GDP that is
    Phi(mu / sqrt(2)); no mu that dominates the curve is needed. Few points only loosen it, and so
    does the midpoint rule, which is never above the integral of a convex function.
    """
    cells = 20_000
    alarms = (np.arange(cells) + 0.5) / cells
    misses = np.zeros(cells)
    for epsilon, delta in zip(epsilons, deltas, strict=True):
        misses = np.maximum(misses, 1.0 - delta - math.exp(epsilon) * alarms)
        misses = np.maximum(misses, math.exp(-epsilon) * (1.0 - delta - alarms))
    return float(1.0 - misses.mean())


def claimed_epsilon(release: TrainingRelease, steps: int, delta: float) -> float:
    """As `accounting.epsilon`, for any delta: attacks have their power where nobody would claim."""
    return answers_epsilon(((release.record(), steps),), delta, "pld", FINE)


def claimed_largest_auc(release: TrainingRelease, steps: int) -> float:
    """`largest_auc` of the accountant's curve, at deltas that cover it."""
    deltas = (1e-3, 0.01, 0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8)
    return largest_auc([claimed_epsilon(release, steps, delta) for delta in deltas], deltas)


def auc(scores: np.ndarray, is_member: np.ndarray) -> float:
    """Chance that a member's score is above a non-member's, ties counted half."""
    ranks = stats.rankdata(scores)
    members = int(is_member.sum())
    others = is_member.size - members
    return float((ranks[is_member].sum() - members * (members + 1) / 2) / (members * others))


def auc_bounds(
    scores: np.ndarray, is_member: np.ndarray, alpha: float = ALPHA
) -> tuple[float, float]:
    """Lower and upper bound, each at `alpha`, of the AUC over (models, examples) pooled.

    Models are independent, examples of one model are not: jackknife over models, Student's t
    (Arvesen 1969; for one score a model it is the variance of DeLong et al. 1988).
    """
    models = len(scores)
    whole = auc(scores.ravel(), is_member.ravel())
    left = [
        auc(np.delete(scores, i, axis=0).ravel(), np.delete(is_member, i, axis=0).ravel())
        for i in range(models)
    ]
    pseudo = models * whole - (models - 1) * np.asarray(left)
    spread = float(stats.sem(pseudo) * stats.t.ppf(1.0 - alpha, models - 1))
    return float(pseudo.mean()) - spread, float(pseudo.mean()) + spread
