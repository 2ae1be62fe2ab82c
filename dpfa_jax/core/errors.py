"""Typed errors. Each names the parameter and its value, and says what to do."""


class DPFAError(Exception):
    """Base class of every error that this library raises on purpose."""


class ArgumentError(DPFAError, ValueError):
    """An argument is outside what the function promises to handle.

    Attributes:
      parameter: the argument's name, as the caller wrote it.
      value: what was passed.
      problem: what is wrong with it.
      advice: what the caller can do about it.
    """

    def __init__(self, parameter: str, value: object, problem: str, advice: str):
        self.parameter = parameter
        self.value = value
        self.problem = problem
        self.advice = advice
        super().__init__(f"{parameter} = {value!r}: {problem}. {advice}")


class BudgetExceededError(DPFAError):
    """A release would pass the privacy budget; nothing was released."""


class KeyReuseError(DPFAError):
    """A noise key would be used for two releases; their difference would be noise-free."""


class CoverageError(DPFAError):
    """A trainable parameter is under no clipping rule; it would leave unprotected."""


class PrivateAutodiffError(DPFAError, TypeError):
    """Automatic differentiation reached a release that does not offer it."""


class LedgerError(DPFAError):
    """A ledger cannot be read, written or trusted."""


class UnsupportedEventError(DPFAError, ValueError):
    """An event and a relation, unit or accountant that do not go together."""


class TileTableError(DPFAError, ValueError):
    """A table of measured tiles is damaged, or is another device's."""


class UnsupportedBackendError(DPFAError, NotImplementedError):
    """One backend cannot serve this call; the message is its reason."""
