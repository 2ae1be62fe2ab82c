"""The kernels lower for Ampere and Ada on a machine without a GPU, and say what they cannot."""

import functools
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dpfa_jax.attention import core
from dpfa_jax.core import UnsupportedBackendError
from dpfa_jax.kernels import dispatch
from dpfa_jax.kernels.base import (
    AttentionInputs,
    AttentionSpec,
    ExampleReadout,
    MemoryReadout,
    NoiseInputs,
)
from dpfa_jax.kernels.triton import backend

BACKEND = backend.TritonBackend()
EXAMPLE = ExampleReadout(0.5, (1.0, 1.0), (0.125, 0.125))
MEMORY = MemoryReadout("sum", 1.0, 1.0, 1.0, 0.1, (1.0, 1.0), (0.125, 0.125))
EVERYTHING = {"is_causal": True, "local_window": (9, 3), "logits_soft_cap": 5.0}


def shapes(rows=100, keys=93, head_size=64, dtype=jnp.bfloat16, **more):
    struct = jax.ShapeDtypeStruct
    kv = struct((2, keys, 1, head_size), dtype)
    return AttentionInputs(struct((2, rows, 2, head_size), dtype), kv, kv, **more)


def noise_shapes():
    struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.uint32)
    return NoiseInputs(struct((2, 2)), struct((2,)), struct((2,)))


def lower(function, *arguments, kind="NVIDIA A100", cores=108):
    device = AbstractDevice(kind, cores, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def loss(spec, inputs, arrays):
    query, key, value, bias = arrays
    inputs = inputs._replace(query=query, key=key, value=value, bias=bias)
    return core.attend(BACKEND, spec, inputs)[0].astype(jnp.float32).sum()


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (jnp.bfloat16, 128),
        *(
            pytest.param(dtype, size, marks=pytest.mark.slow)
            for dtype in (jnp.bfloat16, jnp.float16, jnp.float32)
            for size in (16, 64, 128, 256)
            if (dtype, size) != (jnp.bfloat16, 128)
        ),
    ],
)
def test_every_kernel_lowers(dtype, size):
    """Forward, three gradients with every option at once, both private readouts."""
    struct = jax.ShapeDtypeStruct
    inputs = shapes(
        head_size=size - 3, dtype=dtype, mask=struct((1, 2, 100, 93), jnp.bool_),
        bias=struct((1, 2, 1, 93), jnp.float32), query_lengths=struct((2,), jnp.int32),
        key_lengths=struct((2,), jnp.int32),
    )  # fmt: skip

    def everything(inputs, noise):
        gradient = jax.grad(functools.partial(loss, AttentionSpec(0.1, **EVERYTHING), inputs))
        released = [
            core.attend(BACKEND, AttentionSpec(0.1, readout=readout), inputs._replace(noise=noise))[
                0
            ]
            for readout in (EXAMPLE, MEMORY)
        ]
        return gradient(inputs[:4]), released

    text = lower(everything, inputs, noise_shapes())
    for kernel in ("forward", "backward_queries", "backward_keys", "backward_bias", "memory"):
        assert f"dpfa_triton_{kernel}" in text
    assert "atomic" not in text and "callback" not in text


@pytest.mark.slow
def test_vmap_of_gradient_and_ada_lower():
    """A grid of four axes, on compute capability 8.9."""
    inputs = shapes(rows=64, keys=64)
    gradient = jax.grad(functools.partial(loss, AttentionSpec(0.1), inputs))
    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), (*inputs[:3], None)
    )
    assert "dpfa_triton_backward_keys" in lower(
        jax.vmap(gradient), stacked, kind="NVIDIA L4", cores=58
    )


