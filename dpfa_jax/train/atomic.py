"""Files that are whole or absent, whenever the process or the machine stops."""

import json
import os
from pathlib import Path
from typing import Any


def write_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to a sibling, syncs it and renames it to `path`. Errors: OSError."""
    sibling = path.with_name(path.name + ".part")
    try:
        with sibling.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(sibling, path)
    except OSError:
        sibling.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON; NaN is refused. Errors: OSError, ValueError."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_bytes(path, text.encode())
