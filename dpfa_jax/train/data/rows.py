"""One example of a user's file, checked."""

import dataclasses
import math
import pathlib
from typing import Any

from dpfa_jax.core.texts import is_unicode
from dpfa_jax.train.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class Row:
    """A text and its label, and the line of the file they stand on."""

    line: int
    text: str
    label: str


def checked_row(
    path: pathlib.Path, line: int, text: Any, label: Any, text_column: str, label_column: str
) -> Row:
    """The row.

    Errors: DataError for a text or label that is empty, NaN, no string or no Unicode text.
    """
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            path, "no text", "Fill in the text, or leave the row out.", row=line, column=text_column
        )
    if isinstance(label, bool):
        label = "true" if label else "false"
    elif isinstance(label, int):
        label = str(label)
    elif isinstance(label, float) and math.isfinite(label) and label.is_integer():
        label = str(int(label))
    if not isinstance(label, str) or label.strip().lower() in ("", "nan"):
        raise DataError(
            path,
            f"label {label!r} is blank, NaN or no class name",
            "Write a class name, or leave the row out.",
            row=line,
            column=label_column,
        )
    for column, field in ((text_column, text), (label_column, label)):
        if not is_unicode(field):
            raise DataError(
                path,
                "half of a surrogate pair, which is no character",
                "Write the whole pair, or leave it out.",
                row=line,
                column=column,
            )
    return Row(line, text, label.strip())


def require_columns(
    path: pathlib.Path, found: list[str], needed: tuple[str, str], row: int
) -> None:
    """Errors: DataError if a needed column is absent or there twice."""
    for name in needed:
        if name not in found:
            raise DataError(
                path,
                f"no such column; the file has {', '.join(map(repr, found)) or 'none'}",
                "Pass --text-column and --label-column.",
                row=row,
                column=name,
            )
        if found.count(name) > 1:
            raise DataError(
                path, "the header holds this column twice", "Rename one.", row=row, column=name
            )
    if needed[0] == needed[1]:
        raise DataError(
            path, "text and label are the same column", "Pass two columns.", column=needed[0]
        )
