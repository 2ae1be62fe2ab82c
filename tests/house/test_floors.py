"""The house stands: floors, one public list a room, no forbidden words, light import."""

import pathlib
import re
import subprocess
import sys

import pytest
from importlinter.cli import lint_imports

import dpfa_jax

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "dpfa_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_floors_hold() -> None:
    """Every import-linter contract of pyproject.toml is kept (exhaustive floors included)."""
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


def test_a_broken_floor_is_caught(tmp_path: pathlib.Path) -> None:
    """Negative control: a contract that the package breaks must fail."""
    config = tmp_path / "importlinter.ini"
    config.write_text(
        "[importlinter]\nroot_package = dpfa_jax\n"
        "[importlinter:contract:planted]\nname = planted\ntype = forbidden\n"
        "source_modules = dpfa_jax.release\nforbidden_modules = dpfa_jax.core\n"
    )
    assert lint_imports(config_filename=str(config), no_cache=True) != 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_small_and_named(path: pathlib.Path) -> None:
    """One idea a file: no utils, no file over 400 lines but a kernel body (600)."""
    assert path.name not in {"utils.py", "helpers.py", "misc.py", "common.py"}
    limit = 600 if "kernels" in path.parts else 400
    assert len(path.read_text().splitlines()) <= limit


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.name == "__init__.py" and p.parent != PACKAGE], ids=str
)
def test_init_is_a_public_list(path: pathlib.Path) -> None:
    """An __init__ holds a docstring, imports and `__all__`, and no definitions."""
    text = path.read_text()
    assert text.startswith('"""')
    assert not re.search(r"^(def|class) ", text, re.MULTILINE)
    assert ("__all__" in text) == bool(re.search(r"^(from|import) ", text, re.MULTILINE))


UNDOCUMENTED = re.compile(
    r"^\s*(?:from|import) (jax\._src|jaxlib|jax\.experimental\.mosaic)\b", re.M
)


def test_what_jax_does_not_document_is_in_one_file() -> None:
    """The operations of Mosaic GPU that Pallas has no name for; all else has a public name."""
    found = {str(p.relative_to(PACKAGE)) for p in SOURCES if UNDOCUMENTED.search(p.read_text())}
    assert found == {"kernels/mosaic_gpu/dialect.py"}


def test_public_names_exist() -> None:
    """Every public name resolves."""
    for name in dpfa_jax.__all__:
        assert getattr(dpfa_jax, name) is not None


def test_import_is_light() -> None:
    """`import dpfa_jax` brings in none of the heavy rooms."""
    code = (
        "import sys, dpfa_jax; dpfa_jax.dp_attention; "
        "print([m for m in ('flax','optax','orbax','dp_accounting','jax_privacy','matplotlib',"
        "'rich','tyro','torch','scipy.stats') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]", output.stdout


def test_no_machine_in_the_tree() -> None:
    """No path of a machine, and no name of a registry outside the lock, in what is tracked."""
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    planted = re.compile(r"/(root|farm|work)/|pypi" + r"\.org|python" + "hosted")
    for name in files:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".sh", ".json", ".yml"} and path.is_file():
            assert not planted.search(path.read_text()), name
