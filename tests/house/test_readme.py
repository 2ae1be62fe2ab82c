"""What the README shows runs as it stands."""

import pathlib
import re

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_the_readme_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    exec(compile("\n".join(blocks), "README.md", "exec"), {})
    one_release, noise_multiplier, trained = map(float, capsys.readouterr().out.split())
    assert one_release > 0
    assert noise_multiplier > 0
    assert 2.9 < trained <= 3.0


def test_every_file_that_the_readme_names_exists():
    text = README.read_text(encoding="utf-8")
    named = re.findall(r"`(benchmarks/results/[^`]+)`|\]\((docs/[^)]+)\)", text)
    assert len(named) > 5
    for names in named:
        assert (README.parent / "".join(names)).exists(), names
