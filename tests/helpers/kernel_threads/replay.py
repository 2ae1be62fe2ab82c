"""Recorded threads of a kernel against each other, in a random order: hangs, races, wrong tiles.

Each tile carries which rows and keys it is of, so that what is multiplied must fit together; what
was multiplied is counted by the operand that the weights met.
"""

import collections

from helpers.kernel_threads.pieces import BLOCK, Piece, require, times
from helpers.kernel_threads.program import Program
from helpers.kernel_threads.references import Dims

from dpfa_jax.kernels.mosaic_gpu import axes


class Replay:
    """What all programs of the launches of one kernel did.

    Attributes:
      visits: {operand: [(batch, head, rows, keys, mask, columns)]}.
      stores: {(output, batch, first row, head, first column): times}.
      additions: {(output, batch, first row, head): programs in their order}.
      chunk, written, padded: of a launch: where its chunk begins, tiles of logit gradients in
        memory, rows with padding.
    """

    def __init__(self, kernel, group, rng, *, varies):
        """`group`: query heads of a key head. `varies`: {array of pairs: (by example, by head)}."""
        self.kernel, self.group, self.rng, self.varies = kernel, group, rng, varies
        self.visits, self.additions = (collections.defaultdict(list) for _ in range(2))
        self.stores, self.turns, self.written = collections.Counter(), collections.Counter(), set()
        self.chunk, self.padded = (0, 0, 0), 0

    def run(self, recording, resident=1):
        """So many programs at a time, in the order of the grid."""
        waiting = [Program(self, recording.arrivals, *program) for program in recording.programs]
        running = []
        while waiting or running:
            while waiting and len(running) < resident:
                running.append(waiting.pop(0))
            moved = False
            threads = [(program, thread) for program in running for thread in [*program.left]]
            self.rng.shuffle(threads)
            for program, thread in threads:
                moved |= program.advance(thread, self.rng.choice((1, 3, 1000)))
            flights = [(program, x) for program in running for x in program.flights]
            if flights and (not moved or self.rng.random() < 0.5):
                program, flight = self.rng.choice(flights)
                program.land(flight)
                moved = True
            for program in [x for x in running if not x.left and not x.flights]:
                program.finish()
                running.remove(program)
                moved = True
            require(moved, "hang", [(x.place, t, x.next(t)) for x in running for t in x.left])

    def piece(self, name, index):
        """Of a tile in global memory."""
        batch = int(index[0])
        if name in ("query", "cotangent"):
            head = int(index[2])
            return Piece(name, batch, head, head // self.group, index[1].range)
        if name in ("key", "value"):
            head = int(index[2])
            return Piece(name, batch, None, head, None, index[1].range, columns=_columns(index))
        if name == "normaliser":
            return Piece(name, batch, keys=index[1].range)
        head, rest = int(index[1]), [x.range for x in index[2:]]
        if name in ("lse2", "delta"):
            rows = times(rest[0], BLOCK) if self.kernel == "bias" else rest[0]
            return Piece(name, batch, head, head // self.group, rows)
        if name == "logit_gradients":
            return self._of_chunk(batch, head, *rest)
        if name == "mask" and len(rest) == 2:  # bits
            rest = [times(rest[1], BLOCK), times(rest[0], 32)]
        rows, keys = [None, *rest][-2:]
        if self.kernel in ("kv", "wide_kv"):
            rows, keys = keys, rows
        return Piece(name, batch, head, None, rows, keys)

    def _of_chunk(self, batch, head, keys, rows):
        batch, head = batch + self.chunk[0], head + self.chunk[1] * self.group
        begin = self.chunk[2] * BLOCK
        keys = range(begin + keys.start, begin + keys.stop)
        return Piece("ds", batch, head, head // self.group, rows, keys, "memory")

    def keep(self, piece, name, index, how, place):
        """A result on its way to global memory."""
        if name == "logit_gradients":
            rest = (x.range for x in index[2:])
            target = self._of_chunk(int(index[0]), int(index[1]), *rest)
            require(piece._replace(mask="memory") == target, piece, target)
            self.written.add((*target.of_row, target.keys.start, target.rows.start))
            return
        if name in ("lse", "normalisers", "bias"):
            return
        rows, head = index[1].range, int(index[2])
        target = (name.removesuffix("_sum"), int(index[0]), rows.start, head)
        all_made = piece.mask if isinstance(piece, Piece) else ()
        if how == "add":
            self.additions[target].append(place[axes.KEYS])
        else:
            columns = all_made[-1].columns if all_made else None
            self.stores[(*target, columns.start if columns else 0)] += 1
        for made in all_made:
            require(made.columns in (None, _columns(index)), made, target)
            by_key = (made.batch, made.key_head, made.keys)
            by_row = (*made.of_row, made.rows)
            found = by_key if name[:2] in ("dk", "dv") else by_row
            require(found == (target[1], head, rows), made, target)


def _columns(index):
    """Of an index of an array whose fourth axis is the columns; None: all."""
    return index[3].range if len(index) > 3 and isinstance(index[3], Dims) else None
