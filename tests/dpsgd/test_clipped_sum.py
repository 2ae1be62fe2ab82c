"""Clipped sums without per-example gradients of the batch (V4, V8, V10, V23)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import clipping_oracle
from helpers.clipping_oracle import QUICKLY_COMPILED
from helpers.dpsgd_cases import batch_of, clipped_by_hand, flat, loss_fn, params_of
from helpers.layer_cases import BATCH, LAYERS, batch_for, loss_for, params_for

from dpfa_jax.clipping.trees import CLIP_MARGIN
from dpfa_jax.core import ArgumentError
from dpfa_jax.dpsgd.coverage import coverage
from dpfa_jax.dpsgd.late_gradients import LateGradient
from dpfa_jax.kernels import gradient_products

pytestmark = pytest.mark.quickly_compiled


def clipped_sum(*arguments, **named):
    return clipping_oracle.clipped_sum(*arguments, **named).gradients


def summed(batch, is_real, *, l2_clip_norm=1.0, micro_batch_size=4):
    return _summed(l2_clip_norm, micro_batch_size)(params_of(), batch, jnp.asarray(is_real))


@functools.cache
def _summed(l2_clip_norm, micro_batch_size):
    return jax.jit(
        lambda params, batch, is_real: clipped_sum(
            loss_fn,
            params,
            batch,
            is_real,
            l2_clip_norms=(l2_clip_norm,),
            leaf_groups=(0, 0, 0),
            micro_batch_size=micro_batch_size,
            per_example_bytes=2**20,
        )
    )


@pytest.mark.parametrize("l2_clip_norm", [0.03, 1.0, 1e6])
def test_sums_equal_the_float64_oracle(l2_clip_norm):
    """V8: error at most twice that of the chain rule in float32; without the clip it is not."""
    batch, real = batch_of(32), np.arange(32) < 27
    effective = l2_clip_norm * (1.0 - CLIP_MARGIN)
    exact = clipped_by_hand(params_of(), batch, real, effective, np.float64).sum(axis=0)
    naive = clipped_by_hand(params_of(), batch, real, effective, np.float32).sum(axis=0)
    error = np.linalg.norm(flat(summed(batch, real, l2_clip_norm=l2_clip_norm)) - exact)
    rounding = 2.0**-24 * np.linalg.norm(exact)  # a lucky naive sum may err less than one rounding
    assert error <= 2.0 * max(np.linalg.norm(naive - exact), rounding)
    if l2_clip_norm == 1.0:
        unclipped = flat(summed(batch, real, l2_clip_norm=1e6))
        assert np.linalg.norm(unclipped - exact) > 1e3 * error


@pytest.mark.parametrize("sizes", [(1, 8), pytest.param((2, 3, 12), marks=pytest.mark.slow)])
def test_micro_batches_do_not_change_the_sum(sizes):
    """V10: to rounding; and an example sees no other one (V6's sense for gradients)."""
    batch, real = batch_of(24), np.arange(24) < 19
    whole = flat(summed(batch, real, micro_batch_size=24))
    for micro_batch_size in sizes:
        part = flat(summed(batch, real, micro_batch_size=micro_batch_size))
        np.testing.assert_allclose(part, whole, atol=19 * 2.0**-23)


def test_a_batch_coupled_loss_sees_one_example():
    """Batch normalisation over the batch axis cannot couple examples: each is a batch of one."""

    def coupled(params, batch):
        centred = batch["x"] - batch["x"].mean(axis=0)  # zero in a batch of one
        return loss_fn(params, {"x": centred, "y": batch["y"]})

    batch, real = batch_of(8), np.ones(8, bool)
    alone = batch | {"x": np.zeros_like(batch["x"])}
    arguments = {"l2_clip_norms": (1.0,), "leaf_groups": (0, 0, 0), "micro_batch_size": 4}
    arguments["per_example_bytes"] = 2**20
    found = clipped_sum(coupled, params_of(), batch, real, **arguments)
    expected = clipped_sum(loss_fn, params_of(), alone, real, **arguments)
    np.testing.assert_array_equal(flat(found), flat(expected))


@pytest.mark.parametrize(
    ("loss", "parameter"),
    [
        (lambda p, b: loss_fn(p, b).mean(), "loss_fn"),
        (lambda p, b: (loss_fn(p, b), 0), "loss_fn"),
        (lambda p, b: loss_fn(p, b)[:, None], "loss_fn"),
    ],
)
def test_losses_that_are_not_per_example_are_refused(loss, parameter):
    """V23."""
    with pytest.raises(ArgumentError, match="losses of shape") as error:
        clipped_sum(
            loss,
            params_of(),
            batch_of(4),
            jnp.ones(4, bool),
            l2_clip_norms=(1.0,),
            leaf_groups=(0, 0, 0),
            micro_batch_size=4,
            per_example_bytes=2**20,
        )
    assert error.value.parameter == parameter


def test_axes_that_disagree_are_refused():
    """V23: a leaf of another length is named; so is a micro-batch that does not divide."""
    with pytest.raises(ArgumentError, match=r"batch\['y'\]"):
        summed(batch_of(8) | {"y": np.zeros(7, np.float32)}, np.ones(8, bool))
    with pytest.raises(ArgumentError, match="micro_batch_size = 3"):
        summed(batch_of(8), np.ones(8, bool), micro_batch_size=3)


# Memory for per-example gradients: all of the batch's, a few examples', one parameter's of one.
ALLOWED = {"all": 2**24, "some": 30_000, "one at a time": 4_200}


@functools.cache
def gradient_rows(name, dtype):
    """Per-example gradients by jax.grad of one example after the other."""
    wide = np.float64 if dtype == np.float64 else np.float32
    with jax.enable_x64(dtype == np.float64):
        cast = jax.tree.map(lambda p: jnp.asarray(p, wide), params_for(name))
        loss = loss_for(name, jnp.float64 if dtype == np.float64 else dtype)

        @functools.partial(jax.jit, compiler_options=QUICKLY_COMPILED)
        def one(params, example):
            return jax.grad(lambda p: loss(p, jax.tree.map(lambda x: x[None], example))[0])(params)

        examples = [jax.tree.map(lambda x, i=i: x[i], batch_for(name)) for i in range(BATCH)]
        rows = [jax.tree.leaves(one(cast, example)) for example in examples]
        return [[np.asarray(leaf, wide) for leaf in row] for row in rows]


def oracle(name, real, norms, owners, dtype):
    """The rows clipped and added in numpy."""
    wide = np.float64 if dtype == np.float64 else np.float32
    rows = gradient_rows(name, jnp.dtype(dtype))
    totals = [np.zeros(leaf.shape, wide) for leaf in rows[0]]
    for row in (rows[i] for i in np.flatnonzero(real)):
        for group, norm in enumerate(norms):
            members = [i for i, owner in enumerate(owners) if owner == group]
            squares = sum(np.sum(np.square(row[i], dtype=wide)) for i in members)
            scale = min(1.0, norm * (1.0 - CLIP_MARGIN) / np.sqrt(squares))
            for i in members:
                totals[i] = totals[i] + wide(scale) * row[i]
    return np.concatenate([np.ravel(total).astype(np.float64) for total in totals])


# The others differ from these in their size, or are seen in the tests below.
LONG = ("transformer", "lora", "checkpoint", "scan of checkpoint", "positions")
QUICK = {("scan", "all")} | {(name, "some") for name in LAYERS if name not in LONG}
CASES = [
    pytest.param(name, n, marks=() if (name, n) in QUICK else pytest.mark.slow)
    for name in LAYERS
    for n in ALLOWED
]


@pytest.mark.parametrize(("name", "allowed"), CASES)
def test_every_layer_equals_the_float64_oracle(name, allowed):
    """V8: flat clipping, ragged batch, error at most twice the naive one, whatever the memory."""
    check_against_the_oracle(name, ALLOWED[allowed], flat_groups=True, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("checkpoint", "bfloat16"),
        *(
            pytest.param(name, dtype, marks=pytest.mark.slow)
            for name in ("transformer", "tied", "scan", "checkpoint", "scan of checkpoint")
            for dtype in ("float32", "bfloat16")
        ),
    ],
)
def test_each_parameter_its_own_group(name, dtype):
    """V8: per-layer clipping, and mixed precision: norms and sums stay in float32."""
    check_against_the_oracle(name, 2**24, flat_groups=False, dtype=jnp.dtype(dtype))


