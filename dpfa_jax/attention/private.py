"""Private attention: an example's output (F) or the readout of a private memory (M)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key, UInt32

from dpfa_jax.attention import checks, core, placement, private_checks
from dpfa_jax.kernels import dispatch
from dpfa_jax.kernels.base import NoiseInputs
from dpfa_jax.kernels.row_clip import clip_rows_stored
from dpfa_jax.noise import bind, guard, is_word, key_words
from dpfa_jax.release import ExampleRelease, RecordRelease


def dp_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    release: ExampleRelease | RecordRelease,
    noise_key: Key[Array, ""],
    release_id: int | UInt32[Array, ""] = 0,
    layer: int | UInt32[Array, ""] = 0,
    batch_start: placement.Start | None = None,
    head_start: placement.Start | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    logits_soft_cap: float | None = None,
    logits_bound: float | None = None,
    deterministic: bool = True,
    implementation: str | None = None,
) -> Float[Array, "*B T N H"]:
    """Attention whose output is one private release; charge it first (`charge`).

    With `ExampleRelease`: rows of query and key are clipped where the release says so; the
    normalised output is clipped, noised, snapped to a public grid and cast. Every row gets noise,
    padded and fully masked ones too. Gradients pass through clips and attention; they are
    noise-free functions of the input, and what is computed from them is not covered by this
    release.

    With `RecordRelease`: (N, Z) = sum_j e_j (v_j, kappa) + noise with the public maximum B, then
    N / max(Z / kappa, floor); or, in the ratio form, N / Z + noise. No derivative exists.

    Args:
      query, key, value: (B, T, N, H), (B, S, K, H), (B, S, K, H), not float64, and in a dtype
        that holds the largest noise (float16 ends at 65504).
      bias, mask, is_causal, query_seq_lengths, key_value_seq_lengths: as `dot_product_attention`.
      scale, local_window_size, logits_soft_cap, implementation: likewise; scale is a Python float.
      logits_bound: likewise; no guarantee rests on it: a row that leaves float32 counts as zero, as
        every row that is not finite. Refused for a `RecordRelease`, which has its own.
      deterministic: as `dot_product_attention`; of gradients, the release always has the same bits.
      release: the promise, which must match the shapes (rows T, heads N, head size H).
      noise_key: the key of this release, from `charge`. An argument, never closed over.
      release_id, layer: tell several uses of one key apart, 32 bits each; the answer is NaN where
        a traced one is negative. Each use is one release and must have been charged; the key does
        not know how often it was paid for.
      batch_start, head_start: global index of the first batch row and query head, where this call
        sees a part of them. The noise depends on global indices only. Heads end with the release's:
        beyond, an error, and NaN where the index is traced. Both are due inside shard_map: the
        names of the mesh axes along which batch or heads are cut ("data", or several, the outermost
        first), 0 for what is whole on each shard. A number that differs between shards is refused.

    Returns:
      The private answer in the query's shape and dtype. Log-sum-exp, maxima and logits are never
      returned.

    Formal guarantees:
      * ExampleRelease: each batch row is one example, replaced whole; `release.record()` is the
        Gaussian mechanism of one row, and rows are different individuals.
      * RecordRelease: each batch row has its own memory, and no record lies in two of them, nor in
        two rows of other calls under the key; put queries that share a memory along T. Query, scale
        and soft cap are public. Bias and mask may be public, or depend, in the column of a key, on
        that key's record. The sum form takes every mask, length, window and causality: a hidden key
        has weight 0, bit for bit. The ratio form is for `release.memory_length` keys, all seen: it
        refuses every one of them, and its bias must be public.

    Errors: ArgumentError for arguments that do not fit each other or the release; KeyReuseError
    for a key that would serve twice; PrivateAutodiffError for a derivative of a record release.
    """
    inputs = checks.arrays(query, key, value, bias, mask, query_seq_lengths, key_value_seq_lengths)
    readout = private_checks.release_of(release, inputs.query.shape[2])
    if isinstance(scale, jax.core.Tracer):
        private_checks.refuse_traced("scale", scale)
    query_key_norm = getattr(release, "query_key_clip_norm", None)
    spec = checks.spec(
        inputs,
        readout,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        logits_bound=logits_bound,
        deterministic=deterministic,
        query_key_norm=query_key_norm,
    )
    private_checks.fits(release, spec, inputs, head_start)
    if query_key_norm is not None:
        inputs = inputs._replace(
            query=clip_rows_stored(inputs.query, query_key_norm),
            key=clip_rows_stored(inputs.key, query_key_norm),
        )
    private_checks.noise_key(release, noise_key)
    place = placement.of_call(
        inputs, noise_key, release.num_heads, batch_start=batch_start, head_start=head_start
    )
    is_use = is_word(release_id, layer)
    release_id = private_checks.use("release_id", release_id)
    layer = private_checks.use("layer", layer)
    witnesses = [x for x in jax.tree.leaves(inputs) if x is not None]
    drawn = tuple(part.drawn for part in place)
    noise_key = guard(
        noise_key,
        *witnesses,
        uses=(release_id, layer),
        spans=drawn,
        names=("release_id", "layer", "batch_start", "head_start"),
        promise=release.record(),
    )
    inputs = inputs._replace(
        noise=_noise_inputs(noise_key, release_id, layer, place, inputs.query.shape[0])
    )
    backend = dispatch.choose(spec, inputs, checks.implementation(implementation))
    output, _ = core.attend(backend, spec, inputs)
    if is_use is not None:
        output = jnp.where(is_use, output, jnp.nan)
    return place.answered(output).reshape(jnp.shape(query))


def _noise_inputs(
    noise_key: Key[Array, ""],
    release_id: int | UInt32[Array, ""],
    layer: int | UInt32[Array, ""],
    place: placement.Placement,
    batch: int,
) -> NoiseInputs:
    words = bind(key_words(noise_key), release_id, layer)
    batch_start, head_start = (jnp.asarray(part.start, jnp.uint32) for part in place)
    return NoiseInputs(
        jnp.broadcast_to(words, (batch, 2)),
        batch_start + jnp.arange(batch, dtype=jnp.uint32),
        jnp.broadcast_to(head_start, (batch,)),
    )
