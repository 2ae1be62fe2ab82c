"""A user's own file: CSV with a header row, or JSON lines; one text and one label a row."""

import collections
import pathlib
from collections.abc import Iterator

from dpfa_jax.train.data.csv_rows import csv_rows
from dpfa_jax.train.data.dataset import ClassificationData
from dpfa_jax.train.data.errors import DataError
from dpfa_jax.train.data.jsonl_rows import jsonl_rows
from dpfa_jax.train.data.rows import Row
from dpfa_jax.train.data.texts import text_data

MINIMUM_ROWS = 100


def load_table(
    source: str,
    *,
    max_length: int,
    text_column: str,
    label_column: str,
    class_names: tuple[str, ...] | None,
    seed: int,
) -> ClassificationData:
    """The examples of FILE.csv or FILE.jsonl. Arguments as `load_data`.

    Errors: DataError for a file that is missing, empty, not UTF-8, malformed, of fewer than 100
    rows or of one class; for an absent or doubled column; for an empty text, a blank or NaN label,
    a label that is none of `class_names`. It names the line and the column.
    """
    path = pathlib.Path(source)
    rows = list(_rows(path, text_column, label_column))
    if len(rows) < MINIMUM_ROWS:
        problem = "holds no rows" if not rows else f"holds {len(rows)} rows"
        raise DataError(
            source, problem, f"Private training needs at least {MINIMUM_ROWS}, better thousands."
        )
    found = sorted({row.label for row in rows})
    if class_names is None:
        _refuse_personal_labels(source, rows, label_column)
        class_names = tuple(found)
        note = "Class names were read from the file and count as public schema"
    else:
        note = "Class names were given as public schema"
        for row in rows:
            if row.label not in class_names:
                raise DataError(
                    source,
                    f"label {row.label!r} is none of {', '.join(class_names)}",
                    "Add it to class_names, or correct the row.",
                    row=row.line,
                    column=label_column,
                )
    if len(class_names) < 2:
        raise DataError(
            source,
            f"holds one class only, {found[0]!r}",
            "Pass data with at least two classes.",
            column=label_column,
        )
    return text_data(
        path.name,
        [row.text for row in rows],
        [row.label for row in rows],
        class_names,
        max_length=max_length,
        seed=seed,
        notes=(
            f"{note}: {', '.join(class_names)}.",
            f"The number of rows and the split (each row by its own draw, seed {seed}) count as"
            " public. Test rows take no part in training; accuracy on them is not private.",
            "One row is one unit of privacy: a person with several rows is protected less.",
        ),
    )


def _refuse_personal_labels(source: str, rows: list[Row], label_column: str) -> None:
    """Class names are published as they are; a label of one row alone is that row's own value."""
    counts = collections.Counter(row.label for row in rows)
    alone = sum(count == 1 for count in counts.values())
    if alone:
        raise DataError(
            source,
            f"{alone} of its {len(counts)} labels occur once only; the report names all classes, "
            "so each of these would publish one person's value",
            "Check the label column, merge rare labels, or pass the public --class-names.",
            column=label_column,
        )


def _rows(path: pathlib.Path, text_column: str, label_column: str) -> Iterator[Row]:
    read = csv_rows if path.suffix.lower() == ".csv" else jsonl_rows
    try:
        # utf-8-sig: spreadsheets write a byte-order mark that would hide in the first column name.
        with path.open(encoding="utf-8-sig", newline="") as stream:
            yield from read(path, stream, text_column, label_column)
    except UnicodeDecodeError:
        raise DataError(
            path, "not UTF-8", "Save the file as UTF-8.", row=_first_bad_line(path)
        ) from None
    except OSError as error:
        raise DataError(
            path, f"cannot be read ({error.strerror})", "Check the path and its permissions."
        ) from None


def _first_bad_line(path: pathlib.Path) -> int | None:
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:  # counted here: the stream counts from its last chunk
        return content[: error.start].count(b"\n") + 1
    return None