def test_shard_map_of_gradient_lowers():
    """The mesh axes over which the inputs vary come back on the gradients."""
    device = AbstractDevice("NVIDIA A100", 108, "gpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    split = PartitionSpec("data")
    inputs = shapes(rows=64, keys=64)

    def gradient(query, key, value):
        run = functools.partial(loss, AttentionSpec(0.1), AttentionInputs(query, key, value))
        return jax.grad(run)((query, key, value, None))[0]

    with jax.sharding.use_abstract_mesh(mesh):
        sharded = jax.shard_map(gradient, in_specs=(split,) * 3, out_specs=split)
        traced = jax.jit(sharded).trace(*inputs[:3])
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "dpfa_triton_backward_queries" in text


@pytest.mark.parametrize("key_heads", [1, 4])
def test_explicit_axes_keep_their_pieces(key_heads):
    """V10: where types name the sharding, each kernel gets its piece of batch and heads."""
    device = AbstractDevice("NVIDIA A100", 108, "gpu")
    kinds = (AxisType.Explicit,) * 2
    mesh = AbstractMesh((2, 4), ("batch", "heads"), kinds, abstract_device=device)
    split = PartitionSpec("batch", None, "heads")
    own = split if key_heads > 1 else PartitionSpec("batch")

    def struct(heads, place):
        sharding = NamedSharding(mesh, place)
        return jax.ShapeDtypeStruct((4, 64, heads, 64), jnp.bfloat16, sharding=sharding)

    def gradients(query, key, value):
        run = functools.partial(loss, AttentionSpec(0.1), AttentionInputs(query, key, value))
        return jax.grad(run)((query, key, value, None))[:3]

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(gradients).trace(struct(8, split), *(struct(key_heads, own),) * 2)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "all_gather" not in text
    # The sum over the pieces of one key's query heads is all that passes between devices.
    assert ("all_reduce" in text) == (key_heads == 1)
    launches = [line for line in text.splitlines() if "dpfa_triton_backward_queries" in line]
    assert launches
    assert all("tensor<2x64x2x64xbf16>" in line for line in launches)
    assert jax.tree.leaves(traced.out_info)[0].sharding.spec[:3] == tuple(split)


@pytest.mark.parametrize("readout", [EXAMPLE, MEMORY])
def test_private_program(readout):
    """V24: no callback, no second draw of noise, nothing but the answer among its results."""
    inputs = shapes(rows=64, keys=64, noise=noise_shapes())

    def release(inputs):
        return core.attend(BACKEND, AttentionSpec(0.1, readout=readout), inputs)[0]

    text = lower(release, inputs)
    assert "callback" not in text
    assert "stablehlo.xor" not in text  # of threefry, which would be a second draw
    (main,) = (line for line in text.splitlines() if "@main" in line)
    assert main.split("->")[-1].count("tensor<") == 1
    # Beside the answer a kernel writes maximum and sum of each row, which stay inside.
    (launch,) = (line for line in text.splitlines() if "dpfa_triton_" in line)
    wide = "tensor<2x64x2x64xbf16>"
    made = launch.split("->")[-1]
    assert made.count(wide) == 1 and made.count("tensor<") == (3 if readout is EXAMPLE else 1)

    # Negative control: with residuals the un-noised output is a kernel's result, and is seen.
    if readout is EXAMPLE:
        spec = AttentionSpec(0.1, readout=readout)
        text = lower(lambda x: BACKEND.forward(spec, x).unclipped, inputs)
        (launch,) = (line for line in text.splitlines() if "dpfa_triton_" in line)
        assert launch.split("->")[-1].count("tensor<") == 4


def test_the_warning_of_the_end_of_pallas_triton_is_silent():
    """One place silences it; without that place it is an error here (negative control)."""
    inputs = shapes(rows=16, keys=16, head_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lower(
            lambda *x: BACKEND.forward(AttentionSpec(1.0), AttentionInputs(*x)).output, *inputs[:3]
        )
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "filterwarnings", lambda *_: None)
        warnings.simplefilter("error")
        with pytest.raises(DeprecationWarning, match="Triton"):
            lower(lambda *x: BACKEND.forward(AttentionSpec(2.0), AttentionInputs(*x)), *inputs[:3])


@pytest.mark.parametrize(
    ("spec", "inputs", "words"),
    [
        (AttentionSpec(1.0), shapes(dtype=jnp.float64), "bfloat16, float16 or float32"),
        (AttentionSpec(1.0), shapes(head_size=264), "head size 264"),
        (AttentionSpec(1.0), shapes(keys=0), "empty"),
        (AttentionSpec(1.0, readout=MEMORY.__class__(**{**MEMORY.__dict__, "form": "ratio"})),
         shapes(), "ratio form"),
    ],
)  # fmt: skip
def test_cannot_says_why(spec, inputs, words, monkeypatch):
    """V23: what is not served is named, and dispatch goes on to the next backend."""
    monkeypatch.setattr(backend, "_device_reason", lambda: None)
    assert words in BACKEND.cannot(spec, inputs, "gpu")
    for readout in (EXAMPLE, MEMORY):
        assert BACKEND.cannot(AttentionSpec(1.0, readout=readout), shapes(), "gpu") is None


class Device:
    device_kind = "a GPU"

    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("capability", "serves"),
    [("7.5", False), ("8.0", True), ("8.9", True), ("10.0", True), ("gfx942", False)],
)
def test_capability(capability, serves, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda platform: [Device(capability)])
    reason = backend._device_reason.__wrapped__()
    assert (reason is None) == serves
    assert serves or capability in reason


def test_on_a_cpu_it_is_passed_over():
    assert "cpu" in BACKEND.cannot(AttentionSpec(1.0), shapes(), "cpu")
    if jax.default_backend() == "cpu":
        x = jnp.ones((1, 2, 1, 4))
        assert dispatch.choose(AttentionSpec(1.0), AttentionInputs(x, x, x)).name == "blocked"
        assert "GPU" in BACKEND.cannot(AttentionSpec(1.0), shapes(), "gpu")


def test_a_grid_that_cuda_does_not_take_is_refused(monkeypatch):
    """V23: by dispatch where shapes show it, else by name once mapped axes have joined."""
    monkeypatch.setattr(backend, "_device_reason", lambda: None)
    struct = jax.ShapeDtypeStruct
    inputs = shapes(rows=8, keys=8)
    biased = inputs._replace(bias=struct((2, 40000, 8, 8), jnp.float32))
    assert "65535" in BACKEND.cannot(AttentionSpec(1.0), biased, "gpu")
    assert BACKEND.cannot(AttentionSpec(1.0), inputs, "gpu") is None

    def run(*arrays):
        return BACKEND.forward(AttentionSpec(1.0), AttentionInputs(*arrays)).output

    stacked = [struct((70000, *x.shape), x.dtype) for x in inputs[:3]]
    with pytest.raises(UnsupportedBackendError, match="vmapped"):
        jax.eval_shape(jax.vmap(run), *stacked)
    jax.eval_shape(jax.vmap(run), *(struct((3, *x.shape), x.dtype) for x in inputs[:3]))


@pytest.mark.slow
def test_checkpoint_and_maps_of_the_gradient_lower():
    """`jax.checkpoint` runs the forward kernel again; maps of maps are folded into the batch."""
    inputs = shapes(rows=64, keys=64)
    run = jax.checkpoint(functools.partial(loss, AttentionSpec(0.1), inputs))
    gradient = jax.grad(lambda arrays: jnp.sin(run(arrays)))
    arrays = (*inputs[:3], None)
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, 5, *x.shape), x.dtype), arrays)
    assert "dpfa_triton_backward_keys" in lower(jax.vmap(jax.vmap(gradient)), stacked)
