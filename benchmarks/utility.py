"""What privacy costs on the main job: Reuters R8 with flat, per-layer and adaptive clipping.

    python benchmarks/utility.py --output benchmarks/results/<device>/<date>-utility.json

Each row is one training run of the main job's model and settings with real noise keys and secret
batches, scored on the official test split. Nothing is chosen here: flat clipping has the settings
that were chosen for epsilon 3 on splits of the training texts, the other modes take them over.
"""

import argparse
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from dpfa_jax import dpsgd
from dpfa_jax.noise import new_noise_key
from dpfa_jax.release import AdaptiveClipping
from dpfa_jax.train.data import ClassificationData, load_data
from dpfa_jax.train.defaults import Defaults, defaults_for
from dpfa_jax.train.evaluate import evaluator
from dpfa_jax.train.job import architecture
from dpfa_jax.train.models import Classifier, build_model
from dpfa_jax.train.optimizer import build_optimizer
from dpfa_jax.train.twin import train_twin

EPSILONS, DELTA, SEEDS = (1.0, 3.0, 8.0), 1e-5, 5
MODES = ("flat", "per-layer", "adaptive")
MICRO_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Task:
    data: ClassificationData
    classifier: Classifier
    settings: Defaults


def plan_for(task: Task, mode: str, epsilon: float) -> dpsgd.DPSGDPlan:
    params, clip = task.classifier.init(0), task.settings.clip
    more: dict[str, Any] = {"l2_clip_norm": clip}
    if mode == "per-layer":
        found = dpsgd.per_layer_groups(params, clip)
        more = {"l2_clip_norm": found.l2_clip_norms, "groups": found.groups}
    if mode == "adaptive":
        more["adaptive_clipping"] = AdaptiveClipping()
    return dpsgd.DPSGDPlan.calibrated(
        epsilon=epsilon,
        delta=DELTA,
        dataset_size=len(task.data.train_labels),
        expected_batch_size=task.settings.batch,
        steps=task.settings.steps,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        micro_batch_size=MICRO_BATCH,
        **more,
    )


def batches_of(task: Task, plan: dpsgd.DPSGDPlan) -> Iterator[tuple[Any, np.ndarray]]:
    examples = {"inputs": task.data.train_inputs, "labels": task.data.train_labels}
    for indices in plan.index_batches(np.random.default_rng()):
        yield dpsgd.take_batch(examples, indices)


def private_runs(task: Task, mode: str, epsilon: float, seeds: int) -> Iterator[dict[str, Any]]:
    plan = plan_for(task, mode, epsilon)
    optimizer = build_optimizer(task.settings, task.settings.steps)
    step = dpsgd.make_dp_step(task.classifier.per_example_loss, optimizer, plan)
    score = evaluator(task.classifier, MICRO_BATCH)
    for seed in range(seeds):
        began, key = time.perf_counter(), new_noise_key()
        state = step.init(task.classifier.init(seed))
        for batch, is_real in batches_of(task, plan):
            state = step.step(state, batch, is_real, key)
        found = score(state.params, task.data.test_inputs, task.data.test_labels)
        yield _row(mode, epsilon, seed, found.accuracy, time.perf_counter() - began)


def plain_runs(task: Task, seeds: int) -> Iterator[dict[str, Any]]:
    plan = plan_for(task, "flat", 8.0)  # for its batches only
    score = evaluator(task.classifier, MICRO_BATCH)
    for seed in range(seeds):
        began = time.perf_counter()
        params = train_twin(
            task.classifier,
            build_optimizer(task.settings, task.settings.steps, learning_rate=3e-3),
            task.classifier.init(seed),
            batches_of(task, plan),
            micro_batch=MICRO_BATCH,
            look=lambda step, params: None,
        )
        found = score(params, task.data.test_inputs, task.data.test_labels)
        yield _row("non-private", None, seed, found.accuracy, time.perf_counter() - began)


def _row(mode: str, epsilon: float | None, seed: int, accuracy: float, seconds: float) -> Any:
    row = {"clipping": mode, "epsilon": epsilon, "delta": DELTA if epsilon else None, "seed": seed}
    row |= {"accuracy": round(accuracy, 4), "seconds": round(seconds, 1)}
    print(row, flush=True)
    return row


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--output", help="JSON file to write")
    made.add_argument("--seeds", type=int, default=SEEDS)
    made.add_argument("--epsilons", type=float, nargs="+", default=EPSILONS)
    made.add_argument("--steps", type=int, help="fewer than the main job's, to try the script")
    return made


def main() -> None:
    arguments = parser().parse_args()
    settings = defaults_for("r8")
    if arguments.steps is not None:
        settings = dataclasses.replace(settings, steps=arguments.steps)
    data = load_data("r8", max_length=settings.max_length)
    task = Task(data, build_model(settings.model, data, **architecture(settings)), settings)
    rows = list(plain_runs(task, arguments.seeds))
    for mode in MODES:
        for epsilon in arguments.epsilons:
            rows += private_runs(task, mode, epsilon, arguments.seeds)
    result = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/utility.py " + " ".join(sys.argv[1:]),
        "versions": {"jax": jax.__version__},
        "rows": rows,
    }
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
