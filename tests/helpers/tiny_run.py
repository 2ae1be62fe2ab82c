"""A private run small enough for tests, on texts that a linear model tells apart."""

import random
from pathlib import Path

from dpfa_jax.train import TrainConfig

PARAMETERS = 2 * 384 + 2
_WORDS = {
    "sport": ("goal", "match", "team", "player", "coach", "league", "stadium", "tennis"),
    "kitchen": ("flour", "oven", "butter", "recipe", "onion", "soup", "garlic", "pepper"),
}


def write_csv(path: Path, rows: int = 900) -> Path:
    """Two classes of five-word texts, the same at every call."""
    rng = random.Random(0)
    lines = ["text,label"]
    for row in range(rows):
        label = sorted(_WORDS)[row % 2]
        lines.append(f"{' '.join(rng.choices(_WORDS[label], k=5))},{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def tiny_config(data: Path, out: Path, **changes: object) -> TrainConfig:
    """Twelve steps of a linear model at epsilon 8."""
    settings = {
        "data": str(data),
        "model": "linear",
        "epsilon": 8.0,
        "batch": 64,
        "steps": 12,
        "learning_rate": 0.05,
        "max_length": 8,
        "checkpoint_every": 2,
        "evaluate_every": 4,
        "out": out,
    }
    return TrainConfig(**(settings | changes))
