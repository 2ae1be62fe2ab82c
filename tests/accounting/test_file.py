"""V20 and V21: the durable ledger under kills, full disks, several processes and damage."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import random
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from dpfa_jax.accounting import (
    Budget,
    Ledger,
    LedgerFile,
    NonPrivateRecord,
    epsilon,
    record,
    storage,
)
from dpfa_jax.accounting.chain import GENESIS, canonical, is_torn, record_from_json, record_to_json
from dpfa_jax.core import ArgumentError, BudgetExceededError, LedgerError, UnsupportedEventError
from dpfa_jax.release import ExampleRelease, RecordRelease, TrainingRelease

# The forked children charge a file and die; they never touch the threads that jax may have started.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*")

STEP = TrainingRelease(1.0, 2.0, 1000, 50, 500)
OTHER = dataclasses.replace(STEP, noise_multiplier=3.0)
BUDGET = Budget(8.0, 1e-5, "rdp")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def test_v18_json_round_trip():
    """V18: every record, floats to the last bit."""
    for release in (
        STEP,
        dataclasses.replace(STEP, l2_clip_norm=(0.1, 1 / 3), insecure_test_noise=True),
        ExampleRelease(0.1, math.pi, 3, 2, 4),
        RecordRelease(1.0, 0.3, 1e-3, 3, 2, 5),
    ):
        assert record_from_json(record_to_json(release.record())) == release.record()
    bare = NonPrivateRecord("one training example", "add_or_remove", "loss curve")
    assert record_from_json(record_to_json(bare)) == bare


def test_charges_survive_and_merge(path):
    with LedgerFile.create(path, budget=BUDGET, metadata={"run": "a"}) as file:
        assert file.charge(STEP) == record(Ledger(), STEP)
        file.charge(OTHER, 3)
        file.charge(STEP, 2)
        head = file.head
    again = LedgerFile.open(path, expect_head=head)
    assert again.ledger == record(record(Ledger(), STEP, 3), OTHER, 3)
    assert (again.budget, again.metadata, again.head) == (BUDGET, {"run": "a"}, head)
    with pytest.raises(LedgerError, match="exists"):
        LedgerFile.create(path)
    again.close()
    with pytest.raises(LedgerError, match="closed"):
        again.charge(STEP)


def test_over_budget_nothing_is_written(path):
    file = LedgerFile.create(path, budget=Budget(2.0, 1e-5, "rdp"))
    size, count = path.stat().st_size, 0
    with pytest.raises(BudgetExceededError, match="Nothing was charged"):
        while True:
            size = path.stat().st_size
            file.charge(STEP, 5)
            count += 5
    assert path.stat().st_size == size and file.ledger.total_count == count > 0
    assert epsilon(file.ledger, 1e-5, accountant="rdp") <= 2.0
    assert epsilon(record(file.ledger, STEP, 5), 1e-5, accountant="rdp") > 2.0
    with pytest.raises(BudgetExceededError):
        file.charge(NonPrivateRecord(STEP.unit, STEP.relation, "raw loss"))
    with pytest.raises(UnsupportedEventError, match="unit"):
        file.charge(ExampleRelease(1.0, 1.0, 4, 2, 8))
    assert path.stat().st_size == size
    file.close()


def test_test_noise_needs_a_ledger_that_says_so(path, tmp_path):
    insecure = dataclasses.replace(STEP, insecure_test_noise=True)
    with LedgerFile.create(path) as file, pytest.raises(LedgerError, match="test seed"):
        file.charge(insecure)
    with LedgerFile.create(tmp_path / "t", budget=BUDGET, insecure_test_noise=True) as file:
        ledger = file.charge(insecure)
    assert epsilon(ledger, 1e-5) == math.inf
    with LedgerFile.open(tmp_path / "t") as file:
        assert file.insecure_test_noise


# --- V20: crashes -------------------------------------------------------------------------------


def _kill_at(path, point, half):
    """In a forked child: charge until the `point`-th system call of the ledger, then die in it.

    `half`: a write dies in the middle. Every acknowledged charge is told through a pipe.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls = 0
        real = {name: getattr(os, name) for name in ("write", "fsync", "ftruncate", "replace")}

        def wrapped(name):
            def call(*arguments):
                nonlocal calls
                calls += 1
                if calls == point:
                    if name == "write" and half:
                        real["write"](arguments[0], arguments[1][: len(arguments[1]) // 2])
                    elif half:
                        real[name](*arguments)
                    os._exit(9)
                return real[name](*arguments)

            return call

        try:
            for name in real:
                setattr(os, name, wrapped(name))
            file = (
                LedgerFile.open(path)
                if os.path.exists(path)
                else LedgerFile.create(path, budget=BUDGET)
            )
            for _ in range(6):
                file.charge(STEP)
                real["write"](writer, b"x")
        except BaseException:
            os._exit(1)
        os._exit(0)
    os.close(writer)
    acknowledged = 0
    while got := os.read(reader, 64):
        acknowledged += len(got)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return acknowledged, os.waitstatus_to_exitcode(status)


def _crash_series(folder, points, rounds):
    shown = killed = 0
    for point in range(1, points + 1):
        path = folder / f"{point}.jsonl"
        released = 0
        for attempt in range(rounds):
            acknowledged, code = _kill_at(path, 1 + (point + 3 * attempt) % 13, half=point % 2)
            released += acknowledged
            killed += code == 9
            if not path.exists() or b"\n" not in path.read_bytes():
                # died while creating it: refuses, never resets
                assert released == 0
                with pytest.raises(LedgerError, match=r"header|cannot be opened"):
                    LedgerFile.open(path)
                path.unlink(missing_ok=True)
                continue
            file = LedgerFile.open(path, read_only=True)
            charged = file.ledger.total_count
            file.close()
            # at most one charge a crash is wasted, and never is one forgotten
            assert released <= charged <= released + attempt + 1
            shown += 1
    return shown, killed


def test_v20_killed_at_every_call(tmp_path):
    """V20, quick: 26 points x 2 crashes in a row on one file; charged >= released each time."""
    shown, killed = _crash_series(tmp_path, 26, 2)
    assert shown > 40 and killed > 40


@pytest.mark.slow
def test_v20_killed_at_every_call_long(tmp_path):
    """V20: 208 points x 5."""
    shown, killed = _crash_series(tmp_path, 208, 5)
    assert shown > 900 and killed > 900


def test_torn_line_is_dropped_and_the_chain_says_so(path):
    with LedgerFile.create(path) as file:
        file.charge(STEP, 7)
    whole = path.read_bytes()
    for cut in (1, 5, 60):
        path.write_bytes(whole + whole.splitlines(True)[-1][:cut])
        reader = LedgerFile.open(path, read_only=True)
        assert reader.ledger.total_count == 7 and path.stat().st_size == len(whole) + cut
        reader.close()
        with LedgerFile.open(path) as file:
            file.charge(STEP)
        assert b'"dropped_bytes":%d' % cut in path.read_bytes()
        with LedgerFile.open(path) as file:
            assert file.ledger.total_count == 8
    assert is_torn(b'{"bo') and not is_torn(b"x") and not is_torn(b"\xff") and not is_torn(b"{} ")


def test_a_whole_line_without_its_newline_is_not_dropped(path):
    with LedgerFile.create(path) as file:
        file.charge(STEP, 7)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(LedgerError, match="last line"):
        LedgerFile.open(path)


_WORKER = """
import sys
from dpfa_jax.accounting import LedgerFile
from dpfa_jax.release import TrainingRelease
file = LedgerFile.open(sys.argv[1], lock_timeout_seconds=60)
for _ in range(int(sys.argv[2])):
    file.charge(TrainingRelease(1.0, 2.0, 1000, 50, 500))
"""


@pytest.mark.parametrize("charges", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_v20_two_processes_total_exact(path, charges):
    LedgerFile.create(path).close()
    workers = [
        subprocess.Popen([sys.executable, "-c", _WORKER, str(path), str(charges)]) for _ in range(2)
    ]
    assert [worker.wait() for worker in workers] == [0, 0]
    with LedgerFile.open(path) as file:
        assert file.ledger.total_count == 2 * charges


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_does_not_charge_through_its_parents_file(path):
    """Parent and child would share one lock and one position, and overwrite each other's lines."""
    with LedgerFile.create(path, lock_timeout_seconds=0.2) as file:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                file.charge(STEP)
            except LedgerError as error:
                file.close()
                code = 0 if "fork" in str(error) else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        with pytest.raises(LedgerError, match="another process"):  # the child left the lock alone
            LedgerFile.open(path, lock_timeout_seconds=0.2)
        assert file.charge(STEP).total_count == 1
    assert LedgerFile.open(path).ledger.total_count == 1


def test_closing_or_entering_a_held_file_again(path):
    """`close` gives the lock back; a second `with` is refused and the first keeps its lock."""
    with LedgerFile.create(path) as file:
        with pytest.raises(LedgerError, match="entered twice"):
            file.__enter__()
        file.charge(STEP)
        file.close()
    assert LedgerFile.open(path, lock_timeout_seconds=0.2).charge(STEP).total_count == 2


def test_a_held_ledger_is_not_shared(path):
    with LedgerFile.create(path) as file:
        file.charge(STEP)
        with pytest.raises(LedgerError, match="another process"):
            LedgerFile.open(path, lock_timeout_seconds=0.05)
    LedgerFile.open(path).close()


def test_another_thread_waits_for_a_held_ledger_and_is_refused(path):
    """It ends with an error, never waits forever; after `with`, threads charge again."""
    with LedgerFile.create(path, lock_timeout_seconds=0.05) as file, ThreadPoolExecutor(1) as pool:
        with pytest.raises(LedgerError, match="another thread"):
            pool.submit(file.charge, STEP).result(timeout=30)
        assert file.charge(STEP).total_count == 1
    file = LedgerFile.open(path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: file.charge(STEP), range(20)))
    assert file.ledger.total_count == 21


@pytest.mark.parametrize("name", ["write", "fsync"])
def test_v20_full_disk_releases_nothing(path, monkeypatch, name):
    """V20: ENOSPC in either call raises, the object stops, and reopening finds a sound file."""
    file = LedgerFile.create(path)
    file.charge(STEP)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(LedgerError, match="released"):
            file.charge(STEP)
    with pytest.raises(LedgerError, match="earlier charge failed"):
        file.charge(STEP)
    file.close()
    with LedgerFile.open(path) as file:
        assert file.ledger.total_count in ((1,) if name == "write" else (1, 2))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_v20_really_full_device():
    from dpfa_jax.accounting.storage import append_durably

    descriptor = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(LedgerError, match="No space left"):
        append_durably(descriptor, b"x\n", 0, "/dev/full")
    os.close(descriptor)


def test_v20_read_only(path, tmp_path, monkeypatch):
    LedgerFile.create(path).close()
    file = LedgerFile.open(path, read_only=True)
    with pytest.raises(LedgerError, match="read-only"):
        file.charge(STEP)
    file.close()
    with pytest.raises(LedgerError, match="cannot be opened"):
        LedgerFile.open(tmp_path / "missing")
    with pytest.raises(LedgerError, match="cannot be created"):
        LedgerFile.create(tmp_path / "no" / "folder")
    real = os.open

    def refuse(name, flags, *rest):
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(name, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(LedgerError, match="Read-only file system"):
        LedgerFile.open(path)


# --- V21: damage --------------------------------------------------------------------------------


def _damaged(lines, rng):
    lines = list(lines)
    kind = rng.choice(["flip", "drop", "swap", "double"])
    if kind == "flip":
        data = bytearray(b"".join(lines))
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)
    if kind == "drop":
        del lines[rng.randrange(len(lines) - 1)]  # the last line: only an anchor shows it
    elif kind == "swap":
        a, b = rng.sample(range(len(lines)), 2)
        lines[a], lines[b] = lines[b], lines[a]
    else:
        index = rng.randrange(len(lines))
        lines.insert(rng.randrange(index, len(lines)) + 1, lines[index])
    return b"".join(lines)


def test_v21_damage_is_detected(path):
    """V21: 1000 of 1000 flipped bits, dropped, reordered or doubled lines."""
    file = LedgerFile.create(path, budget=BUDGET)
    for index in range(8):
        file.charge(STEP if index % 2 else OTHER, index + 1)
    file.close()
    lines = path.read_bytes().splitlines(True)
    rng, detected = random.Random(0), 0
    for _ in range(1000):
        path.write_bytes(_damaged(lines, rng))
        try:
            LedgerFile.open(path).close()
        except LedgerError:
            detected += 1
    assert detected == 1000
    path.write_bytes(b"".join(lines))  # the negative control: the sound file opens
    LedgerFile.open(path).close()


def test_v21_rollback_needs_the_anchor(path):
    """Whole lines cut off the end: invisible in the file, refused where the head was kept."""
    with LedgerFile.create(path) as file:
        file.charge(STEP)
        early = file.head
        file.charge(STEP)
        late = file.head
    lines = path.read_bytes().splitlines(True)
    path.write_bytes(b"".join(lines[:-1]))
    LedgerFile.open(path, expect_head=early).close()
    with pytest.raises(LedgerError, match="rolled back"):
        LedgerFile.open(path, expect_head=late)


def _charged_cut_charged_again(path):
    """Two charges, the last one cut off, one more like it: the head before the cut."""
    with LedgerFile.create(path, budget=BUDGET) as file:
        file.charge(STEP)
        file.charge(STEP)
        head = file.head
    path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-1]))
    with LedgerFile.open(path) as file:
        assert file.charge(STEP).total_count == 2
    return head


