"""What `privatize` takes, what it refuses by name, and what its pure functions compute (V23)."""

import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers.clipping_oracle import clipped_sum

from dpfa_jax import dpsgd, nn
from dpfa_jax.core import ArgumentError, CoverageError

pytestmark = pytest.mark.quickly_compiled

BATCH = {"x": np.arange(12, dtype=np.float32).reshape(3, 4) / 10}


class Scale(nnx.Variable):
    """A kind of one's own, which no optimizer of flax would train unasked."""


class Model(nnx.Module):
    """A linear layer and whatever is put beside it."""

    def __init__(self, **beside):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        for name, value in beside.items():
            setattr(self, name, value)

    def __call__(self, x):
        x = self.linear(x)
        for layer in ("norm", "dropout", "counted"):
            x = getattr(self, layer)(x) if hasattr(self, layer) else x
        return x * self.scale[...] if hasattr(self, "scale") else x


class Counted(nnx.Module):
    """Keeps the mean of what it has seen."""

    def __init__(self, lifted):
        self.mean, self.lifted = nnx.Variable(jnp.zeros(4)), lifted

    def __call__(self, x):
        def see(layer, x):
            layer.mean[...] = x.mean(axis=0)
            return x

        return nnx.jit(see)(self, x) if self.lifted else see(self, x)


def squares(model, batch):
    return jnp.sum(model(batch["x"]) ** 2, axis=-1)


def test_parameters_are_held_apart_and_the_model_comes_back():
    model = Model(scale=Scale(jnp.full(4, 2.0)), table=jnp.ones(3))
    private = nn.privatize(model, frozen="scale")
    assert list(private.params) == ["linear/bias", "linear/kernel"]
    assert sorted(private.frozen) == ["scale", "table"]
    assert private.num_parameters == 20
    expected = model(BATCH["x"])
    np.testing.assert_array_equal(private.apply(private.params, BATCH["x"]), expected)
    np.testing.assert_array_equal(
        private.loss(squares)(private.params, BATCH), squares(model, BATCH)
    )
    moved = jax.tree.map(lambda p: p + 1.0, private.params)
    back = private.model(moved)
    assert isinstance(back, Model)
    np.testing.assert_array_equal(back.linear.kernel[...], model.linear.kernel[...] + 1.0)
    np.testing.assert_array_equal(model(BATCH["x"]), expected)  # the given model is untouched


