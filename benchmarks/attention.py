"""Attention, private and not, against its peers, in one run on one GPU.

    python benchmarks/attention.py --at-once 12 --output benchmarks/results/h100/<date>-grid.json

Every time is a median over queued calls on iid normal bf16 inputs, in milliseconds; compare times
of one shape and mask only: its implementations are timed in one process, where nothing else runs
on the GPU meanwhile. Peers: cuDNN through jax.nn, tokamax's Mosaic kernel and the best of torch's
SDPA backends where they are installed, and cuDNN followed by a clip and `jax.random.normal`.
`left_out` names what is missing and why, `ceiling` what the tensor cores gave for a large product.

`dpfa_bound` and `dpfa_example_bound` state a bound of the logits, which spares the running maximum;
`dpfa_example_clipped` clips query and key rows instead, in a pass of its own that is part of its
time (a model's compiler makes one pass of it and of what makes queries and keys).
Where asked for by name, `dpfa_example_inside` and `dpfa_example_after` (with `_bound`: a bound
stated) make the noise of `dpfa_example` in the kernel, or in a pass after it, whatever is faster.
`dpfa_memory` is the sum form over a private memory with 16 bits a value. `dpfa_any_order` allows
gradients whose last bits differ between runs, as those of the peers may; `dpfa` does not. Masks
"boolean" (B, 1, T, S) and "bias" (1, N, T, S) are arguments, for those that take them, and
"learned_bias" is a bias that has a gradient too:

    python benchmarks/attention.py --masks boolean bias learned_bias --head-sizes 128 --shapes 1
"""

import argparse
import itertools
import json
import math
import sys
import time
from typing import Any

from arguments import Help, count, file, require_gpu, seconds
from row_processes import Limits, in_turn
from stored_runs import begun, child_environment, write

TOKENS, WIDTH = 16384, 2048  # of a call: B T, and H D
LENGTHS = (2048, 4096, 1024, 16384, 512, 32768, 8192)
HEAD_SIZES = (128, 64, 256)
# B, T, query heads, key heads, head size; of each head size one call with grouped heads.
SHAPES = tuple(
    (max(1, TOKENS // length), length, WIDTH // size, WIDTH // size, size)
    for length in LENGTHS
    for size in HEAD_SIZES
) + tuple((4, 4096, 2 * WIDTH // size, WIDTH // size // 2, size) for size in HEAD_SIZES)
# What there is to time, and what serves a mask or bias as an argument.
IMPLEMENTATIONS = (
    "dpfa", "dpfa_bound", "dpfa_any_order", "dpfa_example", "dpfa_example_bound",
    "dpfa_example_clipped", "dpfa_memory", "cudnn", "cudnn_posthoc", "tokamax", "torch_sdpa",
    "dpfa_example_inside", "dpfa_example_after", "dpfa_example_inside_bound",
    "dpfa_example_after_bound",
)  # fmt: skip
WITH_PAIRS = {"boolean": ("cudnn", "dpfa"), "bias": ("cudnn", "dpfa"),
              "learned_bias": ("cudnn", "dpfa")}  # fmt: skip
CEILING_SIZE = 8192  # of the matrices whose product is the ceiling
# To set up one case, and to time it.
SETUP_SECONDS, TIMING_SECONDS = 300.0, 120.0


def child(words: dict[str, Any]) -> dict[str, Any]:
    import attention_calls

    if "product" in words:
        return attention_calls.ceiling(words["product"], words["seconds"])
    return attention_calls.case(
        tuple(words["shape"]), words["mask"], words["implementations"], words["seconds"]
    )


def command(**words: Any) -> list[str]:
    return [sys.executable, __file__, "--child", json.dumps(words)]


def run(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    end = time.monotonic() + arguments.limit_seconds
    shapes = [shape for shape in SHAPES if shape[-1] in arguments.head_sizes]
    cases = list(itertools.product(shapes[: arguments.shapes], arguments.masks))

    def done(case: Any, found: dict[str, Any] | None, why: str) -> None:
        shape, mask = case
        name = {**dict(zip(("B", "T", "H", "K", "D"), shape, strict=True)), "mask": mask}
        if found is None:
            found = {"rows": [], "left_out": [{"why": why}]}
        result["rows"] += found["rows"]
        result["left_out"] += [name | x for x in found["left_out"]]
        for x in found["left_out"]:
            print(f"{shape} {mask:6} left out: {x}", flush=True)
        for direction, rows in itertools.groupby(found["rows"], key=lambda x: x["direction"]):
            times = {x["implementation"]: round(x["milliseconds"], 3) for x in rows}
            print(f"{shape} {mask:6} {direction:16} {times}", flush=True)
        write(result, arguments.output)

    def take_ceiling(_: Any, found: dict[str, Any] | None, why: str) -> None:
        result["ceiling"] = found or {"why": why}

    seconds, chosen = arguments.seconds, arguments.implementations
    environment, limits = child_environment(), Limits(SETUP_SECONDS, TIMING_SECONDS, end)
    product = command(product=CEILING_SIZE, seconds=seconds)
    in_turn({"ceiling": product}, environment, limits, take_ceiling)
    for first in range(0, len(cases), arguments.at_once):
        commands = {
            (shape, mask): command(shape=shape, mask=mask, seconds=seconds, implementations=chosen)
            for shape, mask in cases[first : first + arguments.at_once]
        }
        in_turn(commands, environment, limits, done)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=Help)
    made.add_argument("--output", type=file, help="JSON file to write, after each case")
    made.add_argument("--shapes", type=count, default=len(SHAPES), help="the first so many of them")
    made.add_argument(
        "--head-sizes", nargs="+", type=int, default=list(HEAD_SIZES), choices=HEAD_SIZES
    )
    made.add_argument(
        "--implementations", nargs="+", choices=IMPLEMENTATIONS, metavar="NAME",
        help=f"some of {', '.join(IMPLEMENTATIONS)}; where left out, all but those named last, "
        "which say where noise is made",
    )  # fmt: skip
    made.add_argument(
        "--masks",
        nargs="+",
        default=["full", "causal"],
        choices=("full", "causal", *WITH_PAIRS),
    )
    made.add_argument("--seconds", type=seconds, default=0.3, help="of timing, for each figure")
    made.add_argument(
        "--at-once", type=count, default=4, help="cases that set up at once; they are timed in turn"
    )
    made.add_argument("--limit-seconds", type=seconds, default=math.inf, help="of the whole run")
    return made


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(child(json.loads(sys.argv[2]))))
        return
    made = parser()
    arguments = made.parse_args()
    chosen = arguments.implementations or IMPLEMENTATIONS
    for mask in arguments.masks:
        if not set(chosen) & set(WITH_PAIRS.get(mask, IMPLEMENTATIONS)):
            names = ", ".join(WITH_PAIRS[mask])
            made.error(f"argument --implementations: none serves the mask {mask}; add {names}")
    result = begun("benchmarks/attention.py", ("jax", "tokamax", "torch"))
    require_gpu(made, result["device"])
    run(arguments, result)


if __name__ == "__main__":
    main()
