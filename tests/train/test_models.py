"""Classifiers: trainable float32 parameters only, one example at a time, public preparation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpfa_jax.train.data import ClassificationData
from dpfa_jax.train.defaults import DEFAULTS, defaults_for
from dpfa_jax.train.models import build_model

pytestmark = pytest.mark.quickly_compiled

VOCABULARY, LENGTH, CLASSES = 50, 6, 3


def text_data(seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY, (20, LENGTH)).astype(np.int32)
    ids[::2, 4:] = 0
    labels = rng.integers(0, CLASSES, 20).astype(np.int32)
    table = rng.normal(size=(VOCABULARY, 12)).astype(np.float32)
    names = tuple("abc")
    return ClassificationData(
        "t", ids, labels, ids[:2], labels[:2], names, "text", table, np.asarray, ()
    )


def image_data(seed=0):
    images = np.random.default_rng(seed).random((20, 8, 8), dtype=np.float32)
    labels = np.arange(20, dtype=np.int32) % CLASSES
    return ClassificationData(
        "i", images, labels, images[:2], labels[:2], tuple("abc"), "image", None, np.asarray, ()
    )


def batch_of(data):
    return {"inputs": jnp.asarray(data.train_inputs), "labels": jnp.asarray(data.train_labels)}


def moved(params):
    """Away from the zeros of the initial head and residual matrices."""
    rng = np.random.default_rng(9)
    return {
        name: np.float32(leaf + 0.3 * rng.standard_normal(leaf.shape))
        for name, leaf in params.items()
    }


@pytest.mark.parametrize(
    ("name", "data"),
    [
        pytest.param("transformer", text_data(), marks=pytest.mark.slow),
        pytest.param("transformer", image_data(), marks=pytest.mark.slow),
        ("linear", text_data()),
        ("linear", image_data()),
    ],
    ids=["text-transformer", "image-transformer", "text-linear", "image-linear"],
)
def test_parameters_are_trainable_float32_and_seeded(name, data):
    model = build_model(name, data, features=8, num_heads=2, hidden_features=8)
    params = model.init(0)
    assert all(leaf.dtype == jnp.float32 for leaf in params.values())
    # The frozen table is no parameter, and every parameter has a gradient.
    assert all(VOCABULARY not in leaf.shape for leaf in params.values())
    for key, leaf in model.init(0).items():
        np.testing.assert_array_equal(leaf, params[key])
    if name == "transformer":
        assert any((model.init(1)[key] != leaf).any() for key, leaf in params.items())
    loss = jax.jit(lambda params: model.per_example_loss(params, batch_of(data)).sum())
    gradient = jax.grad(loss)(moved(params))
    # A bias on all keys shifts every logit of a row alike: softmax ignores it.
    zero = [key for key, leaf in gradient.items() if jnp.abs(leaf).max() < 1e-5]
    assert all(key.endswith("attention.key.bias") for key in zero), zero
    np.testing.assert_allclose(
        model.per_example_loss(params, batch_of(data)), np.log(CLASSES), 1e-5
    )


@pytest.mark.parametrize(
    "data",
    [text_data(), pytest.param(image_data(), marks=pytest.mark.slow)],
    ids=["text", "image"],
)
def test_no_example_touches_another(data):
    """V6: example i's loss and gradient are those of a batch that holds it alone."""
    model = build_model("transformer", data, features=8, num_heads=2, hidden_features=8)
    params, batch = moved(model.init(0)), batch_of(data)

    @jax.jit
    def together_and_alone(params, batch):
        alone = jax.vmap(
            lambda x, y: model.per_example_loss(params, {"inputs": x[None], "labels": y[None]})[0]
        )(batch["inputs"], batch["labels"])
        return model.per_example_loss(params, batch), alone

    np.testing.assert_allclose(*together_and_alone(params, batch), rtol=1e-5, atol=1e-5)
    if data.kind == "image":
        weights = jax.jacobian(lambda x: model.logits(params, x).sum(axis=1))
        across = weights(batch["inputs"][:3])
        assert float(jnp.abs(across[0, 1:]).max()) == 0.0 < float(jnp.abs(across[0, 0]).max())


@pytest.mark.slow
def test_padding_takes_no_part():
    """V7: other padding length, same logits; a text of padding alone is finite."""
    data = text_data()
    model = build_model("transformer", data, features=8, num_heads=2, hidden_features=8)
    params = moved(model.init(0))
    ids = data.train_inputs[:2]
    longer = np.pad(ids, ((0, 0), (0, 5)))
    np.testing.assert_allclose(
        model.logits(params, ids), model.logits(params, longer), rtol=1e-5, atol=1e-5
    )
    assert jnp.isfinite(model.logits(params, np.zeros((1, LENGTH), np.int32))).all()


def test_the_model_uses_public_numbers_only():
    """Parameters and preparation are the same for any two sets of examples."""
    one, other = text_data(0), text_data(1)
    other = ClassificationData(**{**vars(other), "token_embeddings": one.token_embeddings})
    models = [build_model("transformer", data, features=8, num_heads=2) for data in (one, other)]
    params = moved(models[0].init(0))
    np.testing.assert_array_equal(*(m.logits(params, one.train_inputs) for m in models))


def test_defaults_cover_every_source():
    assert set(DEFAULTS) == {"r8", "movies", "mnist", "digits", "csv"}
    assert defaults_for("some/FILE.JSONL") == DEFAULTS["csv"]
    with pytest.raises(ValueError, match="not a known source"):
        defaults_for("r9")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"features": 0}, "features"),
        ({"num_layers": 1.5}, "num_layers"),
        ({"patch_size": 3}, "patch_size"),
    ],
)
def test_bad_sizes_are_named(options, match):
    """V23."""
    with pytest.raises(ValueError, match=match):
        build_model("transformer", image_data(), **options)
    with pytest.raises(ValueError, match="transformer, linear"):
        build_model("bert", image_data())