def test_trainable_and_frozen_by_path_or_kind():
    def trained(**rules):
        model = Model(scale=Scale(jnp.ones(4)), norm=nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
        return list(nn.privatize(model, **rules).params)

    assert trained(trainable="bias", frozen=Scale) == ["linear/bias", "norm/bias"]
    assert trained(trainable=(Scale, "^norm/")) == ["norm/bias", "norm/scale", "scale"]
    assert trained(frozen=("^linear", Scale)) == ["norm/bias", "norm/scale"]


def shared_array():
    model = Model(other=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    model.other.kernel.set_value(model.linear.kernel.get_value())
    return model


@pytest.mark.parametrize(
    ("model", "rules", "words"),
    [
        (lambda: Model(scale=Scale(jnp.ones(4))), {}, ["'scale'", "Scale", "frozen="]),
        (lambda: Model(scale=nnx.Param(jnp.arange(4))), {}, ["'scale'", "int32"]),
        (shared_array, {}, ["'linear/kernel'", "'other/kernel'", "same array"]),
        (lambda: Model(norm=nnx.BatchNorm(4, rngs=nnx.Rngs(0))), {}, ["'norm'", "BatchNorm"]),
        (
            lambda: Model(norm=nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))),
            {"frozen": nnx.BatchStat},
            ["'norm'", "BatchNorm"],
        ),
        (
            lambda: Model(
                norm=nnx.SpectralNorm(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
            ),
            {},
            ["'norm'", "SpectralNorm"],
        ),
        (lambda: Model(), {"frozen": "linear"}, ["no parameter"]),
    ],
    ids=["kind", "integers", "shared array", "batch norm", "its mean", "spectral norm", "nothing"],
)
def test_what_is_not_covered_is_refused_by_name(model, rules, words):
    with pytest.raises(CoverageError) as error:
        nn.privatize(model(), **rules)
    assert all(word in str(error.value) for word in words)


def test_a_shared_variable_is_one_parameter():
    """The control of the refusal of a shared array: tied on purpose, through the Variable."""
    model = Model(other=nnx.Linear(4, 4, rngs=nnx.Rngs(1)))
    model.other.kernel = model.linear.kernel
    private = nn.privatize(model)
    assert [path for path in private.params if "kernel" in path] == ["linear/kernel"]
    back = private.model()
    assert back.other.kernel is back.linear.kernel


@pytest.mark.parametrize(
    ("arguments", "rules", "parameter"),
    [
        ((Model(),), {"trainable": "nobody"}, "trainable"),
        ((Model(),), {"trainable": nnx.LoRAParam}, "trainable"),
        ((Model(),), {"trainable": "linear", "frozen": "bias"}, "frozen"),
        ((Model(),), {"frozen": 3}, "trainable or frozen"),
        ((Model(), {}), {}, "variables"),
        ((linen.Dense(3),), {}, "variables"),
        ((linen.Dense(3), {"kernel": 1}), {}, "variables"),
        ((lambda x: x,), {}, "model"),
    ],
)
def test_bad_arguments_are_named(arguments, rules, parameter):
    with pytest.raises(ArgumentError) as error:
        nn.privatize(*arguments, **rules)
    assert error.value.parameter == parameter


def test_parameters_of_another_model_are_refused():
    private = nn.privatize(Model())
    with pytest.raises(ArgumentError, match="linear/bias"):
        private.apply({"linear/kernel": private.params["linear/kernel"]}, BATCH["x"])


@pytest.mark.parametrize("lifted", [False, True])
def test_state_that_would_be_lost_is_refused(lifted):
    """Statistics of private examples, also behind a lifted transform, under jit or not."""
    private = nn.privatize(Model(counted=Counted(lifted)), frozen="mean")
    loss_fn = private.loss(squares)
    for call in (loss_fn, jax.jit(loss_fn)):
        with pytest.raises(CoverageError, match="'counted/mean'"):
            call(private.params, BATCH)


class Forgotten(nnx.Module):
    """Lets go of its variable."""

    def __init__(self):
        self.mean = nnx.Variable(jnp.zeros(4))

    def __call__(self, x):
        self.mean = None
        return x


def test_state_that_is_taken_away_is_refused():
    private = nn.privatize(Model(counted=Forgotten()), frozen="mean")
    with pytest.raises(CoverageError, match="'counted/mean'"):
        private.loss(squares)(private.params, BATCH)


class Dropped(nnx.Module):
    """Dropout, plain or behind a transform that returns every variable anew."""

    def __init__(self, lifted, *, rate=0.5):
        self.lifted, self.linear = lifted, nnx.Linear(4, 8, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(rate, rngs=nnx.Rngs(0))

    def __call__(self, x):
        def forward(layers, x):
            return layers.dropout(layers.linear(x))

        return (nnx.remat(forward) if self.lifted else forward)(self, x)


@pytest.mark.slow
@pytest.mark.parametrize("lifted", [False, True])
def test_dropout_needs_a_key_an_example(lifted):
    private = nn.privatize(Dropped(lifted))
    with pytest.raises(CoverageError, match="random stream 'dropout/rngs'"):
        private.loss(squares)(private.params, BATCH)
    with pytest.raises(CoverageError, match="random stream 'dropout/rngs'"):
        private.apply(private.params, BATCH["x"])
    # The control: a stream that nothing draws from is no reason to refuse.
    quiet = nn.privatize(Dropped(lifted, rate=0.0))
    quiet.loss(squares)(quiet.params, BATCH)

    loss_fn = jax.jit(private.loss(squares, rng_key="dropout"))
    one = jax.tree.map(lambda x: x[:1], BATCH)
    rows = jax.tree.map(lambda x: np.repeat(x[:1], 8, axis=0), BATCH)
    keys = jax.random.split(jax.random.key(1), 8)
    losses = loss_fn(private.params, rows | {"dropout": keys})
    assert len(np.unique(losses)) > 3  # equal examples, masks of their own
    again = [loss_fn(private.params, one | {"dropout": keys[i : i + 1]})[0] for i in range(2)]
    np.testing.assert_allclose(losses[:2], again, rtol=1e-6)  # a row's key alone decides its mask


@pytest.mark.parametrize(
    "keys", [None, np.zeros(3, np.uint32), jax.random.key(0)], ids=["none", "numbers", "one"]
)
def test_keys_that_are_none_are_refused(keys):
    private = nn.privatize(Dropped(False))
    batch = BATCH if keys is None else BATCH | {"dropout": keys}
    with pytest.raises(ArgumentError, match=r"batch\['dropout'\]"):
        private.loss(squares, rng_key="dropout")(private.params, batch)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_whose_draw_depends_on_other_rows_are_refused(impl):
    private = nn.privatize(Dropped(False))
    keys = jax.random.split(jax.random.key(0, impl=impl), 3)
    with pytest.raises(ArgumentError, match=r"batch\['dropout'\].*masks of others.*threefry"):
        private.loss(squares, rng_key="dropout")(private.params, BATCH | {"dropout": keys})


class DroppedFirst(nnx.Module):
    """A gradient that is its example's mask."""

    def __init__(self):
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.linear = nnx.Linear(64, 1, use_bias=False, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(self.dropout(x))


def test_documented_dropout_keys_belong_to_examples():
    """Without one example the others keep their masks: a known key moves the sum by C at most."""
    page = (Path(__file__).parents[2] / "docs/flax.md").read_text()
    recipe = page[page.index("    step_key =") : page.index("    state = step.step(state, batch")]
    private = nn.privatize(DroppedFirst())
    loss_fn = private.loss(lambda model, batch: model(batch["x"]).sum(axis=-1), rng_key="dropout")
    examples = {"x": np.random.default_rng(0).choice([-1.0, 1.0], (20, 64)).astype(np.float32)}

    def total(indices):
        batch, is_real = dpsgd.take_batch(examples, np.array(indices))
        names = {"jax": jax, "batch": batch, "indices": np.array(indices), "i": 3}
        exec(textwrap.dedent(recipe), names | {"dropout_key": jax.random.key(0)})
        clipped = clipped_sum(
            loss_fn, private.params, batch, is_real, l2_clip_norms=(1.0,), leaf_groups=(0,),
            micro_batch_size=16, per_example_bytes=None,
        )  # fmt: skip
        return np.ravel(clipped.gradients["linear/kernel"])

    with_it = total(range(16))
    moved = [np.linalg.norm(with_it - total([*range(1, 16), last])) for last in (-1, 17)]
    assert 0.99 < moved[0] < 1.0 + 1e-5
    assert moved[1] < 2.0 + 1e-5  # another in its place


class LinenModel(linen.Module):
    """Dense, and what is asked for."""

    beside: str = ""

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(4)(x)
        if self.beside == "batch norm":
            x = linen.BatchNorm(use_running_average=False)(x)
        if self.beside == "dropout":
            x = linen.Dropout(0.5, deterministic=False)(x)
        if self.beside in ("constants", "seen"):
            held = self.variable(self.beside, "held", lambda: jnp.ones(4))
            if self.beside == "seen":
                held.value = x.mean(axis=0)
            x = x * held.value
        return x


def linen_variables(module):
    return module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, BATCH["x"])


def test_linen_is_held_apart_and_refused_alike():
    module = LinenModel("constants")
    variables = linen_variables(module)
    with pytest.raises(CoverageError, match="'constants/held'"):
        nn.privatize(module, variables)
    private = nn.privatize(module, variables, frozen="^constants/")
    assert list(private.params) == ["Dense_0/bias", "Dense_0/kernel"]
    expected = module.apply(variables, BATCH["x"])
    np.testing.assert_array_equal(private.apply(private.params, BATCH["x"]), expected)
    back = private.model(jax.tree.map(lambda p: p + 1.0, private.params)).variables
    np.testing.assert_array_equal(
        back["params"]["Dense_0"]["bias"], variables["params"]["Dense_0"]["bias"] + 1.0
    )
    module = LinenModel("batch norm")
    with pytest.raises(CoverageError, match="'BatchNorm_0'"):
        nn.privatize(module, linen_variables(module), frozen="batch_stats")
    one = jnp.ones((4, 4))
    twice = {"params": {"a": {"kernel": one}, "b": {"kernel": one}}}
    with pytest.raises(CoverageError, match="'a/kernel' and 'b/kernel'"):
        nn.privatize(module, twice)


def two_of_one_path_in_nnx():
    layers = nnx.Dict({"a/b": nnx.Linear(2, 2, rngs=nnx.Rngs(0))})
    layers["a"] = nnx.Dict(b=nnx.Linear(2, 2, rngs=nnx.Rngs(1)))
    return (Model(layers=layers),)


def two_of_one_path_in_linen():
    variables = {"params": {"lora": {"kernel": jnp.ones(4)}}, "lora": {"kernel": jnp.zeros(4)}}
    return LinenModel(), variables


@pytest.mark.parametrize(
    ("model", "path", "places"),
    [
        (
            two_of_one_path_in_nnx,
            "'layers/a/b/bias'",
            ["model['layers']['a/b']['bias']", "model['layers']['a']['b']['bias']"],
        ),
        (
            two_of_one_path_in_linen,
            "'lora/kernel'",
            ["variables['params']['lora']['kernel']", "variables['lora']['kernel']"],
        ),
    ],
)
@pytest.mark.parametrize("rules", [{}, {"trainable": "."}, {"trainable": "linear", "frozen": "."}])
def test_two_arrays_of_one_path_are_refused(model, path, places, rules):
    """One of them would take the other's place in silence."""
    with pytest.raises(CoverageError, match="have one path") as error:
        nn.privatize(*model(), **rules)
    assert all(word in str(error.value) for word in (path, *places))


def test_linen_state_and_dropout():
    module = LinenModel("seen")
    private = nn.privatize(module, linen_variables(module), frozen="^seen/")
    with pytest.raises(CoverageError, match="changes its state"):
        private.loss(squares)(private.params, BATCH)
    module = LinenModel("dropout")
    private = nn.privatize(module, linen_variables(module))
    with pytest.raises(CoverageError, match="random numbers"):
        private.loss(squares)(private.params, BATCH)
    rows = jax.tree.map(lambda x: np.repeat(x[:1], 8, axis=0), BATCH)
    rows["dropout"] = jax.random.split(jax.random.key(1), 8)
    losses = jax.jit(private.loss(squares, rng_key="dropout"))(private.params, rows)
    assert len(np.unique(losses)) > 3


def test_coverage_lists_everything():
    private = nn.privatize(Model(scale=Scale(jnp.ones(4)), table=jnp.ones(3)), frozen="scale")
    found = private.coverage(private.loss(squares), BATCH)
    assert [row.path for row in found.trained] == ["linear/bias", "linear/kernel"]
    assert [row.example_bytes for row in found.trained] == [16, 64]
    assert found.frozen == (("scale", "Scale", (4,)), ("table", "array", (3,)))
    lines = str(found).splitlines()
    assert len(lines) == 5
    assert "(4, 4)" in lines[2] and "frozen Scale" in lines[3]


class InBatchNorm(nnx.Module):
    """A batch-coupled layer of one's own, without statistics to be found by."""

    def __call__(self, x):
        return x - x.mean(axis=0, keepdims=True)


@pytest.mark.parametrize(
    "loss",
    [
        squares,
        lambda model, batch: jax.nn.log_softmax(squares(model, batch)),
    ],
    ids=["layer", "loss"],
)
def test_a_loss_that_couples_examples_is_refused(loss):
    """V6 by bits: in the layer, or in the loss (in-batch negatives). A plain one passes above."""
    coupled = loss is squares
    private = nn.privatize(Model(norm=InBatchNorm()) if coupled else Model())
    same = jax.tree.map(lambda x: np.repeat(x[:1], 3, axis=0), BATCH)
    zeros = jax.tree.map(np.zeros_like, BATCH)
    for batch in (BATCH, same, jax.tree.map(lambda x: x[1:2], BATCH), zeros):
        with pytest.raises(CoverageError, match="depends on the others"):
            private.coverage(private.loss(loss), batch)


@pytest.mark.parametrize("reverse", [False, True], ids=["earlier rows", "later rows"])
def test_a_loss_that_looks_one_way_is_refused(reverse):
    private = nn.privatize(Model())
    loss_fn = private.loss(
        lambda model, batch: jax.lax.cumsum(squares(model, batch), reverse=reverse)
    )
    with pytest.raises(CoverageError, match="depends on the others"):
        private.coverage(loss_fn, BATCH)


@pytest.mark.parametrize("rng_key", [None, "dropout"])
@pytest.mark.parametrize("reduce", [jnp.mean, lambda losses: (losses,)], ids=["mean", "tuple"])
def test_a_loss_that_is_not_one_number_an_example_is_refused(rng_key, reduce):
    private = nn.privatize(Model())
    loss_fn = private.loss(lambda model, batch: reduce(squares(model, batch)), rng_key=rng_key)
    batch = BATCH | {"dropout": jax.random.split(jax.random.key(0), 3)}
    calls = [private.coverage] if rng_key is None else [private.coverage, run_on_batch]
    for call in calls:
        with pytest.raises(ArgumentError, match=r"loss_fn.*not one floating-point loss an example"):
            call(loss_fn, batch)


def run_on_batch(loss_fn, batch):
    return loss_fn(nn.privatize(Model()).params, batch)


@pytest.mark.parametrize("number", [np.int32(0), np.float32(0), np.bool_(False)])
def test_rows_of_zeros_hide_no_coupling(number):
    """A product with the mean is zero for an example of zeros, whatever is beside it."""

    def loss(model, batch):
        x = batch["x"].astype(np.float32) * 0.1
        return squares(model, {"x": x * x.mean(axis=0)})

    private = nn.privatize(Model())
    with pytest.raises(CoverageError, match="depends on the others"):
        private.coverage(private.loss(loss), {"x": np.full((3, 4), number)})


class Making(nnx.Module):
    """Does something to itself in each call."""

    def __init__(self, does):
        self.does = does

    def __call__(self, x):
        self.does(self)
        return x


def make_a_parameter(layer):
    layer.late = nnx.Param(jnp.ones(4))


def sow(layer):
    layer.late = nnx.Intermediate(jnp.ones(4))


def make_state(layer):
    layer.late = nnx.Variable(jnp.ones(4))


def move_a_parameter(layer):
    layer.own[...] = layer.own[...] * 2.0


def put_another_in_its_place(layer):
    layer.own = nnx.Param(jnp.ones(4))


@pytest.mark.parametrize(
    ("does", "name"),
    [
        (make_a_parameter, "'norm/late'"),
        (make_state, "'norm/late'"),
        (move_a_parameter, "'norm/own'"),
        (put_another_in_its_place, "'norm/own'"),
    ],
)
def test_what_a_call_makes_or_changes_is_refused(does, name):
    """A step would drop it in silence; what is sown for the caller passes."""
    layer = Making(does)
    layer.own = nnx.Param(jnp.full(4, 2.0))
    private = nn.privatize(Model(norm=layer))
    with pytest.raises(CoverageError, match=name):
        private.loss(squares)(private.params, BATCH)
    sowing = nn.privatize(Model(norm=Making(sow)))
    assert sowing.loss(squares)(sowing.params, BATCH).shape == (3,)
