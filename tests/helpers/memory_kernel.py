"""The memory kernel in the Mosaic GPU simulator; run as a program, it saves what tests look at.

python memory_kernel.py CASE FILE.npz: a program of its own, because the simulator's threads wait
inside XLA's thread pool, which must have more of them than the machine may have cores (NPROC), and
because a kernel whose warpgroups wait for each other for ever can then be ended.
"""

import dataclasses
import sys
from unittest import mock

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, MemoryReadout, NoiseInputs
from dpfa_jax.kernels.mosaic_gpu import device, memory_call

COLUMNS = 128  # of the values, most of one tile
READOUT = MemoryReadout("sum", 1.0, 1.0, 0.75, 1.0, (4.0, 2.0), (2.0**-2, 2.0**-3))


@dataclasses.dataclass(frozen=True)
class Case:
    """A call with two query heads of one key head.

    Attributes:
      rows, keys, size: T, S and the head size.
      spec: of the call.
      processors: of the GPU: most programs.
      lengths: of queries and keys; None: whole.
    """

    rows: int
    keys: int
    size: int
    spec: AttentionSpec
    processors: int
    lengths: tuple[int, int] | None = None


# Tiles are 128 rows of a head, steps 128 keys, of which two lie in shared memory. Above head size
# 128 there is a tile for each 128 columns of the values, and steps are 64 keys.
CASES = {
    # One program, two tiles of one step: each step is a tile's first and last.
    "a step": Case(
        70, 150, 41, AttentionSpec(0.2, is_causal=True, logits_soft_cap=3.0, readout=READOUT),
        processors=1, lengths=(66, 140),
    ),
    # Three programs with 2, 1 and 1 tiles of three steps; two blocks of columns.
    "three steps": Case(200, 300, 72, AttentionSpec(0.2, readout=READOUT), processors=3),
    # More processors than the four tiles, which have two steps and three, hidden in part on either
    # side; the last tile has six rows.
    "window": Case(
        136, 260, 64, AttentionSpec(0.2, local_window=(60, 20), readout=READOUT),
        processors=9, lengths=(130, 259),
    ),
    # Three programs with 2, 1 and 1 tiles of three steps: both parts of either head.
    "two parts": Case(70, 150, 256, AttentionSpec(0.1, is_causal=True, readout=READOUT), 3),
    # Eight tiles, of one step or two; the second part's columns run past the end of the values.
    "a short part": Case(
        136, 100, 141, AttentionSpec(0.1, local_window=(60, 20), readout=READOUT),
        processors=2, lengths=(130, 99),
    ),
}  # fmt: skip


def inputs(case: Case) -> AttentionInputs:
    """Ragged sizes and lengths, some slots masked; columns past 128: the first ones, reversed."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((1, n, heads, case.size)), jnp.bfloat16)
        for n, heads in ((case.rows, 2), (case.keys, 1), (case.keys, 1))
    )
    more = case.size - COLUMNS
    if more > 0:
        value = value.at[..., COLUMNS:].set(value[..., :more][..., ::-1])
    query_lengths, key_lengths = (
        None if case.lengths is None else jnp.asarray([case.lengths[i]], jnp.int32)
        for i in range(2)
    )
    return AttentionInputs(
        query,
        key,
        value,
        mask=jnp.asarray(rng.random((1, 1, 1, case.keys)) < 0.7),
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        noise=NoiseInputs(
            jnp.asarray([[1, 0xFFFFFFFF]], jnp.uint32),
            jnp.asarray([1000], jnp.uint32),
            jnp.asarray([3], jnp.uint32),
        ),
    )


def with_bytes(given: AttentionInputs, filler: float) -> AttentionInputs:
    """`given` with `filler` in every hidden slot's key and value."""
    seen = given.mask[0, 0, 0]
    if given.key_lengths is not None:
        seen &= jnp.arange(len(seen)) < given.key_lengths[0]
    key, value = (
        jnp.where(seen[None, :, None, None], x, filler).astype(x.dtype)
        for x in (given.key, given.value)
    )
    return given._replace(key=key, value=value)


def answer(case: Case, given: AttentionInputs) -> memory_call.MemoryResults:
    """The kernel's answer and its un-noised sums."""
    interpret = plgpu.InterpretGPUParams()
    with mock.patch.object(device, "processors", lambda: case.processors):
        return memory_call.answer(case.spec, given, keep_sums=True, interpret=interpret)


def main(name: str, path: str) -> None:
    """Runs the kernel on `inputs` and on the same with NaN in hidden slots."""
    case = CASES[name]
    names = ("output", "numerators", "normalisers")
    saved = {}
    for prefix, given in (("", inputs(case)), ("nan_", with_bytes(inputs(case), float("nan")))):
        for name, x in zip(names, answer(case, given), strict=True):
            x = x.astype(jnp.float32) if name == "output" else x
            saved[prefix + name] = np.asarray(x)
    np.savez(path, **saved)


if __name__ == "__main__":
    main(*sys.argv[1:])
