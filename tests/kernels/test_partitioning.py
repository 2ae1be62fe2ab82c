"""V10 on eight devices, for what XLA cannot see into: the same numbers, and no gather under jit."""

import pytest
from helpers import forced_devices

PROGRAM = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec
from dpfa_jax.kernels.blocked import BACKEND
from dpfa_jax.kernels.partitioning import by_batch_and_heads, by_elements
from dpfa_jax.noise import attention_noise

spec = AttentionSpec(0.5, is_causal=True)

def forward(query, key, value, words, batch_index, head_index):
    outputs = BACKEND.forward(spec, AttentionInputs(query, key, value))
    noise = attention_noise(words, batch_index, head_index[:, 0], heads=query.shape[2],
                            row_start=0, rows=query.shape[1], columns=query.shape[3])
    return outputs.output, noise, jnp.swapaxes(outputs.lse, 1, 2)

def backward(query, key, value, cotangent):
    inputs = AttentionInputs(query, key, value)
    outputs = BACKEND.forward(spec, inputs)
    return BACKEND.backward(spec, inputs, outputs, cotangent)[:3]

def kernels(key_heads):
    wrap = functools.partial(by_batch_and_heads, key_heads=key_heads)
    return (
        wrap(forward, ["btnh", "bskh", "bskh", "bw", "b", "bn"], ["btnh", "btnh", "bnt"]),
        wrap(backward, ["btnh", "bskh", "bskh", "btnh"], ["btnh", "bskh", "bskh"]),
    )

rng = np.random.default_rng(0)

@jax.jit
def whole(arrays, more):
    return forward(*arrays[:3], *more), backward(*arrays)

def check(mesh, key_heads, heads_split, is_ambient, gathers):
    heads = P("batch", None, "heads")
    own = heads if heads_split else P("batch")
    draw = lambda n: jnp.asarray(rng.standard_normal((4, 6, n, 8)), jnp.float32)
    arrays = [draw(n) for n in (8, key_heads, key_heads, 8)]
    words = jnp.asarray(rng.integers(0, 2**32, (4, 2), dtype=np.uint32))
    index = jnp.arange(4, dtype=jnp.uint32)
    more = (words, index, jnp.arange(8, dtype=jnp.uint32)[None] + jnp.zeros((4, 1), jnp.uint32))
    specs = [heads, own, own, heads]
    split = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs)]
    wrapped = kernels(key_heads)
    def run(arrays, more):
        return wrapped[0](*arrays[:3], *more), wrapped[1](*arrays)
    expected = whole(arrays, more)
    if is_ambient:
        jax.set_mesh(mesh)
    compiled = jax.jit(run).lower(split, more).compile()
    found = compiled(split, more)
    text = compiled.as_text()
    assert ("all-gather" in text) == gathers, (mesh, key_heads)
    # The sum over the pieces of one key's query heads is all that passes between devices.
    assert ("all-reduce" in text) == (key_heads == 1), (mesh, key_heads)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6, rtol=2e-6)
    np.testing.assert_array_equal(found[0][1], expected[0][1])  # noise: bit for bit
    if not gathers:
        assert found[0][0].sharding.spec[2] == "heads"

def bias_gradient(query, key, value, cotangent, bias):
    inputs = AttentionInputs(query, key, value, bias)
    outputs = BACKEND.forward(spec, inputs)
    return (BACKEND.backward(spec, inputs, outputs, cotangent).bias,)

def check_bias(mesh, key_heads, shape):
    from dpfa_jax.kernels.pieces import in_pieces
    heads = P("batch", None, "heads")
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.float32)
    arrays = [draw(4, 6, n, 8) for n in (8, key_heads, key_heads, 8)] + [draw(*shape)]
    own = heads if key_heads > 1 else P("batch")
    specs = [heads, own, own, heads, P()]
    split = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs)]
    axes = ["btnh", "bskh", "bskh", "btnh", "pair"]
    run = in_pieces(bias_gradient, axes, ["pair"], key_heads)
    compiled = jax.jit(lambda *x: run(*x)[0]).lower(*split).compile()
    text = compiled.as_text()
    assert "all-gather" not in text, shape
    # A sum over pieces, exactly where the bias is broadcast along batch or heads.
    assert ("all-reduce" in text) == (1 in shape[:2]), shape
    expected, = bias_gradient(*arrays)
    np.testing.assert_allclose(compiled(*split), expected, atol=1e-5, rtol=1e-5)

