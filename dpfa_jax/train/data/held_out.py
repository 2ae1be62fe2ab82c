"""A held-out split for sources that have no official one."""

import numpy as np
from jaxtyping import Bool

TEST_FRACTION = 0.2


def held_out(rows: int, seed: int) -> Bool[np.ndarray, " rows"]:
    """True for the rows of the test split: each with probability 0.2, by its own draw.

    A row's side depends on its index and the seed alone, so adding a row at the end moves no other
    row, and never on texts or labels: a stratified split would look at the labels of all.
    """
    return np.random.default_rng(seed).random(rows) < TEST_FRACTION
