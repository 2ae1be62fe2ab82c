"""V10 on eight devices, the kernels as plain JAX: the same numbers, and no gather under jit."""

import pytest
from helpers import forced_devices, several_devices

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from helpers import triton_cases
from dpfa_jax.attention import core
from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, ExampleReadout, MemoryReadout
from dpfa_jax.kernels.triton.backend import TritonBackend

BACKEND = TritonBackend(interpret=True)
HEADS = 8
NOISE, GRIDS = tuple(0.25 + n / 8 for n in range(HEADS)), (2.0**-5,) * HEADS
EXAMPLE = ExampleReadout(0.3, NOISE, GRIDS)
MEMORY = MemoryReadout("sum", 1.0, 1.0, 0.75, 0.1, NOISE, GRIDS)
rng = np.random.default_rng(0)

def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

def outcome(spec, inputs, cotangent):
    def answer(query, key, value, bias):
        given = inputs._replace(query=query, key=key, value=value, bias=bias)
        return core.attend(BACKEND, spec, given)
    if isinstance(spec.readout, MemoryReadout):
        return answer(*inputs[:4])[:1]
    (output, lse), pull = jax.vjp(answer, *inputs[:4])
    return output, lse, *(x for x in pull((cotangent, jnp.zeros_like(lse))) if x is not None)

def check(key_heads, readout=None, bias=None, gathers=False):
    mesh = jax.make_mesh((2, 4), ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    heads = P("batch", None, "heads")
    own = heads if key_heads % 4 == 0 else P("batch")
    more = {} if readout is None else {"readout": readout}
    spec = AttentionSpec(0.3, is_causal=readout is not MEMORY, **more)
    query, cotangent = draw(4, 20, HEADS, 16), draw(4, 20, HEADS, 16)
    key, value = draw(4, 18, key_heads, 16), draw(4, 18, key_heads, 16)
    lengths = jnp.asarray([18, 3, 11, 18])
    noise = None if readout is None else triton_cases.noise_inputs(4)
    pairs = None if bias is None else draw(*bias)
    inputs = AttentionInputs(query, key, value, pairs, key_lengths=lengths, noise=noise)
    places = AttentionInputs(heads, own, own, P(), key_lengths=P("batch"), noise=P())
    put = lambda x, place: jax.device_put(x, NamedSharding(mesh, place))
    split = AttentionInputs(*(
        None if x is None else jax.tree.map(lambda y: put(y, place), x)
        for x, place in zip(inputs, places)
    ))
    expected = jax.jit(outcome, static_argnums=0)(spec, inputs, cotangent)
    run = jax.jit(outcome, static_argnums=0).lower(spec, split, put(cotangent, heads)).compile()
    text = run.as_text()
    assert ("all-gather" in text) == gathers, (key_heads, readout, bias)
    # What passes between devices: gradients of one key's heads, and of what was broadcast.
    is_summed = readout is not MEMORY and (key_heads == 1 or (bias is not None and 1 in bias[:2]))
    assert ("all-reduce" in text) == is_summed, (key_heads, readout, bias)
    found = run(split, put(cotangent, heads))
    if not gathers:
        assert found[0].sharding.spec[2] == "heads"
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        if index == 0:  # V10: each row is one program's, noise and all
            np.testing.assert_array_equal(one, other)
        else:  # XLA's row sums, and sums over pieces, may have another order
            np.testing.assert_allclose(one, other, atol=4e-6, rtol=4e-6)

if sys.argv[1] == "quick":
    check(4, EXAMPLE)
else:
    check(1)
    check(8, EXAMPLE)
    check(4, MEMORY)
    check(1, MEMORY)
    check(2, gathers=True)  # four pieces of two key heads: brought together
    check(4, bias=(1, 8, 20, 18))
    check(1, bias=(4, 1, 1, 18))
print("passed")
"""


@pytest.mark.slow  # tests/attention/test_sharding.py has eight devices in the quick suite
@pytest.mark.parametrize("part", ["quick", "rest"])
def test_eight_devices(part):
    """Batch and heads in pieces; GQA, MQA, both private readouts, bias.

    Explicit axes are in test_lowering.py: the interpreter knows nothing of varying axes.
    """
    assert forced_devices.printed(8, "-c", PROGRAM, part) == "passed"


@pytest.mark.gpu
# A kernel that an earlier test has traced is lowered anew, under this test's own filters.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", several_devices.CALLS)
def test_calls_on_gpus(name, count):
    several_devices.check_on_gpus(name, count, "triton")
