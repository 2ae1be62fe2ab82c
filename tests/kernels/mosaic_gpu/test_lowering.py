"""Lowering for CUDA on a CPU: layouts, transforms and shared memory, without running."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, PartitionSpec

from dpfa_jax.attention import core
from dpfa_jax.core import ArgumentError
from dpfa_jax.kernels.base import (
    AttentionInputs,
    AttentionSpec,
    ExampleReadout,
    MemoryReadout,
    NoiseInputs,
    Plain,
)
from dpfa_jax.kernels.mosaic_gpu import backend, gradient_chunks
from dpfa_jax.kernels.mosaic_gpu.tiles import LONG_BACKWARD

BACKEND = backend.MosaicGpuBackend()
# Where the noise of an example release is made.
PLACES = {is_after: dataclasses.replace(BACKEND, noise_pass=is_after) for is_after in (False, True)}
RELEASE = ExampleReadout(1.0, (0.5, 0.5), (2.0**-5, 2.0**-5))
MEMORY = MemoryReadout("sum", 1.0, 1.0, 1.0, 0.1, (1.0, 1.0), (0.1, 0.1))


def shapes(rows=100, keys=93, head_size=64, dtype=jnp.bfloat16, **more):
    struct = jax.ShapeDtypeStruct
    kv = struct((2, keys, 1, head_size), dtype)
    return AttentionInputs(struct((2, rows, 2, head_size), dtype), kv, kv, **more)


def noise_shapes():
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.uint32)
    return NoiseInputs(struct((2, 2)), struct((2,)), struct((2,)))


def lower(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def loss(spec, query, inputs, backend=BACKEND):
    inputs = inputs._replace(query=query)
    return core.attend(backend, spec, inputs)[0].astype(jnp.float32).sum()


@pytest.mark.parametrize(
    ("spec", "inputs"),
    [
        (
            AttentionSpec(0.1, is_causal=True, local_window=(9, 3), logits_soft_cap=5.0),
            shapes(
                head_size=72,
                key_lengths=jax.ShapeDtypeStruct((2,), jnp.int32),
                query_lengths=jax.ShapeDtypeStruct((2,), jnp.int32),
            ),
        ),
        pytest.param(
            AttentionSpec(0.1, readout=RELEASE),
            shapes(head_size=128, noise=noise_shapes()),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            AttentionSpec(0.1, largest_logit=5.0, readout=RELEASE),
            shapes(head_size=128, noise=noise_shapes()),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gradient_lowers(spec, inputs):
    gradient = jax.grad(functools.partial(loss, backend=PLACES[False]), argnums=1)
    text = lower(functools.partial(gradient, spec), inputs.query, inputs)
    for kernel in ("forward", "backward_kv", "backward_q"):
        assert f"dpfa_attention_{kernel}" in text


def results_of_kernels(text):
    """How many arrays each kernel writes."""
    kernels = (line for line in text.splitlines() if "custom_call @mosaic_gpu" in line)
    return [line.split("->")[-1].count("tensor<") for line in kernels]


def test_gradient_after_a_pass_lowers():
    """The answer before the pass is what the gradient needs: nothing else is stored."""
    spec, inputs = AttentionSpec(0.1, readout=RELEASE), shapes(noise=noise_shapes())
    gradient = jax.grad(functools.partial(loss, backend=PLACES[True]), argnums=1)
    text = lower(functools.partial(gradient, spec), inputs.query, inputs)
    for kernel in ("forward", "backward_kv", "backward_q"):
        assert f"dpfa_attention_{kernel}" in text
    first = results_of_kernels(text)[:2]
    assert first == [2, 1]  # answer and log-sum-exp, release


@pytest.mark.parametrize(
    ("head_size", "rows", "keys"),
    [(128, LONG_BACKWARD, LONG_BACKWARD), pytest.param(256, 104, 93, marks=pytest.mark.slow)],
)
def test_sums_are_not_filled_before_the_cotangent_is_there(head_size, rows, keys, monkeypatch):
    """Constants would be, for all layers of a model at once."""
    monkeypatch.setattr(gradient_chunks, "WAVES", 0)  # several launches, which share their sums
    monkeypatch.setattr(gradient_chunks, "LOGIT_GRADIENT_BYTES", 1)
    inputs = shapes(rows=rows, keys=keys, head_size=head_size)
    spec = AttentionSpec(0.1)
    several = dataclasses.replace(BACKEND, name="mosaic_gpu, several launches")
    gradient = jax.grad(functools.partial(loss, backend=several), argnums=1)
    text = lower(functools.partial(gradient, spec), inputs.query, inputs)
    like = rf"tensor<2x{rows}x2x{head_size}xbf16>"
    (barrier,) = re.findall(rf"(%\d+):2 = stablehlo.optimization_barrier \S+ \S+ : {like}", text)
    filled = re.findall(r"broadcast_in_dim (\S+), .* -> tensor<2x\d+x2x\d+xf32>", text)
    assert f"{barrier}#1" in filled


def kernels_behind_results(text):
    """How many arrays each kernel writes that a result of `main` is made from.

    Nothing is followed back through a kernel that takes key words: what it makes is released.
    """
    begin, *lines = text[text.index("@main") :].splitlines()
    main = lines[: lines.index("  }")]
    (words,) = re.findall(r"(%arg\d+): tensor<2x2xui32>", begin)
    made = {}
    for line in main:
        if found := re.match(r"\s*(%\w+)(?::\d+)? = (.*?)(?: \{|$)", line):
            types = line.split("->")[-1].count("tensor<")
            made[found[1]] = (re.findall(r"%\w+", found[2]), "@mosaic_gpu" in line, types)
    todo, kernels = re.findall(r"%\w+", main[-1]), []
    while todo:
        operands, is_kernel, types = made.get(todo.pop(), ((), False, 0))
        if is_kernel:
            kernels.append(types)
        if not (is_kernel and words in operands):
            todo += operands
    return kernels


@pytest.mark.parametrize("is_after", PLACES)
def test_private_program(is_after):
    """V24: no callback, no noise but the kernel's, nothing but the answer among its results."""
    spec = AttentionSpec(0.1, readout=RELEASE)
    inputs = shapes(head_size=128, noise=noise_shapes())

    def release(inputs):
        return PLACES[is_after].forward(spec, inputs, residuals=False).output

    text = lower(release, inputs)
    assert "callback" not in text
    assert "stablehlo.xor" not in text  # of threefry, which would be a second draw
    # The answer and the log-sum-exp, which stays inside and which XLA drops; the released one.
    assert results_of_kernels(text) == ([2, 1] if is_after else [2])
    (main,) = (line for line in text.splitlines() if "@main" in line)
    assert main.split("->")[-1].count("tensor<") == 1
    assert kernels_behind_results(text) == [1 if is_after else 2]

    # Negative control: what is not released is seen to come from the kernel before the pass.
    bare = lower(lambda x: PLACES[is_after].forward(spec, x).unclipped, inputs)
    assert kernels_behind_results(bare) == [2 if is_after else 3]


