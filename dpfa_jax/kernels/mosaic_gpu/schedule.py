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
    longest_first = np.asarray(sorted(range(len(costs)), key=lambda tile: -costs[tile]))
    # Parts of one size: a small last one would have too few short tiles to fill the gaps with.
    parts = np.array_split(np.arange(groups), -(-groups // group_size))
    order = np.concatenate(
        [np.add.outer(longest_first, part * len(costs)).ravel() for part in parts]
    )
    if min(costs) == max(costs):  # in turn
        shares = [order[program::programs] for program in range(programs)]
    else:
        shares = _to_the_first_free(order, costs, programs)
    width = 2 + max(len(share) for share in shares)
    table = np.zeros((programs, width), np.int32)
    for row, share in zip(table, shares, strict=True):
        row[0] = len(share)
        row[1 : 1 + len(share)] = share
        row[1 + len(share) :] = share[-1] if len(share) else 0
    return table


def _to_the_first_free(
    order: np.ndarray, costs: tuple[float, ...], programs: int
) -> list[np.ndarray]:
    queue = [(0.0, program) for program in range(programs)]
    taken: list[list[int]] = [[] for _ in range(programs)]
    for tile in order.tolist():
        done, program = queue[0]
        taken[program].append(tile)
        heapq.heapreplace(queue, (done + costs[tile % len(costs)], program))
    return [np.asarray(share, np.int64) for share in taken]
