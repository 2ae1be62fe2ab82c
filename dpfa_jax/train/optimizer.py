"""The optimizer of a run: Adam on the released gradients, its rate along half a cosine."""

import optax

from dpfa_jax.train.defaults import Defaults


def build_optimizer(
    defaults: Defaults, steps: int, learning_rate: float | None = None
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba, 2015) over `steps` steps; `learning_rate` overrides the default peak.

    Post-processing: it sees noised gradients only.
    """
    peak = defaults.learning_rate if learning_rate is None else learning_rate
    return optax.adam(
        optax.cosine_decay_schedule(peak, steps),
        b1=defaults.first_moment,
        b2=defaults.second_moment,
    )