def _without_randomness(patch):
    """The planted defect: every line has the same id."""
    patch.setattr(secrets, "token_hex", lambda count: "0" * (2 * count))


def test_v21_a_rollback_that_is_charged_again_has_another_head(path, monkeypatch, tmp_path):
    """V21: three answers were released, two are charged; the head that was kept tells."""
    head = _charged_cut_charged_again(path)
    with pytest.raises(LedgerError, match="rolled back"):
        LedgerFile.open(path, expect_head=head)
    with monkeypatch.context() as patch:  # the negative control: without ids it is not seen
        _without_randomness(patch)
        head = _charged_cut_charged_again(tmp_path / "blind")
        LedgerFile.open(tmp_path / "blind", expect_head=head).close()


def test_v21_no_two_ledgers_share_a_line(tmp_path, monkeypatch):
    """V21: same budget, same charges, also in a copy that goes on beside the original."""

    def lines(name):
        with LedgerFile.create(tmp_path / name, budget=BUDGET) as file:
            file.charge(STEP, 3)
        return (tmp_path / name).read_bytes().splitlines()

    one, other = lines("a"), lines("b")
    assert len({*one, *other}) == 4
    ids = [json.loads(line)["id"] for line in (*one, *other)]
    assert len(set(ids)) == 4 and all(len(bytes.fromhex(name)) == 16 for name in ids)
    (tmp_path / "c").write_bytes((tmp_path / "a").read_bytes())
    with LedgerFile.open(tmp_path / "a") as first, LedgerFile.open(tmp_path / "c") as second:
        assert first.head == second.head
        first.charge(STEP)
        second.charge(STEP)
        assert first.head != second.head
    with monkeypatch.context() as patch:  # the negative control
        _without_randomness(patch)
        assert lines("d") == lines("e")


