"""The kernel that clips rows: in the simulator (values), lowered for CUDA, and on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, PartitionSpec

from dpfa_jax.attention import dp_attention
from dpfa_jax.clipping import rows
from dpfa_jax.core import ArgumentError, UnsupportedBackendError
from dpfa_jax.kernels import row_clip
from dpfa_jax.kernels.mosaic_gpu import device
from dpfa_jax.kernels.mosaic_gpu import row_clip as kernel
from dpfa_jax.noise import insecure_test_key
from dpfa_jax.release import ExampleRelease

pytestmark = pytest.mark.quickly_compiled

SIMULATE = plgpu.InterpretGPUParams()
BFLOAT16, FLOAT16 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)
FLOAT32 = jnp.dtype(jnp.float32)
LAYOUTS = [(128, BFLOAT16), (64, FLOAT16), (80, BFLOAT16), (112, FLOAT16), (64, FLOAT32)]


def hostile(count, columns, dtype):
    """Rows of every magnitude, from zero and subnormals to the largest; NaN and infinity."""
    rng = np.random.default_rng(columns)
    most = float(jnp.finfo(dtype).max)
    least = -24 if dtype == FLOAT16 else -133 if dtype == BFLOAT16 else -149
    x = rng.standard_normal((count, columns))
    x *= 2.0 ** rng.uniform(least - 1, np.log2(most) - 3, (count, 1))
    x[0], x[1], x[2], x[3] = 0.0, most, -most, 2.0**least
    x[4] = np.eye(1, columns)[0] * most
    x[5] = np.eye(1, columns, columns - 1)[0] * 2.0**least
    for row, bad in enumerate((np.nan, np.inf, -np.inf)):
        x[6 + row, rng.integers(columns)] = bad
    x[9] = np.where(np.arange(columns) % 2, 2.0**least, most)
    # Stored without a flush of subnormal numbers, which XLA on a CPU allows itself.
    return jnp.asarray(x.astype(dtype))


def check(x, bound, clipped, *, flushes):
    """Norms by float64; `flushes`: subnormal float32 numbers may have become zero."""
    columns, dtype = x.shape[1], x.dtype
    assert clipped.dtype == dtype
    given, found = (np.asarray(y).astype(np.float64) for y in (x, clipped))
    with np.errstate(invalid="ignore"):
        norms = np.linalg.norm(given, axis=1)
    finite = np.isfinite(norms)
    assert not finite.all()
    assert np.all(found[~finite] == 0.0)
    assert np.linalg.norm(found, axis=1).max() <= bound
    inside = finite & (norms <= bound * (1 - 2.0**-14))
    assert inside.sum() > 10
    is_kept = found == given
    if flushes:
        is_kept |= np.abs(given) < 2.0**-125
    assert np.all(is_kept[inside])
    # A longer row keeps its direction, each number rounded toward zero from no less than its own.
    outside = finite & (norms > bound)
    assert outside.sum() > 10
    exact = given[outside] * (bound / norms[outside])[:, None]
    spacing = float(jnp.finfo(dtype).eps) * np.abs(exact)
    spacing = np.maximum(spacing, 2.0**-24 if dtype == FLOAT16 else 2.0**-125)
    away = exact - found[outside]
    assert np.all(np.abs(away) <= spacing + (columns + 64) * 2.0**-24 * np.abs(exact))
    assert np.all(away * np.sign(exact) >= -(2.0**-24) * np.abs(exact))


@pytest.mark.parametrize(("columns", "dtype"), LAYOUTS)
def test_stored_norm_never_passes_the_bound(columns, dtype):
    """V4, every magnitude against float64; the last program overlaps the one before."""
    count = 2 * kernel.rows_of(columns, dtype) + 5
    x = hostile(count, columns, dtype)
    for bound in (1.0, 3e-3) if columns == 128 else (0.37,):
        clipped = kernel.clip_rows_stored(x, bound, interpret=SIMULATE)
        check(x, bound, clipped, flushes=True)


def test_rounding_to_nearest_would_be_caught():
    """V4, negative control."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2000, 128)), BFLOAT16)
    nearest = rows.clip_rows(x, 1.0).astype(BFLOAT16)
    assert np.linalg.norm(np.asarray(nearest, np.float64), axis=1).max() > 1.0


