"""The result of a run as numbers and plain sentences: report.json and report.html."""

import dataclasses
import json
from typing import Any

from dpfa_jax.accounting import LedgerFile, epsilon
from dpfa_jax.train import atomic, machine
from dpfa_jax.train.charges import charged_steps
from dpfa_jax.train.choice_cost import choice_cost
from dpfa_jax.train.errors import RunError
from dpfa_jax.train.evaluate import Metrics, majority_accuracy
from dpfa_jax.train.feasible import signal_to_noise
from dpfa_jax.train.job import Job
from dpfa_jax.train.loop import Course
from dpfa_jax.train.options import clip_norms, less_than_asked, options_text, privacy_options
from dpfa_jax.train.page import render
from dpfa_jax.train.run_folder import RunFolder
from dpfa_jax.train.twin import Twin

FORMAT = 1


def make_report(
    job: Job,
    course: Course,
    ledger_file: LedgerFile,
    final: Metrics,
    twin: Twin | None,
    *,
    finished: bool,
    look_examples: int,
    seconds_total: float,
) -> dict[str, Any]:
    """All that is known of a run, as JSON values.

    `epsilon` is null where the noise came from a test seed: such a run has none. `epsilon_nominal`
    is what the same run would have spent with secret noise.
    """
    config, plan, ledger = job.config, job.plan, ledger_file.ledger
    record = plan.release.record()
    pld = epsilon(ledger, config.delta, nominal=True)
    rdp = epsilon(ledger, config.delta, accountant="rdp", nominal=True)
    secret = not config.insecure_test_noise
    examples = course.step * plan.release.expected_batch_size
    report = {
        "format": FORMAT,
        "finished": finished,
        "insecure_test_noise": config.insecure_test_noise,
        "epsilon": pld if secret else None,
        "epsilon_nominal": pld,
        "epsilon_rdp": rdp,
        "epsilon_budget": config.epsilon,
        "epsilon_planned": plan.epsilon,
        "epsilon_note": less_than_asked(plan, config.epsilon),
        "delta": config.delta,
        "accuracy": final.accuracy,
        "loss": final.loss,
        "accuracy_majority": majority_accuracy(job.data.test_labels),
        "accuracy_nonprivate": twin.final.accuracy if twin else None,
        "loss_nonprivate": twin.final.loss if twin else None,
        "steps": course.step,
        "steps_planned": plan.steps,
        "steps_charged": charged_steps(ledger_file),
        "seconds": course.seconds,
        "seconds_total": seconds_total,
        "examples_per_second": examples / max(course.seconds, 1e-9),
        "peak_memory_bytes": machine.peak_memory_bytes(),
        "versions": machine.versions(),
        "device": machine.device(),
        "data": {
            "name": job.data.name,
            "kind": job.data.kind,
            "examples": len(job.data.train_labels),
            "test_examples": len(job.data.test_labels),
            "class_names": list(job.data.class_names),
            "notes": list(job.data.notes),
        },
        "model": {
            "name": job.classifier.name,
            "parameters": plan.release.num_parameters,
        },
        "release": {
            **dataclasses.asdict(record),
            "noise_multiplier": plan.release.noise_multiplier,
        },
        "options": {
            **privacy_options(plan),
            "l2_clip_norms": clip_norms(plan),
            "last_l2_clip_norms": clip_norms(plan, course.state.private.l2_clip_norms),
            "noise_strategy": list(plan.release.noise_strategy),
            "text": options_text(plan),
        },
        "signal_to_noise": signal_to_noise(plan.release, plan.steps),
        "ledger": {"file": "ledger.jsonl", "head": ledger_file.head},
        "choice_cost": _choice(job),
        "does_not_protect": _does_not_protect(job, twin),
        "seed": config.seed,
        "settings": {**config.settings(), **job.resolved()},
        "look_examples": look_examples,
        "history": course.history,
        "history_nonprivate": twin.history if twin else [],
    }
    return json.loads(json.dumps(report, allow_nan=False))  # as a reader of the file will see it


def write_report(folder: RunFolder, report: dict[str, Any]) -> None:
    """report.json and report.html, each whole or absent. Errors: RunError."""
    try:
        atomic.write_json(folder.report, report)
        atomic.write_bytes(folder.page, render(report).encode())
    except OSError as error:
        raise RunError(
            folder.path,
            f"the report cannot be written ({error.strerror})",
            "Make room on the disk and run the same command with --resume; no step is repeated.",
        ) from error


def _choice(job: Job) -> dict[str, Any]:
    """What choosing the settings privately would have cost, as numbers and as a sentence."""
    tried, delta = job.settings.chosen.configurations_tried, job.config.delta
    if tried is None:
        text = (
            "The settings of this run were not chosen by results on these examples, as far as this "
            "report can know. If you did choose them so, by comparing several runs, that choice "
            "reveals something too, and the epsilon above does not include it."
        )
        return {"configurations_tried": None, "epsilon": None, "delta": delta, "text": text}
    cost = choice_cost(job.plan.release, steps=job.plan.steps, expected_trials=tried, delta=delta)
    text = (
        f"The default settings are the best of {tried} that were tried on a split of the training "
        f"examples, and the epsilon above does not include that choice. Had it been made privately "
        f"(the best of a random number of runs, {tried} on average; Papernot and Steinke, 2022), "
        f"choice and training together would cost epsilon = {cost.epsilon:.1f} at the same delta, "
        f"against {cost.trial_epsilon:.2f} for one run by the same (Renyi) analysis."
    )
    return {
        "configurations_tried": tried,
        "epsilon": cost.epsilon,
        "trial_epsilon": cost.trial_epsilon,
        "delta": cost.delta,
        "text": text,
    }


def _does_not_protect(job: Job, twin: Twin | None) -> list[str]:
    texts = [
        *job.plan.release.does_not_protect,
        "the held-out examples: loss and accuracy on them are computed openly",
        "the number of training examples, the class names and the settings, which count as public",
    ]
    if twin is not None:
        texts.append(
            "the figures of the twin that was trained without privacy: publish them only where the "
            "training examples are public"
        )
    if job.config.insecure_test_noise:
        texts.append("anything at all: the noise of this run came from a test seed")
    return texts
