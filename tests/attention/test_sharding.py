"""V10 on eight devices: the same numbers, and no gather, under jit and under shard_map."""

import os
import subprocess
import sys

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dpfa_jax.attention import dot_product_attention, dp_attention
from dpfa_jax.core import KeyReuseError
from dpfa_jax.noise import insecure_test_key
from dpfa_jax.release import ExampleRelease

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
