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


def _tail(radius_bits: int) -> float:
    """Radius of the least u = 2^-(bits + 1): r = sqrt(-2 log u)."""
    return math.sqrt(2.0 * (radius_bits + 1) * math.log(2.0))


# Attention: 40 bits of one counter block. Parameters come by the hundred million in thousands of
# steps, where that tail would cost more delta than is claimed: a second block adds 24 bits.
RADIUS_BITS = 40
LONG_RADIUS_BITS = 64
BOX_MULLER_TAIL = _tail(RADIUS_BITS)
LONG_TAIL = _tail(LONG_RADIUS_BITS)

_TEST = "INSECURE-test-seed/"
_SHORT, _LONG = (f"threefry2x32/box-muller-{n}" for n in (RADIUS_BITS, LONG_RADIUS_BITS))
THREEFRY = Generator(_SHORT, BOX_MULLER_TAIL, is_secret=True)
THREEFRY_LONG = Generator(_LONG, LONG_TAIL, is_secret=True)
INSECURE_TEST = Generator(_TEST + _SHORT, BOX_MULLER_TAIL, is_secret=False)
INSECURE_TEST_LONG = Generator(_TEST + _LONG, LONG_TAIL, is_secret=False)
GENERATORS = {
    generator.name: generator
    for generator in (THREEFRY, THREEFRY_LONG, INSECURE_TEST, INSECURE_TEST_LONG)
}
