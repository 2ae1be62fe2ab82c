"""Names and tails of the noise generators, as they travel with every release.

`Generator.tail` is the largest |z| that the sampler can draw, in standard deviations. It costs
delta (see `accounting`), so it is part of the promise, not a detail of the sampler.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Generator:
    """A source of normal noise: its name, its tail in standard deviations, whether it is secret."""

    name: str
    tail: float
    is_secret: bool


# A radius from 40 random bits: r = sqrt(-2 log u), u in [2^-41, 1 - 2^-41].
RADIUS_BITS = 40
BOX_MULLER_TAIL = math.sqrt(2.0 * (RADIUS_BITS + 1) * math.log(2.0))

THREEFRY = Generator("threefry2x32/box-muller-40", BOX_MULLER_TAIL, is_secret=True)
INSECURE_TEST = Generator(
    "INSECURE-test-seed/threefry2x32/box-muller-40", BOX_MULLER_TAIL, is_secret=False
)
GENERATORS = {generator.name: generator for generator in (THREEFRY, INSECURE_TEST)}