def test_rows_lie_in_as_few_lanes_as_fill_a_line():
    """Each length has a layout of its own; the longest fill the registers of sixteen lanes."""
    expected = {64: 8, 128: 8, 192: 8, 256: 8, 512: 16, 1024: 16, 80: 2, 96: 4, 2048: 16}
    assert {n: kernel.lanes_of(n, BFLOAT16) for n in expected} == expected
    assert kernel.lanes_of(64, FLOAT32) == 8
    assert [kernel.lanes_of(n, BFLOAT16) for n in (4, 72, 100, 136, 4096)] == [0] * 5
    for columns in range(8, 257, 8):
        if kernel.lanes_of(columns, BFLOAT16):
            tile = kernel.rows_of(columns, BFLOAT16)
            accesses = tile * columns * 2 // kernel.ACCESS // 128
            assert 1 <= accesses <= kernel.MOST_ACCESSES


def lower(function, *arguments):
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def struct(*shape, dtype=BFLOAT16):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(device, "cannot_pieces", lambda array: None)


CLIP = functools.partial(row_clip.clip_rows_stored, l2_clip_norm=1.0)


@pytest.mark.parametrize(("columns", "dtype"), LAYOUTS)
def test_every_layout_lowers(columns, dtype, hopper):
    assert "dpfa_row_clip" in lower(CLIP, struct(3, 100, 7, columns, dtype=dtype))


def test_transformed_calls_lower(hopper):
    """Under vmap, inside shard_map, and the value beside a derivative."""
    x = struct(2, 256, 4, 128)
    mapped = lower(jax.vmap(jax.vmap(CLIP, 1, 1)), x)
    assert mapped.count("custom_call @mosaic_gpu") == 1
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    split = PartitionSpec("data")
    shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=split, out_specs=split)
    assert "dpfa_row_clip" in lower(shard(CLIP), x)

    def squares(x):
        return jnp.square(CLIP(x)).sum()

    assert "dpfa_row_clip" in lower(jax.value_and_grad(squares), x)
    assert "dpfa_row_clip" in lower(shard(jax.grad(squares)), x)
    assert "dpfa_row_clip" in lower(jax.vmap(jax.grad(squares)), x)


def test_attention_clips_by_the_kernel(hopper):
    release = ExampleRelease(
        1.0, 1.0, 128, 4, 64, query_key_clip_norm=1.0, insecure_test_noise=True
    )

    def run(query, key, value):
        return dp_attention(query, key, value, release=release, noise_key=insecure_test_key(0))

    assert lower(run, *[struct(2, 128, 4, 64)] * 3).count("dpfa_row_clip") >= 2


@pytest.fixture
def simulated(monkeypatch, hopper):
    """The dispatch as on a Hopper GPU, its kernel in the simulator."""
    real = kernel.clip_rows_stored
    monkeypatch.setattr(
        kernel,
        "clip_rows_stored",
        lambda x, norm, interpret=None: real(x, norm, interpret=SIMULATE),
    )


