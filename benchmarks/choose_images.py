"""Chooses the settings of the digit jobs on splits of their training images (those of seed 0).

Each setting trains with three seeds on four fifths of the training images, a split a seed, and is
scored on the others, by DP-Adam at the noise that (epsilon, delta) = (3, 1e-5) asks for with all
of them, at the same sampling rate. The noise comes from `jax.random` and protects nobody, so only
the chosen numbers leave: `dpfa_jax.train.choice_cost` says what that would cost.

    python benchmarks/choose_images.py --data digits --out benchmarks/results/<device>/<name>.json
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
from dpfa_jax.train.data import load_data
from dpfa_jax.train.models import build_model

EPSILON, DELTA, SEEDS, MICRO = 3.0, 1e-5, 3, 32


@dataclasses.dataclass(frozen=True)
class Setting:
    """One candidate; the fields are those of `dpfa_jax.train.defaults.Defaults`."""

    model: str
    patch_size: int
    batch: int
    steps: int
    learning_rate: float


def candidates(source: str) -> list[Setting]:
    """Logistic regression at many rates, a transformer at a few."""
    patch_size, batches, rates = {
        "digits": (4, (128, 256), (0.01, 0.03, 0.1)),
        "mnist": (7, (256, 512), (0.003, 0.01, 0.03)),
    }[source]
    linear = [
        Setting("linear", patch_size, batch, steps, rate)
        for batch in batches
        for steps in (100, 200)
        for rate in rates
    ]
    return linear + [
        Setting("transformer", patch_size, batches[-1], 100, rate) for rate in (0.01, 0.03)
    ]


@functools.cache
def noise_multiplier(batch: int, steps: int, examples: int) -> float:
    """The noise that `steps` steps at this batch need for (EPSILON, DELTA)."""
    release = TrainingRelease(1.0, 1.0, examples, batch, num_parameters=10_000)
    return calibrate(release, delta=DELTA, epsilon=EPSILON, count=steps).release.noise_multiplier


def scorer(source: str, setting: Setting):
    """score(learning_rate, seed) -> accuracy; rates share one compiled program."""
    data = load_data(source)
    model = build_model(setting.model, data, patch_size=setting.patch_size)
    examples = len(data.train_labels)
    held_out = examples // 5
    rate = setting.batch / examples
    expected = rate * (examples - held_out)
    capacity = MICRO * int(np.ceil((expected + 5.0 * np.sqrt(expected)) / MICRO))
    stddev = noise_multiplier(setting.batch, setting.steps, examples)
    inputs, labels = jnp.asarray(data.train_inputs), jnp.asarray(data.train_labels)
    adam = optax.scale_by_adam(b1=0.5)

    def clipped(params, index):
        batch = {"inputs": inputs[index][None], "labels": labels[index][None]}
        gradient = jax.grad(lambda params: model.per_example_loss(params, batch)[0])(params)
        scale = jnp.minimum(1.0, 1.0 / jnp.maximum(optax.global_norm(gradient), 1e-12))
        return jax.tree.map(lambda leaf: leaf * jnp.where(index < 0, 0.0, scale), gradient)

    def step(carry, drawn):
        params, state = carry
        rows, key, step_size = drawn

        def add(total, part):
            gradients = jax.vmap(clipped, (None, 0))(params, part)
            return jax.tree.map(lambda a, b: a + b.sum(axis=0), total, gradients), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zeros, rows.reshape(-1, MICRO))
        leaves, structure = jax.tree.flatten(total)
        keys = jax.random.split(key, len(leaves))
        noised = [
            (leaf + stddev * jax.random.normal(key, leaf.shape)) / expected
            for leaf, key in zip(leaves, keys, strict=True)
        ]
        updates, state = adam.update(jax.tree.unflatten(structure, noised), state, params)
        return (jax.tree.map(lambda p, u: p - step_size * u, params, updates), state), None

    @jax.jit
    def train(params, batches, keys, step_sizes):
        carry = (params, adam.init(params))
        return jax.lax.scan(step, carry, (batches, keys, step_sizes))[0][0]

    answers = jax.jit(model.logits)

    def score(learning_rate: float, seed: int) -> float:
        rng = np.random.default_rng(100 + seed)
        order = rng.permutation(examples)
        held, kept = order[:held_out], order[held_out:]
        batches = np.full((setting.steps, capacity), -1)
        for row in batches:
            drawn = kept[rng.random(len(kept)) < rate][:capacity]
            row[: len(drawn)] = drawn
        keys = jax.random.split(jax.random.key(seed), setting.steps)
        schedule = optax.cosine_decay_schedule(learning_rate, setting.steps)
        step_sizes = jax.vmap(schedule)(jnp.arange(setting.steps))
        params = train(model.init(seed), jnp.asarray(batches), keys, step_sizes)
        return float(jnp.mean(answers(params, inputs[held]).argmax(axis=1) == labels[held]))

    return score


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--data", choices=("digits", "mnist"), required=True)
    made.add_argument("--out", type=pathlib.Path, required=True)
    return made


def main() -> None:
    """Compares all candidates and writes one row each."""
    arguments = parser().parse_args()
    rows, scorers = [], {}
    for setting in candidates(arguments.data):
        program = dataclasses.replace(setting, learning_rate=0.0)
        if program not in scorers:
            scorers[program] = scorer(arguments.data, setting)
        scores = [scorers[program](setting.learning_rate, seed) for seed in range(SEEDS)]
        mean = float(np.mean(scores))
        rows.append(dataclasses.asdict(setting) | {"scores": scores, "mean": mean})
        print(f"{mean:.4f} {setting}", flush=True)
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
