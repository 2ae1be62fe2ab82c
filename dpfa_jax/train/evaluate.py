"""Loss and accuracy on held-out examples. They are not private; the report says so."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax.train.models import Classifier, Params

_PARTS = 16  # micro-batches in one call of the compiled program


@dataclasses.dataclass(frozen=True)
class Metrics:
    """Mean cross-entropy in nats, and the share of examples that were classified right."""

    loss: float
    accuracy: float


def evaluator(
    classifier: Classifier, micro_batch: int
) -> Callable[[Params, np.ndarray, np.ndarray], Metrics]:
    """evaluate(params, inputs (n, ...), labels (n,)) -> Metrics, compiled once for all n.

    It computes `micro_batch` examples at a time.
    """

    def sums(
        params: Params, inputs: jax.Array, labels: jax.Array, is_real: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        logits = classifier.logits(params, inputs)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
        right = logits.argmax(1) == labels
        return jnp.where(is_real, losses, 0.0).sum(), jnp.where(is_real, right, False).sum()

    @jax.jit
    def sums_of_parts(params: Params, *rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        parts = [x.reshape(_PARTS, micro_batch, *x.shape[1:]) for x in rows]
        losses, right = jax.lax.map(lambda part: sums(params, *part), parts)
        return losses.sum(), right.sum()

    def evaluate(params: Params, inputs: np.ndarray, labels: np.ndarray) -> Metrics:
        loss, right, size = 0.0, 0, _PARTS * micro_batch
        for start in range(0, len(labels), size):
            rows = np.arange(start, start + size)
            index = np.minimum(rows, len(labels) - 1)
            part = sums_of_parts(params, inputs[index], labels[index], rows < len(labels))
            loss, right = loss + float(part[0]), right + int(part[1])
        return Metrics(loss / len(labels), right / len(labels))

    return evaluate


def majority_accuracy(test_labels: np.ndarray) -> float:
    """Accuracy of always answering the commonest class among the held-out labels.

    Not that of the training labels: which class is commonest there is private.
    """
    return float(np.bincount(test_labels).max() / len(test_labels))
