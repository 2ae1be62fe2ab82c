"""The error of data that cannot be used as they are."""

from dpfa_jax.core import DPFAError


class DataError(DPFAError, ValueError):
    """Data are missing or malformed; nothing was trained.

    Attributes:
      source: the file or the named data set.
      row: line of the file, counted from 1, or None.
      column: the column's name, or None.
      advice: what the caller can do about it.
    """

    def __init__(
        self,
        source: object,
        problem: str,
        advice: str,
        *,
        row: int | None = None,
        column: str | None = None,
    ):
        self.source = str(source)
        self.row = row
        self.column = column
        self.advice = advice
        where = self.source
        if row is not None:
            where += f", line {row}"
        if column is not None:
            where += f", column {column!r}"
        super().__init__(f"{where}: {problem}. {advice}")
