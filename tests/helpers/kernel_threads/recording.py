"""What each thread of a Mosaic GPU kernel does, in its order, found by running its body in Python.

Which steps a thread takes depends on sizes, lengths and the schedule, never on the numbers in a
tile. So the body runs once for each warpgroup, and for each warp where it maps over them, with
scalars as they are and everything else left out: on the path that a GPU takes, not the simulator's.
`replay` lets the recorded threads run against each other.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
from helpers.kernel_threads.references import Ref, integer
from helpers.kernel_threads.substitutes import substituted

from dpfa_jax.kernels.mosaic_gpu import tiles

WARPS = 4


class Launch(NamedTuple):
    """One kernel of a call, as `pallas.kernel` gets it; `operands`, `outputs`: (name, shape)."""

    kernel: str
    body: Any
    operands: list[tuple[str, tuple[int, ...]]]
    outputs: list[tuple[str, tuple[int, ...]]]
    scratch: tuple[dict[str, Any], dict[str, Any]]
    grid: tuple[int, ...]
    names: tuple[str, ...]
    threads: int
    schedule: np.ndarray | None


class Recording:
    """The threads of each program: `programs`: (place in the grid, {thread: operations})."""

    def __init__(self, launch, values):
        """`values`: those of operands that say where a thread goes."""
        self.launch, self.programs = launch, []
        shared, barriers = launch.scratch
        self.arrivals = {name: barrier.num_arrivals for name, barrier in barriers.items()}
        self._noise_chunks = 0
        with substituted(self):
            for place in itertools.product(*(range(size) for size in launch.grid)):
                self.place, self._threads = dict(zip(launch.names, place, strict=True)), {}
                for self.warpgroup in range(launch.threads):
                    self._operations = self._threads[(self.warpgroup,)] = []
                    launch.body(
                        *(self._array(*x, values) for x in launch.operands),
                        *(self._array(*x, {}) for x in launch.outputs),
                        {name: self._shared(name, x) for name, x in shared.items()},
                        {name: Ref(self, "barrier", name, ()) for name in barriers},
                    )
                self.programs.append((self.place, {k: x for k, x in self._threads.items() if x}))

    def _array(self, name, shape, values):
        return Ref(self, "global", name, shape, values=values.get(name))

    def _shared(self, name, kind):
        if name != "noise_then_output":
            return Ref(self, "shared", name, kind.shape)
        parts = getattr(kind, "refs", (kind,))
        self._noise_chunks = parts[0].shape[0] // tiles.COMPUTE_WARPGROUPS
        named = zip(("noise", "output"), parts, strict=False)
        found = tuple(Ref(self, "shared", name, part.shape) for name, part in named)
        return found if len(found) > 1 else found[0]

    def place_of(self, key):
        """Noise and answer of a warpgroup share their place."""
        if not self._noise_chunks or key[0] not in ("noise", "output") or len(key) == 1:
            return key
        if key[0] == "noise":
            return ("noise, output", key[1] // self._noise_chunks, key[1])
        return ("noise, output", key[1] // 2)

    def op(self, *what):
        self._operations.append(what)

    def map_warps(self, body):
        outer = self._operations
        for warp in range(WARPS):
            self._operations = self._threads[(self.warpgroup, warp)] = []
            body(integer(warp))
        self._operations = outer
