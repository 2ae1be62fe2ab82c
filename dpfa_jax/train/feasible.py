"""Whether a privacy budget leaves anything to learn from."""

import math

from dpfa_jax.core import ArgumentError
from dpfa_jax.release import TrainingRelease
from dpfa_jax.train.noise_sums import summed_noise

LEAST_SIGNAL_TO_NOISE = 1.0


def signal_to_noise(release: TrainingRelease, steps: int) -> float:
    """Length of the whole run's signal over that of its noise, at best.

    If in every step every example's clipped gradient had the full norm C and the same direction,
    `steps` mean gradients would add up to steps * C. The noise of the mean is
    sigma * C / batch in each of D coordinates and adds up to sqrt(steps * D) of that. The ratio
    is batch * sqrt(steps) / (sigma * sqrt(D)); real gradients stay well below it. Correlated noise
    adds up to less (`summed_noise`).
    """
    noise = release.gradient_noise_multiplier * math.sqrt(release.num_parameters)
    if len(release.noise_strategy) == 1:
        return release.expected_batch_size * math.sqrt(steps) / noise
    last = summed_noise(release.noise_strategy, steps).last
    return release.expected_batch_size * steps / (noise * last)


def require_signal(release: TrainingRelease, steps: int, epsilon: float) -> None:
    """Refuses a run that would end nearer to noise than to any model.

    Errors: ArgumentError where even the best case of `signal_to_noise` is below 1.
    """
    ratio = signal_to_noise(release, steps)
    if ratio < LEAST_SIGNAL_TO_NOISE:
        raise ArgumentError(
            "epsilon",
            epsilon,
            f"more noise than {release.dataset_size} examples can carry: a noise multiplier of "
            f"{release.noise_multiplier:.3g} over {steps} steps of {release.expected_batch_size} "
            f"examples drowns {release.num_parameters} parameters (signal / noise {ratio:.2g} at "
            "best, 1 is the least)",
            "Pass a larger --epsilon, a larger --batch or a smaller --model, or collect more data.",
        )
