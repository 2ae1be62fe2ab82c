"""A polite stop: Ctrl-C and SIGTERM end the run after the step at hand."""

import contextlib
import dataclasses
import signal
import threading
from collections.abc import Iterator


@dataclasses.dataclass
class StopRequest:
    """Whether somebody asked the run to stop."""

    requested: bool = False


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; a second one raises KeyboardInterrupt.

    Outside the main thread, where Python cannot handle signals, nothing is caught.
    """
    request = StopRequest()

    def handle(_number: int, _frame: object) -> None:
        if request.requested:
            raise KeyboardInterrupt
        request.requested = True

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
