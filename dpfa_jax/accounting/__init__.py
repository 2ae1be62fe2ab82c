"""Record -> event -> ledger -> epsilon; calibration; the filter; the durable ledger."""

from dpfa_jax.accounting.budget import Budget
from dpfa_jax.accounting.calibration import Calibration, calibrate
from dpfa_jax.accounting.events import dp_event
from dpfa_jax.accounting.file import LedgerFile
from dpfa_jax.accounting.filter import PrivacyFilter
from dpfa_jax.accounting.guarantee import epsilon
from dpfa_jax.accounting.ledger import Entry, Ledger, NonPrivateRecord, record

__all__ = [
    "Budget",
    "Calibration",
    "Entry",
    "Ledger",
    "LedgerFile",
    "NonPrivateRecord",
    "PrivacyFilter",
    "calibrate",
    "dp_event",
    "epsilon",
    "record",
]
