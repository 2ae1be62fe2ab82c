"""Random attention calls, mostly at the borders of tiles."""

import dataclasses
import random

KINDS = (
    "forward", "forward, noise", "forward, pairs", "forward, tiles", "two", "two, pairs", "fused",
    "wide", "wide, pairs", "wide, chunks", "memory", "memory, parts", "bias",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A call; `choice`: of options that change no visible pair; `mask`, `bias`: their shapes."""

    kind: str
    rows: int
    keys: int
    batch: int = 1
    key_heads: int = 1
    group: int = 1
    size: int = 64
    is_causal: bool = False
    window: tuple[int, int] | None = None
    query_lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    processors: int = 1
    choice: int = 0
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None

    @property
    def heads(self):
        return self.key_heads * self.group


def random_case(kind, seed):
    """Sizes, windows and lengths mostly at the borders of tiles."""
    rng = random.Random(f"{kind} {seed}")
    borders = (1, 8, 63, 64, 65, 127, 128, 129, 192, 193, 256, 257)

    def length():
        return rng.choice(borders) if rng.random() < 0.5 else rng.randint(1, 450)

    rows, keys = length(), length()
    keys = rows if rng.random() < 0.2 else keys
    most = max(1, 1500 // max(rows, keys))
    batch = min(most, rng.choice((1, 1, 2, 3)))
    key_heads = min(most // batch, rng.choice((1, 1, 2)))
    group = min(most // (batch * key_heads), rng.choice((1, 1, 2, 3)))

    def window():
        if rng.random() < 0.35:
            return None
        near = (0, 1, 3, 63, 64, 65, 127, 128, 600, rng.randint(0, 300))
        left, right = rng.choice(near), rng.choice(near)
        # A negative side: only keys before, or behind, a row.
        sign = rng.choice((None, None, None, 0, 1))
        if sign is not None:
            back = min(left, right, rng.choice(near))
            left, right = ((-back, right), (left, -back))[sign]
        return left, right

    def lengths(size):
        if rng.random() < 0.4:
            return None
        near = (0, 1, 63, 64, 65, 127, 128, 129, size - 1, size, rng.randint(0, size))
        return tuple(min(rng.choice(near), size) for _ in range(batch))

    def shape():
        return tuple(rng.choice((1, x)) for x in (batch, key_heads * group, rows, keys))

    is_wide = kind.startswith("wide") or kind == "memory, parts"
    found = Case(
        kind, rows, keys, batch, key_heads, group,
        size=rng.choice((192, 256, 200) if is_wide else (64, 128, 40)),
        is_causal=rng.random() < 0.4,
        window=window(),
        query_lengths=lengths(rows) if kind.startswith(("forward", "memory")) else None,
        key_lengths=None if kind.startswith("memory") else lengths(keys),
        processors=rng.choice((1, 1, 2, 3, 132)),
        choice=rng.randrange(12),
    )  # fmt: skip
    if kind.endswith("pairs"):
        what = rng.choice((("mask",), ("bias",), ("mask", "bias")))
        found = dataclasses.replace(found, **{name: shape() for name in what})
    if kind == "bias":
        mask = rng.choice((None, shape()))
        found = dataclasses.replace(found, bias=(*shape()[:3], keys), mask=mask)
    return found
