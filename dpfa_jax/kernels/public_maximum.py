"""Whether a softmax can do without a running maximum, by what arguments say about its logits.

Its weights are then exp(logit) times a constant of their dtype. Any factor gives the same softmax;
one that the arguments fix serves where every weight that they allow is a normal number.
"""

import math

import jax.numpy as jnp

from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec

# |logit| in base 2 up to which weights are taken as they are. bfloat16 and float32, which sums
# them, hold normal numbers from 2^-126 to 2^127: 36 binades are left on either side, for values,
# their number, and statements that are not true. float16 holds 2^-14 to 2^15: weights are doubled.
BINADES = {"bfloat16": 90.0, "float16": 14.5}
SHIFT = {"bfloat16": 0.0, "float16": 1.0}


def largest_logit(spec: AttentionSpec, inputs: AttentionInputs) -> float | None:
    """B with |logit| <= B for every visible key, None where arguments tell none (bias has none)."""
    if inputs.bias is not None:
        return None
    bounds = (spec.logits_soft_cap, spec.largest_logit)
    return min((bound for bound in bounds if bound is not None), default=None)


def has_public_maximum(spec: AttentionSpec, inputs: AttentionInputs) -> bool:
    """Whether weights 2^`SHIFT` exp(logit) are normal numbers of the values' dtype."""
    bound = largest_logit(spec, inputs)
    binades = BINADES.get(jnp.dtype(inputs.value.dtype).name)
    return bound is not None and binades is not None and bound * math.log2(math.e) <= binades