def primitives_on(shape, jaxpr):
    """Names of the operations that take or make an array of `shape`, inner programs included."""
    names = set()
    for equation in jaxpr.eqns:
        if any(
            getattr(x.aval, "shape", None) == shape for x in (*equation.invars, *equation.outvars)
        ):
            names.add(equation.primitive.name)
        for inner in jaxprs_in_params(equation.params):
            names |= primitives_on(shape, inner)
    return names


@pytest.mark.parametrize("readout", [Plain(), RELEASE])
def test_a_stated_bound_leaves_no_maximum_and_no_clamp(readout):
    """Nothing compares logits, 64 rows by 128 keys a step, where their range is said."""
    noise = None if readout == Plain() else noise_shapes()
    inputs = shapes(rows=128, keys=256, head_size=64, noise=noise)

    def comparisons(bound):
        spec = AttentionSpec(0.1, largest_logit=bound, readout=readout)
        found = jax.make_jaxpr(functools.partial(PLACES[False].forward, spec))(inputs)
        names = primitives_on((64, 128), found.jaxpr)
        assert "exp2" in names
        return names & {"max", "min", "clamp", "reduce_max", "select_n", "lt", "gt"}

    assert comparisons(5.0) == set()
    assert comparisons(None) == comparisons(70.0) == {"reduce_max"}


