"""Leaves that leave in the pass that adds their examples: the same release, each leaf once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.barriers import without_a_barrier
from helpers.clipping_oracle import clipped_sum
from helpers.dpsgd_cases import plan_of, reader

from dpfa_jax import dpsgd
from dpfa_jax.core import ArgumentError, KeyReuseError
from dpfa_jax.dpsgd.adaptive_clipping import noise_for
from dpfa_jax.dpsgd.clipped_sum import split_gradient
from dpfa_jax.dpsgd.leaf_noise import LeafNoise
from dpfa_jax.dpsgd.noise_state import NoisySumState
from dpfa_jax.dpsgd.parameters import leaf_groups
from dpfa_jax.dpsgd.released import Released, sums_of
from dpfa_jax.dpsgd.sum_noise import TRAINING_LAYER, noise_of
from dpfa_jax.kernels import gradient_products, released_rows
from dpfa_jax.noise import bind, fields, grid, insecure_test_key, key_words, new_noise_key
from dpfa_jax.release import AdaptiveClipping

pytestmark = pytest.mark.quickly_compiled

ROWS, TOKENS = 16, 6
SHAPES = {"a": (8, 12), "b": (12, 2, 4), "table": (5, 8)}  # b: heads, as of attention
LEAVES = len(SHAPES)
NUMBERS = sum(int(np.prod(shape)) for shape in SHAPES.values())
LAYERS = (("a",), ("b",), ("table",))
PLANS = {
    "flat": {},
    "per layer": {"l2_clip_norm": (0.5, 0.7, 0.9), "groups": LAYERS},
    "adaptive": {
        "l2_clip_norm": (0.5, 0.7, 0.9),
        "groups": LAYERS,
        "adaptive_clipping": AdaptiveClipping(quantile=0.5, learning_rate=0.2, budget_share=0.1),
    },
}


def plan(name, **changes):
    return plan_of(**{"num_parameters": NUMBERS} | PLANS.get(name, {}) | changes)


def params():
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in SHAPES.items()}


def batch():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((ROWS, TOKENS, 8)).astype(np.float32)
    return {"x": x, "at": rng.integers(0, 5, (ROWS, TOKENS))}


def loss(params, batch):
    x = batch["x"] + params["table"][batch["at"]]
    mixed = jnp.einsum("btf,fhd->bthd", jnp.tanh(x @ params["a"]), params["b"])
    return jnp.sum(jnp.tanh(mixed), axis=(1, 2, 3))


@pytest.fixture
def one_pass(monkeypatch):
    """As where kernels serve; gives the places of the leaves that left so."""
    left, release = [], LeafNoise.of_rows

    def noted(self, leaf, rows, scales):
        found = release(self, leaf, rows, scales)
        left.extend([] if found is None else [found.leaf])
        return found

    monkeypatch.setattr(LeafNoise, "of_rows", noted)
    monkeypatch.setattr(gradient_products, "chosen", lambda *operands: True)
    monkeypatch.setattr(released_rows, "chosen", lambda rows, stddev: np.ndim(stddev) == 0)
    return left


def stepper(one):
    """Compiled once: (examples, who is real) -> released sums, in units of the clip norms."""
    dp = dpsgd.make_dp_step(loss, reader(), one)
    state = dp.init(params())

    def run(examples, real):
        after = dp.step(state, examples, jnp.asarray(real), insecure_test_key(0))
        return [8.0 * np.asarray(x, np.float64) for x in after.opt_state.values()]

    return run


def expected_of(one, examples, real):
    """The same by its parts: the sums, and the noise that leaf and step have; grids."""
    release, groups = one.release, leaf_groups(params(), one.groups)
    sums = jax.jit(
        lambda: clipped_sum(
            loss, params(), examples, jnp.asarray(real), l2_clip_norms=release.l2_clip_norms,
            leaf_groups=groups, micro_batch_size=ROWS, per_example_bytes=None,
        ).gradients
    )()  # fmt: skip
    key = insecure_test_key(0)
    stddevs, grids = release.noise_stddevs, release.grids
    if release.adaptive_clipping is not None:
        stddevs, grids = noise_for(release, jnp.asarray(release.l2_clip_norms))

    @jax.jit
    def noise(key):  # an element's noise goes by its flat index: of all leaves, as many as of any
        words = bind(key_words(key), jnp.zeros((), jnp.int32), TRAINING_LAYER)
        step_key = jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))
        draw = jax.vmap(lambda leaf: fields.parameter_noise(step_key, leaf, (96,)))
        return draw(jnp.arange(LEAVES, dtype=jnp.uint32))

    drawn = [z[: x.size].reshape(x.shape) for z, x in zip(noise(key), sums.values(), strict=True)]
    parts = zip(sums.values(), drawn, groups, strict=True)
    return [
        (np.asarray(total, np.float64) + float(stddevs[group]) * np.asarray(z), float(grids[group]))
        for total, z, group in parts
    ]


@pytest.mark.parametrize(
    "name", ["per layer", *(pytest.param(x, marks=pytest.mark.slow) for x in ("flat", "adaptive"))]
)
def test_one_pass_releases_each_sum_and_its_noise_once(name, one_pass):
    """V10, V12, V4: to half a cell; NaN and padding leave exactly nothing behind."""
    one, examples, real = plan(name), batch(), np.arange(ROWS) < 13
    run = stepper(one)
    found = run(examples, real)
    assert sorted(one_pass) == [0, 1]  # a table's rows are added in another way
    for mine, (exact, cell) in zip(found, expected_of(one, examples, real), strict=True):
        assert np.all(mine % cell == 0)
        assert np.abs(mine - exact).max() <= cell / 2 + 1e-5
        # Negative control: the noise of the next number.
        assert np.abs(mine - np.roll(exact, 1)).max() > 4 * cell
    without = real & (np.arange(ROWS) != 3)
    clean = run(examples, without)
    examples["x"][3], examples["x"][14] = np.nan, 1e30
    for mine, other, before in zip(run(examples, real), clean, found, strict=True):
        np.testing.assert_array_equal(mine, other)
        assert np.any(mine != before)  # the control: an example is seen


PARTS = {
    "micro-batches": {"micro_batch_size": 8},
    "pieces": {"per_example_bytes": 2000},
    "correlated": {"noise_strategy": (0.8, 0.6)},
    "slices": {
        "l2_clip_norm": (1.0,) * 9,
        "groups": (*((f"a/{i}",) for i in range(8)), ("b", "table")),
    },
}


SLOW = dict.fromkeys(("correlated", "micro-batches", "slices"), pytest.mark.slow)


@pytest.mark.parametrize(
    "changes", [pytest.param(x, id=name, marks=SLOW.get(name, ())) for name, x in PARTS.items()]
)
def test_a_part_of_a_sum_gets_no_noise(changes, one_pass):
    """V10: where all examples are not there at once, or noise is more than one number's."""
    own = {k: v for k, v in changes.items() if k != "per_example_bytes"}
    one = dataclasses.replace(
        plan("flat", **own), per_example_bytes=changes.get("per_example_bytes")
    )
    dp = dpsgd.make_dp_step(loss, optax.sgd(0.1), one)
    inputs = dp.init(params()), batch(), jnp.ones(ROWS, bool), insecure_test_key(0)
    names = list(primitives(jax.make_jaxpr(dp.step)(*inputs).jaxpr))
    assert one_pass == ([1] if "groups" in changes else [])  # b has one deviation
    assert names.count("cos") == LEAVES


