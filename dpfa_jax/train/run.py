"""`train`: one private run from settings to report, or on from where it stopped."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dpfa_jax.accounting import LedgerFile
from dpfa_jax.accounting.guarantee import answers_epsilon
from dpfa_jax.accounting.losses import COARSE
from dpfa_jax.dpsgd import make_dp_step, take_batch
from dpfa_jax.train.charges import charged_steps, index_batches, steps_left
from dpfa_jax.train.checkpoints import Checkpoints
from dpfa_jax.train.config import TrainConfig
from dpfa_jax.train.errors import RunError
from dpfa_jax.train.evaluate import Metrics, evaluator
from dpfa_jax.train.job import Job, architecture, prepare
from dpfa_jax.train.loop import Course, LoopState, run_steps
from dpfa_jax.train.models import Params
from dpfa_jax.train.options import less_than_asked, options_text
from dpfa_jax.train.progress import Progress, progress_for
from dpfa_jax.train.report import make_report, write_report
from dpfa_jax.train.run_folder import RunFolder, new_run_folder, require_same_settings
from dpfa_jax.train.run_ledger import create_run_ledger, open_run_ledger
from dpfa_jax.train.same_data import require_same_data
from dpfa_jax.train.saved_model import save_model
from dpfa_jax.train.stop import StopRequest, stop_requests
from dpfa_jax.train.twin import Twin, train_twin

_LOOK_EXAMPLES = 512


def train(config: TrainConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Trains a classifier privately and returns the report that was written to its folder.

    The folder is the same whenever the process dies: every step was charged to `ledger.jsonl`
    before it ran, and `resume=True` goes on with what the budget has left. With `finished` false
    in the report, a polite stop (Ctrl-C, SIGTERM) came first.

    Errors: ArgumentError, DataError, RunError, LedgerError, BudgetExceededError; what was there
    before is unchanged, and what was charged stays charged.
    """
    started = time.monotonic()
    shown = progress_for() if progress is None else progress
    folder = RunFolder(config.out) if config.resume and config.out else new_run_folder(config)
    if config.resume:
        folder.require_run()  # before the data are loaded
    job = prepare(config)
    with contextlib.ExitStack() as stack:
        if config.resume:
            require_same_settings(folder, config, job.resolved())
        else:
            _start(job, folder)
        step_fn = make_dp_step(job.classifier.per_example_loss, job.optimizer, job.plan)
        course = Course(LoopState(step_fn.init(job.params), job.params))
        # One lock from here to the end: nobody else is at work here, so what looks left over is.
        ledger_file = stack.enter_context(open_run_ledger(folder, job))
        checkpoints = Checkpoints(folder.checkpoints)
        stack.callback(checkpoints.close)
        head = _restore(course, checkpoints)
        if head is not None:  # the ledger must hold the charges that paid for these steps
            ledger_file.require_head(head)
        _require_model(job, folder, course, ledger_file)
        require_same_data(folder.checkpoints, job.data, step=course.step)
        stop = stack.enter_context(stop_requests())
        stack.enter_context(shown)
        _announce(job, folder, course, ledger_file, shown)
        evaluate = evaluator(job.classifier, job.plan.micro_batch_size)
        run_steps(
            job,
            step_fn,
            ledger_file,
            checkpoints,
            course,
            shown,
            stop,
            look=_look(job, evaluate),
            epsilon_after=_epsilon_after(job),
        )
        finished = steps_left(job.plan, ledger_file) == 0
        twin = _twin(job, evaluate, shown, stop) if finished else None
        final = evaluate(course.state.average, job.data.test_inputs, job.data.test_labels)
        report = make_report(
            job,
            course,
            ledger_file,
            final,
            twin,
            finished=finished,
            look_examples=min(_LOOK_EXAMPLES, len(job.data.test_labels)),
            seconds_total=time.monotonic() - started,
        )
        names = ("epsilon", "epsilon_nominal", "delta", "insecure_test_noise", "accuracy")
        save_model(
            folder.model,
            job.classifier,
            architecture(job.settings.chosen),
            course.state.average,
            job.data,
            {name: report[name] for name in names},
        )
        write_report(folder, report)
    return report | {"folder": str(folder.path)}


