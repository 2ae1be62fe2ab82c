"""Every check of an attention call's arrays and options, and their one normal form."""

import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dpfa_jax.core import ArgumentError
from dpfa_jax.core import checks as host
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, Readout

IMPLEMENTATIONS = ("mosaic_gpu", "triton", "blocked", "reference")
_FLOATS = ("float32", "bfloat16", "float16", "float64")


def implementation(value: object) -> str | None:
    """A backend's name. jax.nn's "xla" is "blocked"; its "cudnn" is not offered."""
    if value is None or value in IMPLEMENTATIONS:
        return value
    if value == "xla":
        return "blocked"
    advice = f"Pass None, 'xla' or one of {', '.join(map(repr, IMPLEMENTATIONS))}."
    if value == "cudnn":
        raise ArgumentError(
            "implementation",
            value,
            "cuDNN is not a backend here",
            "Pass None (the fastest that can) or call jax.nn.dot_product_attention.",
        )
    raise ArgumentError("implementation", value, "no such backend", advice)


def arrays(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    query_seq_lengths: ArrayLike | None,
    key_value_seq_lengths: ArrayLike | None,
) -> AttentionInputs:
    """The arrays of a call with a batch axis, checked against each other.

    Errors: ArgumentError for a rank, shape or dtype that does not fit.
    """
    query, key, value = (
        _with_batch(name, x) for name, x in (("query", query), ("key", key), ("value", value))
    )
    _dtype_in("query", query, _FLOATS)
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise ArgumentError(
                name, x.dtype, f"query is {query.dtype}", "Cast all three to one dtype."
            )
    batch, length, heads, size = query.shape
    if key.shape[0] != batch or key.shape[3] != size:
        raise ArgumentError(
            "key",
            key.shape,
            f"does not fit query {query.shape}",
            "Batch and head size must agree (BTNH and BSKH).",
        )
    if value.shape != key.shape:
        raise ArgumentError("value", value.shape, f"key is {key.shape}", "Give both one shape.")
    if size < 1 or heads < 1:
        raise ArgumentError(
            "query", query.shape, "no heads, or head size 0", "Pass 1 or more of each."
        )
    if key.shape[2] < 1 or heads % key.shape[2]:
        raise ArgumentError(
            "key",
            key.shape,
            f"{heads} query heads are no multiple of {key.shape[2]} key heads",
            "Use a number of key heads that divides the query heads.",
        )
    logits_shape = (batch, heads, length, key.shape[1])
    return AttentionInputs(
        query,
        key,
        value,
        _bias(bias, logits_shape),
        _mask(mask, logits_shape),
        _lengths("query_seq_lengths", query_seq_lengths, batch, length),
        _lengths("key_value_seq_lengths", key_value_seq_lengths, batch, key.shape[1]),
    )


def spec(
    inputs: AttentionInputs,
    readout: Readout,
    *,
    scale: object,
    is_causal: object,
    local_window_size: object,
    logits_soft_cap: object,
    logits_bound: object,
    deterministic: object = True,
    query_key_norm: float | None = None,
) -> AttentionSpec:
    """The static part of a call; no row of query or key is longer than `query_key_norm`.

    Errors: ArgumentError for an option outside its range.
    """
    if not isinstance(is_causal, bool):
        raise ArgumentError("is_causal", is_causal, "not a Python bool", "Pass True or False.")
    if not isinstance(deterministic, bool):
        raise ArgumentError(
            "deterministic", deterministic, "not a Python bool", "Pass True or False."
        )
    cap = None if logits_soft_cap is None else host.positive("logits_soft_cap", logits_soft_cap)
    bounds = [] if logits_bound is None else [host.positive("logits_bound", logits_bound)]
    factor = 1.0 / math.sqrt(inputs.query.shape[-1])
    if scale is not None:
        factor = host.real("scale", _number("scale", scale))
    if query_key_norm is not None:
        bounds.append(abs(factor) * query_key_norm**2)
    return AttentionSpec(
        scale=factor,
        is_causal=is_causal,
        local_window=_window(local_window_size, inputs),
        logits_soft_cap=cap,
        largest_logit=min(bounds, default=None),
        deterministic=deterministic,
        readout=readout,
    )


def times_scale(
    query: Float[Array, "B T N H"], scale: Float[Array, ""] | Int[Array, ""]
) -> Float[Array, "B T N H"]:
    """The query times a traced scale, in float32 or wider, rounded once to its own dtype.

    Errors: ArgumentError for more than one number, or one that is not real.
    """
    if scale.ndim:
        raise ArgumentError("scale", scale.shape, "not a scalar", "Pass one number.")
    if not jnp.issubdtype(scale.dtype, jnp.floating) and not _is_integer(scale):
        raise ArgumentError("scale", scale.dtype, "not a real number", "Pass a float.")
    wide = jnp.promote_types(query.dtype, jnp.float32)
    return (query.astype(wide) * scale.astype(wide)).astype(query.dtype)


