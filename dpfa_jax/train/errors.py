"""The error of a run that cannot start, go on, or be written down."""

from dpfa_jax.core import DPFAError


class RunError(DPFAError):
    """A run cannot start, go on or be written. What is on the disk is unchanged or still good.

    Attributes:
      place: the folder or file.
      advice: what the caller can do about it.
    """

    def __init__(self, place: object, problem: str, advice: str):
        self.place = str(place)
        self.advice = advice
        super().__init__(f"{place}: {problem}. {advice}".rstrip())
