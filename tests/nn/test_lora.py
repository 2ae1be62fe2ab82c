"""LoRA: small trained factors, a frozen base that the compiled step takes as an argument."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers.clipping_oracle import check_clipped_sum
from helpers.flax_models import GPT, Llama, language_loss, tokens_batch

from dpfa_jax import nn
from dpfa_jax.core import ArgumentError
from dpfa_jax.dpsgd import DPSGDPlan, make_dp_step
from dpfa_jax.noise import insecure_test_key
from dpfa_jax.release import TrainingRelease

pytestmark = pytest.mark.quickly_compiled


class Small(nnx.Module):
    """Both kinds of linear layer, one of them under two names."""

    def __init__(self, width=6):
        rngs = nnx.Rngs(0)
        self.split = nnx.LinearGeneral(width, (2, 3), rngs=rngs)
        self.turned = nnx.LinearGeneral((2, 3), width, axis=(-2, -1), rngs=rngs)
        self.middle = nnx.List([nnx.Linear(width, width, rngs=rngs)])
        self.again = self.middle[0]

    def __call__(self, x):
        x = self.turned(jnp.sin(self.split(x)))
        return self.again(jnp.sin(self.middle[0](x)))


BATCH = {"x": np.random.default_rng(0).standard_normal((5, 4, 6)).astype(np.float32)}


def loss(model, batch):
    return jnp.sum(jnp.sin(model(batch["x"])), axis=(1, 2))


def adapted(model, targets, **options):
    """With factors that are not zero, as after some steps."""
    model = nn.add_lora(model, rank=2, targets=targets, rngs=nnx.Rngs(1), **options)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nn.LowRankLinear):
            shape = layer.lora_b.shape
            layer.lora_b[...] = 0.3 * jax.random.normal(jax.random.key(2), shape)
    return model


def test_an_update_is_a_low_rank_matrix():
    """At first nothing; then alpha / rank times A B, on flattened input and output axes."""
    plain = Small()
    x = BATCH["x"]
    first = nn.add_lora(plain, rank=2, targets="", rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(first(x), plain(x))
    model = adapted(plain, "", alpha=6.0)
    assert isinstance(model.split, nnx.LoRA) and isinstance(plain.split, nnx.LinearGeneral)
    assert model.again is model.middle[0]  # a layer under two names keeps one update
    for name in ("split", "turned", "again"):
        layer, base = getattr(model, name), getattr(plain, name)
        update = 3.0 * layer.lora_a[...] @ layer.lora_b[...]
        base.kernel[...] = base.kernel[...] + update.reshape(base.kernel.shape)
    np.testing.assert_allclose(model(x), plain(x), rtol=1e-4, atol=1e-5)
    merged = nn.merge_lora(model)
    np.testing.assert_allclose(merged(x), plain(x), rtol=1e-4, atol=1e-5)
    assert nnx.graphdef(merged) == nnx.graphdef(Small())


def test_only_the_updates_are_trained_and_clipped():
    """V8, against the float64 oracle."""
    model = adapted(Small(), "split|turned|middle/0")
    private = nn.privatize(model, trainable=nnx.LoRAParam)
    assert {path.rpartition("/")[2] for path in private.params} == {"lora_a", "lora_b"}
    assert len(private.params) == 6
    assert "split/base_module/kernel" in private.frozen
    check_clipped_sum(private.loss(loss), private.params, BATCH, micro_batch_size=5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "targets", "layers"),
    [(GPT, r"attention/(query|value)$", 4), (Llama, r"(query|value|out|gate|up|down)$", 12)],
)
def test_families(family, targets, layers):
    private = nn.privatize(adapted(family(nnx.Rngs(0)), targets), trainable=nnx.LoRAParam)
    assert len(private.params) == 2 * layers
    loss_fn = private.loss(language_loss)
    check_clipped_sum(loss_fn, private.params, tokens_batch(), micro_batch_size=3)


def test_targets_that_match_nothing_are_refused():
    """V23: the linear layers there are are listed."""
    with pytest.raises(ArgumentError, match="'split', 'turned'") as error:
        nn.add_lora(Small(), rank=2, targets="attention", rngs=nnx.Rngs(0))
    assert error.value.parameter == "targets"
    with pytest.raises(ArgumentError, match="rank = 0"):
        nn.add_lora(Small(), rank=0, targets="", rngs=nnx.Rngs(0))
    batched = nnx.LinearGeneral(3, 3, batch_axis={0: 2}, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match="base"):
        nn.LowRankLinear(batched, rank=1, alpha=1.0, rngs=nnx.Rngs(0))


def _takes(eqn, shape):
    """Whether the equation calls a compiled function on an argument of this shape."""
    return "jaxpr" in eqn.params and shape in [np.shape(v.aval) for v in eqn.invars]


def _constant_shapes(closed):
    """Shapes of the constants in a program and in those that it calls."""
    yield from map(np.shape, closed.consts)
    for eqn in closed.eqns:
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(inner, "consts"):
                yield from _constant_shapes(inner)


@pytest.mark.slow
def test_the_frozen_base_is_an_argument_of_the_step():
    """The compiled step holds no copy of it, which a closure would (the control). It stays."""
    width = 50
    model = nn.add_lora(Small(width), rank=1, targets="middle", rngs=nnx.Rngs(0))
    private = nn.privatize(model, trainable=nnx.LoRAParam)
    release = TrainingRelease(
        l2_clip_norm=1.0,
        noise_multiplier=1.0,
        dataset_size=100,
        expected_batch_size=4,
        num_parameters=private.num_parameters,
        truncated_batch_size=8,
        insecure_test_noise=True,
    )
    plan = DPSGDPlan(release, steps=3, delta=1e-5, micro_batch_size=8)
    batch, real = {"x": np.ones((8, 2, width), np.float32)}, np.arange(8) < 3
    loss_fn = private.loss(loss)

    def weights_of_step(loss_fn):
        """How often the frozen matrix is an argument of the compiled step, and a constant in it."""
        dp = make_dp_step(loss_fn, optax.sgd(0.1), plan)
        program = jax.make_jaxpr(dp.step)(
            dp.init(private.params), batch, jnp.asarray(real), insecure_test_key(0)
        )
        (step,) = (eqn for eqn in program.eqns if _takes(eqn, batch["x"].shape))
        arguments = [np.shape(argument.aval) for argument in step.invars]
        constants = list(_constant_shapes(step.params["jaxpr"]))
        return arguments.count((width, width)), constants.count((width, width))

    assert weights_of_step(loss_fn) == (1, 0)
    assert weights_of_step(lambda params, batch: loss_fn(params, batch)) == (0, 1)

    dp = make_dp_step(loss_fn, optax.sgd(0.1), plan)
    state = dp.step(dp.init(private.params), batch, jnp.asarray(real), insecure_test_key(0))
    trained = private.model(state.params)
    assert not np.array_equal(trained.again.lora_b[...], model.again.lora_b[...])
    np.testing.assert_array_equal(trained.again.base.kernel[...], model.again.base.kernel[...])
