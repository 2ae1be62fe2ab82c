import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import forced_devices
from helpers.statistics import correlation_p_value

from dpfa_jax.core import ArgumentError
from dpfa_jax.noise import attention_noise, bind, insecure_test_key, key_words, parameter_noise

WORDS = key_words(insecure_test_key(11))


# Compilers round log and cosine differently in vector bodies and remainders: the words agree bit
# for bit, the normals to a few units in the last place. Another word would differ by about 1.
LAST_PLACES = 2e-6

_draw = jax.jit(attention_noise, static_argnames=("heads", "rows", "columns"))
_leaf = jax.jit(parameter_noise, static_argnums=(1, 2))


def _same(a, b):
    return a.shape == b.shape and np.abs(a - b).max(initial=0.0) < LAST_PLACES


def _field(batches=4, heads=6, rows=40, columns=18, *, batch=0, head=0, row=0, words=None):
    words = WORDS if words is None else words
    index = jnp.arange(batch, batch + batches, dtype=jnp.uint32)
    return np.asarray(
        _draw(
            jnp.broadcast_to(words, (batches, 2)),
            index,
            jnp.full(batches, head, jnp.uint32),
            heads=heads,
            row_start=row,
            rows=rows,
            columns=columns,
        )
    )


def test_noise_does_not_depend_on_how_it_is_cut():
    """V10: batch, head, row and column splits (traced row start) give the same numbers."""
    whole = _field()
    assert whole.shape == (4, 40, 6, 18)
    assert _same(np.concatenate([_field(2), _field(2, batch=2)], 0), whole)
    assert _same(np.concatenate([_field(rows=13), _field(rows=27, row=13)], 1), whole)
    assert _same(np.concatenate([_field(heads=3), _field(heads=3, head=3)], 2), whole)
    assert _same(_field(columns=7), whole[..., :7])
    assert not _same(_field(rows=39, row=1), whole[:, :39])


@pytest.mark.parametrize("shape", [(), (4, 6), (0,), (2, 3, 5)])
def test_parameter_noise_goes_by_the_flat_index(shape):
    """V10: element e of a leaf is element e of the flat leaf, whatever its shape."""
    key = insecure_test_key(4)
    flat = np.asarray(_leaf(key, 2, (64,)))
    leaf = np.asarray(_leaf(key, 2, shape))
    assert leaf.shape == shape
    assert _same(leaf.ravel(), flat[: leaf.size])
    assert not _same(flat, np.asarray(_leaf(key, 3, (64,))))


def test_no_correlation_along_any_coordinate():
    """V11: batch, head, row, column (each distance 1), layer, release id and step (key)."""
    field = _field(8, 8, 64, 32)
    pairs = {
        name: (np.take(field, range(field.shape[axis] - 1), axis),
               np.take(field, range(1, field.shape[axis]), axis))
        for axis, name in enumerate(("batch", "row", "head", "column"))
    }  # fmt: skip
    pairs["cosine, sine"] = field[..., 0::2], field[..., 1::2]
    pairs["squares"] = field[..., 0::2] ** 2 - 1, field[..., 1::2] ** 2 - 1
    others = {
        "layer": bind(WORDS, 0, 1),
        "release id": bind(WORDS, 1, 0),
        "step": key_words(jax.random.fold_in(insecure_test_key(11), 1)),
    }
    first = _field(8, 8, 64, 32, words=bind(WORDS, 0, 0))
    for name, words in others.items():
        pairs[name] = first, _field(8, 8, 64, 32, words=words)
    pairs["shard"] = _field(2, 8, 64, 32), _field(2, 8, 64, 32, batch=2)
    for name, (a, b) in pairs.items():
        assert correlation_p_value(a, b) > 1e-3 / len(pairs), name
    # Control: shards that count from 0 repeat the noise; 3 % of shared noise is seen too.
    assert correlation_p_value(_field(2, 8, 64, 32), _field(2, 8, 64, 32)) < 1e-3
    mixed = 0.97 * pairs["layer"][0] + 0.03 * pairs["layer"][1]
    assert correlation_p_value(mixed, pairs["layer"][1]) < 1e-3


def test_positions_beyond_the_counters_are_nan():
    """V11: a traced index that no host check can see does not wrap round into used counters."""
    assert np.isnan(_field(1, batch=2**20)).all()
    field = _field(1, heads=2, head=2**12 - 1)
    assert np.isfinite(field[:, :, 0]).all()
    assert np.isnan(field[:, :, 1]).all()
    with pytest.raises(ArgumentError, match="rows"):
        attention_noise(
            WORDS[None],
            jnp.zeros(1, jnp.uint32),
            jnp.zeros(1, jnp.uint32),
            heads=1,
            row_start=2**23 - 1,
            rows=2,
            columns=1,
        )
    assert np.isnan(_field(row=2**23 - 1, rows=2)[:, 1]).all()
    with pytest.raises(ArgumentError, match="columns"):
        _field(columns=1025)
    with pytest.raises(ArgumentError, match="shape"):
        parameter_noise(insecure_test_key(0), 0, (2**17, 2**16))


@pytest.mark.slow  # a private step and attention have eight devices in the quick suite
def test_sharding_does_not_change_the_noise():
    """V10: 2 and 8 devices give, as one does, the same numbers."""
    program = textwrap.dedent("""
        import jax, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from dpfa_jax.noise import insecure_test_key, parameter_noise
        draw = lambda key: parameter_noise(key, 1, (16, 10))
        key = insecure_test_key(8)
        whole = np.asarray(draw(key))
        auto = jax.sharding.AxisType.Auto
        for n in (2, 8):
            mesh = jax.make_mesh((n,), ("d",), axis_types=(auto,), devices=jax.devices()[:n])
            out = jax.jit(draw, out_shardings=NamedSharding(mesh, P("d")))(key)
            assert len(out.sharding.device_set) == n
            assert np.abs(np.asarray(out) - whole).max() < 2e-6, n
        print("same")
    """)
    assert forced_devices.printed(8, "-c", program, is_optimised=True) == "same"