def _line(previous, **rest):
    digest = hashlib.sha256(canonical({**rest, "previous": previous}).encode()).hexdigest()
    return canonical({**rest, "previous": previous, "hash": digest}).encode() + b"\n", digest


def test_ledgers_of_format_1_are_read_but_not_charged(path):
    """Their lines have no ids. A file of lines with and without ids is no ledger at all."""
    header = {
        "type": "header",
        "format": 1,
        "library": "0.0",
        "budget": dataclasses.asdict(BUDGET),
        "insecure_test_noise": False,
        "metadata": {},
    }
    charge = {"type": "charge", "record": record_to_json(STEP.record()), "count": 4}
    first, head = _line(GENESIS, body=header)
    old, with_id = _line(head, body=charge)[0], _line(head, body=charge, id="0" * 32)[0]
    path.write_bytes(first + old)
    with LedgerFile.open(path, read_only=True, expect_head=head) as file:
        assert file.ledger.total_count == 4 and file.budget == BUDGET and not file.has_line_ids
        with pytest.raises(LedgerError, match="read-only"):
            file.charge(STEP)
    with pytest.raises(LedgerError, match=r"format = 1.*no random ids"):
        LedgerFile.open(path)
    path.write_bytes(first + with_id)
    with pytest.raises(LedgerError, match="another format"):
        LedgerFile.open(path, read_only=True)
    first, head = _line(GENESIS, body=header | {"format": 2}, id="1" * 32)
    for fields, found in (
        ({"id": "2" * 32}, None),  # the negative control: these hand-made lines are sound
        ({}, "another format"),
        ({"id": "2" * 31}, "holds what no line"),
        ({"id": 2}, "no JSON line"),
        ({"id": "2" * 32, "more": 1}, "holds what no line"),
    ):
        path.write_bytes(first + _line(head, body=charge, **fields)[0])
        if found is None:
            LedgerFile.open(path).close()
            continue
        with pytest.raises(LedgerError, match=found):
            LedgerFile.open(path)


