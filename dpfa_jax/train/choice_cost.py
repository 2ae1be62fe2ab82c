"""What choosing the hyper-parameters would cost if the choice itself were private.

A choice among settings by their accuracy on the private examples is one more release. Had it been
made by drawing a random number of trials, training a randomly drawn setting in each, and keeping
the best, its Renyi differential privacy would be bounded by that of one trial and of the random
number (Liu and Talwar, 2019; Papernot and Steinke, "Hyperparameter Tuning with Renyi Differential
Privacy", 2022). Nothing here spends budget: it is a figure for the report.
"""

import dataclasses
import math
from collections.abc import Sequence

from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.release import TrainingRelease

_ETA_LIMIT = 50.0


@dataclasses.dataclass(frozen=True)
class ChoiceCost:
    """The guarantee of a private choice of the same breadth.

    Attributes:
      epsilon: of choosing and training together, at `delta`.
      delta: of both guarantees.
      trial_epsilon: of one training run, from the same Renyi curve.
      expected_trials: mean of the random number of trials.
      eta: shape of the truncated negative binomial number of trials; 1 is geometric.
    """

    epsilon: float
    delta: float
    trial_epsilon: float
    expected_trials: float
    eta: float


def choice_cost(
    release: TrainingRelease,
    *,
    steps: int,
    expected_trials: float,
    delta: float,
    eta: float = 1.0,
) -> ChoiceCost:
    """epsilon of keeping the best of a random number of training runs of `steps` steps each.

    The number of runs is truncated negative binomial of mean `expected_trials` and shape `eta`, and
    each run draws its setting at random from the same candidates. The score by which the best is
    known must not look at the private examples beyond what the run released.

    Errors: ArgumentError.
    """
    from dpfa_jax.accounting import renyi  # needs scipy: only where asked for

    steps = checks.count("steps", steps)
    divergences = renyi.renyi_curve(release.record(), steps) / (renyi.ORDERS - 1.0)
    return best_of_trials(
        list(zip(renyi.ORDERS.tolist(), divergences.tolist(), strict=True)),
        expected_trials=expected_trials,
        delta=delta,
        eta=eta,
    )


def best_of_trials(
    curve: Sequence[tuple[float, float]],
    *,
    expected_trials: float,
    delta: float,
    eta: float = 1.0,
) -> ChoiceCost:
    """epsilon of the best of K trials, each with the Renyi bounds `curve`.

    Theorem 2 of Papernot and Steinke (2022): with R(a) the bound of one trial at order a, the best
    of K trials has at each order a > 1, for every b > 1,

      R(a) + (1 + eta) (1 - 1/b) R(b) + (1 + eta) log(1/gamma) / b + log(E[K]) / (a - 1).

    Args:
      curve: pairs (order > 1, Renyi divergence bound of one trial).
      expected_trials: E[K] >= 1.
      delta: at which both epsilons are stated, in (0, 1).
      eta: shape, > -1; 0 is the logarithmic and 1 the geometric distribution.

    Errors: ArgumentError.
    """
    delta = checks.delta("delta", delta)
    trials = checks.real("expected_trials", expected_trials)
    if trials < 1.0:
        raise ArgumentError(
            "expected_trials", trials, "less than one trial", "Pass a number of at least 1."
        )
    eta = checks.real("eta", eta)
    if not -1.0 < eta <= _ETA_LIMIT:
        raise ArgumentError("eta", eta, "outside (-1, 50]", "Pass 1.0, the geometric number.")
    for order, bound in curve:
        if not order > 1.0:
            raise ArgumentError("curve", order, "an order not above 1", "Pass orders above 1.")
        checks.nonnegative("curve", bound)
    trial_epsilon = min(_epsilon(order, bound, delta) for order, bound in curve)
    if trials == 1.0:  # one trial, always: nothing is chosen
        return ChoiceCost(trial_epsilon, delta, trial_epsilon, trials, eta)
    log_inverse_gamma = -math.log(success_probability(trials, eta))
    penalty = (1.0 + eta) * min(
        (1.0 - 1.0 / order) * bound + log_inverse_gamma / order for order, bound in curve
    )
    epsilon = min(
        _epsilon(order, bound + penalty + math.log(trials) / (order - 1.0), delta)
        for order, bound in curve
    )
    return ChoiceCost(epsilon, delta, trial_epsilon, trials, eta)


def success_probability(expected_trials: float, eta: float) -> float:
    """gamma in (0, 1) at which the truncated negative binomial has the mean `expected_trials`.

    The mean falls as gamma grows: eta (1 - gamma) / (gamma (1 - gamma^eta)), or at eta = 0
    (1/gamma - 1) / log(1/gamma) (Papernot and Steinke, 2022, definition 1).
    """

    def mean(log_gamma: float) -> float:
        gamma = math.exp(log_gamma)
        if eta == 0.0:
            return math.expm1(-log_gamma) / -log_gamma
        return eta * (1.0 - gamma) / (gamma * -math.expm1(eta * log_gamma))

    low, high = -1.0, -1e-9
    while mean(low) < expected_trials:
        low *= 2.0
        if low < -700.0:
            raise ArgumentError(
                "expected_trials",
                expected_trials,
                f"no gamma reaches this mean at eta = {eta}",
                "Pass fewer trials or a larger eta.",
            )
    for _ in range(200):
        middle = 0.5 * (low + high)
        if mean(middle) > expected_trials:
            low = middle
        else:
            high = middle
    return math.exp(low)  # the smaller gamma, the larger bound


def _epsilon(order: float, bound: float, delta: float) -> float:
    # Canonne, Kamath, Steinke (2020), proposition 12.
    value = bound + math.log1p(-1.0 / order) - math.log(delta * order) / (order - 1.0)
    return max(value, 0.0)
