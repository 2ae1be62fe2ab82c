"""`dpfa bench`: runs one of the checkout's benchmarks and says where its figures are."""

import runpy
import sys
from pathlib import Path

import dpfa_jax
from dpfa_jax.cli.entry import BAD_INPUT, DONE
from dpfa_jax.core import ArgumentError

# The benchmarks import peers (torch, opacus, fastDP, jax_privacy) that the package itself must not.
BENCHMARKS = {
    "attention": "forward and backward, with noise and without, against cuDNN and others",
    "train": "DP-SGD steps of whole transformers against non-private ones and peers",
    "utility": "accuracy of the main job at several epsilons, for each kind of clipping",
    "plot": "figures and tables of all stored results, into docs/benchmarks.md",
}
_USAGE = "usage: dpfa bench BENCHMARK [options]   (dpfa bench BENCHMARK --help lists them)"


def run(arguments: list[str]) -> int:
    """Runs `benchmarks/NAME.py` of the checkout with the remaining arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<10} {text}" for name, text in BENCHMARKS.items()]
        print("\n".join([_USAGE, "", *lines]))
        return DONE if arguments else BAD_INPUT
    name, *rest = arguments
    if name not in BENCHMARKS:
        raise ArgumentError("benchmark", name, "unknown", f"Choose one of {tuple(BENCHMARKS)}.")
    folder = Path(dpfa_jax.__file__).parents[1] / "benchmarks"
    script = folder / f"{name}.py"
    if not script.is_file():
        raise ArgumentError(
            "benchmark",
            name,
            "this installation has no benchmarks: they compare with packages that it does not need",
            "Run it from a clone of the repository.",
        )
    sys.argv = [str(script), *rest]
    sys.path.insert(0, str(folder))
    runpy.run_path(str(script), run_name="__main__")
    return DONE
