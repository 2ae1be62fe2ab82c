"""The rows of a training benchmark as they are stored, written whenever something is added."""

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from stored_runs import write

SLOWER = 1.2  # than the best part: parts beyond are not tried


class Row(NamedTuple):
    """One process: a method, and the size of the parts that it takes the batch in, if any."""

    model: str
    T: int
    batch: int
    method: str
    micro_batch: int | None = None

    def named(self) -> dict[str, Any]:
        """What tells a stored row from others: all but the parts, whose best one is stored."""
        return dict(zip(self._fields[:4], self[:4], strict=True))


class Results:
    def __init__(self, path: str | None, result: dict[str, Any]) -> None:
        self.path, self.result, self._lock = path, result, threading.Lock()
        self._early: dict[Row, int] = {}  # largest batches of rows that are not timed yet

    def is_wanted(self, row: Row) -> bool:
        """Whether the row has no figure yet, and no size of part says that it would be slow.

        Beyond a size that is slower than the best by a fifth, none is tried.
        """
        known = self._find(row)
        if not known or row.micro_batch is None:
            return not known
        tried = {int(size): time for size, time in known["tried"].items()}
        best = min(tried, key=tried.__getitem__)
        return row.micro_batch not in tried and not any(
            time > SLOWER * tried[best]
            and min(best, row.micro_batch) < size < max(best, row.micro_batch)
            for size, time in tried.items()
        )

    def is_largest_wanted(self, row: Row) -> bool:
        return self._find(row).get("largest_batch") is None

    def add(self, row: Row, gpu: str, found: dict[str, Any] | None, why: str) -> None:
        """A row without `found` is left out; with both, its largest batch alone is."""
        with self._lock:
            self._forget(row, "row")
            if found is None:
                self._leave_out(row, "row", why)
            else:
                self._take(row, gpu, found)
                if why:
                    self._forget(row, "largest")
                    self._leave_out(row, "largest", why)
            write(self.result, self.path)

    def add_largest(self, row: Row, found: dict[str, Any] | None, why: str) -> None:
        with self._lock:
            self._forget(row, "largest")
            if found is None:
                self._leave_out(row, "largest", why)
            else:
                print(*row[:4], found, flush=True)
                known = self._find(row)
                self._early[row] = found["largest_batch"]
                if known:
                    known["largest_batch"] = found["largest_batch"]
            write(self.result, self.path)

    def _find(self, row: Row) -> dict[str, Any]:
        for known in self.result["rows"]:
            if row.named().items() <= known.items():
                return known
        return {}

    def _take(self, row: Row, gpu: str, found: dict[str, Any]) -> None:
        print(*row, f"GPU {gpu}", found, flush=True)
        known = self._find(row)
        tried = dict(known.get("tried", {}))
        if row.micro_batch is not None:
            tried[str(row.micro_batch)] = found["milliseconds"]
            found = found | {"micro_batch": row.micro_batch, "tried": tried}
        if known and known["milliseconds"] <= found["milliseconds"]:
            known["tried"] = tried
            return
        early = self._early.get(row._replace(micro_batch=None))
        new = row.named() | {"largest_batch": known.get("largest_batch") or early} | found
        new["tokens_per_second"] = round(row.batch * row.T / found["milliseconds"] * 1e3)
        new["gpu"] = gpu
        if len(self.result.get("runs", ())) > 1:
            new["run"] = len(self.result["runs"]) - 1
        if known:
            known.clear()
            known.update(new)
        else:
            self.result["rows"].append(new)

    def _leave_out(self, row: Row, what: str, why: str) -> None:
        names = {name: value for name, value in row._asdict().items() if value is not None}
        self.result["left_out"].append(names | {"what": what, "why": why})
        print(f"left out: {self.result['left_out'][-1]}", flush=True)

    def _forget(self, row: Row, what: str) -> None:
        """An older reason, of another run, to leave out what was tried again now."""
        self.result["left_out"] = [
            old for old in self.result["left_out"]
            if not (
                row.named().items() <= old.items()
                and old.get("micro_batch") == row.micro_batch and old["what"] == what
            )
        ]  # fmt: skip


def added_to(path: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """The stored result at `path`, to which `run` is to add: `runs` has what each says of itself.

    ValueError where the device or a version differs: rows of one file are there to be compared. A
    package that one of the two did without is no difference.
    """
    with open(path) as file:
        result = json.load(file)
    old, new = result["versions"], run["versions"]
    differ = [name for name in old if new.get(name, old[name]) != old[name]]
    for name, was, now in (
        ("device", result["device"], run["device"]),
        ("versions", *({name: them[name] for name in differ} for them in (old, new))),
    ):
        if was != now:
            raise ValueError(f"{path} is of {name} {was}, this run of {now}")
    head: Sequence[str] = ("device", "date", "command", "versions")
    runs = result.get("runs") or [{name: result[name] for name in head}]
    result["runs"] = [*runs, {name: run[name] for name in head}]
    result["versions"] = old | new
    result["command"] = "; ".join(dict.fromkeys(one["command"].strip() for one in result["runs"]))
    return result