def _start(job: Job, folder: RunFolder) -> None:
    """Makes the folder and its ledger; the settings come last and make the folder a run."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            folder.path,
            f"cannot be made ({error.strerror})",
            "Pass --out with a folder that you may write.",
        ) from error
    head = create_run_ledger(folder, job)
    folder.start(job.config, job.resolved(), ledger_head=head)


def _restore(course: Course, checkpoints: Checkpoints) -> str | None:
    """Sets `course` to the newest checkpoint, if any; the ledger's head when that was made."""
    found = checkpoints.latest(course.state.released())
    if found is None:
        return None
    state, note = found
    course.state = course.state.resumed(state)
    course.step, course.seconds, course.history = note.step, note.seconds, list(note.history)
    return note.ledger_head


def _require_model(job: Job, folder: RunFolder, course: Course, ledger_file: LedgerFile) -> None:
    """Refuses a run that is paid for in full but whose steps are in no checkpoint."""
    if course.step == 0 and steps_left(job.plan, ledger_file) == 0:
        raise RunError(
            folder.checkpoints,
            f"holds no checkpoint, but the ledger has paid for all {job.plan.steps} steps",
            "Restore the checkpoints from a copy. Without them this model is lost, and its charge "
            "stays; a new run in another folder spends a budget of its own on top.",
        )


def _announce(
    job: Job, folder: RunFolder, course: Course, ledger_file: LedgerFile, progress: Progress
) -> None:
    release, config = job.plan.release, job.config
    if config.insecure_test_noise:
        progress.say("INSECURE: noise from a test seed. This run protects nobody.")
    progress.say(
        f"{job.data.name}: {release.dataset_size} training and {len(job.data.test_labels)} "
        f"held-out examples, {len(job.data.class_names)} classes; {job.classifier.name} with "
        f"{release.num_parameters} parameters"
    )
    progress.say(
        f"epsilon {config.epsilon:g}, delta {config.delta:g}: noise multiplier "
        f"{release.noise_multiplier:.3f}, {job.plan.steps} steps of "
        f"{release.expected_batch_size} examples; folder {folder.path}"
    )
    for text in (options_text(job.plan), less_than_asked(job.plan, config.epsilon)):
        if text:
            progress.say(text)
    charged = min(charged_steps(ledger_file), job.plan.steps)
    if charged:
        lost = charged - course.step
        place = f"after step {course.step}" if course.step else "from the start, no checkpoint"
        progress.say(
            f"resuming {place}; {job.plan.steps - charged} steps are left"
            + (f"; {lost} were charged but lost, and stay charged" if lost else "")
        )


def _look(job: Job, evaluate: Callable) -> Callable[[Params], Metrics]:
    inputs = job.data.test_inputs[:_LOOK_EXAMPLES]
    labels = job.data.test_labels[:_LOOK_EXAMPLES]
    return lambda params: evaluate(params, inputs, labels)


def _epsilon_after(job: Job) -> Callable[[int], float]:
    """Upper bound on epsilon after so many charged steps; exact at the end, coarser before."""
    record = job.plan.release.record()

    def bound(charged: int) -> float:
        if charged == 0:
            return 0.0
        coarse = answers_epsilon(((record, charged),), job.config.delta, "pld", COARSE)
        return min(coarse, job.plan.epsilon)

    return bound


def _twin(job: Job, evaluate: Callable, progress: Progress, stop: StopRequest) -> Twin | None:
    if not job.config.nonprivate_twin:
        return None
    progress.say("training the twin without privacy, to compare")
    look, history = _look(job, evaluate), []

    def note(step: int, params: Params) -> None:
        if step % job.settings.evaluate_every == 0 or step == job.plan.steps:
            metrics = look(params)
            history.append({"step": step, "loss": metrics.loss, "accuracy": metrics.accuracy})

    note(0, job.params)
    params = train_twin(
        job.classifier,
        job.optimizer,
        job.params,
        _twin_batches(job, stop),
        micro_batch=job.plan.micro_batch_size,
        look=note,
    )
    if stop.requested:
        return None
    return Twin(evaluate(params, job.data.test_inputs, job.data.test_labels), history)


def _twin_batches(job: Job, stop: StopRequest) -> Iterator[tuple[Any, np.ndarray]]:
    examples = {"inputs": job.data.train_inputs, "labels": job.data.train_labels}
    for indices in index_batches(
        job.plan, job.plan.steps, insecure_seed=job.insecure_seed, first=0, charged=0
    ):
        if stop.requested:
            return
        yield take_batch(examples, indices)
