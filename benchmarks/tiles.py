"""Times candidate tiles of the attention kernels on this GPU and writes its table.

    python benchmarks/tiles.py --output benchmarks/results/<device>/<date>-tiles.json

For each key of a call (kernel, padded head size, mask, length, noise) every candidate that fits is
compiled, its result is checked against the heuristic's tile (and that one's against the blocked
backend), and what passes is timed in alternating windows. The table names the candidate with the
least median where it beats the heuristic's tile by more than `MARGIN`, else that one. Keys that the
time limit left out keep what the present table says. Compare times of one run only.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from arguments import Help, seconds
from tile_tasks import SHAPES, WIDTH, Task, arrays, by_blocks, fields_of, spec_of

from dpfa_jax.kernels import tile_tables
from dpfa_jax.kernels.base import AttentionSpec, ExampleReadout, Plain
from dpfa_jax.kernels.mosaic_gpu import backward, forward, tile_choice, tiles

TABLES = Path(tile_tables.__file__).parent / "tile_data"
GRID = 2.0**-4
MARGIN = 0.03  # what windows of one tile differ by
# Of 16-bit results in another order of sums: relative, in the norm. A wrong tile errs by far more.
MOST_AWAY = 2.0**-7
WINDOWS = 7


def mosaic_forward(head_size: int, mask: str, length: str, readout_name: str) -> Task:
    is_noisy = readout_name == "example"
    heads = WIDTH // head_size
    readout = ExampleReadout(1.0, (1.0,) * heads, (GRID,) * heads) if is_noisy else Plain()
    spec = spec_of(mask, head_size, readout)
    query, key, value, cotangent = arrays(head_size, length)
    batch, rows = query.shape[:2]
    noise: dict[str, Any] = {}
    if is_noisy:
        noise = {
            "key_words": jax.random.bits(jax.random.key(1), (batch, 2), jnp.uint32),
            "batch_index": jnp.arange(batch, dtype=jnp.uint32),
            "head_start": jnp.zeros(batch, jnp.uint32),
            "stddevs": jnp.ones((batch, heads)),
            "grids": jnp.full((batch, heads), GRID),
            "ones": jnp.ones(batch, jnp.uint32),
        }
    first = tiles.forward_tiles(spec, head_size, rows)
    found = [fields_of(first)]
    for noise_pass in (False, True) if is_noisy else ():  # the other place where noise is made
        tile = tiles.forward_tiles(spec, head_size, rows, noise_pass=noise_pass)
        if fields_of(tile) not in found:
            found.append(fields_of(tile))
    choices = itertools.product((64, 128, 192, 256), (True, False), (2, 3), (True, False), (8, 16))
    for block_kv, ahead, stages, has_warpgroup, columns in choices:
        if not has_warpgroup and columns != tiles.ForwardTiles.noise_columns:
            continue
        if has_warpgroup and not is_noisy:
            continue
        tile = tiles.ForwardTiles(
            block_kv=block_kv, ahead=ahead, stages=stages, noise_warpgroup=has_warpgroup,
            noise_columns=columns,
        )  # fmt: skip
        # Under noise the plain kernel's losers are left out: the noise does not change the loop.
        if is_noisy and (stages == 3 or block_kv == 192):
            continue
        if tile_choice.fits_forward(tile, head_size) and fields_of(tile) not in found:
            found.append(fields_of(tile))

    def run(fields: dict[str, Any]) -> Callable[..., Any]:
        tile = tile_choice.forward_tile(fields, is_noisy=is_noisy)

        def call(query: Any, key: Any, value: Any, cotangent: Any, noise: Any) -> Any:
            given = forward.ForwardArrays(query, key, value, **noise)
            return forward.attention_forward(spec, given, tile, keep_unclipped=False).output

        return call

    plain = by_blocks(spec)
    return Task(
        tile_choice.forward_key(spec, head_size, rows), found, run,
        (query, key, value, cotangent, noise),
        None if is_noisy else lambda q, k, v, c, _: plain(q, k, v, c)[0], is_noisy,
    )  # fmt: skip


def with_rows(spec: AttentionSpec, head_size: int) -> tuple[jax.Array, ...]:
    """Operands of the backward kernels: inputs, cotangent, log-sum-exp, delta."""
    query, key, value, cotangent = arrays(head_size, "long")
    given = forward.ForwardArrays(query, key, value)
    tile = tiles.forward_tiles(spec, head_size, key.shape[1])
    made = jax.jit(lambda x: forward.attention_forward(spec, x, tile, keep_unclipped=False))(given)
    delta = jnp.einsum(
        "btnh,btnh->bnt", made.output.astype(jnp.float32), cotangent.astype(jnp.float32)
    )
    return query, key, value, cotangent, made.lse, delta


def mosaic_backward(head_size: int, mask: str, order: str) -> Task:
    spec = spec_of(mask, head_size, deterministic=order == "same bits")

    def written(tile: Any) -> dict[str, Any]:
        kind = "fused" if isinstance(tile, tiles.FusedTiles) else "two"
        sizes = {
            field.name: getattr(tile, field.name)
            for field in dataclasses.fields(tile)
            if getattr(tile, field.name) != field.default
        }
        return {"kernels": kind, **sizes}

    options = [
        tiles.backward_tiles(spec, head_size, SHAPES["long"][1]),
        *(tiles.FusedTiles(heads=heads) for heads in (8, 16, 32)),
        *(
            tiles.BackwardTiles(block_kv_dq=keys, stages=stages)
            for keys, stages in itertools.product((64, 128), (2, 3))
        ),
    ]
    found: list[dict[str, Any]] = []
    for tile in options:
        if tile_choice.fits_backward(tile, head_size) and written(tile) not in found:
            found.append(written(tile))

    def run(fields: dict[str, Any]) -> Callable[..., Any]:
        tile = tile_choice.backward_tile(fields)

        def call(*operands: Any) -> Any:
            return backward.attention_backward(spec, *operands, None, tile)

        return call

    plain = by_blocks(spec)
    return Task(
        tile_choice.backward_key(spec, head_size, SHAPES["long"][1]), found, run,
        with_rows(spec, head_size),
        lambda q, k, v, c, *_: plain(q, k, v, c)[1],
    )  # fmt: skip


def tasks(arguments: argparse.Namespace) -> Iterator[Callable[[], Task]]:
    """Those that matter most first."""
    if "mosaic_gpu" in arguments.backends:
        for size, mask in itertools.product(arguments.head_sizes, ("full", "causal")):
            yield lambda size=size, mask=mask: mosaic_forward(size, mask, "long", "plain")
        for size, mask in itertools.product(arguments.head_sizes, ("full", "causal")):
            if size <= 128:
                for order in ("same bits", "any order"):
                    yield lambda s=size, m=mask, o=order: mosaic_backward(s, m, o)
        for size, mask in itertools.product(arguments.head_sizes, ("full", "causal")):
            yield lambda size=size, mask=mask: mosaic_forward(size, mask, "long", "example")
        for readout, size, mask in itertools.product(
            ("plain", "example"), arguments.head_sizes, ("full", "causal")
        ):
            yield lambda r=readout, s=size, m=mask: mosaic_forward(s, m, "short", r)
    if "triton" in arguments.backends:
        import triton_tiles

        yield from triton_tiles.tasks(arguments.head_sizes)


def distance(found: Any, expected: Any) -> float:
    """Largest distance of a result from what is expected, relative, in the norm."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    apart = [
        jnp.linalg.norm((x.astype(jnp.float32) - y.astype(jnp.float32)).ravel())
        / jnp.linalg.norm(y.astype(jnp.float32).ravel())
        for x, y in pairs
    ]
    return max(float(x) if math.isfinite(float(x)) else math.inf for x in apart)


