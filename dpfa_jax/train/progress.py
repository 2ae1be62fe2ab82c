"""What a person sees while a run trains."""

import dataclasses
import sys
import time
from types import TracebackType
from typing import Any, Protocol, Self, TextIO


@dataclasses.dataclass(frozen=True)
class Status:
    """Where a run stands.

    Attributes:
      step, steps: updates done, and due in all.
      epsilon: upper bound on what has been spent so far.
      loss, accuracy: on held-out examples, at the latest look.
      examples_per_second: expected, not true, batch sizes over time; those are private.
      seconds_left: estimate.
    """

    step: int
    steps: int
    epsilon: float
    loss: float
    accuracy: float
    examples_per_second: float
    seconds_left: float


class Progress(Protocol):
    """Shows a run. A context manager around its steps."""

    def say(self, text: str) -> None:
        """One line to keep."""
        ...

    def show(self, status: Status, *, keep: bool) -> None:
        """The status of now; `keep` at every look at the held-out examples."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class PlainProgress:
    """One line a look; for files, pipes and small terminals."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream if stream is not None else sys.stdout

    def say(self, text: str) -> None:
        """One line."""
        print(text, file=self._stream, flush=True)

    def show(self, status: Status, *, keep: bool) -> None:
        """One line where `keep`, else nothing."""
        if keep:
            self.say(
                f"step {status.step}/{status.steps}  epsilon <= {status.epsilon:.2f}  "
                f"loss {status.loss:.3f}  accuracy {100 * status.accuracy:.1f} %  "
                f"{status.examples_per_second:.0f} examples/s  "
                f"{clock(status.seconds_left)} left"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        return None


class RichProgress:
    """A live bar on a terminal."""

    def __init__(self) -> None:
        from rich import progress

        self._bar = progress.Progress(
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("[magenta]ε ≤ {task.fields[epsilon]:.2f}"),
            progress.TextColumn("loss {task.fields[loss]:.3f}"),
            progress.TextColumn("[green]{task.fields[accuracy]:.1f} %"),
            progress.TextColumn("{task.fields[rate]:.0f} examples/s"),
            progress.TextColumn("[dim]{task.fields[left]} left"),
        )
        self._task: progress.TaskID | None = None

    def say(self, text: str) -> None:
        """One line above the bar."""
        self._bar.console.print(text, highlight=False, markup=False)

    def show(self, status: Status, *, keep: bool) -> None:
        """Moves the bar."""
        del keep
        fields: dict[str, Any] = {
            "epsilon": status.epsilon,
            "loss": status.loss,
            "accuracy": 100 * status.accuracy,
            "rate": status.examples_per_second,
            "left": clock(status.seconds_left),
        }
        if self._task is None:
            self._task = self._bar.add_task("training", total=status.steps, **fields)
        self._bar.update(self._task, completed=status.step, total=status.steps, **fields)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._bar.stop()


def progress_for(stream: TextIO | None = None) -> Progress:
    """A live bar where standard output is a terminal, else plain lines."""
    if stream is None and sys.stdout.isatty():
        return RichProgress()
    return PlainProgress(stream)


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds, or hours:minutes:seconds."""
    form = "%H:%M:%S" if seconds >= 3600 else "%M:%S"
    return time.strftime(form, time.gmtime(max(seconds, 0.0)))
