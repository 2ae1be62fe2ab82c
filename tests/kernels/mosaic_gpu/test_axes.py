"""Mesh axes around a call may have any name: kernels do not ask them for their own index."""

import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from dpfa_jax.attention import core
from dpfa_jax.kernels.base import (
    AttentionInputs,
    AttentionSpec,
    ExampleReadout,
    MemoryReadout,
    NoiseInputs,
    Plain,
)
from dpfa_jax.kernels.mosaic_gpu import axes, backend, row_clip

READOUT = MemoryReadout("sum", 1.0, 1.0, 1.0, 1.0, (1.0,) * 2, (2.0**-4,) * 2)
EXAMPLE = ExampleReadout(1.0, (1.0,) * 2, (2.0**-4,) * 2)
CALLS = {
    "forward, two backward kernels": (64, Plain(), True),
    "fused backward": (64, Plain(), False),
    "wide backward": (256, Plain(), True),
    "memory": (64, READOUT, True),
    "example release": (256, EXAMPLE, True),
}
ROWS = "row clip"


def asks_the_mesh(case, names):
    """Whether a kernel inside shard_map asks for its device; `names`: of the mesh's axes."""
    size, readout, deterministic = CALLS.get(case, (64, Plain(), True))
    spec = AttentionSpec(0.1, readout=readout, deterministic=deterministic)
    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), names)
    arrays = [jax.ShapeDtypeStruct((2, 200, 2, size), jnp.bfloat16)] * 3

    def call(query, key, value):
        words = jnp.zeros((2, 2), jnp.uint32)
        noise = NoiseInputs(words, jnp.arange(2, dtype=jnp.uint32), jnp.zeros(2, jnp.uint32))
        inputs = AttentionInputs(query, key, value, noise=None if readout == Plain() else noise)
        return core.attend(backend.BACKEND, spec, inputs)[0]

    def gradients(*arrays):
        return jax.grad(lambda *x: call(*x).astype(jnp.float32).sum(), (0, 1, 2))(*arrays)

    def clip(query, key, value):
        return row_clip.clip_rows_stored(query.reshape(-1, size), 1.0).reshape(query.shape)

    run = clip if case == ROWS else gradients if readout == Plain() else call
    place = PartitionSpec(names[0])
    sharded = jax.shard_map(run, mesh=mesh, in_specs=place, out_specs=place)
    text = jax.jit(sharded).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @mosaic_gpu" in text
    assert ("dpfa_example_release" in text) == (readout == EXAMPLE)
    return "nvshmem_my_pe" in text


NAMES = [("batch", "heads"), ("rows", "keys"), ("program", "warpgroup")]


@pytest.mark.slow
@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("case", CALLS)
def test_a_mesh_axis_of_any_name_changes_no_kernel(case, names):
    """A mesh axis "batch" answered for the kernel's own: all programs did the same tile."""
    assert not asks_the_mesh(case, names)


def test_mesh_axes_called_batch_and_heads():
    """The names that users take, and as a negative control the kernel's own."""
    assert not asks_the_mesh(ROWS, NAMES[0])
    assert asks_the_mesh(ROWS, (axes.BLOCKS, "x"))


def test_every_grid_axis_has_a_name_of_its_own_kind():
    names = [x for name, x in vars(axes).items() if name.isupper()]
    assert len(set(names)) == len(names)
    assert all(name.startswith("dpfa_") for name in names)
    for file in sorted(Path(inspect.getfile(axes)).parent.glob("*.py")):
        assert not re.search(r'axis_(index|size)\("', file.read_text()), file