def primitives(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner)


def test_what_has_left_is_no_sum_and_stays_its_own_leaf():
    """V24, V23: nothing adds to it, noises it again, or takes it for another leaf."""
    one = plan("flat")
    noise = noise_of(one)(
        insecure_test_key(0), NoisySumState(jnp.zeros((), jnp.int32)), like=params(), sources=[]
    )
    means = {name: Released(i, jnp.zeros(shape)) for i, (name, shape) in enumerate(SHAPES.items())}
    found, _ = noise.released(means, None)
    assert all(found[name] is means[name].mean for name in SHAPES)
    with pytest.raises(TypeError, match="noise of leaf 1"):
        noise.released(means | {"a": Released(1, jnp.zeros(SHAPES["a"]))}, None)
    with pytest.raises(TypeError):
        jax.tree.map(lambda x: 2.0 * x, means)
    with pytest.raises(TypeError):
        jax.jit(lambda x: x)(means)
    with pytest.raises(TypeError, match="leaf 2"):
        sums_of([jnp.zeros(3), means["table"]])
    noisy = dpsgd.noisy_sum(plan("flat", noise_strategy=(0.8, 0.6)))
    with pytest.raises(ArgumentError, match="Released"):
        noisy.update(means, noisy.init(params()), noise_key=insecure_test_key(0))


def test_data_that_a_loss_closes_over_is_seen_before_any_noise(one_pass):
    """V11: noise is drawn before the sums are there, from what they are made from."""
    key = new_noise_key()

    def stepped(weight):
        dp = dpsgd.make_dp_step(
            lambda p, b: weight * loss(p, b),
            optax.sgd(0.1),
            plan("flat", insecure_test_noise=False),
        )
        return dp.step(dp.init(params()), batch(), jnp.ones(ROWS, bool), key).params

    with pytest.raises(KeyReuseError, match="vmap maps the data"):
        jax.vmap(stepped)(jnp.arange(3.0))
    assert one_pass == [0, 1] or one_pass == [1, 0]