def test_shard_map_of_gradient_lowers():
    """The mesh axes over which the inputs vary come back on the gradients."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    split = PartitionSpec("data")
    gradient = jax.grad(functools.partial(loss, AttentionSpec(0.1)))
    sharded = jax.shard_map(gradient, mesh=mesh, in_specs=(split, split), out_specs=split)
    inputs = shapes(rows=64, keys=64)
    lower(sharded, inputs.query, inputs)


@pytest.mark.parametrize(
    ("spec", "inputs", "words"),
    [
        (AttentionSpec(1.0), shapes(dtype=jnp.float32), "bfloat16 or float16"),
        (AttentionSpec(0.0), shapes(), "scale"),
        (AttentionSpec(1.0), shapes(head_size=264), "head size 264"),
        (AttentionSpec(1.0), shapes(keys=0), "empty"),
        (AttentionSpec(1.0, readout=dataclasses.replace(MEMORY, form="ratio")), shapes(), "ratio"),
        (
            AttentionSpec(1.0, readout=ExampleReadout(1.0, (1.0,), (0.1,), clip="example")),
            shapes(),
            "clip",
        ),
    ],
)
def test_cannot_says_why(spec, inputs, words, monkeypatch):
    """V23: what is not served is named, and dispatch goes on to the next backend."""
    module = "dpfa_jax.kernels.mosaic_gpu.device.reason_without_hopper"
    monkeypatch.setattr(module, lambda: None)
    assert words in BACKEND.cannot(spec, inputs, "gpu")
    assert BACKEND.cannot(AttentionSpec(1.0), shapes(), "gpu") is None
    released = AttentionSpec(1.0, readout=RELEASE)
    assert BACKEND.cannot(released, shapes(), "gpu") is None


def test_cannot_without_a_hopper_gpu():
    assert "cpu" in BACKEND.cannot(AttentionSpec(1.0), shapes(), "cpu")
    if jax.default_backend() == "cpu":
        assert "GPU" in BACKEND.cannot(AttentionSpec(1.0), shapes(), "gpu")


def test_any_batch_is_served(monkeypatch):
    """No grid has the batch on an axis that CUDA limits to 65535, mapped or not."""
    module = "dpfa_jax.kernels.mosaic_gpu.device.reason_without_hopper"
    monkeypatch.setattr(module, lambda: None)
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    many = AttentionInputs(*(struct((70000, 8, 1, 256)) for _ in range(3)))
    assert BACKEND.cannot(AttentionSpec(1.0), many, "gpu") is None
    # The wide kernels put the rows of a chunk there where they share a mask.
    of = functools.partial(gradient_chunks.chunks_of, rows=8, group=1, block=64, processors=132)
    for heads in (1, 3):
        chunks = of(70000, heads, 1, is_even=True)
        assert chunks.batch * chunks.heads * chunks.key_blocks <= 65535
        assert chunks.batch * chunks.counts[0] == 70000 and chunks.heads * chunks.counts[1] == heads


@pytest.mark.parametrize("readout", [RELEASE, dataclasses.replace(MEMORY, grids=(0.125,) * 2)])
def test_noise_inputs_are_due(readout):
    """No noise, or that of other heads, is refused and not answered without."""
    spec = AttentionSpec(0.1, readout=readout)
    with pytest.raises(ArgumentError, match="noise"):
        jax.eval_shape(functools.partial(BACKEND.forward, spec), shapes())
    fewer = dataclasses.replace(readout, noise_stddevs=(0.5,), grids=(0.125,))
    spec = AttentionSpec(0.1, readout=fewer)
    with pytest.raises(ArgumentError, match="2 heads"):
        jax.eval_shape(functools.partial(BACKEND.forward, spec), shapes(noise=noise_shapes()))


@pytest.mark.parametrize(
    "policy",
    [pytest.param(None, marks=pytest.mark.slow), jax.checkpoint_policies.nothing_saveable],
)
def test_checkpoint_and_maps_of_the_gradient_lower(policy):
    """`jax.checkpoint` runs the forward kernel again; maps of maps are folded into the batch."""
    inputs = shapes(rows=64, keys=64)
    run = functools.partial(loss, AttentionSpec(0.1))
    again = run if policy is None else jax.checkpoint(run, policy=policy)

    def through(query, inputs):  # what is computed after is what needs the output again
        return jnp.sin(again(query, inputs))

    gradient = jax.grad(through)
    text = lower(gradient, inputs.query, inputs)
    count = len(results_of_kernels(text))
    assert count == (3 if policy is None else 4)  # forward, again, and two gradients
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, 5, *x.shape), x.dtype), inputs)
    mapped = jax.vmap(jax.vmap(gradient))
    text = lower(mapped, stacked.query, stacked)
    assert len(results_of_kernels(text)) == count
    assert "tensor<30x64x2x64xbf16>" in text
