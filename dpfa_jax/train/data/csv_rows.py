"""Rows of a CSV file with a header."""

import csv
import pathlib
from collections.abc import Iterator
from typing import TextIO

from dpfa_jax.train.data.errors import DataError
from dpfa_jax.train.data.rows import Row, checked_row, require_columns


def csv_rows(
    path: pathlib.Path, stream: TextIO, text_column: str, label_column: str
) -> Iterator[Row]:
    """Each row of the stream. Errors: DataError naming the line where the row ends."""
    reader = csv.reader(stream, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise DataError(path, "the file is empty", "Pass a header row and examples.")
        header = [name.strip() for name in header]
        require_columns(path, header, (text_column, label_column), reader.line_num)
        text_at, label_at = header.index(text_column), header.index(label_column)
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise DataError(
                    path,
                    f"{len(fields)} fields where the header has {len(header)}",
                    "Quote fields that hold commas or line breaks.",
                    row=reader.line_num,
                )
            yield checked_row(
                path, reader.line_num, fields[text_at], fields[label_at], text_column, label_column
            )
    except csv.Error as error:
        raise DataError(
            path, f"not valid CSV ({error})", "Correct the quoting.", row=reader.line_num
        ) from None
