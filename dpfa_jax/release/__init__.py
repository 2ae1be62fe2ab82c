"""What is promised: units of privacy, sensitivities, one frozen record a noisy answer."""

from dpfa_jax.release.adaptive_clipping import AdaptiveClipping
from dpfa_jax.release.example import ExampleRelease
from dpfa_jax.release.gaussian import GaussianRecord, Sampling, noise_grid
from dpfa_jax.release.memory import RecordRelease
from dpfa_jax.release.training import TrainingRelease

Release = ExampleRelease | RecordRelease | TrainingRelease

__all__ = [
    "AdaptiveClipping",
    "ExampleRelease",
    "GaussianRecord",
    "RecordRelease",
    "Release",
    "Sampling",
    "TrainingRelease",
    "noise_grid",
]
