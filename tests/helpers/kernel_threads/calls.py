"""The kernels of a call, as it hands them to Pallas."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
from helpers.kernel_threads.recording import Launch
from jax.experimental.pallas import mosaic_gpu as plgpu

from dpfa_jax.kernels.base import (
    AttentionInputs,
    AttentionSpec,
    ExampleReadout,
    MemoryReadout,
    NoiseInputs,
)
from dpfa_jax.kernels.mosaic_gpu import (
    backward,
    bias_gradient,
    forward,
    memory,
    memory_call,
    pairs,
    tiles,
)
from dpfa_jax.kernels.mosaic_gpu.backward_steps import BackwardArrays
from dpfa_jax.kernels.mosaic_gpu.tiles import BackwardTiles, ForwardTiles, FusedTiles, WideTiles

# Short name, operands and outputs of each kernel.
KERNELS = {
    "dpfa_attention_forward": ("forward", forward.ForwardArrays, ("output", "lse", "unclipped")),
    "dpfa_memory_forward": ("memory", memory.MemoryArrays, ("output", "numerators", "normalisers")),
    "dpfa_attention_backward_kv": ("kv", BackwardArrays, ("dk", "dv")),
    "dpfa_attention_backward_q": ("q", BackwardArrays, ("dq",)),
    "dpfa_attention_backward": ("fused", BackwardArrays, ("dk", "dv")),
    "dpfa_attention_backward_wide_kv": ("wide_kv", BackwardArrays, ("logit_gradients", "dk", "dv")),
    "dpfa_attention_backward_wide_q": ("wide_q", BackwardArrays, ("dq",)),
    "dpfa_attention_backward_bias": ("bias", bias_gradient.BiasArrays, ("bias",)),
}


def call_of(case):
    """(spec, function, its arguments' shapes)."""

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def lengths(given):
        return None if given is None else struct(case.batch, dtype=jnp.int32)

    batch, heads, size, choice = case.batch, case.heads, case.size, case.choice
    padded = -(-size // 64) * 64
    spec = AttentionSpec(0.2, is_causal=case.is_causal, local_window=case.window)
    query = struct(batch, case.rows, heads, size)
    key = struct(batch, case.keys, case.key_heads, size)
    per_head = struct(batch, heads, dtype=jnp.float32)
    words = struct(batch, dtype=jnp.uint32)
    dtype = (jnp.bfloat16, jnp.float32)[choice % 2]
    given = {
        "mask": case.mask and struct(*case.mask, dtype=bool),
        "bias": case.bias and struct(*case.bias, dtype=dtype),
    }
    pair_bytes = pairs.bytes_per_column(**given)
    if case.kind.startswith("memory"):
        stddevs = (4.0,) * heads
        spec = dataclasses.replace(
            spec, readout=MemoryReadout("sum", 1.0, 1.0, 0.75, 1.0, stddevs, stddevs)
        )
        noise = NoiseInputs(struct(batch, 2, dtype=jnp.uint32), words, words)
        inputs = AttentionInputs(
            query, key, key, query_lengths=lengths(case.query_lengths), noise=noise
        )
        answer = functools.partial(memory_call.answer, spec, keep_sums=choice % 2 == 0)
        return spec, answer, (inputs,)
    if case.kind.startswith("forward"):
        noise = {}
        if case.kind == "forward, noise":
            readout = ExampleReadout(0.3, (0.5,) * heads, (2.0**-5,) * heads)
            spec = dataclasses.replace(spec, readout=readout)
            noise = {
                "key_words": struct(batch, 2, dtype=jnp.uint32),
                "stddevs": per_head, "grids": per_head,
                "batch_index": words, "head_start": words, "ones": words,
            }  # fmt: skip
        is_public = choice % 4 == 1
        tile = tiles.forward_tiles(
            spec, padded, (case.keys, 4096)[choice % 3 == 0],
            has_public_maximum=is_public, pair_bytes=pair_bytes, noise_pass=False,
        )  # fmt: skip
        if case.kind == "forward, tiles":
            tile = ForwardTiles(
                block_kv=(64, 128, 256)[choice % 3], stages=2 + choice // 3 % 2,
                ahead=choice % 4 < 3, overlaps=choice % 2 == 0,
            )  # fmt: skip
        given |= noise | {
            "query_lengths": lengths(case.query_lengths),
            "key_lengths": lengths(case.key_lengths),
        }
        arrays = forward.ForwardArrays(query, key, key, **given)
        run = functools.partial(
            forward.attention_forward, spec, tile=tile, has_public_maximum=is_public,
            keep_unclipped=choice % 2 == 0,
        )  # fmt: skip
        return spec, lambda arrays: run(arrays), (arrays,)
    row = struct(batch, heads, case.rows, dtype=jnp.float32)
    arrays = (query, key, key, query, row, row)
    if case.kind == "bias":
        given["key_lengths"] = lengths(case.key_lengths)
        run = functools.partial(bias_gradient.bias_gradient, spec)
        return spec, lambda arrays, given: run(*arrays, **given), (arrays, given)
    if case.kind.startswith("two"):
        tile = BackwardTiles(block_kv_dq=128 if padded == 64 and pair_bytes is None else 64)
    elif case.kind == "fused":
        tile = FusedTiles(heads=(1, 2, 3, 8, 32)[choice % 5])
        spec = dataclasses.replace(spec, deterministic=choice % 4 > 0)
    elif choice % 2:
        tile = WideTiles(cotangent_stages=1 + choice // 2 % 3, key_stages=2 + choice // 2 % 3)
    else:
        tile = tiles.backward_tiles(spec, padded, case.keys, pair_bytes=pair_bytes)

    def gradients(arrays, key_lengths, given):
        return backward.attention_backward(spec, *arrays, key_lengths, tile, **given)

    return spec, gradients, (arrays, lengths(case.key_lengths), given)


def launches_of(function, arguments):
    """The kernels of a call, in their order."""
    found, schedules = [], []

    def kernel(body, *, kernel_name, out_type, scratch_types, grid, grid_names, num_threads, **_):
        def call(*operands):
            name, fields, outputs = KERNELS[kernel_name]
            cells = dict(zip(body.__code__.co_freevars, body.__closure__, strict=True))
            present = cells["present"].cell_contents
            names = [x for x, there in zip(fields._fields, present, strict=True) if there]
            if len(operands) > len(names):
                names = ["schedule", *names]
            shapes = ([tuple(x.shape) for x in some] for some in (operands, out_type))
            # Where gradients are operands, the last outputs are not there.
            named = ([*zip(*x, strict=False)] for x in zip((names, outputs), shapes, strict=True))
            schedule = schedules[-1] if schedules else None
            launch = Launch(
                name, body, *named, scratch_types, grid, grid_names, num_threads, schedule
            )
            found.append(launch)
            return tuple(jnp.zeros(x.shape, x.dtype) for x in out_type)

        return call

    def constant(table):
        schedules.append(table)
        return jnp.asarray(table)

    with (
        mock.patch.object(plgpu, "kernel", kernel),
        mock.patch.object(forward, "constant", constant),
        mock.patch.object(backward, "constant", constant),
        mock.patch.object(memory, "constant", constant),
    ):
        jax.eval_shape(function, *arguments)
    return found
