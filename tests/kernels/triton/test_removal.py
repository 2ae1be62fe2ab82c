"""The backend can be deleted: what `docs/kernels/triton.md` lists is imported from nowhere else."""

import ast
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from dpfa_jax.core import UnsupportedBackendError
from dpfa_jax.kernels import dispatch
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "kernels" / "triton.md").read_text()
LISTED = [ROOT / path for path in re.findall(r"^- `(.+)`$", PAGE, re.MULTILINE)]
# A file that asks for the module by name alone, where its own argument asks for it.
BY_NAME = {ROOT / "benchmarks" / "tiles.py"}


def imported(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def test_nothing_else_imports_it():
    assert len(LISTED) == 6 and all(path.exists() for path in LISTED)
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in LISTED}
    names = {re.sub(r"^(tests|benchmarks)\.", "", module) for module in modules}
    found = set()
    for folder in ("dpfa_jax", "tests", "benchmarks", "scripts"):
        for file in (ROOT / folder).rglob("*.py"):
            if any(file.is_relative_to(path) for path in LISTED):
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                for name in imported(node):
                    if any(name == one or name.startswith(f"{one}.") for one in names):
                        found.add(file)
                        assert file in BY_NAME and node.col_offset > 0, f"{file}: {name}"
    assert found == BY_NAME  # so the search finds what it looks for


def test_without_it_calls_go_to_the_next_backend(monkeypatch):
    for name in [*sys.modules]:
        if name.startswith("dpfa_jax.kernels.triton"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dpfa_jax.kernels.triton", None)
    monkeypatch.setattr(dispatch, "static_platform", lambda _: "gpu")
    spec, inputs = AttentionSpec(1.0), AttentionInputs(*(jnp.ones((1, 2, 1, 4)),) * 3)
    assert dispatch.choose(spec, inputs).name == "blocked"
    with pytest.raises(UnsupportedBackendError, match="triton: cannot be imported"):
        dispatch.choose(spec, inputs, "triton")
