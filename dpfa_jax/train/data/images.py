"""From grey images and digit labels to `ClassificationData`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from dpfa_jax.core import ArgumentError
from dpfa_jax.train.data.dataset import ClassificationData
from dpfa_jax.train.data.held_out import held_out


def image_data(
    name: str,
    images: Float[np.ndarray, "n height width"],
    labels: Float[np.ndarray, " n"],
    seed: int,
) -> ClassificationData:
    """Digits 0 to 9 with a held-out split by `seed`. Images are in [0, 1]."""
    test = held_out(len(images), seed)
    images = images.astype(np.float32)
    labels = labels.astype(np.int32)
    shape = images.shape[1:]

    def encode(raw: Sequence[Any]) -> np.ndarray:
        rows = np.asarray(raw, np.float32)
        inside = rows.size == 0 or (rows.min() >= 0.0 and rows.max() <= 1.0)  # False for NaN
        if rows.shape[1:] != shape or not inside:
            raise ArgumentError(
                "raw",
                f"array of shape {rows.shape}",
                "not images of this model",
                f"Pass (B, {shape[0]}, {shape[1]}) grey values in [0, 1].",
            )
        return rows

    return ClassificationData(
        name=name,
        train_inputs=images[~test],
        train_labels=labels[~test],
        test_inputs=images[test],
        test_labels=labels[test],
        class_names=tuple("0123456789"),
        kind="image",
        token_embeddings=None,
        encode=encode,
        notes=(
            f"{name}: size, split (each image by its own draw, seed {seed}) and classes are public;"
            " pixels are scaled by fixed numbers.",
        ),
    )
