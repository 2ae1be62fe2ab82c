"""The durable ledger: an append-only, hash-chained file that is charged before every release."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Self

from dpfa_jax.accounting import chain, storage
from dpfa_jax.accounting.budget import Budget
from dpfa_jax.accounting.ledger import Ledger, Record, as_record, record
from dpfa_jax.accounting.locks import exclusive
from dpfa_jax.core import ArgumentError, DPFAError, LedgerError, checks
from dpfa_jax.release import GaussianRecord, Release

FORMAT = 2
_WITHOUT_IDS = 1


class LedgerFile:
    """A ledger on disk. A charge that returned is on disk; a charge that raised released nothing.

    Formal guarantees, while the disk keeps what fsync promised:
    * `charge` writes and syncs its line before it returns, so after a crash at any point the file
      holds at least what was released. A crash may waste budget; it never overspends it.
    * A flipped, dropped, reordered or doubled line is found on opening and refused. Whole lines
      cut off the END are not visible in the file alone: keep `head` elsewhere (a checkpoint, say)
      and pass it back as `expect_head`. Every line has random bits of its own, so a charge that
      is written again after such a cut has another hash, also where it charges the same.
    * A file that was removed, renamed or replaced while it is open is refused at the next charge,
      before and after its line is written.
    * The chain detects damage and mistakes. It has no secret key: whoever can write the file can
      write another valid one.
    * Processes may share one file: each charge reads what the others appended, under an exclusive
      lock. `with` holds the lock throughout, so that nobody else, also no other thread, charges
      meanwhile: they wait for `lock_timeout_seconds` and are refused. Each process
      opens the file itself: an object inherited over fork shares lock and position with its
      parent, and is refused.

    Attributes:
      path: the file.
      budget: what may be spent, or None for no limit.
      metadata: what `create` was given.
      insecure_test_noise: True where the file takes answers whose noise came from a test seed.
      ledger: all charges so far, as last read.
      has_line_ids: False in a ledger of format 1: charges that were cut off and written again may
        have the same head.
      head: SHA-256 of the last line, hexadecimal; with line ids, no other file or continuation
        ever has it.
    """

    def __init__(self, path: str, descriptor: int, read_only: bool, timeout_seconds: float):
        self.path = path
        self.budget: Budget | None = None
        self.metadata: Mapping[str, Any] = {}
        self.insecure_test_noise = False
        self.has_line_ids = True
        self.ledger = Ledger()
        self.head = chain.GENESIS
        # What `path` means now: the process may go to another folder.
        self._place = os.path.join(os.getcwd(), path)
        self._descriptor = descriptor
        self._read_only = read_only
        self._timeout_seconds = timeout_seconds
        self._heads: set[str] = set()
        self._end = 0
        self._lines = 0
        self._broken = False
        self._process = os.getpid()
        self._threads = threading.RLock()
        self._held: contextlib.ExitStack | None = None

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        budget: Budget | None = None,
        metadata: Mapping[str, Any] | None = None,
        insecure_test_noise: bool = False,
        lock_timeout_seconds: float = 10.0,
    ) -> Self:
        """A new ledger file, durable when this returns.

        Errors: LedgerError where the file exists or cannot be written; ArgumentError where
          `metadata` is not JSON.
        """
        body = {
            "type": "header",
            "format": FORMAT,
            "library": _library_version(),
            "budget": None if budget is None else dataclasses.asdict(budget),
            "insecure_test_noise": bool(insecure_test_noise),
            "metadata": dict(metadata or {}),
        }
        try:
            line, _ = chain.chained_line(body, chain.GENESIS)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                "metadata", metadata, f"not JSON: {error}", "Pass strings and finite numbers."
            ) from error
        storage.create_file(os.fspath(path), line)
        return cls.open(path, lock_timeout_seconds=lock_timeout_seconds)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        expect_head: str | None = None,
        read_only: bool = False,
        lock_timeout_seconds: float = 10.0,
    ) -> Self:
        """Open an existing ledger and verify its whole chain.

        A last line that a crash left unfinished was never acknowledged, so nothing was released
        for it: it is dropped, and the chain says so. Anything else that does not verify is refused.
        A ledger of format 1, whose lines have no random ids, opens with `read_only` only.

        Args:
          path: the file.
          expect_head: the head at some earlier moment; refused where the chain does not hold it.
          read_only: never writes, also not to drop a torn line; `charge` is refused.
          lock_timeout_seconds: how long to wait for another process or thread.

        Errors: LedgerError.
        """
        name = os.fspath(path)
        descriptor = storage.open_file(name, read_only=read_only)
        file = cls(name, descriptor, read_only, lock_timeout_seconds)
        try:
            with file._locked():
                pass
            if file._lines == 0:
                raise LedgerError(
                    f"path = {name!r}: no complete header line. If creating it was interrupted, "
                    "nothing was ever charged to it: delete it and create it again."
                )
            if expect_head is not None:
                file.require_head(expect_head)
        except BaseException:
            file.close()
            raise
        return file

    def require_head(self, head: str) -> None:
        """Refuse a file whose chain never had `head`.

        Errors: LedgerError.
        """
        if head not in self._heads:
            raise LedgerError(
                f"path = {self.path!r}: its chain does not hold expect_head = {head!r}. "
                "Charges made after that moment are missing: the file was rolled back or "
                "belongs to another run. Restore it from a copy."
            )

    def charge(self, release: Release | Record, count: int = 1) -> Ledger:
        """Charge `count` answers of `release`, durably, BEFORE they are released.

        Returns: the ledger with the charge in it.
        Errors: BudgetExceededError where it would pass the budget, LedgerError where it cannot be
          written, or the file is not in its place; then nothing may be released.
          UnsupportedEventError where unit or relation
          differ from the ledger's.
        """
        checks.count("count", count)
        new = as_record(release)
        with self._locked():
            if self._read_only:
                raise LedgerError(f"path = {self.path!r}: opened read-only. Nothing was charged.")
            charged = record(self.ledger, new, count)
            self._check_secrecy(new)
            if self.budget is not None:
                self.budget.require(self.ledger, new, count)
            self._append({"type": "charge", "record": chain.record_to_json(new), "count": count})
            self.ledger = charged
            return charged

    def refresh(self) -> Ledger:
        """The ledger with what other processes have charged meanwhile.

        Errors: LedgerError, also where the file was removed or replaced.
        """
        with self._locked():
            return self.ledger

    def close(self) -> None:
        """Release the lock and the file. The object cannot be used afterwards."""
        stack, self._held = self._held, None
        if stack is not None:
            stack.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        if self._held is not None:
            raise LedgerError(f"path = {self.path!r}: entered twice. One `with` holds the lock.")
        stack = contextlib.ExitStack()
        stack.enter_context(self._locked())
        self._held = stack
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        if os.getpid() != self._process:
            raise LedgerError(
                f"path = {self.path!r}: opened before a fork, whose processes share one lock. "
                "Open it again in this process. Nothing was charged."
            )
        with self._alone_among_threads():
            if self._descriptor < 0:
                raise LedgerError(f"path = {self.path!r}: closed. Open it again.")
            if self._broken:
                raise LedgerError(
                    f"path = {self.path!r}: an earlier charge failed, so what is on disk is not "
                    "known. Open it again."
                )
            if self._held is not None:
                self._require_in_place(self._end)
                yield
                return
            with exclusive(self._descriptor, self.path, self._timeout_seconds):
                self._read_new_lines()
                yield

    @contextlib.contextmanager
    def _alone_among_threads(self) -> Iterator[None]:
        if not self._threads.acquire(timeout=self._timeout_seconds):
            raise LedgerError(
                f"path = {self.path!r}: another thread has held the ledger for "
                f"{self._timeout_seconds:g} s. Charge from the thread that is inside `with`, or "
                "leave `with` first. Nothing was charged."
            )
        try:
            yield
        finally:
            self._threads.release()

    def _read_new_lines(self) -> None:
        new = storage.read_from(self._descriptor, self._end, self.path)
        self._require_in_place(self._end + len(new))
        *lines, fragment = new.split(b"\n")
        for text in lines:
            line = chain.verified_line(text + b"\n", self.head, self._lines + 1)
            self._apply(line.body)
            if (line.id is not None) != self.has_line_ids:
                raise LedgerError(
                    f"path = {self.path!r}, line {self._lines + 1}: a line of another format. The "
                    "file was altered; restore it from a copy."
                )
            self.head = line.hash
            self._heads.add(self.head)
            self._lines += 1
            self._end += len(text) + 1
        if not fragment:
            return
        if not chain.is_torn(fragment):
            raise LedgerError(
                f"path = {self.path!r}: the last line does not end as a line that was interrupted. "
                "The file was altered or damaged; restore it from a copy."
            )
        if self._lines and not self._read_only:
            storage.cut(self._descriptor, self._end, self.path)
            self._append({"type": "recovery", "dropped_bytes": len(fragment)})

    def _append(self, body: dict[str, Any]) -> None:
        line, head = chain.chained_line(body, self.head)
        self._broken = True
        storage.append_durably(self._descriptor, line, self._end, self.path)
        end = self._end + len(line)
        self._require_in_place(end)
        self._broken = False
        self.head = head
        self._heads.add(head)
        self._lines += 1
        self._end = end

    def _require_in_place(self, end: int) -> None:
        storage.require_in_place(self._descriptor, self._place, end, self.path)

    def _apply(self, body: dict[str, Any]) -> None:
        try:
            kind = body["type"]
            if (kind == "header") != (self._lines == 0):
                raise LedgerError("the header is not the first line, or there are two.")
            if kind == "header":
                self._apply_header(body)
            elif kind == "charge":
                new = chain.record_from_json(body["record"])
                self._check_secrecy(new)
                self.ledger = record(self.ledger, new, body["count"])
            elif kind != "recovery":
                raise LedgerError(f"type = {kind!r}: unknown. Update the library.")
        except (KeyError, TypeError, DPFAError) as error:
            raise LedgerError(f"path = {self.path!r}, line {self._lines + 1}: {error}") from error

    def _apply_header(self, body: dict[str, Any]) -> None:
        if body["format"] not in (_WITHOUT_IDS, FORMAT):
            raise LedgerError(f"format = {body['format']!r}: unknown. Update the library.")
        if body["format"] == _WITHOUT_IDS and not self._read_only:
            raise LedgerError(
                f"format = {_WITHOUT_IDS}: its lines have no random ids, so charges that were cut "
                "off and written again would not show. It opens with read_only=True (`dpfa "
                "account` does so); charge to a new ledger, whose budget counts on top of this one."
            )
        self.has_line_ids = body["format"] != _WITHOUT_IDS
        self.budget = None if body["budget"] is None else Budget(**body["budget"])
        self.metadata = body["metadata"]
        self.insecure_test_noise = body["insecure_test_noise"]

    def _check_secrecy(self, new: Record) -> None:
        if not isinstance(new, GaussianRecord) or new.is_secret_noise:
            return
        if not self.insecure_test_noise:
            raise LedgerError(
                f"generator = {new.generator!r}: noise from a test seed protects nobody, and this "
                "ledger keeps a real promise. Create a ledger with insecure_test_noise=True."
            )


def _library_version() -> str:
    try:
        return importlib.metadata.version("dp-flash-attention")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "not installed"
