"""The steps of a private run: charge, then draw the key, then step; now and then look and save."""

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dpfa_jax.accounting import LedgerFile
from dpfa_jax.dpsgd import DPState, DPStep, restarted, take_batch
from dpfa_jax.train.charges import charge_block, charged_steps, index_batches, steps_left
from dpfa_jax.train.checkpoints import CheckpointNote, Checkpoints
from dpfa_jax.train.evaluate import Metrics
from dpfa_jax.train.job import Job
from dpfa_jax.train.models import Params
from dpfa_jax.train.progress import Progress, Status
from dpfa_jax.train.stop import StopRequest


class LoopState(NamedTuple):
    """What a step leaves behind.

    Attributes:
      private: the state of DP-SGD.
      average: running average of the iterates, the model that is used (post-processing).
    """

    private: DPState
    average: Params

    def released(self) -> "LoopState":
        """What a checkpoint holds: all but the past noise, which is secret."""
        return self._replace(private=self.private._replace(noise_memory=()))

    def resumed(self, found: "LoopState") -> "LoopState":
        """`found`, as `released` left it, with no past noise: what a resumed run goes on from.

        Correlated noise starts afresh, so that no two continuations of one state share any.
        """
        memory = restarted(self.private).noise_memory
        return found._replace(private=found.private._replace(noise_memory=memory))


class _Pace:
    """Steps per second, without the first step of the process, which waits for the compiler."""

    def __init__(self) -> None:
        self._started = self._now = time.monotonic()
        self._steps = -1

    def steps_per_second(self) -> float:
        """Called once after each step."""
        self._now = time.monotonic()
        self._steps += 1
        if self._steps == 0:
            started, self._started = self._started, self._now
            return 1.0 / max(self._now - started, 1e-9)
        return self._steps / max(self._now - self._started, 1e-9)


@dataclasses.dataclass
class Course:
    """How far a run has come.

    Attributes:
      state: after `step` steps.
      step: updates that shaped the state; charged steps that were lost are not among them.
      seconds: spent in steps so far.
      history: one dict a look: step, charged, epsilon, loss, accuracy.
    """

    state: LoopState
    step: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)


def run_steps(
    job: Job,
    step_fn: DPStep,
    ledger_file: LedgerFile,
    checkpoints: Checkpoints,
    course: Course,
    progress: Progress,
    stop: StopRequest,
    *,
    look: Callable[[Params], Metrics],
    epsilon_after: Callable[[int], float],
) -> None:
    """Moves `course` on until the ledger has paid for all steps of the plan, or `stop` asks.

    Steps that were charged but lost in a crash stay charged: they come off the run's end.

    Errors: BudgetExceededError, LedgerError, RunError; `course` then stands after a whole step
    and the newest checkpoint is whole.
    """
    plan, settings = job.plan, job.settings
    seed = job.insecure_seed
    average = _average(settings.chosen.average_decay)
    metrics = look(course.state.average)
    left = steps_left(plan, ledger_file)
    due = course.step + left
    paid = charged_steps(ledger_file)
    batches = index_batches(plan, left, insecure_seed=seed, first=course.step, charged=paid)
    examples = {"inputs": job.data.train_inputs, "labels": job.data.train_labels}
    started, before = time.monotonic(), course.seconds
    pace = _Pace()
    if not course.history:
        _note(course, 0, epsilon_after(0), metrics)
    while left and not stop.requested:
        block = min(settings.checkpoint_every, left)
        keys = charge_block(ledger_file, plan, block, insecure_seed=seed, first=course.step)
        charged = plan.steps - left + block
        # Rounded up to the next look, whose epsilon is due anyway: each one costs a convolution.
        every = settings.evaluate_every
        spent = epsilon_after(min(plan.steps, -(-charged // every) * every))
        for index, indices in enumerate(itertools.islice(batches, block)):
            batch, is_real = take_batch(examples, indices, plan.release.dataset_size)
            private = step_fn.step(course.state.private, batch, jnp.asarray(is_real), keys[index])
            jax.block_until_ready(private.params)
            course.state = LoopState(
                private, average(course.state.average, private.params, course.step)
            )
            course.step += 1
            course.seconds = before + time.monotonic() - started
            is_look = course.step % settings.evaluate_every == 0 or course.step == due
            if is_look:
                metrics = look(course.state.average)
                _note(course, charged, epsilon_after(charged), metrics)
            rate = pace.steps_per_second()
            status = Status(
                step=course.step,
                steps=due,
                epsilon=spent,
                loss=metrics.loss,
                accuracy=metrics.accuracy,
                examples_per_second=rate * plan.release.expected_batch_size,
                seconds_left=(due - course.step) / rate,
            )
            progress.show(status, keep=is_look)
        left -= block
        note = CheckpointNote(course.step, ledger_file.head, course.seconds, course.history)
        checkpoints.save(course.state.released(), note)
    checkpoints.wait()


def _note(course: Course, charged: int, epsilon: float, metrics: Metrics) -> None:
    course.history.append(
        {
            "step": course.step,
            "charged": charged,
            "epsilon": epsilon,
            "loss": metrics.loss,
            "accuracy": metrics.accuracy,
        }
    )


def _average(decay: float) -> Callable[[Params, Params, int], Params]:
    """Exponential moving average of iterates; early on, the plain mean of what there is."""
    if decay == 0.0:
        return lambda average, params, step: params

    @jax.jit
    def update(average: Params, params: Params, keep: Any) -> Params:
        return jax.tree.map(lambda a, p: keep * a + (1.0 - keep) * p, average, params)

    def averaged(average: Params, params: Params, step: int) -> Params:
        return update(average, params, np.float32(min(decay, step / (step + 1.0))))

    return averaged
