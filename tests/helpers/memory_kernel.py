"""The memory kernel in the Mosaic GPU simulator; run as a program, it saves what tests look at.

python memory_kernel.py FILE.npz: a program of its own, because the simulator's threads wait inside
XLA's thread pool, which must have more of them than the machine may have cores (NPROC).
"""

import sys
from unittest import mock

import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, MemoryReadout, NoiseInputs
from dpfa_jax.kernels.mosaic_gpu import device, memory_call

ROWS, KEYS, SIZE = 70, 150, 41
READOUT = MemoryReadout("sum", 1.0, 1.0, 0.75, 1.0, (4.0, 2.0), (2.0**-2, 2.0**-3))
SPEC = AttentionSpec(0.2, is_causal=True, logits_soft_cap=3.0, readout=READOUT)
LENGTHS = (66, 140)


def inputs() -> AttentionInputs:
    """Two query heads of one key head, ragged sizes and lengths, some slots masked."""
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.standard_normal((1, n, heads, SIZE)), jnp.bfloat16)
        for n, heads in ((ROWS, 2), (KEYS, 1), (KEYS, 1))
    )
    return AttentionInputs(
        query,
        key,
        value,
        mask=jnp.asarray(rng.random((1, 1, 1, KEYS)) < 0.7),
        query_lengths=jnp.asarray([LENGTHS[0]], jnp.int32),
        key_lengths=jnp.asarray([LENGTHS[1]], jnp.int32),
        noise=NoiseInputs(
            jnp.asarray([[1, 0xFFFFFFFF]], jnp.uint32),
            jnp.asarray([1000], jnp.uint32),
            jnp.asarray([3], jnp.uint32),
        ),
    )


def with_bytes(given: AttentionInputs, filler: float) -> AttentionInputs:
    """`given` with `filler` in every hidden slot's key and value."""
    seen = given.mask[0, 0, 0] & (jnp.arange(KEYS) < LENGTHS[1])
    key, value = (
        jnp.where(seen[None, :, None, None], x, filler).astype(x.dtype)
        for x in (given.key, given.value)
    )
    return given._replace(key=key, value=value)


def answer(given: AttentionInputs) -> memory_call.MemoryResults:
    """The kernel's answer and its un-noised sums."""
    interpret = plgpu.InterpretGPUParams()
    with mock.patch.object(device, "processors", lambda: 1):  # one program walks over both heads
        return memory_call.answer(SPEC, given, keep_sums=True, interpret=interpret)


def main(path: str) -> None:
    """Runs the kernel on `inputs()` and on the same with NaN in hidden slots."""
    names = ("output", "numerators", "normalisers")
    saved = {}
    for prefix, given in (("", inputs()), ("nan_", with_bytes(inputs(), float("nan")))):
        for name, x in zip(names, answer(given), strict=True):
            x = x.astype(jnp.float32) if name == "output" else x
            saved[prefix + name] = np.asarray(x)
    np.savez(path, **saved)


if __name__ == "__main__":
    main(sys.argv[1])