def check_elements(mesh, place, is_ambient=False, is_automatic_inside=False):
    # The released mean of a leaf in pieces: the noise of its global elements, no gather.
    from dpfa_jax.kernels import parameter_noise
    from dpfa_jax.noise import counters, insecure_test_key
    key, shape = insecure_test_key(1), (8, 6, 4)
    kind = jax.random.key_impl(key)
    total = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    words = jax.random.key_data(key)
    def mean(total, words):
        leaf = jnp.full(1, 3, jnp.uint32)
        row = jnp.zeros(1, jnp.int32)
        numbers = jnp.asarray([1.5, 2.0**-6, 8.0])
        whole = (counters.bind_parameter(words, leaf[0])[None], row, numbers, words, leaf)
        of_piece = functools.partial(parameter_noise.of_piece, shape, kind)
        return by_elements(of_piece, 3, len(whole))(total, *whole)[0]
    expected = jax.jit(lambda x: parameter_noise.released_mean(
        x, key, 3, stddev=1.5, grid=2.0**-6, divisor=8.0, implementation="xla"))(total)
    split = jax.device_put(total, NamedSharding(mesh, place))
    if is_ambient:
        jax.set_mesh(mesh)
    if is_automatic_inside:  # as in a DP-SGD step: the mesh that is set is not that of the types
        mean = jax.sharding.auto_axes(mean, out_sharding=split.sharding)
    compiled = jax.jit(mean).lower(split, words).compile()
    assert "all-gather" not in compiled.as_text(), place
    found = compiled(split, words)
    assert found.sharding.is_equivalent_to(split.sharding, 3), place
    np.testing.assert_array_equal(found, expected)

def check_rows(mesh, place, gathers, is_ambient=False, is_automatic_inside=False):
    # Rows clipped where they lie; only the axis along a row is brought together.
    from dpfa_jax.clipping.rows import clip_rows_stored
    from dpfa_jax.kernels import row_clip
    from dpfa_jax.kernels.partitioning import by_rows
    x = jnp.asarray(rng.standard_normal((8, 6, 4, 4)), jnp.bfloat16)
    expected = jax.jit(lambda x: clip_rows_stored(x, 1.0))(x)
    split = jax.device_put(x, NamedSharding(mesh, place))
    if is_ambient:
        jax.set_mesh(mesh)
    clip = lambda x: by_rows(functools.partial(row_clip.of_piece, 1.0), 4)(x)[0]
    if is_automatic_inside:
        clip = jax.sharding.auto_axes(clip, out_sharding=split.sharding)
    compiled = jax.jit(clip).lower(split).compile()
    text = compiled.as_text()
    assert "all-reduce" not in text and ("all-gather" in text) == gathers, place
    found = compiled(split)
    assert gathers or found.sharding.is_equivalent_to(split.sharding, 4), place
    np.testing.assert_array_equal(found, expected)

def mesh_of(kind, shape=(2, 4)):
    return jax.make_mesh(shape, ("batch", "heads"), axis_types=(kind,) * 2)

auto = mesh_of(AxisType.Auto)
if sys.argv[1] == "quick":
    check(auto, 1, False, False, False)
else:
    for place in (P(), P("heads"), P("batch", None, "heads"), P(("batch", "heads"))):
        check_elements(auto, place)
    for place in (P(), P("heads"), P("batch", None, "heads"), P(None, "batch", ("heads",))):
        check_rows(auto, place, False)
    check_rows(auto, P("batch", None, None, "heads"), True)
    for shape in ((1, 8, 6, 6), (4, 1, 6, 6), (1, 1, 1, 6), (4, 8, 6, 1)):
        check_bias(auto, 4, shape)
    check_bias(auto, 1, (1, 8, 6, 6))
    check_bias(mesh_of(AxisType.Explicit), 4, (1, 1, 6, 6))
    check(auto, 4, True, False, False)
    check(mesh_of(AxisType.Explicit), 4, True, False, False)
    check(auto, 8, True, False, False)
    check(auto, 2, False, False, True)  # four pieces of two key heads: brought together
    check(mesh_of(AxisType.Explicit), 1, False, True, False)
    check_elements(mesh_of(AxisType.Explicit), P(None, "batch", "heads"), True)
    for place in (P(), P("heads"), P(None, "batch")):
        check_elements(mesh_of(AxisType.Explicit), place, True, is_automatic_inside=True)
    for is_inside in (False, True):
        explicit = mesh_of(AxisType.Explicit)
        check_rows(explicit, P("batch", None, "heads"), False, True, is_inside)
    from dpfa_jax.kernels.pieces import fold_vmap
    # Under vmap, and on one device.
    x = jnp.asarray(rng.standard_normal((3, 2, 4, 6, 2, 8)), jnp.float32)
    folded = fold_vmap(kernels(2)[1])
    mapped = jax.jit(jax.vmap(jax.vmap(lambda q: folded(q, q, q, q))))(x)
    flat = backward(*[x.reshape(-1, 6, 2, 8)] * 4)
    for one, other in zip(mapped, flat, strict=True):
        np.testing.assert_allclose(one.reshape(other.shape), other, atol=2e-6)
print("passed")
"""


@pytest.mark.slow  # tests/attention/test_sharding.py has eight devices in the quick suite
@pytest.mark.parametrize("part", ["quick", "rest"])
def test_eight_devices(part):
    """Batch and heads in pieces, GQA and MQA, meshes with automatic and with explicit axes."""
    assert forced_devices.printed(8, "-c", PROGRAM, part) == "passed"
