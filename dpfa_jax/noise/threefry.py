"""The threefry2x32 block function in plain uint32 operations: one text for oracle and kernels."""

import operator
from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # key schedule constant of the Skein family


def threefry2x32(
    key0: UInt32[Array, "..."],
    key1: UInt32[Array, "..."],
    x0: UInt32[Array, "..."],
    x1: UInt32[Array, "..."],
    *,
    add: Callable[[Array, Array], Array] = operator.add,
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """20 rounds of threefry2x32 of the counter (x0, x1) under the key (key0, key1).

    The arrays broadcast. The words equal `jax.random.bits(key, (n,), "uint64")`, whose element i is
    y0 << 32 | y1 of the counter (i >> 32, i). Runs unchanged inside Pallas kernels. `add` lets a
    kernel say how the sum of a round is formed (modulo 2^32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    schedule = (key0, key1, key0 ^ key1 ^ jnp.uint32(_PARITY))
    x0, x1 = x0 + schedule[0], x1 + schedule[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = add(x0, x1)
            x1 = _rotate_left(x1, rotation) ^ x0
        x0 = x0 + schedule[(block + 1) % 3]
        x1 = x1 + schedule[(block + 2) % 3] + jnp.uint32(block + 1)
    return x0, x1


def _rotate_left(x: UInt32[Array, "..."], bits: int) -> UInt32[Array, "..."]:
    # Not `>>`: the logical shift must not depend on how a lowering treats the sign bit.
    low = lax.shift_right_logical(x, jnp.full_like(x, 32 - bits))
    return lax.shift_left(x, jnp.full_like(x, bits)) | low