def _removed(path):
    os.remove(path)


def _renamed(path):
    os.rename(path, f"{path}.away")


def _replaced_by_a_copy(path):
    content = path.read_bytes()
    os.rename(path, f"{path}.away")
    path.write_bytes(content)


def _cut_in_place(path):
    os.truncate(path, path.read_bytes().index(b"\n") + 1)


@pytest.mark.skipif(os.name != "posix", reason="this system keeps open files in their place")
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("harm", [_removed, _renamed, _replaced_by_a_copy, _cut_in_place])
def test_v20_a_file_that_is_not_in_its_place_is_not_charged(path, monkeypatch, harm, held):
    """V20: a charge that nobody can read again was not made, whenever the file went."""
    with contextlib.ExitStack() as stack:
        file = LedgerFile.create(path)
        stack.enter_context(file if held else contextlib.closing(file))
        assert file.charge(STEP).total_count == 1
        harm(path)
        with pytest.raises(LedgerError, match=r"removed|replaced|shrank|bytes, where"):
            file.charge(STEP)
        assert file.ledger.total_count == 1
        with (
            monkeypatch.context() as patch
        ):  # the negative control: what is looked up is what tells
            patch.setattr(storage, "require_in_place", lambda *_: None)
            if held or harm is not _cut_in_place:
                assert file.charge(STEP).total_count == 2


