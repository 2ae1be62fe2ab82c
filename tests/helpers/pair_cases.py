"""Masks and biases for the Hopper kernels' tests; as a program it runs cases in the simulator.

python pair_cases.py FILE CASE...   writes the results of each case to FILE. The simulator needs
more threads than a small machine has cores (NPROC), which is set before JAX starts.
"""

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec

ROWS, KEYS, SIZE = 70, 90, 40
HIDDEN = 5  # a key that every mask with an axis of keys hides


class Case(NamedTuple):
    """Shapes of mask and bias, and options of the call; "n", "t", "s" stand for full axes."""

    mask: tuple[int, ...] | None
    bias: tuple[int, ...] | None
    dtype: Any = jnp.float32
    options: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "all axes": Case((2, 2, ROWS, KEYS), (2, 2, ROWS, KEYS)),
    "causal": Case((2, 1, ROWS, KEYS), (1, 2, ROWS, KEYS), jnp.bfloat16, {"is_causal": True}),
    "keys": Case((2, 1, 1, KEYS), (1, 2, 1, KEYS), options={"logits_soft_cap": 4.0}),
    "rows": Case((1, 2, ROWS, 1), (2, 1, ROWS, 1), jnp.float16, {"local_window": (20, 30)}),
    "one": Case((1, 1, 1, 1), (1, 1, 1, 1)),
    "mask": Case((2, 1, ROWS, KEYS), None, options={"largest_logit": 20.0}),
}


def draw(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def arrays(name):
    """(spec, inputs, cotangent) of a case."""
    case = CASES[name]
    query, key, value, cotangent = (
        draw(2, n, heads, SIZE, seed=seed)
        for seed, (n, heads) in enumerate(((ROWS, 2), (KEYS, 1), (KEYS, 1), (ROWS, 2)))
    )
    mask = bias = None
    if case.mask is not None:
        seen = np.random.default_rng(9).random(case.mask) < 0.6
        seen |= case.mask == (1, 1, 1, 1)
        if case.mask[3] > 1:
            seen[..., HIDDEN] = False
        if case.mask[2] > 1:
            seen[0, 0, 3] = False  # a row that sees no key
        mask = jnp.asarray(seen)
    if case.bias is not None:
        bias = draw(*case.bias, seed=7, dtype=case.dtype)
    inputs = AttentionInputs(query, key, value, bias, mask)
    return AttentionSpec(0.2, **case.options), inputs, cotangent


def main(path, names):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from dpfa_jax.kernels.mosaic_gpu.backend import MosaicGpuBackend

    backend = MosaicGpuBackend(interpret=plgpu.InterpretGPUParams())
    results = {}
    for name in names:
        spec, inputs, cotangent = arrays(name)
        assert backend.cannot(spec, inputs, "cpu") is None
        if inputs.mask.shape[3] > 1:
            inputs = inputs._replace(
                key=inputs.key.at[:, HIDDEN].set(jnp.nan),
                value=inputs.value.at[:, HIDDEN].set(jnp.inf),
            )
        outputs = backend.forward(spec, inputs)
        gradients = backend.backward(spec, inputs, outputs, cotangent)
        found = {"output": outputs.output, "lse": outputs.lse}
        found |= {k: x for k, x in gradients._asdict().items() if x is not None}
        results |= {f"{name} {k}": np.asarray(x, np.float32) for k, x in found.items()}
    np.savez(path, **results)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
