"""From the name of a source to its data."""

import pathlib

from dpfa_jax.train.data.dataset import ClassificationData
from dpfa_jax.train.data.digits import load_digits
from dpfa_jax.train.data.errors import DataError
from dpfa_jax.train.data.mnist import load_mnist
from dpfa_jax.train.data.movies import load_movies
from dpfa_jax.train.data.reuters import load_reuters
from dpfa_jax.train.data.table import load_table

SOURCES = ("r8", "movies", "mnist", "digits")


def load_data(
    source: str,
    *,
    max_length: int = 64,
    text_column: str = "text",
    label_column: str = "label",
    class_names: tuple[str, ...] | None = None,
    seed: int = 0,
) -> ClassificationData:
    """The examples of `source`, with a held-out test split.

    Args:
      source: "r8", "movies", "mnist", "digits", or the path of a .csv or .jsonl file.
      max_length: tokens a text, [CLS] included. Public.
      text_column, label_column: of a file.
      class_names: public names of a file's classes; where None they are read from the file, and
        the notes say that they count as public.
      seed: of the held-out split, where the source has no official one.

    Errors: DataError naming the source, line and column; ArgumentError.
    """
    if source == "r8":
        return load_reuters(max_length)
    if source == "movies":
        return load_movies(max_length, seed)
    if source == "mnist":
        return load_mnist(seed)
    if source == "digits":
        return load_digits(seed)
    suffix = pathlib.PurePath(source).suffix.lower()
    if suffix in (".csv", ".jsonl"):
        return load_table(
            source,
            max_length=max_length,
            text_column=text_column,
            label_column=label_column,
            class_names=class_names,
            seed=seed,
        )
    raise DataError(
        source, "not a known source", f"Pass one of {', '.join(SOURCES)}, FILE.csv or FILE.jsonl."
    )
