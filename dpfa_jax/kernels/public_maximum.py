"""The largest logit that arguments alone allow: under it a softmax needs no running maximum.

Weights are exp(logit - bound), between exp(-2 bound) and 1. Any bound gives the same softmax; one
is of use only where all of these weights are normal numbers of the type that holds them.
"""

import math

import jax.numpy as jnp

from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec

# Powers of two that weights may span. float32 and bfloat16: a weight of 2^-90 leaves 36 more
# binades for the value that it multiplies. float16 holds normal numbers from 2^-14 to 2^15.
WEIGHT_BINADES = {"float32": 90.0, "bfloat16": 90.0, "float16": 29.0}
# Weights are 2^shift at most. One in float16 that is 1 at most would span 14 binades only.
SHIFT = {"float32": 0.0, "bfloat16": 0.0, "float16": 15.0}


def largest_logit(spec: AttentionSpec, inputs: AttentionInputs) -> float | None:
    """B with |logit| <= B for every visible key, None where arguments tell none (bias has none)."""
    if inputs.bias is not None:
        return None
    bounds = (spec.logits_soft_cap, spec.logits_bound, spec.largest_logit)
    return min((bound for bound in bounds if bound is not None), default=None)


def public_maximum(spec: AttentionSpec, inputs: AttentionInputs) -> float | None:
    """`largest_logit` where weights relative to it are normal in the values' dtype, else None."""
    bound = largest_logit(spec, inputs)
    binades = WEIGHT_BINADES.get(jnp.dtype(inputs.value.dtype).name)
    if bound is None or binades is None:
        return None
    return bound if 2.0 * bound * math.log2(math.e) <= binades else None
