"""The file form of a ledger as text: one canonical JSON line an event, each hashing the one before.

A line is {"body": ..., "hash": ..., "id": ..., "previous": ...}: `hash` is SHA-256 over the
canonical form of the other three. `id` is fresh from the operating system, so that no two ledgers,
and no two continuations of one, share a hash, whatever they charge. A line is accepted only if it
is, byte for byte, its own canonical form.
"""

import dataclasses
import hashlib
import json
import re
import secrets
from typing import Any, NamedTuple

from dpfa_jax.accounting.ledger import NonPrivateRecord, Record
from dpfa_jax.core import DPFAError, LedgerError
from dpfa_jax.release import GaussianRecord, Sampling

GENESIS = "0" * 64
_ID_BYTES = 16  # 128 bits: no collision among all lines ever written
_IDS = re.compile("[0-9a-f]{32}")


class Line(NamedTuple):
    """One verified line.

    Attributes:
      body: the event.
      id: 128 random bits, hexadecimal; None in a line of format 1, which had none.
      hash: SHA-256 of the line, hexadecimal.
    """

    body: dict[str, Any]
    id: str | None
    hash: str


def canonical(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def chained_line(body: dict[str, Any], previous: str) -> tuple[bytes, str]:
    """The line (newline included) that follows the line of hash `previous`, and its own hash.

    Its id is fresh: two calls never return the same line.
    """
    hashed = {"body": body, "id": secrets.token_hex(_ID_BYTES), "previous": previous}
    digest = _digest(hashed)
    return canonical({**hashed, "hash": digest}).encode("ascii") + b"\n", digest


def verified_line(line: bytes, previous: str, number: int) -> Line:
    """The content of one complete line (newline included). Errors: LedgerError."""
    try:
        value = json.loads(line)
        body, digest, follows = value["body"], value.pop("hash"), value["previous"]
        hashed, value = value, {**value, "hash": digest}
        named = "id" not in value or _IDS.fullmatch(value["id"]) is not None
        intact = (canonical(value) + "\n").encode("ascii") == line
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _broken(number, "it is no JSON line of a ledger") from error
    if not intact:
        raise _broken(number, "it is not in canonical form")
    if not named or not value.keys() <= {"body", "hash", "id", "previous"}:
        raise _broken(number, "it holds what no line of a ledger holds")
    if follows != previous:
        raise _broken(number, "it does not follow the line before it")
    if digest != _digest(hashed):
        raise _broken(number, "its hash does not match its content")
    return Line(body, value.get("id"), digest)


def is_torn(fragment: bytes) -> bool:
    """True if bytes after the last newline can be the start of a line that was never finished.

    A whole JSON value that only lacks its newline was written in full, or altered: not torn.
    """
    try:
        json.JSONDecoder().raw_decode(fragment.decode("ascii"))
    except UnicodeDecodeError:
        return False
    except ValueError:
        return fragment.startswith(b'{"body":'[: len(fragment)])
    return False


def record_to_json(record: Record) -> dict[str, Any]:
    """`record` as a JSON object; floats survive the round trip exactly."""
    form = "gaussian" if isinstance(record, GaussianRecord) else "non-private"
    return {"form": form, **json.loads(canonical(dataclasses.asdict(record)))}


def record_from_json(value: dict[str, Any]) -> Record:
    """The inverse of `record_to_json`. Errors: LedgerError."""
    try:
        fields = dict(value)
        form = fields.pop("form")
        if form == "non-private":
            return NonPrivateRecord(**fields)
        if form != "gaussian":
            raise LedgerError(f"record form = {form!r}: unknown. Update the library.")
        for name in ("sensitivities", "noise_stddevs", "grids"):
            fields[name] = tuple(fields[name])
        if fields["sampling"] is not None:
            fields["sampling"] = Sampling(**fields["sampling"])
        return GaussianRecord(**fields)
    except (KeyError, TypeError, AttributeError, DPFAError) as error:
        raise LedgerError(f"record = {value!r}: not a record of this version: {error}") from error


def _digest(hashed: dict[str, Any]) -> str:
    return hashlib.sha256(canonical(hashed).encode("ascii")).hexdigest()


def _broken(number: int, problem: str) -> LedgerError:
    return LedgerError(
        f"line {number} of the ledger: {problem}. The file was altered or damaged; restore it "
        "from a copy, or treat the budget as spent. It is never repaired or reset here."
    )
