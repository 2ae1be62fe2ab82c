"""Rows of a file with one JSON object a line."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any, TextIO

from dpfa_jax.train.data.errors import DataError
from dpfa_jax.train.data.rows import Row, checked_row, require_columns


def jsonl_rows(
    path: pathlib.Path, stream: TextIO, text_column: str, label_column: str
) -> Iterator[Row]:
    """Each object of the stream. Errors: DataError naming the line."""
    for line, content in enumerate(stream, start=1):
        if not content.strip():
            continue
        try:
            pairs = json.loads(content, object_pairs_hook=list)
        except ValueError as error:
            raise DataError(
                path, f"not valid JSON ({error})", "Write one object a line.", row=line
            ) from None
        except RecursionError:
            raise DataError(
                path, "nested too deeply", "Write one flat object a line.", row=line
            ) from None
        if not _is_object(content, pairs):
            raise DataError(path, "not a JSON object", "Write one object a line.", row=line)
        require_columns(path, [key for key, _ in pairs], (text_column, label_column), line)
        fields = dict(pairs)
        yield checked_row(
            path, line, fields[text_column], fields[label_column], text_column, label_column
        )


def _is_object(content: str, pairs: Any) -> bool:
    return content.lstrip().startswith("{") and isinstance(pairs, list)
