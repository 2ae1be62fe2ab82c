"""What the measuring script concludes from candidates, on functions that need no GPU."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dpfa_jax.kernels import tile_tables

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "tiles.py"
spec = importlib.util.spec_from_file_location("benchmarks_tiles", SCRIPT)
script = importlib.util.module_from_spec(spec)
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(SCRIPT.parent))
    spec.loader.exec_module(script)


def task_of(change):
    """Three candidates: a slow one, the one that `change` makes, and one that does not compile."""

    def run(fields):
        if fields["block"] == 3:
            raise ValueError("does not fit")

        def call(x):
            return change(x) if fields["block"] == 2 else slowly(x)

        return call

    def slowly(x):
        return jax.lax.fori_loop(0, 300, lambda _, y: jnp.sin(y @ y * 0.01), x) * 0 + 2 * x

    candidates = [{"block": block} for block in (1, 2, 3)]
    return script.Task("a key", candidates, run, (jnp.ones((128, 128)),), lambda x: 2 * x)


@pytest.mark.parametrize(("change", "chosen"), [(lambda x: x + x, 2), (lambda x: 2.1 * x, 1)])
def test_the_fastest_right_candidate_is_chosen(change, chosen):
    """A fast one that is wrong is not timed; one that fails is noted."""
    best, rows = script.measure(task_of(change), 0.02)
    assert best == {"block": chosen}
    assert [row.get("is_right") for row in rows] == [True, chosen == 2, None]
    assert ("milliseconds" in rows[1]) == (chosen == 2)
    assert "does not fit" in rows[2]["error"]


def test_a_wrong_first_tile_stops_the_key():
    """Candidates are compared with it, so that it is compared with the blocked backend."""
    task = task_of(lambda x: 2 * x)._replace(expected=lambda x: 3 * x)
    with pytest.raises(RuntimeError, match="errs"):
        script.measure(task, 0.02)


def test_noise_must_be_the_same():
    task = task_of(None)._replace(is_noisy=True)
    noise = jnp.round(jax.random.normal(jax.random.key(0), (1000,)) / script.GRID) * script.GRID
    assert script.is_right(task, noise.at[3].add(script.GRID), noise)
    assert not script.is_right(task, noise[::-1], noise)
    assert not script.is_right(task, noise + script.GRID, noise)


def test_the_table_is_one_that_can_be_read(monkeypatch, tmp_path):
    """Keys that the limit left out keep what the present table says."""
    old = tile_tables.TileTable("a GPU", None, {"other": {"block": 7}})
    monkeypatch.setattr(tile_tables, "device_kind", lambda: "a GPU")
    monkeypatch.setattr(tile_tables, "of_device", lambda _: old)
    monkeypatch.setattr(script, "tasks", lambda _: [lambda: task_of(lambda x: 2 * x)] * 2)
    table, timings = tmp_path / "a-gpu.json", tmp_path / "timings.json"
    monkeypatch.setattr(sys, "argv", [
        "tiles.py", "--table", str(table), "--output", str(timings), "--seconds", "0.02",
    ])  # fmt: skip
    script.main()
    found = tile_tables.parsed(table.read_bytes(), table.name)
    assert dict(found.tiles) == {"a key": {"block": 2}, "other": {"block": 7}}
    assert found.device == "a GPU"
    stored = json.loads(timings.read_text())
    assert len(stored["rows"]) == 6
    assert stored["command"].startswith("python benchmarks/tiles.py --table")
