"""Chooses the settings of the Reuters R8 job on splits of its training texts, never on test texts.

Each setting trains with three seeds on 4485 of the 5485 training texts, a split a seed, and is
scored on the other 1000. All training is by DP-Adam at the noise that (epsilon, delta) = (3, 1e-5)
asks for with 5485 texts, at the same sampling rate. To compare many settings it is one jitted
program a setting, vmapped over seeds; its noise comes from `jax.random` and protects nobody, so
only the chosen numbers leave: `dpfa_jax.train.choice_cost` says what that would cost.

    python benchmarks/choose_r8.py --out benchmarks/results/<device>/<date>-r8-choice.json
"""

import argparse
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import pathlib
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dpfa_jax.accounting import calibrate
from dpfa_jax.release import TrainingRelease
from dpfa_jax.train.data import ClassificationData, load_data
from dpfa_jax.train.models import Classifier, build_model

EPSILON, DELTA = 3.0, 1e-5
HELD_OUT, SEEDS = 1000, 3


@dataclasses.dataclass(frozen=True)
class Setting:
    """One candidate; the fields are those of `dpfa_jax.train.defaults.Defaults`."""

    features: int = 32
    num_heads: int = 2
    hidden_features: int = 64
    num_layers: int = 1
    max_length: int = 64
    clip: float = 1.0
    batch: int = 512
    steps: int = 120
    learning_rate: float = 2e-2
    first_moment: float = 0.9
    schedule: str = "cosine"


def candidates() -> list[Setting]:
    """The settings that were compared with the model as it is: a norm after the mean."""
    shapes = [
        {},
        {"steps": 240},
        {"steps": 240, "max_length": 32},
        {"first_moment": 0.5},
        {"features": 64, "num_heads": 4, "hidden_features": 128},
        {"features": 64, "num_heads": 4, "first_moment": 0.5},
        {"schedule": "constant"},
        {"batch": 1024},
        {"batch": 768, "steps": 180, "max_length": 48},
        {"first_moment": 0.5, "steps": 240, "max_length": 48},
        {"clip": 0.3},
        {"steps": 180, "max_length": 48},
        {"batch": 1024, "steps": 240, "max_length": 48},
    ]
    rates = (1.2e-2, 2e-2, 3e-2)
    return [Setting(**shape, learning_rate=rate) for shape in shapes for rate in rates]


@functools.cache
def noise_multiplier(batch: int, steps: int, examples: int) -> float:
    """The noise that `steps` steps at this batch need for (EPSILON, DELTA)."""
    release = TrainingRelease(1.0, 1.0, examples, batch, num_parameters=10_000)
    return calibrate(release, delta=DELTA, epsilon=EPSILON, count=steps).release.noise_multiplier


def accuracy(setting: Setting, data: ClassificationData, model: Classifier, seed: int) -> float:
    """Accuracy on the held-out training texts of this seed's split."""
    examples = len(data.train_inputs)
    rng = np.random.default_rng(100 + seed)
    order = rng.permutation(examples)
    held, kept = order[:HELD_OUT], order[HELD_OUT:]
    rate = setting.batch / examples
    expected = rate * len(kept)
    capacity = 64 * int(np.ceil((expected + 5.0 * np.sqrt(expected)) / 64))
    batches = np.full((setting.steps, capacity), -1)
    for row in batches:
        drawn = kept[rng.random(len(kept)) < rate][:capacity]
        row[: len(drawn)] = drawn
    stddev = setting.clip * noise_multiplier(setting.batch, setting.steps, examples)
    schedule = optax.cosine_decay_schedule(setting.learning_rate, setting.steps)
    optimizer = optax.adam(
        schedule if setting.schedule == "cosine" else setting.learning_rate,
        b1=setting.first_moment,
    )
    inputs, labels = jnp.asarray(data.train_inputs), jnp.asarray(data.train_labels)

    def clipped(params, index):
        batch = {"inputs": inputs[index][None], "labels": labels[index][None]}
        gradient = jax.grad(lambda params: model.per_example_loss(params, batch)[0])(params)
        scale = jnp.minimum(1.0, setting.clip / jnp.maximum(optax.global_norm(gradient), 1e-12))
        return jax.tree.map(lambda leaf: leaf * jnp.where(index < 0, 0.0, scale), gradient)

    def step(carry, drawn):
        params, state = carry
        rows, key = drawn

        def add(total, part):
            gradients = jax.vmap(clipped, (None, 0))(params, part)
            return jax.tree.map(lambda a, b: a + b.sum(axis=0), total, gradients), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zeros, rows.reshape(-1, 64))
        leaves, structure = jax.tree.flatten(total)
        keys = jax.random.split(key, len(leaves))
        noised = [
            (leaf + stddev * jax.random.normal(key, leaf.shape)) / expected
            for leaf, key in zip(leaves, keys, strict=True)
        ]
        updates, state = optimizer.update(jax.tree.unflatten(structure, noised), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params, batches, keys):
        return jax.lax.scan(step, (params, optimizer.init(params)), (batches, keys))[0][0]

    keys = jax.random.split(jax.random.key(seed), setting.steps)
    params = train(model.init(seed), jnp.asarray(batches), keys)
    guesses = jnp.argmax(jax.jit(model.logits)(params, inputs[held]), axis=1)
    return float(jnp.mean(guesses == labels[held]))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--out", type=pathlib.Path, required=True)
    made.add_argument("--first", type=int, default=None, help="compare only so many candidates")
    return made


def main() -> None:
    """Compares all candidates and writes one row each."""
    arguments = parser().parse_args()
    rows = []
    for setting in candidates()[: arguments.first]:
        data = load_data("r8", max_length=setting.max_length)
        model = build_model(
            "transformer",
            data,
            features=setting.features,
            num_heads=setting.num_heads,
            hidden_features=setting.hidden_features,
            num_layers=setting.num_layers,
        )
        scores = [accuracy(setting, data, model, seed) for seed in range(SEEDS)]
        rows.append(dataclasses.asdict(setting) | {"scores": scores, "mean": np.mean(scores)})
        print(f"{rows[-1]['mean']:.4f} {setting}", flush=True)
    result = {
        "device": str(jax.devices()[0].device_kind),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        "configurations_tried": len(rows),
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
