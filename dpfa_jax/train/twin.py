"""The same model trained without privacy, to show what privacy costs. Never written to the disk."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpfa_jax.train.evaluate import Metrics
from dpfa_jax.train.models import Classifier, Params


@dataclasses.dataclass(frozen=True)
class Twin:
    """What a twin showed on the held-out examples: at the end, and on the way."""

    final: Metrics
    history: list[dict[str, float]]


def train_twin(
    classifier: Classifier,
    optimizer: optax.GradientTransformation,
    params: Params,
    batches: Iterable[tuple[Any, np.ndarray]],
    *,
    look: Callable[[int, Params], None],
) -> Params:
    """Ordinary training on (batch, is_real) pairs: mean loss, no clipping, no noise.

    `look(step, params)` is called after every step. The result protects nobody.
    """

    def mean_loss(params: Params, batch: Any, is_real: jax.Array) -> jax.Array:
        losses = jnp.where(is_real, classifier.per_example_loss(params, batch), 0.0)
        return losses.sum() / jnp.maximum(is_real.sum(), 1)

    @jax.jit
    def step(params: Params, state: Any, batch: Any, is_real: jax.Array) -> tuple[Params, Any]:
        gradient = jax.grad(mean_loss)(params, batch, is_real)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for number, (batch, is_real) in enumerate(batches, start=1):
        params, state = step(params, state, batch, is_real)
        look(number, params)
    return params
