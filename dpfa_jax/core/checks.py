"""Argument checks for host numbers. They refuse traced values: a bound must not depend on data."""

import math
import numbers

from dpfa_jax.core.errors import ArgumentError

# Largest integer up to which every integer is a float too: beyond it, arithmetic on counts rounds.
LARGEST_COUNT = 2**53


def real(name: str, value: object) -> float:
    """`value` as a finite Python float.

    Errors: ArgumentError if it is a bool, a traced or non-numeric value, NaN or infinite.
    """
    if isinstance(value, (bool, str, bytes)) or value is None:
        raise ArgumentError(name, value, "not a real number", "Pass a Python float.")
    if not isinstance(value, numbers.Real):  # an array may be traced, and is no key of a cache
        raise ArgumentError(
            name,
            value,
            "not a concrete real number",
            "Pass a Python float that does not depend on traced or private values: float(x).",
        )
    try:
        number = float(value)
    except OverflowError:
        raise ArgumentError(
            name, _shown(value), "too large for a float", "Pass a finite number."
        ) from None
    if not math.isfinite(number):
        raise ArgumentError(name, value, "not finite", "Pass a finite number.")
    return number


def positive(name: str, value: object) -> float:
    """`value` as a finite float > 0. Errors: ArgumentError."""
    number = real(name, value)
    if number <= 0.0:
        raise ArgumentError(name, value, "not positive", "Pass a number greater than 0.")
    return number


def magnitude(name: str, value: object) -> float:
    """`value` as a float in 1e-18 .. 1e18, whose products stay normal float32.

    Errors: ArgumentError.
    """
    number = positive(name, value)
    if not 1e-18 <= number <= 1e18:
        raise ArgumentError(name, value, "outside 1e-18 .. 1e18", "Rescale the data.")
    return number


def nonnegative(name: str, value: object) -> float:
    """`value` as a finite float >= 0. Errors: ArgumentError."""
    number = real(name, value)
    if number < 0.0:
        raise ArgumentError(name, value, "negative", "Pass 0 or a positive number.")
    return number


def probability(name: str, value: object) -> float:
    """`value` as a float in (0, 1]. Errors: ArgumentError."""
    number = positive(name, value)
    if number > 1.0:
        raise ArgumentError(name, value, "greater than 1", "Pass a probability in (0, 1].")
    return number


def count(name: str, value: object, *, minimum: int = 1, maximum: int = LARGEST_COUNT) -> int:
    """`value` as a Python int in `minimum` .. `maximum`. Errors: ArgumentError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentError(name, value, "not an integer", "Pass a Python int.")
    number = int(value)
    if number < minimum:
        problem = f"less than {minimum}"
        raise ArgumentError(name, _shown(value), problem, f"Pass an int >= {minimum}.")
    if number > maximum:
        problem = f"more than {maximum}"
        raise ArgumentError(name, _shown(value), problem, f"Pass an int <= {maximum}.")
    return number


def delta(name: str, value: object, *, units: int | None = None) -> float:
    """`value` as a DP delta in (0, 1), below 1/`units` where the number of units is public.

    Errors: ArgumentError. A delta of 1/n allows the mechanism to publish one whole record.
    """
    number = positive(name, value)
    if number >= 1.0:
        raise ArgumentError(name, value, "not below 1", "Pass a delta well below 1/n.")
    if units is not None and number >= 1.0 / units:
        raise ArgumentError(
            name,
            value,
            f"not below 1/n = {1.0 / units:.3g}",
            f"Such a delta lets one of the {units} records be published whole; "
            "pass a smaller one, 1/(10 n) or less.",
        )
    return number


def choice(name: str, value: object, options: tuple[str, ...]) -> str:
    """`value` if it is one of `options`. Errors: ArgumentError."""
    if value not in options:
        raise ArgumentError(name, value, "not an option", f"Pass one of {', '.join(options)}.")
    assert isinstance(value, str)
    return value


def _shown(value: object) -> object:
    """`value` for a message: a very long int by its size, as Python refuses to print it."""
    if isinstance(value, numbers.Integral) and abs(int(value)) >= 10**40:
        return f"<an int of {int(value).bit_length()} bits>"
    return value
