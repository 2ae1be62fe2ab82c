"""10568 movie review snippets rated for sentiment by people (Hutto and Gilbert, 2014).

They lie in the source archive of vaderSentiment (MIT) and in none of its wheels, so no extra of
this package can install them: the archive is read where the user has put it. Label: the sign of
the mean rating; snippets rated 0 are left out.
"""

import hashlib
import io
import os
import pathlib
import tarfile

from dpfa_jax.train.data.dataset import ClassificationData
from dpfa_jax.train.data.errors import DataError
from dpfa_jax.train.data.texts import text_data

CLASS_NAMES = ("negative", "positive")
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_TABLE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def archive_path() -> pathlib.Path:
    """Where the archive is looked for: $DPFA_DATA, or the user's cache folder."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = os.environ.get("DPFA_DATA") or cache / "dp-flash-attention"
    return pathlib.Path(folder) / ARCHIVE


def load_movies(max_length: int, seed: int) -> ClassificationData:
    """The snippets, `max_length` tokens each. Errors: DataError without the true archive."""
    texts, labels = [], []
    for text, rating in _read(archive_path()):
        if rating != 0.0:
            texts.append(text)
            labels.append(CLASS_NAMES[rating > 0.0])
    return text_data(
        "movies",
        texts,
        labels,
        CLASS_NAMES,
        max_length=max_length,
        seed=seed,
        notes=(
            f"Movie snippets: size, classes and split (each row by its own draw, seed {seed}) are"
            " public; ratings of exactly 0 are left out.",
        ),
    )


def _read(path: pathlib.Path) -> list[tuple[str, float]]:
    try:
        archive = path.read_bytes()
    except OSError as error:
        raise DataError(
            path,
            f"the archive of the movie snippets cannot be read ({error.strerror})",
            "No extra installs it. Fetch it: python -m pip download --no-deps --no-binary :all: "
            f"vaderSentiment==3.3.2 --dest {path.parent}",
        ) from None
    if hashlib.sha256(archive).hexdigest() != _SHA256:
        raise DataError(path, "not the published archive (its SHA-256 differs)", "Fetch it again.")
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        inner_file = outer.extractfile(_INNER)
        assert inner_file is not None  # the checksum holds
        with tarfile.open(fileobj=io.BytesIO(inner_file.read())) as inner:
            table = inner.extractfile(_TABLE)
            assert table is not None
            lines = table.read().decode("utf-8").splitlines()
    rows = (line.split("\t") for line in lines if line)
    return [(text, float(rating)) for _, rating, text in rows]
