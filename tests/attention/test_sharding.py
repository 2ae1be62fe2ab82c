"""V10 on eight devices: the same numbers, and no gather, under jit and under shard_map."""

import pytest
from helpers import forced_devices

SETUP = """
import contextlib, dataclasses
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dpfa_jax.attention import dot_product_attention, dp_attention
from dpfa_jax.core import ArgumentError, KeyReuseError
from dpfa_jax.noise import insecure_test_key, new_noise_key
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
"""

JIT = """
for f, extra in ((plain, ()), (private, (key,))):
    compiled = jax.jit(f).lower(*arrays, *extra).compile()
    assert "all-gather" not in compiled.as_text(), f
    np.testing.assert_allclose(compiled(*arrays, *extra), jax.jit(f)(*x, *extra), atol=1e-6)

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
calls = ((plain, (x,), ()), (plain, (one_head,), ()), (memory, (x, silent), (key,)),
         (whole_example, (x, silent), (key,)), (private, (x, silent), (key,)))
steps = {memory: max(records.grids), whole_example: max(release.grids)}
steps[private] = steps[whole_example]
from helpers import several_devices
with BLOCKS:
    for f, given, extra in calls:
        placed = [[several_devices.split(explicit, a) for a in whole] for whole in given]
        compiled = jax.jit(f).lower(*placed[0], *extra).compile()
        assert "all-gather" not in compiled.as_text(), f
        for whole, pieces in zip(given, placed):
            found, expected = compiled(*pieces, *extra), jax.jit(f)(*whole, *extra)
            close = 0 if whole is silent else steps.get(f, 1e-6)
            for mine, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
                np.testing.assert_allclose(mine, theirs, atol=close, rtol=0)
print("passed")
"""

SHARD_MAP = """
def shard(q, k, v, key, **options):
    options = {"batch_start": "batch", "head_start": "heads", "release": release, **options}
    return dp_attention(q, k, v, noise_key=key, **options)

def run(body, key=key, **options):
    specs = dict(mesh=mesh, in_specs=(spec, spec, spec, P()), out_specs=spec, **options)
    return jax.jit(jax.shard_map(body, **specs))(*arrays, key)

index = jax.lax.axis_index
for check in (True, False):
    np.testing.assert_array_equal(run(shard, check_vma=check), jax.jit(private)(*x, key))
    wrong = {
        "none": dict(batch_start=None),
        "one axis": dict(head_start=0),
        "none cut": dict(batch_start=0, head_start=0),
        "constant": lambda: dict(batch_start=jnp.int32(0)),
        "nothing": lambda: dict(batch_start=0 * index("batch")),
        "overlap": lambda: dict(batch_start=index("batch") // 2),
        "right, but who can tell": lambda: dict(batch_start=index("batch")),
    }
    for name, starts in wrong.items():
        try:
            run(lambda *a: shard(*a, **(starts() if callable(starts) else starts)), check_vma=check)
        except KeyReuseError:
            continue
        raise AssertionError((name, check))

secret = dataclasses.replace(release, insecure_test_noise=False)

def twice(q, k, v, key):  # a name is no number: the second is seen to draw the same
    return shard(q, k, v, key, release=secret) - shard(q, k, 2 * v, key, release=secret)

try:
    run(twice, new_noise_key())
except KeyReuseError:
    print("refused")

# Both axes along the batch, the outermost first; and whole on all shards of one.
for starts in (("heads", "batch"), ("batch", "heads"), "batch"):
    both = P(starts)
    flat = [jnp.concatenate([a, a + 1]) for a in x]
    found = jax.jit(jax.shard_map(
        lambda *a: shard(*a, batch_start=starts, head_start=0),
        mesh=mesh, in_specs=(both, both, both, P()), out_specs=both,
    ))(*flat, key)
    np.testing.assert_array_equal(found, jax.jit(private)(*flat, key))

for axis, starts in (
    ("head_start", dict(head_start="heads")),  # the same data on each: two answers
    ("batch_start", dict(batch_start="model", head_start=0)),
    ("head_start", dict(batch_start=("batch", "heads"), head_start=("heads",))),  # 4 heads of 2
):
    cut = P("batch") if "heads" not in starts.get("batch_start", ()) else P(("batch", "heads"))
    flat = [jnp.concatenate([a, a + 1]) for a in x]
    try:
        jax.shard_map(
            lambda *a: shard(*a, **starts), mesh=mesh, in_specs=(cut, cut, cut, P()), out_specs=cut
        )(*flat, key)
    except ArgumentError as error:
        assert error.parameter == axis, error
        print("refused")
try:
    shard(*x, key)
except ArgumentError:
    print("refused")
"""


@pytest.mark.parametrize(
    "blocks",
    [
        "several_devices.small_blocks()",
        # One block has the mesh beside the types in the quick suite.
        pytest.param("contextlib.nullcontext()", marks=pytest.mark.slow),
    ],
)
def test_no_gather_under_jit(blocks):
    """Over batch and heads, with the mesh beside the types and in them."""
    program = SETUP + JIT.replace("BLOCKS", blocks)
    assert forced_devices.printed(8, "-c", program) == "passed"


def test_named_axes_under_shard_map():
    """The same bits by the names of the axes; all else is refused."""
    assert forced_devices.printed(8, "-c", SETUP + SHARD_MAP).split() == ["refused"] * 5
