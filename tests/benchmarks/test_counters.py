"""Counters of a profiler: what is read of its report, and a run of which parts fail."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
COLUMNS = ("ID", "Process ID", "Kernel Name", "gpu__time_duration.sum", "sm__cycles_elapsed.max")
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import counters

    return counters


def page(bench, *launches, without=()):
    """A raw page: kernel names and nanoseconds; every metric but those is 1.5."""
    metrics = [x for x in bench.METRICS.values() if x not in (*COLUMNS, *without)]
    header = [*COLUMNS, *metrics, *bench.STALLS.values()]
    lines = ["==PROF== Disconnected", header, ["", "", "", "ns", *[""] * (len(header) - 4)]]
    for index, (name, nanoseconds) in enumerate(launches):
        values = ["1.5"] * (len(header) - 5)
        lines.append([str(index), "7", name, f"{nanoseconds:,.2f}", "17,000", *values])
    return "\n".join(
        line if isinstance(line, str) else ",".join(f'"{x}"' for x in line) for line in lines
    )


def test_kernels_are_told_apart_by_the_mark_before_them(bench):
    cases = bench.GROUPS["forward"][:2]
    text = page(
        bench,
        ("case_0_begins_mosaic_gpu_kernel", 9000),
        ("dpfa_attention_forward_mosaic_gpu_kernel(Tensor, int)", 10_000),
        ("tiny", 800),
        ("case_1_begins_mosaic_gpu_kernel", 9000),
        ("dpfa_attention_forward_mosaic_gpu_kernel", 20_000),
    )
    rows, missing = bench.rows_of(text, cases)
    assert missing == []
    assert [(row["D"], row["milliseconds"]) for row in rows] == [(64, 0.01), (128, 0.02)]
    assert {row["kernel"] for row in rows} == {"dpfa_attention_forward_mosaic_gpu_kernel"}
    first = rows[0]["counters"]
    assert first["cycles"] == 17_000 and first["ghz"] == 1.7 and first["tensor"] == 1.5
    assert rows[0]["stalls"].keys() == bench.STALLS.keys()
    assert "ghz 1.7 tensor 1.5" in bench.line_of(rows[0])


def test_a_metric_that_is_not_there_is_named_and_the_others_stay(bench):
    cases = bench.GROUPS["forward"]
    launches = ("case_0_begins", 9000), ("kernel", 10_000)
    absent = bench.METRICS["tensor"]
    text = page(bench, *launches, without=(absent,))
    begin, end = text.rsplit('"1.5"', 1)
    text = f'{begin}"n/a"{end}'
    rows, missing = bench.rows_of(text, cases)
    assert absent in missing and len(missing) == 2
    assert "tensor" not in rows[0]["counters"] and rows[0]["counters"]["registers_a_thread"] == 1.5
    assert "tensor nan" in bench.line_of(rows[0])
    with pytest.raises(bench.ProfilerError, match="refused"):
        bench.rows_of("==ERROR== refused", cases)


def test_without_the_profiler_the_run_says_so(bench, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(bench, "PLACES", ("/nowhere/ncu",))
    monkeypatch.setattr(sys, "argv", ["counters.py"])
    assert bench.main() == 1
    assert "no ncu" in capsys.readouterr().err


def test_a_run_keeps_what_it_counted(bench, monkeypatch, tmp_path):
    """A profiler that refuses a metric that it does not list, and fails in one group."""
    ncu, out = tmp_path / "ncu", tmp_path / "out.json"
    (tmp_path / "page").write_text(page(bench, ("case_0_begins", 9000), ("kernel", 10_000)))
    absent = bench.METRICS["tensor"].split(".")[0]
    listed = sorted({x.split(".")[0] for x in bench.METRICS.values()} | {STALL.split(".")[0]})
    listed += [x.split(".")[0] for x in bench.STALLS.values()]
    (tmp_path / "list").write_text("\n".join(x + " Counter" for x in listed if x != absent))
    memory = json.dumps(bench.GROUPS["memory"])
    ncu.write_text(f"""#!{sys.executable}
import pathlib, sys
words = sys.argv[1:]
if "--import" in words:
    print(pathlib.Path({str(tmp_path / "page")!r}).read_text())
elif "--query-metrics" in words:
    print(pathlib.Path({str(tmp_path / "list")!r}).read_text())
elif "--version" in words:
    print("Version 1")
elif {absent!r} in words[words.index("--metrics") + 1] or {memory!r} in words:
    print("==ERROR== refused")
else:
    pathlib.Path(words[words.index("--export") + 1]).write_text("report")
    pathlib.Path(words[-2]).write_text('[{{"why": "a case of its own"}}]')
""")
    ncu.chmod(0o755)
    monkeypatch.setattr(bench, "profiler", lambda: str(ncu))
    monkeypatch.setattr(
        sys, "argv", ["counters.py", "--groups", "forward", "memory", "--output", str(out)]
    )
    assert bench.main() == 0
    stored = json.loads(out.read_text())
    assert stored["profiler"] == "Version 1" and stored["device"] and stored["command"]
    assert [row["kernel"] for row in stored["rows"]] == ["kernel"]
    told = [(x["group"], x["why"]) for x in stored["left_out"]]
    assert ("forward", "a case of its own") in told
    assert any(group == "memory" and "refused" in why for group, why in told)


@pytest.mark.slow
def test_every_case_is_a_call_of_the_benchmark(bench):
    import attention_calls

    for case in (case for group in bench.GROUPS.values() for case in group):
        function, _ = attention_calls.implementations(case.shape, case.mask)[case.implementation]
        assert callable(function)
