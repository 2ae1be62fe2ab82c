"""From encoded inputs to positions: public token features of a text, patches of an image.

Normalised by public statistics only: those of the embedding table, or fixed numbers.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.train.data import ClassificationData

PAD = 0
Positions = Callable[[Array], tuple[Float[Array, "B S W"], Bool[Array, "B S"]]]


def token_positions(table: np.ndarray) -> tuple[Positions, int]:
    """Map of (B, S) token ids to frozen features, and their width.

    Each column of the public table is brought to mean 0 and standard deviation 1 over the whole
    vocabulary. Padding is marked as not real.
    """
    features = jnp.asarray((table - table.mean(axis=0)) / table.std(axis=0), jnp.float32)

    def positions(ids: Array) -> tuple[Array, Array]:
        return features[ids], ids != PAD

    return positions, table.shape[1]


def patch_positions(height: int, width: int, patch_size: int) -> tuple[Positions, int, int]:
    """Map of (B, height, width) images in [0, 1] to flat patches; patch width; number of patches.

    Errors: ArgumentError if `patch_size` does not divide both sides.
    """
    size = checks.count("patch_size", patch_size)
    if height % size or width % size:
        raise ArgumentError(
            "patch_size",
            patch_size,
            f"does not divide an image of {height} x {width}",
            "Pass a common divisor of both sides.",
        )
    rows, columns = height // size, width // size

    def positions(images: Array) -> tuple[Array, Array]:
        x = images.astype(jnp.float32).reshape(-1, rows, size, columns, size)
        x = x.transpose(0, 1, 3, 2, 4).reshape(-1, rows * columns, size * size)
        return 2.0 * x - 1.0, jnp.ones(x.shape[:2], bool)

    return positions, size * size, rows * columns


def positions_of(data: ClassificationData, patch_size: int) -> tuple[Positions, int, int]:
    """The map for this data, the width of a position, the number of positions."""
    if data.token_embeddings is not None:
        positions, width = token_positions(data.token_embeddings)
        return positions, width, data.train_inputs.shape[1]
    height, width = data.train_inputs.shape[1:]
    return patch_positions(height, width, patch_size)
