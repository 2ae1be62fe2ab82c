"""Measured tile sizes, a table for each kind of device: data, made by `benchmarks/tiles.py`.

A table names tiles by the key of a call, such as "mosaic_gpu/forward/64/full/long/plain". It may
change the order of a kernel's sums and nothing else: noise, clip and grid are functions of global
indices (V10). A memory readout's step is part of its sensitivity bound and is in no table.
"""

import dataclasses
import datetime
import functools
import importlib.resources
import json
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from dpfa_jax.core import TileTableError
from dpfa_jax.kernels.base import AttentionSpec, ExampleReadout

LONG = 1024  # keys from which on a call counts as long

Fields = Mapping[str, int | bool | str]


@dataclasses.dataclass(frozen=True)
class TileTable:
    """Tiles measured on one kind of device.

    Attributes:
      device: its kind, as JAX names it.
      date: when they were measured.
      tiles: key of a call -> fields of the tile.
    """

    device: str
    date: datetime.date
    tiles: Mapping[str, Fields]


def key_of(kernel: str, head_size: int, *more: str) -> str:
    """The key of a call: kernel, padded head size, and what else decides."""
    return "/".join((kernel, str(head_size), *more))


def mask_class(spec: AttentionSpec) -> str:
    """ "full", "causal" or "window"."""
    if spec.local_window is not None:
        return "window"
    return "causal" if spec.is_causal else "full"


def length_class(keys: int) -> str:
    """ "short" or "long"."""
    return "long" if keys >= LONG else "short"


def readout_class(spec: AttentionSpec) -> str:
    """ "example" where noise is made, else "plain"."""
    return "example" if isinstance(spec.readout, ExampleReadout) else "plain"


def measured[Tile](
    key: str, make: Callable[[Fields], Tile], fits: Callable[[Tile], bool]
) -> Tile | None:
    """The tile that the table of this device holds for `key`; None: the heuristic is due.

    `make` turns its fields into a tile. None where the device has no table, the table no such key,
    or the tile does not fit. Errors: TileTableError for a table that is damaged, or for fields that
    make no tile.
    """
    table = of_device(device_kind())
    fields = None if table is None else table.tiles.get(key)
    if table is None or fields is None:
        return None
    try:
        tile = make(fields)
    except (TypeError, ValueError, KeyError) as error:
        raise TileTableError(
            f"{file_name(table.device)}: {key} = {dict(fields)} is no tile ({error}). "
            "Make the table anew by benchmarks/tiles.py, or remove the file."
        ) from error
    return tile if fits(tile) else None


def in_use() -> str:
    """Which tiles calls on this machine get, in words."""
    table = of_device(device_kind())
    if table is None:
        return "heuristic"
    return f"measured on {table.device}, {table.date.isoformat()}"


@functools.cache
def device_kind() -> str | None:
    """Kind of the default GPU; None without one."""
    try:
        return str(jax.devices("gpu")[0].device_kind)
    except RuntimeError:
        return None


@functools.cache
def of_device(kind: str | None) -> TileTable | None:
    """The table of one kind of device, read once; None where there is none.

    Errors: TileTableError for a file that is damaged or is another device's.
    """
    if kind is None:
        return None
    name = file_name(kind)
    file = importlib.resources.files("dpfa_jax.kernels") / "tile_data" / name
    if not file.is_file():
        return None
    table = parsed(file.read_bytes(), name)
    if table.device != kind:
        raise TileTableError(f"{name}: measured on {table.device!r}, but named for {kind!r}.")
    return table


def file_name(kind: str) -> str:
    """Of the table of one kind of device: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-") + ".json"


def parsed(content: bytes, name: str) -> TileTable:
    """A table from its file. Errors: TileTableError where it is not whole."""
    try:
        found = json.loads(content)
        tiles = {_text(key): _fields(fields) for key, fields in found["tiles"].items()}
        date = datetime.date.fromisoformat(_text(found["date"]))
        return TileTable(_text(found["device"]), date, MappingProxyType(tiles))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TileTableError(
            f"{name}: not a table of tiles ({type(error).__name__}: {error}). "
            "Make it anew by benchmarks/tiles.py, or remove the file."
        ) from error


def _text(x: Any) -> str:
    if not isinstance(x, str) or not x:
        raise TypeError(f"{x!r} is no text")
    return x


def _fields(fields: Any) -> Fields:
    if not isinstance(fields, dict) or not fields:
        raise TypeError(f"{fields!r} are no fields")
    for value in fields.values():
        if not isinstance(value, int | str):
            raise TypeError(f"{value!r} is no size")
    return MappingProxyType(fields)