def turned(params, batch):
    return -jnp.sum(jnp.tanh(batch["x"] @ params["w"].T), axis=(1, 2))


def heads_first(params, batch):
    mixed = jnp.einsum("btf,hfd->bthd", batch["x"], params["w"])
    return jnp.sum(jnp.tanh(mixed), axis=(1, 2, 3))


@jax.custom_vjp
def by_columns(x, w):
    return x @ jnp.reshape(w, (8, 12), order="F")


def by_columns_bwd(kept, cotangent):
    x, w = kept
    gradient = jnp.einsum("bti,bto->io", x, cotangent)
    return cotangent @ jnp.reshape(w, (8, 12), order="F").T, jnp.ravel(gradient, order="F")


by_columns.defvjp(lambda x, w: (by_columns(x, w), (x, w)), by_columns_bwd)


@pytest.mark.parametrize(
    ("function", "shape", "in_order"),
    [
        # A reshape that takes axes in another order.
        (lambda p, b: jnp.sum(jnp.tanh(by_columns(b["x"], p["w"])), axis=(1, 2)), (96,), False),
        (lambda p, b: jnp.sum(jnp.tanh(b["x"] @ p["w"]), axis=(1, 2)), (8, 12), True),
        (turned, (12, 8), True),
        (heads_first, (2, 8, 6), False),
    ],
)
def test_products_come_in_the_parameter_s_order(function, shape, in_order):
    """`jax.grad` transposes the product of a weight matrix: operands that change places do not."""
    rng = np.random.default_rng(2)
    w, x = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (shape, (TOKENS, 8)))
    split = split_gradient(function, {"w": w}, {"x": x})
    tail = split.tails[1]
    assert tail.form.in_order == in_order
    values = split.head([w, x], [])
    values = [values[i] for i in tail.cut]
    left, right = tail.form.operands(*values)
    made = jnp.einsum("gti,gto->gio", left, right)
    np.testing.assert_allclose(tail.form.finish(made), tail.make(*values), rtol=1e-5, atol=1e-6)
    if in_order:
        np.testing.assert_array_equal(tail.form.finish(made).ravel(), made.ravel())


@pytest.mark.parametrize(
    ("middle", "is_product"), [(jnp.bfloat16, False), (jnp.int32, False), (jnp.float32, True)]
)
def test_a_cast_that_rounds_is_part_of_the_gradient(middle, is_product):
    """What is measured and added is what `jax.grad` gives, so a kernel may not skip the cast."""

    @jax.custom_vjp
    def dense(x, w):
        return x @ w

    def backward(kept, cotangent):
        x, w = kept
        gradient = jnp.einsum("bti,bto->io", x, cotangent)
        return cotangent @ w.T, gradient.astype(middle).astype(jnp.float32)

    dense.defvjp(lambda x, w: (dense(x, w), (x, w)), backward)
    w, x = jnp.ones((8, 12)), jnp.ones((TOKENS, 8))
    split = split_gradient(lambda p, b: dense(b["x"], p["w"]).sum((1, 2)), {"w": w}, {"x": x})
    assert (split.tails[1].form is not None) == is_product


def test_a_released_mean_is_one_value_for_all_readers(monkeypatch):
    """V12: an optimizer that reads it five times; control: XLA makes it five times, on its own."""
    one = plan("flat", num_parameters=64 * 64)

    def draws():
        readers = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
        chain = optax.chain(dpsgd.noisy_sum(one), readers)
        sums = {"w": jnp.zeros((64, 64))}
        state, key = chain.init(sums), insecure_test_key(0)
        compiled = jax.jit(
            lambda sums, state, key: chain.update(sums, state, sums, noise_key=key)
        ).lower(sums, state, key).compile()  # fmt: skip
        return compiled.as_text().count(" cosine(")

    assert draws() == 1
    monkeypatch.setattr(grid, "snap_once", grid.snap)
    assert draws() > 1


@pytest.mark.parametrize(
    "name", ["correlated", *(pytest.param(x, marks=pytest.mark.slow) for x in ("flat", "adaptive"))]
)
def test_a_barrier_is_between_sums_and_results(name, monkeypatch):
    """V12: for means, clip norms from counts, and noise that is kept. Control: without it."""
    one = plan(name, **PARTS.get(name, {}))

    def update(sums, counts, key):
        noisy = dpsgd.noisy_sum(one)
        state = noisy.init(params())
        return noisy.update(sums, state, noise_key=key, centred_counts=counts)

    inputs = params(), jnp.zeros(3), insecure_test_key(0)
    assert not without_a_barrier(update, *inputs)
    monkeypatch.setattr(grid, "snap_once", grid.snap)
    assert "input" in without_a_barrier(update, *inputs)
