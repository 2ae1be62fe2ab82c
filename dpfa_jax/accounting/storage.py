"""Appending lines to a file so that they are on disk before anybody acts on them."""

import contextlib
import os

from dpfa_jax.core import LedgerError

_BINARY = getattr(os, "O_BINARY", 0)  # Windows translates newlines without it


def create_file(path: str, line: bytes) -> None:
    """A new file with one durable line. Errors: LedgerError, also where the file exists."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, 0o600)
    except FileExistsError as error:
        raise LedgerError(
            f"path = {path!r}: it exists. Open it with LedgerFile.open; a ledger is never replaced."
        ) from error
    except OSError as error:
        raise LedgerError(f"path = {path!r}: cannot be created: {error}.") from error
    try:
        append_durably(descriptor, line, 0, path)
        _sync_directory(os.path.dirname(path) or ".")
    except OSError as error:
        raise LedgerError(f"path = {path!r}: its folder cannot be synced: {error}.") from error
    finally:
        os.close(descriptor)


def open_file(path: str, *, read_only: bool) -> int:
    """A descriptor of an existing ledger. Errors: LedgerError."""
    try:
        return os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | _BINARY)
    except OSError as error:
        raise LedgerError(
            f"path = {path!r}: cannot be opened: {error}. Nothing was charged."
        ) from error


def append_durably(descriptor: int, line: bytes, end: int, path: str) -> None:
    """Write `line` at byte `end` and fsync. Errors: LedgerError.

    What a failed write left behind is cut off again where that is possible; where it is not, the
    next opening finds the torn line.
    """
    try:
        os.lseek(descriptor, end, os.SEEK_SET)
        rest = line
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError as error:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, end)
        raise LedgerError(
            f"path = {path!r}: the charge cannot be written: {error}. Nothing may be released."
        ) from error
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise LedgerError(
            f"path = {path!r}: the charge may not be on disk: {error}. Nothing may be released; "
            "the budget may have been charged for nothing."
        ) from error


def read_from(descriptor: int, start: int, path: str) -> bytes:
    """All bytes from `start`. Errors: LedgerError, also where the file is shorter than that."""
    try:
        size = os.fstat(descriptor).st_size
        if size < start:
            raise LedgerError(
                f"path = {path!r}: the file shrank from {start} to {size} bytes while it was open. "
                "Charges are missing; restore it from a copy."
            )
        os.lseek(descriptor, start, os.SEEK_SET)
        parts = []
        while part := os.read(descriptor, 1 << 20):
            parts.append(part)
        return b"".join(parts)
    except OSError as error:
        raise LedgerError(f"path = {path!r}: cannot be read: {error}.") from error


def require_in_place(descriptor: int, place: str, end: int, path: str) -> None:
    """Refuse an open file that is no longer the file at `place`, or does not end at byte `end`.

    A removed or replaced file takes writes without a word, and nobody ever reads them.

    Errors: LedgerError.
    """
    try:
        opened, present = os.fstat(descriptor), os.stat(place)
    except FileNotFoundError as error:
        raise _elsewhere(path, "the file was removed or renamed") from error
    except OSError as error:
        raise _elsewhere(path, f"the file cannot be looked up ({error})") from error
    if not os.path.samestat(opened, present):
        raise _elsewhere(path, "the file was replaced by another one")
    if opened.st_size != end:
        raise _elsewhere(path, f"the file has {opened.st_size} bytes, where {end} are its own,")


def _elsewhere(path: str, problem: str) -> LedgerError:
    return LedgerError(
        f"path = {path!r}: {problem} while it was open. Nothing may be released. Put the ledger "
        "that was charged back in its place and open it again."
    )


def cut(descriptor: int, end: int, path: str) -> None:
    """Drop all bytes from `end`, durably. Errors: LedgerError."""
    try:
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)
    except OSError as error:
        raise LedgerError(
            f"path = {path!r}: its torn last line cannot be dropped: {error}."
        ) from error


def _sync_directory(path: str) -> None:
    if os.name != "posix":  # Windows has no descriptor of a folder; NTFS journals the name itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
