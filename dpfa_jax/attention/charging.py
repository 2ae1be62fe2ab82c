"""Charge first, then get the key: the only order in which a release may happen."""

from typing import overload

import jax
import numpy as np
from jaxtyping import Array, Key

from dpfa_jax.accounting import Ledger, LedgerFile, record
from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.noise import new_noise_key, promises
from dpfa_jax.release import Release

_MOST_KEYS = 2**24  # 128 MiB of keys: a larger count would be charged and then not fit


@overload
def charge(
    ledger: Ledger, release: Release, count: int | None = None
) -> tuple[Ledger, Key[Array, "..."]]: ...


@overload
def charge(
    ledger: LedgerFile, release: Release, count: int | None = None
) -> tuple[LedgerFile, Key[Array, "..."]]: ...


def charge(
    ledger: Ledger | LedgerFile, release: Release, count: int | None = None
) -> tuple[Ledger | LedgerFile, Key[Array, "..."]]:
    """Records the release, then and only then makes its noise key from OS entropy.

    Args:
      ledger: a `Ledger` (a new one is returned) or an open `LedgerFile` (written before this
        returns; it is handed back).
      release: what is about to be answered.
      count: None for one answer; an int for that many, each with its own key; at most 2^24.

    Returns:
      The ledger that knows of the charge, and a key of shape () or (count,).

    Batch rows of one answer are different individuals, so one charge covers the call. It covers one
    call: each further answer about the same units (another `layer` or `release_id` under the key, a
    key split off it) is one more release and is due one more charge; `count` gives one key for
    each. The key serves this release alone: an eager call for another one is refused. A crash after
    the charge wastes budget; nothing can spend it twice.

    Errors: ArgumentError for a release with test noise, which no ledger should count as private,
    or a count that is out of range (nothing is charged then); BudgetExceededError from a ledger
    file with a budget.
    """
    if release.insecure_test_noise:
        raise ArgumentError(
            "release",
            release,
            "noise from a test seed protects nobody",
            "Use insecure_test_key(seed) directly, and record(ledger, release) to note the run.",
        )
    number = 1 if count is None else checks.count("count", count, maximum=_MOST_KEYS)
    if isinstance(ledger, LedgerFile):
        ledger.charge(release, number)
    elif isinstance(ledger, Ledger):
        ledger = record(ledger, release, number)
    else:
        raise ArgumentError("ledger", ledger, "not a ledger", "Pass a Ledger or a LedgerFile.")
    noise_key = new_noise_key(() if count is None else (number,))
    promises.remember(np.asarray(jax.random.key_data(noise_key)), release.record())
    return ledger, noise_key
