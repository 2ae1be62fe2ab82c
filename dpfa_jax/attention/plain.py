"""Plain attention with the signature of `jax.nn.dot_product_attention`."""

from typing import Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from dpfa_jax.attention import checks, core
from dpfa_jax.kernels import dispatch
from dpfa_jax.kernels.base import Plain


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    scale: ArrayLike | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    implementation: str | None = ...,
    return_residual: Literal[False] = ...,
    logits_soft_cap: float | None = ...,
    logits_bound: float | None = ...,
    deterministic: bool = ...,
) -> Float[Array, "*B T N H"]: ...


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = ...,
    mask: ArrayLike | None = ...,
    *,
    scale: ArrayLike | None = ...,
    is_causal: bool = ...,
    query_seq_lengths: ArrayLike | None = ...,
    key_value_seq_lengths: ArrayLike | None = ...,
    local_window_size: int | tuple[int, int] | None = ...,
    implementation: str | None = ...,
    return_residual: Literal[True],
    logits_soft_cap: float | None = ...,
    logits_bound: float | None = ...,
    deterministic: bool = ...,
) -> tuple[Float[Array, "*B T N H"], Float[Array, "*B T N"]]: ...


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    logits_bound: float | None = None,
    deterministic: bool = True,
) -> Float[Array, "*B T N H"] | tuple[Float[Array, "*B T N H"], Float[Array, "*B T N"]]:
    """softmax(scale q.k + bias) v without storing the attention matrix. No privacy.

    B batch, T query rows, S keys, N query heads, K key heads (K divides N: grouped-query and
    multi-query attention), H head size.

    Args:
      query: (B, T, N, H) or (T, N, H), float32, bfloat16, float16 or float64.
      key: (B, S, K, H) or (S, K, H), in the query's dtype.
      value: as `key`.
      bias: added to the logits; each axis of (B, N, T, S) full or 1. It has a gradient.
      mask: boolean, True where a key takes part; broadcasts as `bias`.
      scale: factor on q.k; 1 / sqrt(H) where None. A traced scale is multiplied into the query,
        which is rounded once more: in 16 bits up to twice the error of a number known beforehand.
      is_causal: row t sees keys s <= t.
      query_seq_lengths: (B,) ints; rows from there on give 0.
      key_value_seq_lengths: (B,) ints; keys from there on take no part.
      local_window_size: (left, right) or one int for both: row t sees keys t - left .. t + right.
      implementation: None (the first backend that can), "mosaic_gpu", "triton", "blocked" or
        "reference"; jax.nn's "xla" means "blocked". "reference" needs O(T S) memory and alone has
        forward-mode derivatives (`jvp`, `jacfwd`; of the others JAX says TypeError) and all higher
        ones. "blocked" also has second ones by forward over reverse (`hessian`), and by reverse
        over reverse up to T S = 2^18, or without causality, window and lengths, whose loops have no
        fixed length. The kernels have first ones.
        None decides when it is traced, by the platform of `jax.default_device`, or of a committed
        array outside jit, grad and vmap. Where a program is for another one (arrays on the CPU of a
        GPU machine under jit; an export or `lower` with `lowering_platforms`), name the backend:
        "blocked" on a CPU.
      return_residual: also return the log-sum-exp of each row's logits, without gradient.
      logits_soft_cap: c: scale q.k becomes c tanh(scale q.k / c), before bias and mask.
      logits_bound: B: the caller's statement that |scale q.k| <= B, as where query and key are
        normalised. It defines nothing: without bias, and up to B = 62 (float16: 10), a kernel on
        Hopper then takes weights exp(s) and no running maximum, which is faster; all else ignores
        it. A `logits_soft_cap` is such a bound by itself. Where the statement is false, a row is
        still its softmax while its largest logit L keeps exp(L) in range: bfloat16 -70 < L <
        87 - log(S max(1, |v|)), with the row's largest |v|; float16, which stores the weights,
        |L| < 10.3. A row above that is NaN, infinite or 0, a row below it loses weights and ends
        as a row that sees no key.
      deterministic: gradients have the same bits on each run of one program on one device. The
        output always has. Where False, a kernel may add up dQ in the order in which its parts
        finish: at most a few per cent faster, and one example's gradient then depends in its last
        bits on when the others' are done. Leave it True under DP-SGD.

    Returns:
      The output in the query's shape and dtype, and with `return_residual` the log-sum-exp,
      (B, T, N) or (T, N), in that dtype.

    Where it differs from jax.nn: a row that sees no key gives 0 and log-sum-exp -inf (there: the
    mean of all values); float64 stays float64 in the softmax; integer lengths of any width are
    taken, and mean what they say beyond the axis too.

    Bytes of hidden keys: where lengths, the mask, or causality and window hide a key from every
    row, NaN or an infinity in it or its value reaches no output and no gradient, on any backend.
    Where they hide it from some rows only, those that see it become NaN; on Hopper others of their
    tile may too (0 * NaN, as all rows do in jax.nn), and gradients may be NaN on any.

    A bias hides a key where it is -inf, a finite key only: its logit and value are multiplied, and
    NaN in either is NaN in the output. A large negative number is a logit: a row of them alone is
    their softmax, the mean where the sums round to one number; but GPU kernels take logits below
    -4.6e7 (in float32: below -1e38), as -1e9 and finfo(bfloat16).min, for hidden, and such a row
    gives 0. Pass a mask. They do not serve a row whose largest logit is above 4.6e7, as under a
    bias of 1e9: gradients in 16 bits are wrong, and the output may be NaN, on Hopper from about
    1e9 on, on Triton from 2e38 on.

    Errors: ArgumentError for arguments that do not fit; UnsupportedBackendError, alone or in an
    ExceptionGroup, where no backend can serve the call.
    Source: Dao et al., "FlashAttention" (2022); Rabe and Staats (2021).
    """
    inputs = checks.arrays(query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths)
    if not isinstance(return_residual, bool):
        raise checks.ArgumentError(
            "return_residual", return_residual, "not a Python bool", "Pass True or False."
        )
    if isinstance(scale, jax.core.Tracer):
        inputs = inputs._replace(query=checks.times_scale(inputs.query, scale))
        scale = 1.0
    spec = checks.spec(
        inputs,
        Plain(),
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        logits_bound=logits_bound,
        deterministic=deterministic,
    )
    backend = dispatch.choose(spec, inputs, checks.implementation(implementation))
    output, lse = core.attend(backend, spec, inputs)
    shape = jnp.shape(query)
    output = output.reshape(shape)
    if not return_residual:
        return output
    assert lse is not None
    return output, jax.lax.stop_gradient(lse.astype(output.dtype).reshape(shape[:-1]))
