"""From texts and labels to `ClassificationData`, with a held-out split."""

from collections.abc import Sequence

import numpy as np

from dpfa_jax.train.data.dataset import ClassificationData
from dpfa_jax.train.data.held_out import held_out
from dpfa_jax.train.data.tokens import text_encoder, token_embeddings


def text_data(
    name: str,
    texts: Sequence[str],
    labels: Sequence[str],
    class_names: tuple[str, ...],
    *,
    max_length: int,
    seed: int,
    notes: tuple[str, ...],
) -> ClassificationData:
    """Texts cut to `max_length` public tokens; each label is one of `class_names`."""
    encode = text_encoder(max_length)
    inputs = encode(texts)
    index = {label: number for number, label in enumerate(class_names)}
    numbers = np.asarray([index[label] for label in labels], np.int32)
    test = held_out(len(inputs), seed)
    return ClassificationData(
        name=name,
        train_inputs=inputs[~test],
        train_labels=numbers[~test],
        test_inputs=inputs[test],
        test_labels=numbers[test],
        class_names=class_names,
        kind="text",
        token_embeddings=token_embeddings(),
        encode=encode,
        notes=notes,
    )
