"""An exclusive lock on an open file, on POSIX and Windows."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

from dpfa_jax.core import LedgerError

_POLL_SECONDS = 0.002
# Windows locks byte ranges and blocks reads of them: lock one byte far behind any content.
_WINDOWS_OFFSET = 2**60


@contextlib.contextmanager
def exclusive(descriptor: int, path: str, timeout_seconds: float) -> Iterator[None]:
    """Hold the lock of `descriptor`. The system drops it when the process ends, however it ends.

    The lock belongs to the open file, which a forked child shares; only the process that took it
    gives it back.

    Errors: LedgerError where another holder keeps it for `timeout_seconds`.
    """
    holder = os.getpid()
    give_up = time.monotonic() + timeout_seconds
    while not _try_lock(descriptor):
        if time.monotonic() > give_up:
            raise LedgerError(
                f"path = {path!r}: another process has held the ledger for {timeout_seconds:g} s. "
                "Wait for it, or give this run a ledger of its own."
            )
        time.sleep(_POLL_SECONDS)
    try:
        yield
    finally:
        if os.getpid() == holder:
            _unlock(descriptor)


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            os.lseek(descriptor, _WINDOWS_OFFSET, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _unlock(descriptor: int) -> None:
        os.lseek(descriptor, _WINDOWS_OFFSET, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise LedgerError(
                f"the file system cannot lock the ledger: {error}. Keep it on a local disk."
            ) from error
        return True

    def _unlock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
