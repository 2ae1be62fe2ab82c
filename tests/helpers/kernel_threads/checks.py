"""Calls replayed: each weight counts once where a row sees a key, and nowhere else."""

import collections
import random
from unittest import mock

import numpy as np
from helpers.kernel_threads.calls import call_of, launches_of
from helpers.kernel_threads.pieces import BLOCK, require
from helpers.kernel_threads.recording import Recording
from helpers.kernel_threads.replay import Replay

from dpfa_jax.kernels.mosaic_gpu import backward_wide, device, gradient_chunks, memory, tiles

# What weights, or logit gradients, are multiplied by.
FACTORS = {
    "forward": ("value",), "memory": ("value", "normaliser"), "kv": ("cotangent", "query"),
    "q": ("key",), "fused": ("cotangent", "query", "key"), "wide_kv": ("cotangent", "query"),
    "wide_q": ("key",), "bias": ("bias",),
}  # fmt: skip


def _launch_places(chunks):
    """First batch row, key head and key block of each chunk."""
    sizes = (chunks.batch, chunks.heads, chunks.key_blocks)
    return [
        tuple(x * size for x, size in zip(index, sizes, strict=True))
        for index in np.ndindex(chunks.counts)
    ]


def replay(case, seed):
    """Operations done; errors: `pieces.Fault`, AssertionError."""
    rng = random.Random(seed)
    spec, function, arguments = call_of(case)
    chunks = []

    def chunks_of(*given, **sizes):
        chunks.append(gradient_chunks.chunks_of(*given, **sizes))
        return chunks[0]

    limits = {}
    if case.kind == "wide, chunks":
        block_bytes = -(-case.rows // 128) * 128 * case.group * BLOCK * gradient_chunks.ITEM_BYTES
        limits = {"LOGIT_GRADIENT_BYTES": (1 + case.choice % 4) * block_bytes, "WAVES": 0}
    with (
        mock.patch.object(device, "processors", lambda: case.processors),
        mock.patch.object(backward_wide, "chunks_of", chunks_of),
        mock.patch.multiple(gradient_chunks, ITEM_BYTES=gradient_chunks.ITEM_BYTES, **limits),
    ):
        launches = launches_of(function, arguments)
    varies = {
        name: tuple(x > 1 for x in (shape or (1, 1))[:2])
        for name, shape in (("mask", case.mask), ("bias", case.bias))
    }
    replays = {x.kernel: Replay(x.kernel, case.group, rng, varies=varies) for x in launches}
    operations, written = 0, set()
    for chunk in _launch_places(chunks[0]) if chunks else [(0, 0, 0)]:
        written.clear()
        for launch in launches:
            values = {
                "query_lengths": case.query_lengths, "key_lengths": case.key_lengths,
                "schedule": launch.schedule, "chunk": chunk,
            }  # fmt: skip
            recording = Recording(launch, values)
            operations += sum(len(x) for _, threads in recording.programs for x in threads.values())
            run = replays[launch.kernel]
            run.chunk, run.written, run.padded = chunk, written, case.rows + -case.rows % 8
            run.run(recording, rng.choice((1, 2, 5, 100)) if launch.kernel == "fused" else 1)
    for name, done in replays.items():
        size = next(shape for x, shape in launches[0].operands if x == "query")[-1]
        _check_visits(case, spec, done, size)
        _check_results(case, done, size, chunks[0].counts[2] if chunks else 1)
        for added in done.additions.values():
            require(len(set(added)) == len(added), name, added)
            require(added == sorted(added) or not spec.deterministic, name, added)
    return operations


def _seen(spec, rows, keys, key_length, query_length):
    """By the definition of the arguments, not by `tiles`."""
    row, key = np.asarray(rows)[:, None], np.asarray(keys)[None, :]
    seen = (key < key_length) & (row >= 0)
    if query_length is not None:
        seen &= row < query_length
    if spec.is_causal:
        seen &= key <= row
    if spec.local_window is not None:
        left, right = spec.local_window
        seen &= (key >= row - left) & (key <= row + right)
    return seen


def _check_visits(case, spec, done, size):
    """Each pair that is seen has met each factor once, and no other has."""
    for factor in FACTORS[done.kernel]:
        found = collections.defaultdict(list)
        for *place, columns in done.visits[factor]:
            found[columns].append(place)
        times, parts = 1, [None]
        if done.kernel == "wide_kv":  # each warpgroup has a half of the columns
            times = 2
        elif done.kernel == "memory":
            columns = tiles.value_columns(size)
            begins = range(0, size, columns)
            times = len(begins)
            if factor == "value":
                times, parts = columns // memory.PART, [range(x, x + columns) for x in begins]
        require(set(found) <= set(parts), done.kernel, factor, found.keys(), parts)
        for part in parts:
            _check_part(case, spec, done.kernel, factor, found[part], times)


def _check_part(case, spec, kernel, factor, visits, times):
    """`_check_visits`, of one part of the columns: so many times."""
    shape = (case.batch, case.heads, case.rows + 256, case.keys + 512)
    count = np.zeros(shape, np.int8)
    for batch, head, rows, keys, mask in visits:
        place = (batch, head, slice(rows.start, rows.stop), slice(keys.start, keys.stop))
        if mask == "memory":  # hidden by the kernel that wrote them
            length = case.key_lengths[batch] if case.key_lengths else case.keys
            count[place] += _seen(spec, rows, keys, min(length, case.keys), None)
        else:
            count[place] += 1 if mask is None else _seen(spec, rows, keys, *mask[2:])
    is_forward = kernel == "forward"
    for batch in range(case.batch):
        key_lengths = case.key_lengths or [case.keys] * case.batch
        query_lengths = case.query_lengths if is_forward else None
        query_length = query_lengths[batch] if query_lengths else None
        keys = range(count.shape[3])
        expected = _seen(spec, range(case.rows), keys, key_lengths[batch], query_length)
        found = count[batch, :, : case.rows]
        if kernel not in ("forward", "q"):  # zero keys, or results that are cut off
            found, expected = found[..., : case.keys], expected[:, : case.keys]
        wrong = np.argwhere(found != times * expected)
        require(not len(wrong), kernel, factor, "batch, head, row, key", batch, wrong[:1])


def _check_results(case, done, size, chunks):
    """Each tile of each result is stored once; of dQ once for each of the chunks of its keys."""
    of_keys = [(name, case.keys, case.key_heads) for name in ("dk", "dv")]
    of_rows = {"forward": "output", "memory": "output", "q": "dq", "wide_q": "dq"}
    results = of_keys
    if done.kernel in of_rows:
        results = [(of_rows[done.kernel], case.rows, case.heads)]
    elif done.kernel == "bias":
        results = []
    times = {"wide_kv": 2, "wide_q": chunks}.get(done.kernel, 1)
    begins = range(0, size, tiles.value_columns(size)) if done.kernel == "memory" else (0,)
    for name, rows, heads in results:
        for batch, block, head in np.ndindex(case.batch, -(-rows // BLOCK), heads):
            for column in begins:
                found = done.stores[(name, batch, block * BLOCK, head, column)]
                require(found == times, done.kernel, name, batch, block, head, column, found)
