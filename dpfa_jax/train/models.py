"""Models for private training: pure functions of (parameters, inputs), one example at a time."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32

from dpfa_jax.core import checks
from dpfa_jax.train.data import ClassificationData
from dpfa_jax.train.networks import LinearClassifier, TransformerClassifier
from dpfa_jax.train.positions import positions_of

MODELS = ("transformer", "linear")
Params = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A classifier as pure functions.

    Attributes:
      name: of the architecture.
      init: seed -> parameters: path -> float32 array, every one of them trainable.
      logits: (parameters, inputs (B, ...)) -> (B, classes) float32.
      per_example_loss: (parameters, {"inputs": (B, ...), "labels": (B,)}) -> (B,) cross-entropies.
    """

    name: str
    init: Callable[[int], Params]
    logits: Callable[[Params, Array], Float32[Array, "B C"]]
    per_example_loss: Callable[[Params, dict[str, Array]], Float32[Array, " B"]]


def build_model(
    name: str,
    data: ClassificationData,
    *,
    features: int = 64,
    num_heads: int = 4,
    hidden_features: int = 64,
    num_layers: int = 1,
    patch_size: int = 4,
) -> Classifier:
    """A classifier for `data`; of the data it reads the kind, shapes, class names and public table.

    Args:
      name: "transformer" (projection, pre-norm encoder, mean over positions, norm, linear head) or
        "linear" (logistic regression on the mean of a text's tokens, or on an image's pixels).
      features, num_heads, hidden_features, num_layers: of the encoder.
      patch_size: side of the square patches that an image is cut into; it divides both sides.

    Errors: ArgumentError.
    """
    checks.choice("name", name, MODELS)
    positions, width, length = positions_of(data, patch_size)
    classes = len(data.class_names)

    def module(seed: int) -> nnx.Module:
        rngs = nnx.Rngs(seed)
        if name == "linear":
            pixels = length if data.kind == "image" else None
            return LinearClassifier(width, classes, length=pixels, rngs=rngs)
        return TransformerClassifier(
            width,
            length,
            classes,
            features=checks.count("features", features),
            num_heads=checks.count("num_heads", num_heads),
            hidden_features=checks.count("hidden_features", hidden_features),
            num_layers=checks.count("num_layers", num_layers),
            learn_positions=data.kind == "image",
            rngs=rngs,
        )

    # The structure is static: built once without arrays, filled with parameters at each call.
    graph, empty = nnx.split(nnx.eval_shape(lambda: module(0)), nnx.Param)
    paths, structure = jax.tree.flatten_with_path(empty)
    names = [_path_name(path) for path, _ in paths]

    def init(seed: int) -> Params:
        leaves = jax.tree.leaves(nnx.split(module(seed), nnx.Param)[1])
        return dict(zip(names, leaves, strict=True))

    def logits(params: Params, inputs: Array) -> Float32[Array, "B C"]:
        state = jax.tree.unflatten(structure, [params[name] for name in names])
        return nnx.merge(graph, state)(*positions(inputs)).astype(jnp.float32)

    def per_example_loss(params: Params, batch: dict[str, Array]) -> Float32[Array, " B"]:
        log_probabilities = jax.nn.log_softmax(logits(params, batch["inputs"]))
        labels = batch["labels"][:, None].astype(jnp.int32)
        return -jnp.take_along_axis(log_probabilities, labels, axis=1)[:, 0]

    return Classifier(name, init, logits, per_example_loss)


def _path_name(path: tuple) -> str:
    """ "encoder.blocks.0.mlp_in.kernel" of a key path into the module's state."""
    if isinstance(path[-1], jax.tree_util.GetAttrKey):  # the array inside its nnx variable
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")
