"""One program of a kernel in a replay: its threads, barriers and slots of shared memory.

A thread goes on until it must wait. Copies land as late as they like, a product reads its operands
until it is waited for, a store its source likewise. It is a fault if a slot is written while one of
them needs it, or read before it is there, or if a barrier is two phases ahead of a thread that
waits on it: such a thread would wait for ever, or pass too early.
"""

import collections

from helpers.kernel_threads.pieces import BLOCK, Piece, check_fit, inside, overlap, require


class _Thread:
    """What one thread has at hand."""

    def __init__(self):
        self.products = self.weights = self.mask = self.next_mask = None
        self.stream = self.noise = None
        self.multiplying, self.storing = [], []
        self.read, self.made, self.kept = {}, collections.defaultdict(list), set()


class Program:
    def __init__(self, replay, arrivals, place, threads):
        self.replay, self.place, self._arrivals, self._operations = replay, place, arrivals, threads
        self.left = dict.fromkeys(threads, 0)
        self._threads = {thread: _Thread() for thread in threads}
        self._seen = {thread: collections.Counter() for thread in threads}
        self._waiters = collections.defaultdict(set)
        for thread, operations in threads.items():
            for kind, *rest in operations:
                if kind == "wait":
                    self._waiters[rest[0]].add(thread)
        self._arrived, self._phases = collections.Counter(), collections.Counter()
        self._slots, self.flights = {}, []

    def next(self, thread):
        return self._operations[thread][self.left[thread]]

    def advance(self, thread, most):
        """Up to `most` operations; whether there was one."""
        for done in range(most):
            kind, *given = self.next(thread)
            act = getattr(self, "_" + kind.replace(" ", "_"))
            if act(thread, self._threads[thread], *given) is False:
                return done > 0
            self.left[thread] += 1
            if self.left[thread] == len(self._operations[thread]):
                state = self._threads[thread]
                require(not state.multiplying and not state.storing, thread, "ends too early")
                del self.left[thread]
                break
        return True

    def land(self, flight):
        self.flights.remove(flight)
        key, piece, barrier = flight
        self._slots[key] = piece
        self._arrive(None, None, barrier)

    def finish(self):
        for barrier, count in self._phases.items():
            require(self._waiters[barrier], barrier, "has no waiter")
            require(not self._arrived[barrier], barrier, "has an arrival too many")
            for thread in self._waiters[barrier]:
                require(self._seen[thread][barrier] == count, thread, barrier, "unseen phase")

    # Barriers.

    def _wait(self, thread, _, barrier):
        if self._phases[barrier] <= self._seen[thread][barrier]:
            return False
        self._seen[thread][barrier] += 1
        return True

    def _arrive(self, _, __, barrier):
        self._arrived[barrier] += 1
        if self._arrived[barrier] < self._arrivals[barrier[0]]:
            return
        self._arrived[barrier] = 0
        self._phases[barrier] += 1
        for thread in self._waiters[barrier]:
            ahead = self._phases[barrier] - self._seen[thread][barrier]
            require(ahead <= 1, thread, barrier, "missed phase")

    def _wait_for_turn(self, _, __, turn, value):
        return self.replay.turns[turn] >= value

    def _count_turn(self, _, __, turn):
        self.replay.turns[turn] += 1

    # Slots.

    def _at(self, key):
        found = [piece for place, piece in self._slots.items() if overlap(place, key)]
        require(found and None not in found, key, "is read before it is there")
        return found

    def _claim(self, thread, key):
        """Nobody needs what lies there."""
        for other, state in self._threads.items():
            for place in (*(x for refs in state.multiplying for x in refs), *state.storing):
                require(not overlap(place, key), key, "written by", thread, "needed by", other)
        for place in [place for place in self._slots if overlap(place, key)]:
            require(self._slots.pop(place), key, "is written twice at once")

    def _load(self, thread, _, key, name, index, barrier):
        self._claim(thread, key)
        self._slots[key] = None
        self.flights.append((key, self.replay.piece(name, index), barrier))

    def _read(self, _, state, key, name):
        for piece in self._at(key):
            state.read[name] = piece
            if piece.name == "noise":
                self._check_noise(state, piece)
                if name == "noise":
                    require(inside(piece.columns, state.made["value"][-1].columns), piece)
            if name in ("mask", "bias"):
                products, varies = state.products, self.replay.varies[name]
                require(inside(products.rows, piece.rows), products, piece)
                require(inside(products.keys, piece.keys), products, piece)
                for x, y, differs in zip(products.of_row, piece.of_row, varies, strict=True):
                    require(x == y or not differs, products, piece)

    def _write(self, thread, state, key, name):
        self._claim(thread, key)
        kernel, weights = self.replay.kernel, state.weights
        if name in ("p", "ds"):
            piece = Piece("zero")
            if weights is not None:
                self._check_rows(state, weights, ("lse2", "delta")[: 1 + (name == "ds")])
                piece = weights._replace(name=name, mask=state.mask)
            self._slots[key] = piece
            return
        if name in ("noise", "normaliser_noise"):
            self._slots[key] = state.noise
            return
        sources = {"key": "query", "value": "cotangent", "dq": "key", "output": "value"}
        sources["query"] = "value" if kernel == "forward" else "key"
        source = sources.get(name)
        if source in state.kept and kernel != "forward":  # nothing new
            state.made[source].clear()
        state.kept.add(source)
        self._slots[key] = Piece("result", mask=tuple(state.made[source]))

    def _store(self, _, state, key, name, index, how):
        (piece,) = self._at(key)
        state.storing.append(key)
        self.replay.keep(piece, name, index, how, self.place)

    def _put(self, _, __, name, index):
        self.replay.keep(None, name, index, "put", self.place)

    def _stored(self, _, state, left):
        state.storing = state.storing[len(state.storing) - left :] if left else []

    # Noise.

    def _stream(self, _, state, batch, head):
        state.stream = (batch, head)

    def _normals(self, _, state, rows, columns):
        state.noise = Piece("noise", *state.stream, rows=rows, columns=columns)

    def _check_noise(self, state, noise):
        weights = state.weights
        require((*weights.of_row, weights.rows) == (*noise.of_row, noise.rows), weights, noise)

    # Products.

    def _mask(self, _, state, *what):
        state.next_mask = what

    def _weights(self, _, state):
        state.weights, state.mask, state.next_mask = state.products, state.next_mask, None
        if state.mask is not None and state.weights is not None:
            require(state.mask[:2] == state.weights[4:6], state.mask, state.weights)
        if self.replay.kernel == "bias":
            self._check_rows(state, state.weights, ("lse2", "delta"))
            self._visit(state, state.weights._replace(mask=state.mask), "bias")

    def _multiplied(self, _, state, left):
        state.multiplying = state.multiplying[len(state.multiplying) - left :] if left else []

    def _multiply(self, thread, state, refs, has_weights):
        state.multiplying.append([key for key, _ in refs])
        operands = [(name, piece) for key, name in refs for piece in self._at(key)]
        found = dict(operands)
        if set(found) == {"query", "key"}:
            query, key = found["query"], found["key"]
            require((query.batch, query.key_head) == (key.batch, key.key_head), query, key)
            state.products = query._replace(name="weights", keys=key.keys)
        elif set(found) == {"value", "cotangent"}:
            check_fit(state.products, found["value"])
            check_fit(state.products, found["cotangent"])
        else:
            source = refs[-1][1]
            weights = [piece for name, piece in operands if name in ("p", "ds")]
            if has_weights:
                weights = [state.weights._replace(mask=state.mask)]
                if self.replay.kernel not in ("forward", "memory"):
                    names = ("lse2", "delta")[: 1 + (source in ("query", "key"))]
                    self._check_rows(state, weights[0], names)
            for piece in weights:
                if piece.name != "zero":
                    check_fit(piece, found[source])
                    self._visit(state, piece._replace(columns=found[source].columns), source)

    def _visit(self, state, piece, source):
        if piece.mask == "memory":
            for key in range(piece.keys.start, piece.keys.stop, BLOCK):
                for row in range(piece.rows.start, piece.rows.stop, BLOCK):
                    there = (*piece.of_row, key, row) in self.replay.written
                    require(there or row >= self.replay.padded, piece, "was never written")
        self.replay.visits[source].append((*piece.of_row, *piece[4:]))
        if source in state.kept:
            state.kept.discard(source)
            state.made[source].clear()
        state.made[source].append(piece)

    def _check_rows(self, state, weights, names):
        for name in names:
            check_fit(weights, state.read[name])
