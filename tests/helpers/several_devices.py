"""Calls sharded over several devices against the same calls on one: V6, V10.

The same bodies run on GPUs (kernels) and on forced CPU devices (the blocked backend).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dpfa_jax import dpsgd
from dpfa_jax.attention import dot_product_attention, dp_attention
from dpfa_jax.kernels import rectangles
from dpfa_jax.noise import insecure_test_key
from dpfa_jax.release import ExampleRelease, RecordRelease, TrainingRelease

CAPACITY = 16
CALLS = (
    "one key head a query head", "grouped", "one key head", "example", "noise of an example",
    "memory",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a call: B, T = S, query heads, head size."""

    batch: int = 8
    rows: int = 512
    heads: int = 8
    size: int = 64
    dtype: Any = jnp.bfloat16

    def rounding(self, addends: int = 1) -> float:
        """What results of two orders of summation may differ by, relatively.

        16 bits: each addend and the sum are rounded once. float32: sums of `rows` terms err by the
        root of their number.
        """
        terms = 1 + addends if jnp.finfo(self.dtype).bits == 16 else self.rows * addends
        return float(jnp.finfo(self.dtype).eps) * terms**0.5


class Case(NamedTuple):
    """One call.

    Attributes:
      run: of query, key, value, cotangent and a noise key, to a tuple; its first result holds one
        private or plain answer an example.
      key_heads: number of key heads.
      step: a cell of what is released, into which its neighbour may round; 0 where nothing is.
      is_noise_alone: values are zero: what is released is the noise, bit for bit the same anywhere.
    """

    run: Callable[..., tuple[jax.Array, ...]]
    key_heads: int
    step: float
    is_noise_alone: bool = False


