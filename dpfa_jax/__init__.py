"""DP-Flash-Attention: transformers that keep their training data and their inputs private.

Rooms load on first use, so that importing this package costs no more than importing jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpfa_jax import accounting, attention, dpsgd, nn, noise, train
    from dpfa_jax.accounting import Budget, Ledger, LedgerFile, calibrate, epsilon, record
    from dpfa_jax.attention import charge, dot_product_attention, dp_attention
    from dpfa_jax.release import ExampleRelease, RecordRelease, TrainingRelease

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "ExampleRelease",
    "Ledger",
    "LedgerFile",
    "RecordRelease",
    "TrainingRelease",
    "accounting",
    "attention",
    "calibrate",
    "charge",
    "dot_product_attention",
    "dp_attention",
    "dpsgd",
    "epsilon",
    "nn",
    "noise",
    "record",
    "train",
]

_HOMES = {
    "accounting": ("Budget", "Ledger", "LedgerFile", "calibrate", "epsilon", "record"),
    "attention": ("charge", "dot_product_attention", "dp_attention"),
    "release": ("ExampleRelease", "RecordRelease", "TrainingRelease"),
}
_ROOMS = ("accounting", "attention", "dpsgd", "nn", "noise", "train")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"dpfa_jax.{name}")
    for room, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"dpfa_jax.{room}"), name)
    raise AttributeError(f"module 'dpfa_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
