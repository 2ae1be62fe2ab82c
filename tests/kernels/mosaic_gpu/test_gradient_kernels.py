"""The kernels of DP-SGD: in the simulator (values), lowered for CUDA (layouts), their tiles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, PartitionSpec

from dpfa_jax.kernels import gradient_products as products
from dpfa_jax.kernels import parameter_noise, released_rows
from dpfa_jax.kernels.mosaic_gpu import device
from dpfa_jax.kernels.mosaic_gpu import gradient_products as product_kernel
from dpfa_jax.kernels.mosaic_gpu import parameter_noise as noise_kernel
from dpfa_jax.kernels.mosaic_gpu.gradient_products import SUM_TILE, ProductTiles
from dpfa_jax.noise import counters, insecure_test_key, key_words, normal_pair
from dpfa_jax.noise.threefry import threefry2x32

pytestmark = pytest.mark.quickly_compiled

SIMULATE = plgpu.InterpretGPUParams()
TEAMS = ProductTiles(rows=64, columns=64, tokens=32, stages=2, buffers=1)
ROWS = ((4, jnp.float32), (3, jnp.float16))  # with and without rows left after pairs
TOGETHER = ProductTiles(rows=64, columns=64, members=2, tokens=32, stages=3, buffers=1)


def draw(*shape, seed=0, dtype=jnp.bfloat16):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def lower(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(device, "cannot", lambda array: None)
    monkeypatch.setattr(device, "cannot_pieces", lambda array: None)
    monkeypatch.setattr(device, "processors", lambda: 132)


def check_products(tile, rows, columns):
    """V4, V8: ragged tiles and tokens; the squares are those of the stored numbers."""
    lhs, rhs = draw(3, 40, rows), draw(3, 40, columns, seed=1)
    lhs = lhs.at[2, 39, 0].set(jnp.nan)
    options = {"unit": 0.5, "processors": 1, "interpret": SIMULATE}
    made, parts = product_kernel.product_squares(lhs, rhs, tile, store=True, **options)
    exact = np.einsum("bti,bto->bio", np.asarray(lhs, np.float64), np.asarray(rhs, np.float64))
    made = np.asarray(made, np.float64)
    assert np.isnan(made[2, 0]).all()
    assert np.all(np.abs(made - exact)[:2] <= 2.0**-8 * (np.abs(exact[:2]) + 1))
    squares = np.asarray(products.add_in_runs(parts.reshape(3, -1)), np.float64)
    norms = np.sqrt(np.square(made[:2] / 0.5).sum((1, 2)))
    assert np.all(np.abs(np.sqrt(squares[:2]) / norms - 1) < 2.0**-15)
    assert np.isnan(squares[2])
    return lhs, rhs, made


def test_products_of_two_teams():
    check_products(TEAMS, 128, 64)


@pytest.mark.slow
def test_products_of_one_team():
    check_products(TOGETHER, 192, 128)


@pytest.mark.slow
def test_weighted_sum_adds_the_stored_products():
    """V8: bit for bit the products of the other kernel, scaled; scale zero leaves NaN out."""
    lhs, rhs, made = check_products(TOGETHER, 192, 64)
    scales = jnp.asarray([0.5, 2.0, 0.0])
    total = product_kernel.weighted_sum(
        lhs, rhs, scales, TOGETHER, processors=1, interpret=SIMULATE
    )
    exact = 0.5 * made[0] + 2.0 * made[1]
    assert np.abs(np.asarray(total.sum(0)) - exact).max() <= 2.0**-22 * np.abs(exact).max()


def noised(rows, scales, size, **more):
    """(the kernel's mean, XLA's), in cells of the grid."""
    key, numbers = insecure_test_key(3), jnp.asarray([1.5, 2.0**-10, 250.0], jnp.float32)
    table = counters.bind_parameter(key_words(key), jnp.arange(7, dtype=jnp.uint32))
    mean = noise_kernel.released_mean(
        rows, scales, table, jnp.asarray([5]), numbers, block=512, interpret=SIMULATE, **more
    )
    exact = released_rows.released_mean_of_rows(
        rows, scales, key, 5, stddev=1.5, grid=2.0**-10, divisor=250.0, implementation="xla"
    )
    assert mean.shape == exact.shape == (size,)
    return (np.asarray(x, np.float64) * 250 * 2**10 for x in (mean, exact))


@pytest.mark.slow
@pytest.mark.parametrize("size", [512, 516])
def test_noise_is_the_oracle_s(size):
    """V10, V12: words by global index; the last of two programs overlaps the first."""
    mine, theirs = noised(draw(1, size, dtype=jnp.float32), jnp.ones(1), size)
    assert np.abs(mine - theirs).max() <= 1.01


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(5, jnp.bfloat16), *(pytest.param(*x, marks=pytest.mark.slow) for x in ROWS)],
)
def test_rows_are_added_and_noised_in_one_pass(count, dtype):
    """V4, V8, V12: two together, then what is left; a row of scale zero is NaN, and left out."""
    rows = draw(count, 512, dtype=dtype).at[1].set(jnp.nan)
    scales = jnp.linspace(0.2, 1.0, count).at[1].set(0.0)
    mine, theirs = noised(rows, scales, 512, together=2)
    assert np.abs(mine - theirs).max() <= 1.01
    assert np.mean(mine != theirs) < 0.02
    # Negative control: one row more moves nearly every number by many cells.
    _, other = noised(rows, scales.at[2].set(0.0), 512, together=2)
    assert np.median(np.abs(mine - other)) > 100


def test_a_piece_has_its_own_elements():
    """V10: rows 6 to 11 of a leaf of 12: the numbers of the whole, from an index on."""
    key, shape = insecure_test_key(3), (12, 4096)
    total = draw(*shape, dtype=jnp.float32)
    numbers = jnp.asarray([1.5, 2.0**-10, 250.0], jnp.float32)
    table = counters.bind_parameter(key_words(key), jnp.arange(7, dtype=jnp.uint32))
    leaf = jnp.full(1, 5, jnp.uint32)
    columns = jnp.arange(4096, dtype=jnp.uint32)
    more = (columns, table, leaf.astype(jnp.int32), numbers, key_words(key), leaf)
    kind = jax.random.key_impl(key)
    rows = jnp.arange(6, 12, dtype=jnp.uint32)
    (mean,) = parameter_noise.of_piece(shape, kind, total[6:], rows, *more, interpret=SIMULATE)
    exact = parameter_noise.released_mean(
        total, key, 5, stddev=1.5, grid=2.0**-10, divisor=250.0, implementation="xla"
    )[6:]
    cells = np.abs(np.asarray(mean, np.float64) - np.asarray(exact, np.float64)) * 250 * 2**10
    assert cells.max() <= 1.01
    assert (cells > 0.5).mean() < 1e-2


def test_the_pair_whose_radius_goes_on():
    """V9, V10: of this key's pairs 479 has first word 0; the program around it draws more."""
    words, pair = jnp.asarray([7, 3158553], jnp.uint32), 479
    w0, w1 = threefry2x32(words[0], words[1], jnp.uint32(0), jnp.uint32(pair))
    more, _ = threefry2x32(words[0], words[1], jnp.uint32(1), jnp.uint32(pair))
    assert int(w0) == 0
    numbers = jnp.asarray([1.0, 2.0**-14, 1.0], jnp.float32)
    rows, leaf = (jnp.zeros((1, 1024)), jnp.ones(1)), jnp.asarray([0])
    mean = noise_kernel.released_mean(
        *rows, words[None], leaf, numbers, block=512, interpret=SIMULATE
    )
    found = np.asarray(mean)[2 * pair : 2 * pair + 2]
    long, short = (np.ravel(normal_pair(w0, w1, third)) for third in (more, None))
    assert np.abs(found - long).max() <= 2.0**-14
    assert np.abs(found - short).max() > 2.0**-10