@pytest.mark.slow
@pytest.mark.parametrize("allowed", ALLOWED)
def test_mixed_precision(allowed):
    check_against_the_oracle("transformer", ALLOWED[allowed], flat_groups=True, dtype=jnp.bfloat16)


def check_against_the_oracle(name, allowed, *, flat_groups, dtype):
    params, batch, real = params_for(name), batch_for(name), np.arange(BATCH) < BATCH - 3
    leaves = len(jax.tree.leaves(params))
    owners = (0,) * leaves if flat_groups else tuple(range(leaves))
    norms = (0.7,) if flat_groups else tuple(0.2 + 0.05 * i for i in range(leaves))
    exact = oracle(name, real, norms, owners, np.float64)
    naive = oracle(name, real, norms, owners, dtype)
    found = jax.jit(
        functools.partial(
            clipped_sum,
            loss_for(name, dtype),
            l2_clip_norms=norms,
            leaf_groups=owners,
            micro_batch_size=BATCH // 2,
            per_example_bytes=allowed,
        )
    )(params, batch, real)
    rounding = 2.0**-22 * np.linalg.norm(exact)
    error = np.linalg.norm(flat(found) - exact)
    assert error <= 2.0 * max(np.linalg.norm(naive - exact), rounding)
    # A control: one example of 13 too many is seen.
    more = oracle(name, np.arange(BATCH) < BATCH - 2, norms, owners, np.float64)
    assert np.linalg.norm(more - exact) > 10 * error


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        pytest.param(name, n, marks=() if (name, n) == ("linear", "all") else pytest.mark.slow)
        for name in LAYERS
        for n in ("all", "one at a time")
    ],
)
def test_padding_and_bad_examples_are_exactly_zero_in_every_layer(name, allowed):
    """V4, bit for bit: padding of any content, and an example with NaN or infinity in its loss.

    Negative control: one real example more is seen in every parameter that the loss depends on.
    """
    flat_groups = allowed != "all"
    params, batch = params_for(name), batch_for(name)
    leaves = len(jax.tree.leaves(params))
    loss = loss_for(name, jnp.float32)
    run = jax.jit(
        functools.partial(
            clipped_sum,
            lambda params, batch: batch["weight"] * loss(params, batch["of"]),
            l2_clip_norms=(0.7,) if flat_groups else (0.7,) * leaves,
            leaf_groups=(0,) * leaves if flat_groups else tuple(range(leaves)),
            micro_batch_size=BATCH // 2,
            per_example_bytes=ALLOWED[allowed],
        ),
        compiler_options=QUICKLY_COMPILED,
    )
    rows = np.arange(BATCH)
    bad, padding = rows % 5 == 1, rows >= BATCH - 3
    weight, none = np.ones(BATCH, np.float32), bad | padding
    blank = jax.tree.map(lambda x: np.where(_as(none, x), np.zeros_like(x), x), batch)
    expected = run(params, {"of": blank, "weight": weight}, ~none)
    for value in (np.nan, np.inf, -np.inf):
        spoilt = np.where(none, np.float32(value), weight)
        found = run(params, {"of": batch, "weight": spoilt}, ~padding)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        if "x" in batch:
            x = np.where(_as(none, batch["x"]), np.float32(value), batch["x"])
            found = run(params, {"of": {"x": x}, "weight": weight}, ~padding)
            jax.tree.map(np.testing.assert_array_equal, found, expected)
    more = run(params, {"of": batch, "weight": weight}, ~none | (rows == 1))
    for path, leaf in more.items():
        assert np.any(np.asarray(leaf) != np.asarray(expected[path])) or path == "nobody", path