def _number(name: str, value: object) -> object:
    """A concrete array of shape () as a Python number; what is none as it is."""
    if isinstance(value, jax.core.Tracer) or not isinstance(value, (jax.Array, np.ndarray)):
        return value
    if value.ndim:
        raise ArgumentError(name, value.shape, "not a scalar", "Pass one number.")
    return value.item()


def _is_integer(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.integer)


def _array(name: str, x: ArrayLike) -> jax.Array:
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError):  # strings, objects, ragged lists
        raise ArgumentError(
            name, f"<{type(x).__name__}>", "no array of numbers", "Pass an array."
        ) from None


def _host_array(name: str, x: ArrayLike) -> np.ndarray:
    try:
        return np.asarray(x)
    except (TypeError, ValueError):  # ragged lists
        raise ArgumentError(
            name, f"<{type(x).__name__}>", "no array of numbers", "Pass an array."
        ) from None


def _with_batch(name: str, x: ArrayLike) -> Float[Array, "B T N H"]:
    if x is None:
        raise ArgumentError(name, x, "missing", "Pass an array (BTNH or TNH).")
    x = _array(name, x)
    if x.ndim not in (3, 4):
        raise ArgumentError(
            name,
            x.shape,
            "not of rank 3 or 4",
            "Pass (batch, length, heads, size) or without batch.",
        )
    return x if x.ndim == 4 else x[None]


def _dtype_in(name: str, x: jax.Array, options: tuple[str, ...]) -> None:
    if x.dtype.name not in options:
        raise ArgumentError(
            name, x.dtype, "not a supported dtype", f"Cast it to one of {', '.join(options)}."
        )


def _bias(bias: ArrayLike | None, shape: tuple[int, ...]) -> Float[Array, "b n t s"] | None:
    if bias is None:
        return None
    bias = _array("bias", bias)
    if bias.dtype == jnp.bool_:
        raise ArgumentError(
            "bias", bias.dtype, "boolean", "Pass it as mask, or an additive bias as floats."
        )
    if _is_integer(bias):
        bias = bias.astype(jnp.float32)
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ArgumentError("bias", bias.dtype, "not real", "Pass real numbers.")
    return _broadcastable("bias", bias, shape)


def _mask(mask: ArrayLike | None, shape: tuple[int, ...]) -> Bool[Array, "b n t s"] | None:
    if mask is None:
        return None
    mask = _array("mask", mask)
    if mask.dtype != jnp.bool_:
        raise ArgumentError(
            "mask",
            mask.dtype,
            "not boolean",
            "Pass True where a key takes part; an additive mask goes to bias.",
        )
    return _broadcastable("mask", mask, shape)


def _broadcastable(name: str, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`x` with four axes, each 1 or full."""
    if x.ndim > 4:
        raise ArgumentError(name, x.shape, "more than 4 axes", "Pass (batch, heads, T, S).")
    full = x.reshape((1,) * (4 - x.ndim) + x.shape)
    if any(have not in (1, want) for have, want in zip(full.shape, shape, strict=True)):
        raise ArgumentError(
            name, x.shape, f"does not broadcast to {shape}", "Each axis must be full or 1."
        )
    return full


def _lengths(
    name: str, lengths: ArrayLike | None, batch: int, largest: int
) -> Int[Array, " B"] | None:
    """Lengths as int32 in [0, largest], which hide what they did: 2^40 ends no row at 0."""
    if lengths is None:
        return None
    if not any(isinstance(x, jax.Array) for x in jax.tree.leaves(lengths)):
        host_lengths = _host_array(name, lengths)  # before JAX cuts 64 bits to 32
        if jnp.issubdtype(host_lengths.dtype, jnp.integer):
            host_lengths = host_lengths.clip(0, _last(host_lengths.dtype, largest))
        lengths = host_lengths
    found = _array(name, lengths)
    if not _is_integer(found):
        raise ArgumentError(name, found.dtype, "not integers", "Pass int32 lengths.")
    if found.shape != (batch,):
        raise ArgumentError(
            name, found.shape, f"not of shape ({batch},)", "Pass one length a batch row."
        )
    return found.clip(0, _last(found.dtype, largest)).astype(jnp.int32)


def _last(dtype: np.dtype, largest: int) -> int:
    """`largest`, or what ends `dtype` before it."""
    return min(largest, int(jnp.iinfo(dtype).max))


def _window(window: object, inputs: AttentionInputs) -> tuple[int, int] | None:
    if window is None:
        return None
    pair = (window, window) if isinstance(window, numbers.Integral) else window
    if (
        isinstance(window, bool)
        or not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or not all(isinstance(side, numbers.Integral) for side in pair)
    ):
        raise ArgumentError(
            "local_window_size", window, "neither an int nor a pair of ints", "Pass (left, right)."
        )
    # A side beyond both lengths hides nothing; smaller numbers keep index sums within 32 bits.
    far = inputs.query.shape[1] + inputs.key.shape[1]
    left, right = (max(-far, min(far, int(side))) for side in pair)
    return left, right