@pytest.mark.skipif(os.name != "posix", reason="this system keeps open files in their place")
@pytest.mark.parametrize("harm", [_removed, _renamed, _replaced_by_a_copy])
def test_v20_a_file_that_goes_while_it_is_written(path, monkeypatch, harm):
    """V20: the look before the write saw nothing; the one after it does, and the object stops."""
    file, write = LedgerFile.create(path), os.write
    file.charge(STEP)

    def harmed(*arguments):
        monkeypatch.undo()
        harm(path)
        return write(*arguments)

    monkeypatch.setattr(os, "write", harmed)
    with pytest.raises(LedgerError, match=r"removed|replaced"):
        file.charge(STEP)
    with pytest.raises(LedgerError, match="earlier charge failed"):
        file.charge(STEP)
    file.close()


def test_a_relative_path_and_a_link_stay_in_place(tmp_path, monkeypatch):
    """No false alarm: the process goes to another folder, the ledger is reached through a link."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with LedgerFile.create("ledger.jsonl") as file:
        file.charge(STEP)
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert file.charge(STEP).total_count == 2
    os.symlink(tmp_path / "ledger.jsonl", tmp_path / "link")
    with LedgerFile.open(tmp_path / "link") as file:
        assert file.charge(STEP).total_count == 3


def test_file_shrinking_while_open_is_refused(path):
    file = LedgerFile.create(path)
    file.charge(STEP)
    os.truncate(path, 10)
    with pytest.raises(LedgerError, match="shrank"):
        file.charge(STEP)
    file.close()


def test_v23_bad_metadata(path):
    with pytest.raises(ArgumentError, match="metadata"):
        LedgerFile.create(path, metadata={"x": math.nan})
    assert not path.exists()