def _as(rows, like):
    return rows.reshape(-1, *[1] * (like.ndim - 1))


@pytest.mark.parametrize(
    ("name", "path"),
    [("linear", "kernel"), ("transformer", "query"), ("scan", "kernel"), ("checkpoint", "kernel")],
)
def test_large_gradients_are_made_late(name, path):
    """The head of the program makes no per-example weight gradient; biases it makes itself."""
    params = params_for(name)
    # One example with more tokens than the parameters are wide, as in real models.
    example = jax.tree.map(lambda x: np.tile(x[:1], (1, 6, 1)[: x.ndim]), batch_for(name))
    rows = coverage(loss_for(name, jnp.float32), params, example)
    kept = {row.path: row.how == "in the backward pass" for row in rows}
    assert not kept[path]
    assert kept["bias"]


@pytest.mark.parametrize(("allowed", "anew"), [(2**20, True), (12_000, False)])
def test_a_normalised_input_is_made_anew_where_gradients_are_made_once(allowed, anew, monkeypatch):
    """Not kept beside what the normalisation's derivative keeps; kept where bits might differ."""
    width = 48

    def loss(params, batch):
        x = jnp.tanh(batch["x"] @ params["a"]).astype(jnp.bfloat16)
        wide = x.astype(jnp.float32)
        centred = wide - wide.mean(-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
        hidden = (scaled * params["scale"]).astype(jnp.bfloat16) @ params["b"].astype(jnp.bfloat16)
        return jnp.sum(jnp.square(hidden.astype(jnp.float32)), axis=(1, 2))

    square = jax.ShapeDtypeStruct((width, width), jnp.float32)
    params = {"a": square, "b": square, "scale": jax.ShapeDtypeStruct((width,), jnp.float32)}
    batch = {"x": jax.ShapeDtypeStruct((4, 64, width), jnp.float32)}
    seen = []
    made = LateGradient.made

    def noted(self, l2_clip_norm):
        seen.append((self.path, self.tail.recomputes))
        return made(self, l2_clip_norm)

    monkeypatch.setattr(LateGradient, "made", noted)
    program = functools.partial(
        clipped_sum,
        loss,
        l2_clip_norms=(1.0,),
        leaf_groups=(0, 0, 0),
        micro_batch_size=4,
        per_example_bytes=allowed,
    )
    jax.eval_shape(program, params, batch, jax.ShapeDtypeStruct((4,), jnp.bool_))
    assert ("b", anew) in seen
    assert ("b", not anew) not in seen
    assert ("a", True) not in seen


def test_the_plan_bounds_the_memory_of_the_step():
    """The compiled step holds no per-example gradients beyond what it is allowed."""
    width, rows = 512, 32

    def loss(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["a"])
        return jnp.sum((hidden @ params["b"]) ** 2, axis=(1, 2))

    params = {"a": jnp.zeros((width, width)), "b": jnp.zeros((width, width))}
    batch = {"x": jax.ShapeDtypeStruct((rows, 4, width), jnp.float32)}
    real = jax.ShapeDtypeStruct((rows,), jnp.bool_)

    def temporary_bytes(allowed: int) -> int:
        program = functools.partial(
            clipped_sum,
            loss,
            l2_clip_norms=(1.0,),
            leaf_groups=(0, 0),
            micro_batch_size=rows,
            per_example_bytes=allowed,
        )
        compiled = jax.jit(program).lower(params, batch, real).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one = 2 * 4 * width * width
    all_of_them, four, one_parameter = (temporary_bytes(n) for n in (rows * one, 4 * one, one // 2))
    assert all_of_them > rows * one  # the control: it would be seen
    assert four < 3 * 4 * one
    assert one_parameter < 4 * one


def test_a_plan_that_says_nothing_holds_no_more_than_it_must(monkeypatch):
    """All examples at once where their gradients need less than what they are made from."""
    width, rows = 64, 8
    one = 2 * 4 * width * width
    monkeypatch.setattr("dpfa_jax.dpsgd.clip_groups.DEFAULT_PER_EXAMPLE_BYTES", one)

    def loss(params, batch):
        hidden = jnp.tanh(batch["x"] @ params["a"])
        return jnp.sum((hidden @ params["b"]) ** 2, axis=(1, 2))

    def has_a_loop(tokens: int, allowed: int | None) -> bool:
        program = functools.partial(
            clipped_sum,
            loss,
            l2_clip_norms=(1.0,),
            leaf_groups=(0, 0),
            micro_batch_size=rows,
            per_example_bytes=allowed,
        )
        batch = {"x": jax.ShapeDtypeStruct((rows, tokens, width), jnp.float32)}
        params = {name: jax.ShapeDtypeStruct((width, width), jnp.float32) for name in "ab"}
        real = jax.ShapeDtypeStruct((rows,), jnp.bool_)
        return "scan[" in str(jax.make_jaxpr(program)(params, batch, real))

    # Each product has two operands of tokens x width numbers: with 32 tokens they are as large.
    assert not has_a_loop(32, None)
    assert has_a_loop(24, None)
    assert has_a_loop(32, one)


def test_what_does_not_fit_is_refused_by_name():
    """V23."""
    call = functools.partial(
        clipped_sum,
        loss_for("transformer", jnp.float32),
        params_for("transformer"),
        batch_for("transformer"),
        np.ones(BATCH, bool),
        l2_clip_norms=(1.0,),
        leaf_groups=(0,) * len(jax.tree.leaves(params_for("transformer"))),
        micro_batch_size=BATCH,
    )
    with pytest.raises(ArgumentError, match="one example's gradient of") as error:
        jax.eval_shape(lambda: call(per_example_bytes=2_000))
    needed = int(re.search(r"per_example_bytes to (\d+)", str(error.value)).group(1))
    jax.eval_shape(lambda: call(per_example_bytes=needed))
    with pytest.raises(ArgumentError, match="Lower micro_batch_size"):
        jax.eval_shape(lambda: call(per_example_bytes=100))


def test_bad_examples_leave_the_groups_they_spoil():
    """A loss that is not finite leaves all groups; a gradient that is not, its own."""

    def loss(params, batch):
        with_bad_slope = jnp.where(batch["x"] > 0, jnp.sqrt(params["a"] * batch["x"]), 0.0)
        return with_bad_slope + params["b"] * batch["y"]

    params = {"a": jnp.float32(1.0), "b": jnp.float32(1.0)}
    batch = {"x": np.float32([4, np.nan, -1.0]), "y": np.float32([3, 3, 3])}
    batch["y"][1] = np.nan
    found = clipped_sum(
        loss,
        params,
        batch,
        np.ones(3, bool),
        l2_clip_norms=(10.0, 10.0),
        leaf_groups=(0, 1),
        micro_batch_size=3,
        per_example_bytes=2**20,
    )
    assert found["a"] == 1.0  # sqrt(4 a) has slope 1; the third one's is NaN
    assert found["b"] == 6.0  # the second one's loss is NaN


@pytest.mark.parametrize(
    ("per_example_bytes", "micro_batch_size"),
    [
        pytest.param(2**20, 12, id="one pass"),
        pytest.param(80, 4, id="two passes"),
        pytest.param(2**20, 4, marks=pytest.mark.slow),
        pytest.param(80, 12, marks=pytest.mark.slow),
    ],
)
def test_counts_of_unclipped_examples(micro_batch_size, per_example_bytes):
    """+1/2 an unclipped, -1/2 a clipped, 0 a padded or non-finite example, group by group.

    The clip norms are traced: an adaptive plan's follow what was released.
    """
    batch, real = batch_of(12), np.arange(12) < 9
    batch["y"][4] = np.nan
    groups = (0, 1, 0)  # 80 bytes hold the kernel's gradient, but not the group's
    rows = clipped_by_hand(params_of(), batch, np.ones(12), 1e6, np.float64)
    members = [0, *range(5, 25)], [*range(1, 5)]
    norms = np.stack([np.linalg.norm(rows[:, own], axis=1) for own in members])
    norms[:, 4] = np.nan
    bounds = np.float32([np.sort(n[real & np.isfinite(n)])[3] * 1.01 for n in norms])

    @jax.jit
    def run(bounds):
        return clipping_oracle.clipped_sum(
            loss_fn,
            params_of(),
            batch,
            jnp.asarray(real),
            l2_clip_norms=tuple(bounds),
            leaf_groups=groups,
            micro_batch_size=micro_batch_size,
            per_example_bytes=per_example_bytes,
        )

    found = run(bounds)
    np.testing.assert_array_equal(found.centred_counts, [0.5 * (4 - 4)] * 2)
    np.testing.assert_array_equal(run(0.0 * bounds + 1e6).centred_counts, [4.0, 4.0])
    np.testing.assert_array_equal(run(0.0 * bounds + 1e-6).centred_counts, [-4.0, -4.0])
    fixed = clipped_sum(
        loss_fn,
        params_of(),
        batch,
        jnp.asarray(real),
        l2_clip_norms=tuple(float(bound) for bound in bounds),
        leaf_groups=groups,
        micro_batch_size=micro_batch_size,
        per_example_bytes=2**20,
    )
    np.testing.assert_allclose(flat(found.gradients), flat(fixed), rtol=1e-5, atol=1e-6)


def test_a_sum_without_an_order_is_not_made_twice():
    """A gradient that a device may add up in another order must be made once, or not at all."""
    params, batch = params_for("convolution"), batch_for("convolution")
    call = functools.partial(
        clipped_sum,
        loss_for("convolution", jnp.float32),
        params,
        batch,
        np.ones(BATCH, bool),
        l2_clip_norms=(1.0,),
        leaf_groups=(0, 0),
        micro_batch_size=1,
    )
    rows = coverage(loss_for("convolution", jnp.float32), params, batch)
    late = {row.path: row.example_bytes for row in rows if row.how == "late"}
    assert "kernel" in late
    call(per_example_bytes=sum(row.example_bytes for row in rows))
    if len(late) > 1:
        with pytest.raises(ArgumentError, match="'kernel' need"):
            call(per_example_bytes=max(late.values()))


@pytest.mark.parametrize(
    ("name", "least_shapes"),
    [
        pytest.param("transformer", 2, marks=pytest.mark.slow),
        ("scan of checkpoint", 1),
    ],
)
def test_products_that_a_kernel_makes_and_measures(name, least_shapes, monkeypatch):
    """V8: the path of the Hopper kernel, with XLA in the kernel's place."""
    seen = []

    def chosen(left, right):
        seen.append(left.shape)
        return True

    monkeypatch.setattr(gradient_products, "chosen", chosen)
    monkeypatch.setattr(gradient_products, "_uses_kernel", lambda *arguments: False)
    check_against_the_oracle(name, ALLOWED["some"], flat_groups=True, dtype=jnp.bfloat16)
    check_against_the_oracle(name, 2**24, flat_groups=False, dtype=jnp.float32)
    assert len({shape[1:] for shape in seen}) >= least_shapes


def test_order_of_a_large_batch_hardly_matters():
    """V4: one of 2^17 examples that agree is removed, all others move up a place, as a loader's do.

    The sum must move by that example. Negative control: in plain float32, micro-batch by
    micro-batch, rounding adds several times as much.
    """
    rows, micro, size = 2**17, 4, 16
    rng = np.random.default_rng(0)
    direction = rng.standard_normal(size)
    direction /= np.linalg.norm(direction)
    x = (direction * rng.uniform(0.5, 1.0, (rows, 1))).astype(np.float32)
    x[0] = direction * 1e3
    fewer = np.roll(x, -1, axis=0)

    @jax.jit
    def total(x, is_real):
        return clipped_sum(
            lambda params, batch: batch @ params,
            jnp.zeros(size),
            x,
            is_real,
            l2_clip_norms=(1.0,),
            leaf_groups=(0,),
            micro_batch_size=micro,
            per_example_bytes=None,
        )

    @jax.jit
    def plainly(x, is_real):
        norms = jnp.linalg.norm(x, axis=1, keepdims=True)
        x = jnp.where(is_real[:, None], x * jnp.minimum(1.0, 1.0 / norms), 0.0)
        parts = jnp.swapaxes(x.reshape(micro, -1, size), 0, 1)
        start = jnp.zeros(size)
        return jax.lax.scan(lambda so_far, part: (so_far + part.sum(0), None), start, parts)[0]

    def further(sum_of):
        sums = sum_of(x, np.ones(rows, bool)), sum_of(fewer, np.arange(rows) < rows - 1)
        moved = np.subtract(*(np.asarray(getattr(s, "gradients", s), np.float64) for s in sums))
        return np.linalg.norm(moved - direction)

    assert further(total) < 2e-3
    assert further(plainly) > 5e-3