def test_values_and_derivative_under_transformations(simulated):
    """V4, V8: each row's bits are the same wherever it lies; the derivative is `clipping`'s."""
    draw = np.random.default_rng(3).standard_normal
    x, direction = (jnp.asarray(draw((2, 128, 64)), BFLOAT16) for _ in range(2))
    x = x.at[0, 0, 0].set(jnp.nan) * jnp.asarray(10.0 ** draw((2, 128, 1)), BFLOAT16)
    clip = functools.partial(row_clip.clip_rows_stored, l2_clip_norm=2.0)
    clipped, tangent = jax.jvp(clip, (x,), (direction,))
    exact, exact_tangent = jax.jvp(lambda x: rows.clip_rows_stored(x, 2.0), (x,), (direction,))
    np.testing.assert_array_equal(tangent, exact_tangent)
    away = np.abs(np.asarray(clipped, np.float64) - np.asarray(exact, np.float64))
    assert np.all(away <= 2.0**-7 * np.abs(np.asarray(exact, np.float64)))
    assert (away > 0).mean() < 1e-2
    np.testing.assert_array_equal(jax.vmap(clip)(x), clipped)
    np.testing.assert_array_equal(clip(x.reshape(16, 16, 1, 64)).reshape(x.shape), clipped)
    pulled = jax.grad(lambda x: (clip(x) * direction).astype(jnp.float32).sum())(x)
    expected = jax.grad(
        lambda x: (rows.clip_rows_stored(x, 2.0) * direction).astype(jnp.float32).sum()
    )(x)
    np.testing.assert_array_equal(pulled, expected)
    np.testing.assert_array_equal(pulled[0, 0], 0)


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((8, 64, 4, 128), BFLOAT16, None),
        ((64, 64, 4), BFLOAT16, "few lanes"),
        ((16, 4096), BFLOAT16, "few lanes"),
        ((8, 2048), BFLOAT16, None),
        ((7, 2048), BFLOAT16, "fewer"),
        ((10, 64), BFLOAT16, "fewer"),
        ((2**24, 128), BFLOAT16, "more than"),
        ((2**10, 64), jnp.dtype(jnp.int16), "few lanes"),
    ],
)
def test_cannot_says_why(shape, dtype, words, hopper):
    reason = row_clip.cannot(struct(*shape, dtype=dtype))
    assert reason is None if words is None else words in reason


def test_wrong_calls_are_refused(hopper):
    """V23: the kernel is not asked before the arguments are checked."""
    x = jnp.ones((4, 64, 128), BFLOAT16)
    with pytest.raises(ArgumentError, match="l2_clip_norm"):
        row_clip.clip_rows_stored(x, 0.0)
    with pytest.raises(ArgumentError, match="implementation"):
        row_clip.clip_rows_stored(x, 1.0, implementation="torch")
    with pytest.raises(ArgumentError, match="x"):
        row_clip.clip_rows_stored(x.astype(jnp.int32), 1.0)
    with pytest.raises(UnsupportedBackendError, match=r"mosaic_gpu: .*fewer"):
        row_clip.clip_rows_stored(x[:1, :1], 1.0, implementation="mosaic_gpu")


def test_a_cpu_clips_as_before():
    """The bits of `clipping.rows`, of which XLA makes the same program."""
    x = hostile(512, 64, BFLOAT16)
    ours, theirs = (
        jax.jit(lambda x, clip=clip: clip(x, 1.0)).lower(x).as_text()
        for clip in (row_clip.clip_rows_stored, rows.clip_rows_stored)
    )
    if jax.default_backend() == "cpu":
        assert ours == theirs
        assert "needs a Hopper GPU" in row_clip.cannot(x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16, FLOAT32])
@pytest.mark.parametrize("columns", [64, 80, 112, 128, 192, 256, 512])
def test_stored_norm_on_a_gpu(columns, dtype):
    """V4: the hardware's root and rounding; rows within the norm bit for bit, subnormal or not."""
    x = hostile(100_003, columns, dtype)
    reason = row_clip.cannot(x)
    if reason is not None and "Hopper" in reason:
        pytest.skip(reason)
    for bound in (1.0, 3e-3, 1e3):
        clip = jax.jit(
            functools.partial(
                row_clip.clip_rows_stored, l2_clip_norm=bound, implementation="mosaic_gpu"
            )
        )
        check(x, bound, clip(x), flushes=False)