def is_right(task: Task, found: Any, first: Any) -> bool:
    """Whether a candidate's result is the heuristic's but for rounding, and its noise the same."""
    if not task.is_noisy:
        return distance(found, first) <= MOST_AWAY
    away = np.abs(np.asarray(found - first, np.float32))
    # A cell of the grid where rounding moves a value over a border, and the cast to 16 bits.
    slack = GRID + 2.0**-7 * np.abs(np.asarray(first, np.float32))
    return bool(np.all(away <= slack) and np.mean(away > 0) <= 0.05)


def timed(programs: list[Any], operands: tuple[Any, ...], budget: float) -> list[list[float]]:
    """Milliseconds a call of each program, in windows that take turns."""
    counts = []
    for program in programs:
        jax.block_until_ready(program(*operands))
        start = time.perf_counter()
        jax.block_until_ready(program(*operands))
        counts.append(max(2, math.ceil(budget / WINDOWS / (time.perf_counter() - start))))
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(WINDOWS):
        for program, count, own in zip(programs, counts, times, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                result = program(*operands)
            jax.block_until_ready(result)
            own.append((time.perf_counter() - start) / count * 1e3)
    return times


def measure(task: Task, budget: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The best candidate of a key, and a row for each."""

    def compiled(fields: dict[str, Any]) -> Any:
        return jax.jit(task.run(fields)).lower(*task.operands).compile()

    with futures.ThreadPoolExecutor() as pool:
        started = [pool.submit(compiled, fields) for fields in task.candidates]
    first = started[0].result()(*task.operands)
    if task.expected is not None:
        few = jax.tree.map(lambda x: x[:1], (task.operands, first))
        apart = distance(few[1], jax.jit(task.expected)(*few[0]))
        if apart > MOST_AWAY:
            raise RuntimeError(f"{task.key}: the heuristic's tile errs by {apart}")
    rows, programs = [], []
    for fields, building in zip(task.candidates, started, strict=True):
        row: dict[str, Any] = {"key": task.key, "tile": fields}
        rows.append(row)
        error = building.exception()
        if error is None:
            try:
                row["is_right"] = is_right(task, building.result()(*task.operands), first)
            except jax.errors.JaxRuntimeError as failure:
                error = failure
        if error is not None:
            row["error"] = f"{error!r:.200}"
        elif row["is_right"]:
            programs.append((row, building.result()))
    for (row, _), times in zip(
        programs, timed([x for _, x in programs], task.operands, budget), strict=True
    ):
        row["milliseconds"] = round(statistics.median(times), 4)
        row["spread"] = round(max(times) - min(times), 4)
    timings = [row for row in rows if "milliseconds" in row]
    best = min(timings, key=lambda row: row["milliseconds"])
    is_better = best["milliseconds"] < (1 - MARGIN) * rows[0]["milliseconds"]
    return (best if is_better else rows[0])["tile"], rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=Help)
    made.add_argument("--output", help="JSON file for all timings; its folder is made")
    made.add_argument("--table", type=Path, help="the table; in the package where left out")
    made.add_argument(
        "--backends", nargs="+", default=["mosaic_gpu"], choices=("mosaic_gpu", "triton")
    )
    made.add_argument(
        "--head-sizes", nargs="+", type=int, default=[64, 128, 256], choices=(64, 128, 192, 256)
    )
    made.add_argument("--seconds", type=seconds, default=0.15, help="of timing, a candidate")
    made.add_argument("--limit-seconds", type=seconds, default=math.inf, help="start no key after")
    return made


def main() -> None:
    arguments = parser().parse_args()
    began = time.perf_counter()
    kind = tile_tables.device_kind()
    if kind is None:
        sys.exit("JAX sees no GPU here, and a table is made on its device: run this there")
    present = tile_tables.of_device(kind)
    chosen = {} if present is None else {key: dict(x) for key, x in present.tiles.items()}
    rows: list[dict[str, Any]] = []
    for make in tasks(arguments):
        if time.perf_counter() - began > arguments.limit_seconds:
            print("time limit: the rest keeps its tiles", file=sys.stderr)
            break
        task = make()
        try:
            chosen[task.key], found = measure(task, arguments.seconds)
        except Exception as error:  # the finding: this key keeps its tiles
            print(f"{task.key}: left out: {error!r:.300}", file=sys.stderr)
            continue
        rows += found
        best = min(x["milliseconds"] for x in found if "milliseconds" in x)
        print(
            f"{time.perf_counter() - began:5.0f} s  {task.key:50} {found[0]['milliseconds']:.3f} "
            f"-> {best:.3f} ms  {chosen[task.key]}",
            flush=True,
        )
    head = {
        "device": kind,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": "python benchmarks/tiles.py " + " ".join(sys.argv[1:]),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    table = arguments.table or TABLES / tile_tables.file_name(kind)
    files = [(table, {**head, "tiles": dict(sorted(chosen.items()))})]
    if arguments.output:
        files.append((Path(arguments.output), {**head, "rows": rows}))
    for path, content in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