def cases(sizes: Sizes, implementation: str | None) -> dict[str, Case]:
    """GQA, MQA, both private readouts, and the noise of either alone."""
    example = ExampleRelease(
        1.0, 1.0, sizes.rows, sizes.heads, sizes.size, insecure_test_noise=True
    )
    memory = RecordRelease(
        logit_bound=1.0, value_clip_norm=1.0, noise_multiplier=1.0, num_queries=sizes.rows,
        num_heads=sizes.heads, head_dim=sizes.size, insecure_test_noise=True,
    )  # fmt: skip

    def plain(query, key, value, cotangent, noise_key):
        def answer(*arrays):
            return dot_product_attention(*arrays, is_causal=True, implementation=implementation)

        output, pull = jax.vjp(answer, query, key, value)
        return output, *pull(cotangent)

    def private(release, is_causal):
        def run(query, key, value, cotangent, noise_key):
            answer = dp_attention(
                query, key, value, release=release, noise_key=noise_key, is_causal=is_causal,
                implementation=implementation,
            )  # fmt: skip
            return (answer,)

        return run

    step = max(example.grids)
    return {
        "one key head a query head": Case(plain, sizes.heads, 0.0),
        "grouped": Case(plain, sizes.heads // 2, 0.0),
        "one key head": Case(plain, 1, 0.0),
        "example": Case(private(example, True), sizes.heads // 2, step),
        "noise of an example": Case(private(example, True), sizes.heads // 2, 0.0, True),
        "memory": Case(private(memory, False), sizes.heads // 2, 2 * memory_step(memory, sizes)),
    }


def memory_step(release: RecordRelease, sizes: Sizes) -> float:
    """A grid step of the numerator over the least normaliser that `Sizes.rows` keys can give."""
    return max(release.grids) / (sizes.rows * float(np.exp(-2 * release.logit_bound)) / 2)


def operands(sizes: Sizes, case: Case) -> tuple[Any, ...]:
    shape = (sizes.batch, sizes.rows, sizes.heads, sizes.size)
    keys = jax.random.split(jax.random.key(case.key_heads), 4)
    wide = (*shape[:2], case.key_heads, sizes.size)
    arrays = [
        jax.random.normal(key, s, sizes.dtype)
        for key, s in zip(keys, (shape, wide, wide, shape), strict=True)
    ]
    if case.is_noise_alone:
        arrays[2] = jnp.zeros_like(arrays[2])
    return (*arrays, insecure_test_key(3))


def meshes(devices: list[Any]) -> list[Mesh]:
    """Batch alone in pieces, and with four devices batch and heads; both kinds of axes."""
    count, auto = len(devices), AxisType.Auto
    layouts = [
        ((count, 1), auto),
        ((count // 2, 2) if count > 2 else (count, 1), AxisType.Explicit),
    ]
    if count > 2:
        layouts.append(((count // 2, 2), auto))
    return [
        Mesh(np.asarray(devices).reshape(shape), ("batch", "heads"), axis_types=(kind,) * 2)
        for shape, kind in layouts
    ]


def on_mesh(mesh: Mesh) -> Any:
    """The context in which types name the sharding, where the mesh wants that."""
    is_explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if is_explicit else contextlib.nullcontext()


def split(mesh: Mesh, x: jax.Array) -> jax.Array:
    """`x` in pieces of batch and, where the mesh divides them, of heads; a key is everywhere."""
    spec = PartitionSpec()
    if x.ndim == 4:
        is_divided = x.shape[2] % mesh.shape["heads"] == 0
        spec = PartitionSpec("batch", None, "heads" if is_divided else None)
    return jax.device_put(x, NamedSharding(mesh, spec))


def check(sizes: Sizes, case: Case, found_on: list[Mesh], *, is_kernel: bool) -> None:
    """No gather, a smaller share of memory, and the results of one device.

    Kernels give each row the same bits. Gradients of 16 bits are rounded once, XLA's sum of output
    times cotangent may have another order; those of one key head are sums over the pieces of its
    query heads, each of which is rounded.
    """
    given = operands(sizes, case)
    one = jax.device_put(given, found_on[0].devices.flat[0])
    alone = jax.jit(case.run).lower(*one).compile()
    expected = jax.tree.map(np.asarray, alone(*one))
    for mesh in found_on:
        with on_mesh(mesh):
            pieces = [split(mesh, x) for x in given]
            program = jax.jit(case.run).lower(*pieces).compile()
            found = program(*pieces)
        text = program.as_text()
        assert "all-gather" not in text, mesh
        is_summed = len(found) > 1 and case.key_heads % mesh.shape["heads"] != 0
        assert ("all-reduce" in text) == is_summed, mesh
        assert found[0].sharding.spec[0] == "batch"
        # Gradients of one key head, before and after they are added up in float32.
        sums = sum(2 * 4 * x.size for x in found[2:4]) // mesh.shape["batch"] if is_summed else 0
        check_memory(program, alone, mesh, sums)
        first, *gradients = (np.asarray(x, np.float64) for x in found)
        first_expected, *rest = (np.asarray(x, np.float64) for x in expected)
        if is_kernel or case.is_noise_alone:
            np.testing.assert_array_equal(first, first_expected)
        else:
            slack = case.step + sizes.rounding() * np.maximum(1.0, np.abs(first_expected))
            assert np.all(np.abs(first - first_expected) <= slack), mesh
        addends = mesh.shape["heads"] if is_summed else 1
        for mine, theirs in zip(gradients, rest, strict=True):
            away = np.linalg.norm(mine - theirs)
            assert away <= sizes.rounding(addends) * np.linalg.norm(theirs), mesh


def check_memory(program: Any, alone: Any, mesh: Mesh, more: int) -> None:
    """A device needs its share, a tenth of the whole for what each of them holds, and `more`."""
    mine, whole = (
        x.argument_size_in_bytes + x.output_size_in_bytes + x.temp_size_in_bytes
        for x in (program.memory_analysis(), alone.memory_analysis())
    )
    assert mine <= (1 / mesh.size + 0.1) * whole + more, (mesh, mine, whole, more)


def check_step(sizes: Sizes, devices: list[Any], implementation: str | None) -> None:
    """A DP-SGD step with attention in its loss: one noise, the whole batch's sum, no gather.

    Clipped gradients have norm 1 and, in 16 bits, the rounding of their products; then each number
    falls on a grid.
    """
    wide = sizes.heads * sizes.size

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        made = (batch["x"] @ params["qkv"]).astype(sizes.dtype)
        made = made.reshape(*made.shape[:2], sizes.heads, 3 * sizes.size)
        answer = dot_product_attention(*jnp.split(made, 3, axis=-1), implementation=implementation)
        pooled = answer.astype(jnp.float32).mean(axis=1).reshape(-1, wide)
        return (jnp.tanh(pooled @ params["head"]) - batch["y"]) ** 2

    draw = np.random.default_rng(0).standard_normal
    params = {
        "head": draw(wide).astype(np.float32) / wide**0.5,
        "qkv": draw((sizes.size, 3 * wide)).astype(np.float32) / sizes.size**0.5,
    }
    x, y = draw((CAPACITY, sizes.rows, sizes.size)), draw(CAPACITY)
    batch = {"x": x.astype(np.float32), "y": y.astype(np.float32)}
    release = TrainingRelease(
        l2_clip_norm=1.0, noise_multiplier=1.0, dataset_size=1000, expected_batch_size=8,
        num_parameters=sum(x.size for x in params.values()), truncated_batch_size=CAPACITY,
        insecure_test_noise=True,
    )  # fmt: skip
    plan = dpsgd.DPSGDPlan(release, steps=10, delta=1e-5, micro_batch_size=CAPACITY, groups=None)
    dp = dpsgd.make_dp_step(loss_fn, optax.sgd(1.0), plan)

    def released(mesh: Mesh, is_real: np.ndarray) -> dict[str, np.ndarray]:
        def put(tree: Any, *spec: str) -> Any:
            return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))

        with on_mesh(mesh):
            state = dp.init(put(params))
            given = (state, put(batch, "batch"), put(is_real, "batch"), put(insecure_test_key(0)))
            program = jax.jit(dp.step).lower(*given).compile()
            assert "all-gather" not in program.as_text(), mesh
            after = program(*given)
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(after.params))
        moved = jax.tree.map(lambda x, y: np.asarray(x, np.float64) - y, after.params, params)
        return {name: -x * release.expected_batch_size for name, x in moved.items()}

    one, *more = (
        Mesh(np.asarray(given), ("batch",), axis_types=(kind,))
        for given in (devices[:1], devices)
        for kind in (AxisType.Auto, AxisType.Explicit)
        if len(given) > 1 or kind == AxisType.Auto
    )
    nobody, some = np.zeros(CAPACITY, bool), np.arange(CAPACITY) % 4 != 3
    grid, slack = release.grids[0], sizes.rounding() * CAPACITY
    expected = [released(one, is_real) for is_real in (nobody, some)]
    signal = sum(np.linalg.norm(expected[1][x] - expected[0][x]) for x in params)
    assert signal > 10 * slack, "nothing to tell a lost sum from rounding"
    for mesh in more:
        for name, noise in released(mesh, nobody).items():
            np.testing.assert_array_equal(noise, expected[0][name])
        for name, total in released(mesh, some).items():
            away = total - expected[1][name]
            # The learning rate's product and the difference of parameters round once more each.
            near = grid + slack + 4 * 2.0**-24 * release.expected_batch_size * 8
            assert np.abs(away).max() <= near, name
            assert np.linalg.norm(away) <= slack + grid * away.size**0.5, name


def gpus(count: int) -> list[Any]:
    """So many GPUs; skips the test where there are fewer."""
    found = [device for device in jax.devices() if device.platform == "gpu"]
    if len(found) < count:
        pytest.skip(f"{count} GPUs are due, {len(found)} are here")
    return found[:count]


def check_on_gpus(name: str, count: int, implementation: str) -> None:
    """Forward, backward, GQA, MQA, both private readouts; batch, and batch and heads in pieces."""
    sizes = Sizes()
    check(sizes, cases(sizes, implementation)[name], meshes(gpus(count)), is_kernel=True)


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """The blocked backend's loops at sizes that one block would serve."""
    before = rectangles.ONE_BLOCK, rectangles.BLOCK_Q, rectangles.BLOCK_KV
    rectangles.ONE_BLOCK, rectangles.BLOCK_Q, rectangles.BLOCK_KV = 0, 4, 5
    jax.clear_caches()
    try:
        yield
    finally:
        rectangles.ONE_BLOCK, rectangles.BLOCK_Q, rectangles.BLOCK_KV = before
        jax.clear_caches()


def on_cpu(*, is_quick: bool) -> None:
    """Through the blocked backend, on four forced CPU devices: as one block, then in loops."""
    sizes = Sizes(batch=4, rows=24, heads=4, size=8, dtype=jnp.float32)
    all_meshes = meshes(jax.devices()[:4])
    for name, case in cases(sizes, "blocked").items():
        if not is_quick:
            check(sizes, case, all_meshes, is_kernel=False)
        elif name in ("example", "noise of an example"):
            check(sizes, case, all_meshes[-1:], is_kernel=False)
    if not is_quick:
        with small_blocks():
            for case in cases(sizes, "blocked").values():
                check(sizes, case, all_meshes, is_kernel=False)
        check_step(sizes, jax.devices()[:2], "blocked")
    print("passed")
