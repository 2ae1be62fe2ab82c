"""Labelled examples with a held-out test split, as every data source delivers them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class ClassificationData:
    """Examples ready for a model. One row is one unit of privacy.

    Attributes:
      name: of the source.
      train_inputs: (n, S) int32 token ids, 0 where padded; or (n, height, width) float32 in [0, 1].
      train_labels: (n,) int32 indices into `class_names`.
      test_inputs, test_labels: the held-out examples, in the same form.
      class_names: names of the classes, taken as public.
      kind: "text" or "image".
      token_embeddings: (V, E) float32 public table for text, None for images.
      encode: raw texts or images -> rows of inputs.
      notes: what was assumed to be public, and what else a report should say.
    """

    name: str
    train_inputs: np.ndarray
    train_labels: np.ndarray
    test_inputs: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    kind: str
    token_embeddings: np.ndarray | None
    encode: Callable[[Sequence[Any]], np.ndarray]
    notes: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.kind in ("text", "image"), self.kind
        assert len(self.train_inputs) == len(self.train_labels)
        assert len(self.test_inputs) == len(self.test_labels)
        assert self.train_inputs.shape[1:] == self.test_inputs.shape[1:]
        assert (self.token_embeddings is not None) == (self.kind == "text")
