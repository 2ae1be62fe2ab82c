"""The same model trained without privacy, to show what privacy costs. Never written to the disk."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

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
    micro_batch: int,
    look: Callable[[int, Params], None],
) -> Params:
    """Ordinary training on (batch, is_real) pairs: mean loss, no clipping, no noise.

    Gradients are added up over `micro_batch` examples at a time, a divisor of the rows of a batch.
    `look(step, params)` is called after every step. The result protects nobody.
    """
    gradient_of = mean_gradient(classifier, micro_batch)

    @jax.jit
    def step(
        params: Params, state: optax.OptState, batch: Any, is_real: Bool[Array, " rows"]
    ) -> tuple[Params, optax.OptState]:
        updates, state = optimizer.update(gradient_of(params, batch, is_real), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for number, (batch, is_real) in enumerate(batches, start=1):
        params, state = step(params, state, batch, is_real)
        look(number, params)
    return params


def mean_gradient(
    classifier: Classifier, micro_batch: int
) -> Callable[[Params, Any, Bool[Array, " rows"]], Params]:
    """gradient(params, batch, is_real) of the mean loss over the real rows; zero without any."""

    def loss(params: Params, batch: Any, is_real: Bool[Array, " micro"]) -> Array:
        losses = classifier.per_example_loss(params, batch)
        return jnp.where(is_real, losses, 0.0).sum()

    def gradient(params: Params, batch: Any, is_real: Bool[Array, " rows"]) -> Params:
        def add(total: Params, micro: tuple[Any, Array]) -> tuple[Params, None]:
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, *micro)), None

        def parted(x: Array) -> Array:
            return x.reshape(-1, micro_batch, *x.shape[1:])

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zeros, jax.tree.map(parted, (batch, is_real)))
        return jax.tree.map(lambda leaf: leaf / jnp.maximum(is_real.sum(), 1), total)

    return gradient
