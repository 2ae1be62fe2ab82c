"""Every check that a private call adds to those of plain attention."""

import math
from typing import NoReturn

import jax.numpy as jnp
from jaxtyping import Array, UInt32

from dpfa_jax.core import ArgumentError
from dpfa_jax.kernels.base import (
    AttentionInputs,
    AttentionSpec,
    ExampleReadout,
    MemoryReadout,
    Readout,
)
from dpfa_jax.noise import check_attention_ranges, require_key, word
from dpfa_jax.release import ExampleRelease, RecordRelease


def release_of(release: object, heads: int) -> Readout:
    """The numbers that a kernel needs of a release, for the `heads` that this call sees.

    Errors: ArgumentError for another release.
    """
    if isinstance(release, ExampleRelease):
        return ExampleReadout(
            l2_clip_norm=float(release.l2_clip_norm),
            noise_stddevs=release.noise_stddevs[:heads],
            grids=release.grids[:heads],
            clip=release.clip,
        )
    if isinstance(release, RecordRelease):
        return MemoryReadout(
            form=release.form,
            logit_bound=float(release.logit_bound),
            value_clip_norm=float(release.value_clip_norm),
            weight_scale=float(release.kappa),
            floor=float(release.floor),
            noise_stddevs=release.noise_stddevs[:heads],
            grids=release.grids[:heads],
        )
    raise ArgumentError(
        "release",
        release,
        "not a release that attention can answer",
        "Pass an ExampleRelease or a RecordRelease (a TrainingRelease belongs to dpsgd).",
    )


def refuse_traced(name: str, value: object) -> NoReturn:
    """Refuses a number that may depend on data."""
    raise ArgumentError(
        name, value, "a traced value", "Pass a Python number; a private bound must be public."
    )


def fits(
    release: ExampleRelease | RecordRelease,
    spec: AttentionSpec,
    inputs: AttentionInputs,
    head_start: object,
) -> None:
    """Refuses arrays that are not what the release promises about. Errors: ArgumentError."""
    _, rows, heads, size = inputs.query.shape
    if isinstance(release, RecordRelease) and spec.largest_logit is not None:
        raise ArgumentError(
            "logits_bound",
            spec.largest_logit,
            f"release.logit_bound is {release.logit_bound}",
            "Leave it out: a record release is bounded by its own number.",
        )
    if inputs.query.dtype == jnp.float64:
        raise ArgumentError(
            "query",
            inputs.query.dtype,
            "private attention has no float64 noise",
            "Cast query, key and value to float32.",
        )
    if size != release.head_dim:
        raise ArgumentError(
            "query", inputs.query.shape, f"release.head_dim is {release.head_dim}", _MATCH
        )
    _check_room(release, inputs)
    _check_heads(release, heads, head_start)
    check_attention_ranges(batches=inputs.query.shape[0], heads=heads, rows=rows, columns=size + 1)
    if isinstance(release, ExampleRelease):
        if rows != release.query_length:
            raise ArgumentError(
                "query",
                inputs.query.shape,
                f"release.query_length is {release.query_length}",
                "Pad to the public length, or make the release for this one.",
            )
        if release.clip == "example" and rows * heads * size > 2**20:
            raise ArgumentError(
                "query",
                inputs.query.shape,
                'clip="example" serves up to 2^20 numbers an example',
                'Use clip="row".',
            )
        return
    if rows != release.num_queries:
        raise ArgumentError(
            "query",
            inputs.query.shape,
            f"release.num_queries is {release.num_queries}",
            "Put all queries of one memory along T, and make the release for that many.",
        )
    if release.form == "ratio":
        _check_ratio(release, spec, inputs)


_MATCH = "Make the release for these shapes."


def _check_heads(release: ExampleRelease | RecordRelease, heads: int, head_start: object) -> None:
    if heads == release.num_heads:
        return
    problem = f"{heads} query heads, but release.num_heads is {release.num_heads}"
    if head_start is None or heads > release.num_heads:
        raise ArgumentError(
            "query",
            heads,
            problem,
            "Count query heads (not key heads); for a part of them pass head_start.",
        )
    if isinstance(release, ExampleRelease) and release.clip == "example":
        raise ArgumentError(
            "release.clip",
            release.clip,
            problem + ", and one norm over all heads cannot be clipped from a part of them",
            'Use clip="row" where heads are sharded by hand.',
        )
    if len(set(release.noise_stddevs)) > 1:
        raise ArgumentError(
            "release.noise_shares",
            release.noise_shares,
            problem + ", and heads with different noise cannot be sharded by hand",
            "Leave noise_shares out, or shard under jit instead of shard_map.",
        )


def _check_room(release: ExampleRelease | RecordRelease, inputs: AttentionInputs) -> None:
    """The noise must fit the dtype of the answer, which would be infinite: public numbers only."""
    largest = release.record().tail * max(release.noise_stddevs) + max(release.grids)
    if isinstance(release, ExampleRelease):
        largest += release.l2_clip_norm
    elif release.form == "ratio":
        largest += release.value_clip_norm
    else:  # the numerator's noise, over the least normaliser
        largest /= release.floor
    dtype = inputs.query.dtype
    if largest > float(jnp.finfo(dtype).max):
        raise ArgumentError(
            "query",
            dtype,
            f"noise may reach {largest:.3g}, beyond the largest {dtype}",
            "Cast query, key and value to bfloat16 or float32, or scale the clip norm down.",
        )


def _check_ratio(release: RecordRelease, spec: AttentionSpec, inputs: AttentionInputs) -> None:
    """The ratio form's bound needs n public keys, every one seen by every row."""
    if inputs.key.shape[1] != release.memory_length:
        raise ArgumentError(
            "key",
            inputs.key.shape,
            f"release.memory_length is {release.memory_length}",
            'Pass that many keys, or use form="sum", which needs no public number.',
        )
    hiding = {
        "mask": inputs.mask,
        "query_seq_lengths": inputs.query_lengths,
        "key_value_seq_lengths": inputs.key_lengths,
        "is_causal": spec.is_causal or None,
        "local_window_size": spec.local_window,
    }
    for name, value in hiding.items():
        if value is not None:
            raise ArgumentError(
                name,
                getattr(value, "shape", value),
                "hides keys, and the ratio form's bound counts every one",
                'Leave it out, or use form="sum".',
            )
    smallest = float(jnp.finfo(inputs.value.dtype).tiny)
    if math.exp(-2.0 * release.logit_bound) < smallest:
        raise ArgumentError(
            "release.logit_bound",
            release.logit_bound,
            f"exp(-2 B) is below the smallest normal {inputs.value.dtype}",
            'Use a smaller bound, a wider dtype or form="sum".',
        )


def noise_key(release: ExampleRelease | RecordRelease, key: object) -> None:
    """Refuses all but one noise key of the release's generator. Errors: ArgumentError."""
    require_key("noise_key", key, release.record().generator)
    shape = getattr(key, "shape", ())
    if shape != ():
        raise ArgumentError(
            "noise_key",
            f"keys of shape {shape}",
            "more than one key",
            "Pass one key a call; under vmap or scan map the call over the keys.",
        )


def use(name: str, value: object) -> int | UInt32[Array, ""]:
    """One 32-bit number that tells uses of a key apart. Errors: ArgumentError."""
    number = word(name, value)
    if jnp.shape(number) != ():
        raise ArgumentError(
            name, jnp.shape(number), "not a scalar", "Pass one number a call: each use is charged."
        )
    return number