@pytest.mark.slow
def test_every_tile_lowers():
    for tile in product_kernel._PRODUCT_TILES:
        run = functools.partial(
            product_kernel.product_squares, tile=tile, unit=1.0, store=True, processors=132
        )
        lower(run, struct(40, 1000, 768), struct(40, 1000, 2304))


def test_products_lower(hopper):
    """An axis of vmap is walked along."""
    lhs, rhs = struct(40, 1000, 768), struct(40, 1000, 2304)
    mapped = jax.vmap(products.gradient_products)
    assert "dpfa_gradient_products" in lower(mapped, struct(2, *lhs.shape), struct(2, *rhs.shape))
    total = lower(products.weighted_product_sum, lhs, rhs, struct(40, dtype=jnp.float32))
    assert "dpfa_weighted_product_sum" in total


def test_sharded_calls_lower(hopper):
    """Inside shard_map; an operand that all shards share goes with one that they do not."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    split, whole = PartitionSpec("data"), PartitionSpec()
    shard = functools.partial(jax.shard_map, mesh=mesh)
    run = shard(products.gradient_products, in_specs=(split, whole), out_specs=split)
    lower(run, struct(40, 1024, 768), struct(40, 1024, 768))

    def mean(total):
        key = insecure_test_key(0)
        return parameter_noise.released_mean(total, key, 0, stddev=1.0, grid=0.5, divisor=2.0)

    lower(shard(mean, in_specs=split, out_specs=split), struct(1024, 64, dtype=jnp.float32))


def test_noise_lowers_and_vmap_falls_to_xla(hopper):
    def mean(total, stddev):
        key = insecure_test_key(0)
        return parameter_noise.released_mean(total, key, 0, stddev=stddev, grid=0.5, divisor=2.0)

    total, stddev = struct(512, 100, dtype=jnp.float32), struct(dtype=jnp.float32)
    assert "dpfa_parameter_noise" in lower(mean, total, stddev)
    mapped = lower(
        jax.vmap(mean, in_axes=(0, None)), struct(2, 512, 100, dtype=jnp.float32), stddev
    )
    assert "dpfa_parameter_noise" not in mapped


def test_rows_lower_and_vmap_falls_to_xla(hopper):
    """One kernel, which reads the rows as they are; none inside shard_map, where sums are due."""

    def mean(rows, scales, stddev=1.0):
        return released_rows.released_mean_of_rows(
            rows, scales, insecure_test_key(0), 0, stddev=stddev, grid=0.5, divisor=2.0
        )

    rows, scales = struct(6, 512, 100), struct(6, dtype=jnp.float32)
    text = lower(mean, rows, scales)
    assert text.count("custom_call @mosaic_gpu") == 1 and "6x512x100xf32" not in text
    mapped = lower(jax.vmap(mean, in_axes=(0, None)), struct(2, *rows.shape), scales)
    assert "mosaic_gpu" not in mapped
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    specs = (PartitionSpec("data"),) * 2
    shard = jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("data"))
    assert "mosaic_gpu" not in lower(shard, rows, scales)


def test_tiles():
    """Every tile fits; the choice follows the shape; the batch is cut evenly."""
    choose = functools.partial(product_kernel.product_tiles, 32, processors=132)
    assert choose(768, 2304).columns == 192
    assert choose(768, 128).columns == 128
    assert choose(1024, 1024).columns == 128
    for wrong in ({"rows": 100}, {"buffers": 4}, {"stages": 9}, {"warpgroups": 4, "members": 2}):
        with pytest.raises(ValueError, match="ProductTiles"):
            ProductTiles(**wrong)
    for batch, tiles in ((32, 72), (32, 24), (7, 5), (1, 1), (32, 1572)):
        parts = product_kernel.batch_parts(batch, tiles, 132)
        assert batch % parts == 0
    assert product_kernel.batch_parts(32, 1572, 132) == 1
    assert SUM_TILE.program_rows == 128
