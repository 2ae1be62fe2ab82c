"""Which tiles each program of a kernel walks over, and in what order: host arithmetic.

As many programs as the device has processors stay on them from first to last, so that one tile's
epilogue runs under the next one's products. Their shares are balanced beforehand by a list of
costs: a program takes the next tile when it is the first to have finished its tiles so far.
"""

import functools
import heapq

import numpy as np
from jaxtyping import Int32


@functools.lru_cache(maxsize=64)
def balanced(
    costs: tuple[float, ...], groups: int, programs: int, group_size: int
) -> Int32[np.ndarray, "programs width"]:
    """A row a program: how many tiles it has, their numbers, and the last of them once more.

    The tiles of a group, and groups of `group_size` together, read the same keys and start close to
    each other, so that the keys stay in the second-level cache.

    Args:
      costs: of the tiles of one group (a head), in any unit.
      groups: how many there are; tile t of group g has the number g * len(costs) + t.
      programs: rows of the result.
      group_size: at most so many groups start together, the longest tiles of all of them first.
    """
    longest_first = sorted(range(len(costs)), key=lambda tile: -costs[tile])
    shares: list[list[int]] = [[] for _ in range(programs)]
    queue = [(0.0, program) for program in range(programs)]
    # Parts of one size: a small last one would have too few short tiles to fill the gaps with.
    for part in np.array_split(np.arange(groups), -(-groups // group_size)):
        for tile in longest_first:
            for group in part.tolist():
                done, program = queue[0]
                shares[program].append(group * len(costs) + tile)
                heapq.heapreplace(queue, (done + costs[tile], program))
    width = 2 + max(len(share) for share in shares)
    table = np.zeros((programs, width), np.int32)
    for row, share in zip(table, shares, strict=True):
        row[0] = len(share)
        row[1 : 1 + len(share)] = share
        row[1 + len(share) :] = share[-1] if share else 0
    return table
