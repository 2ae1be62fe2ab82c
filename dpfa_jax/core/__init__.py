"""Words without logic: typed errors, argument checks, generator names."""

from dpfa_jax.core.errors import (
    ArgumentError,
    BudgetExceededError,
    CoverageError,
    DPFAError,
    KeyReuseError,
    LedgerError,
    PrivateAutodiffError,
    TileTableError,
    UnsupportedBackendError,
    UnsupportedEventError,
)
from dpfa_jax.core.generators import (
    GENERATORS,
    INSECURE_TEST,
    INSECURE_TEST_LONG,
    THREEFRY,
    THREEFRY_LONG,
    Generator,
)

__all__ = [
    "GENERATORS",
    "INSECURE_TEST",
    "INSECURE_TEST_LONG",
    "THREEFRY",
    "THREEFRY_LONG",
    "ArgumentError",
    "BudgetExceededError",
    "CoverageError",
    "DPFAError",
    "Generator",
    "KeyReuseError",
    "LedgerError",
    "PrivateAutodiffError",
    "TileTableError",
    "UnsupportedBackendError",
    "UnsupportedEventError",
]
