"""V10 on eight devices: the same numbers, and no gather, under jit and under shard_map."""

import os
import subprocess
import sys

PROGRAM = """
import contextlib, dataclasses
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dpfa_jax.attention import dot_product_attention, dp_attention
from dpfa_jax.core import KeyReuseError
from dpfa_jax.noise import insecure_test_key
from dpfa_jax.release import ExampleRelease, RecordRelease

mesh = jax.make_mesh((4, 2), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 6, 2, 8)), jnp.float32)
spec = P("batch", None, "heads", None)
arrays = [jax.device_put(a, NamedSharding(mesh, spec)) for a in x]
release = ExampleRelease(1.0, 1.0, 6, 2, 8, insecure_test_noise=True)
key = insecure_test_key(0)

def plain(q, k, v):
    return jax.grad(lambda *a: jnp.sum(jnp.sin(dot_product_attention(*a, is_causal=True))))(q, k, v)

def private(q, k, v, key):
    return dp_attention(q, k, v, release=release, noise_key=key)

for f, extra in ((plain, ()), (private, (key,))):
    compiled = jax.jit(f).lower(*arrays, *extra).compile()
    assert "all-gather" not in compiled.as_text(), f
    np.testing.assert_allclose(compiled(*arrays, *extra), f(*x, *extra), atol=1e-6)

# JAX's default mesh names the sharding in types: one block and loops, query heads whose one key
# head is everywhere, a memory. Noise alone: the same bits.
explicit = jax.make_mesh((4, 2), ("batch", "heads"))
records = RecordRelease(1.0, 1.0, 1.0, 6, 2, 8, insecure_test_noise=True)

def memory(q, k, v, key):
    return dp_attention(q, k, v, release=records, noise_key=key)

whole_clip = dataclasses.replace(release, clip="example")

def whole_example(q, k, v, key):
    return dp_attention(q, k, v, release=whole_clip, noise_key=key)

one_head = [x[0], x[1][..., :1, :], x[2][..., :1, :]]
silent = [x[0], x[1], jnp.zeros_like(x[2])]
calls = ((plain, x, ()), (plain, one_head, ()), (memory, x, (key,)), (memory, silent, (key,)),
         (whole_example, x, (key,)), (private, silent, (key,)))
from helpers import several_devices
for block in (contextlib.nullcontext(), several_devices.small_blocks()):
    with block:
        for f, whole, extra in calls:
            expected = jax.jit(f)(*whole, *extra)
            placed = [several_devices.split(explicit, a) for a in whole]
            compiled = jax.jit(f).lower(*placed, *extra).compile()
            assert "all-gather" not in compiled.as_text(), f
            found = compiled(*placed, *extra)
            step = {memory: max(records.grids), whole_example: max(release.grids)}.get(f, 1e-6)
            close = 0 if whole is silent else step
            for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(mine, theirs, atol=close, rtol=0)

def shard(q, k, v, key):
    start = jax.lax.axis_index("batch")
    return dp_attention(q, k, v, release=release, noise_key=key, batch_start=start,
                        head_start=jax.lax.axis_index("heads"))

def careless(q, k, v, key):
    return dp_attention(q, k, v, release=release, noise_key=key)

specs = dict(mesh=mesh, in_specs=(spec, spec, spec, P()), out_specs=spec)
by_hand = jax.jit(jax.shard_map(shard, **specs))(*arrays, key)
np.testing.assert_array_equal(by_hand, private(*x, key))
whole_heads = ExampleRelease(1.0, 1.0, 6, 1, 8, insecure_test_noise=True)
release = whole_heads
try:
    jax.shard_map(careless, **specs)(*arrays, key)
except KeyReuseError:
    print("refused")
"""


def test_eight_devices():
    """No all-gather over batch and heads; explicit offsets give the same bits; none: refused."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "refused"
