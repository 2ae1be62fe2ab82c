"""How the noise of a release is divided over its heads or clip groups."""

from dpfa_jax.core import ArgumentError, checks


def checked_shares(
    name: str, shares: tuple[float, ...] | None, groups: int, group_name: str
) -> tuple[float, ...]:
    """Relative noise standard deviations, one a group; equal where `shares` is None.

    Errors: ArgumentError where the number of shares is wrong or one is outside 1e-18 .. 1e18.
    """
    if shares is None:
        return (1.0,) * groups
    if len(shares) != groups:
        raise ArgumentError(
            name, shares, f"{len(shares)} shares for {groups} {group_name}", "Pass one share each."
        )
    return tuple(checks.magnitude(name, share) for share in shares)
