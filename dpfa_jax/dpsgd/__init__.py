"""DP-SGD: one plan that couples sampling, clipping, noise and release; the step that keeps it."""

from dpfa_jax.dpsgd.batches import poisson_batches, take_batch
from dpfa_jax.dpsgd.correlated_noise import banded_strategy
from dpfa_jax.dpsgd.coverage import Covered, coverage
from dpfa_jax.dpsgd.micro_batch import largest_micro_batch
from dpfa_jax.dpsgd.noise_state import NoisySumState
from dpfa_jax.dpsgd.noisy_sum import noisy_sum
from dpfa_jax.dpsgd.parameters import ClipGroups, per_layer_groups
from dpfa_jax.dpsgd.plan import DPSGDPlan
from dpfa_jax.dpsgd.step import DPState, DPStep, make_dp_step, restarted

__all__ = [
    "ClipGroups",
    "Covered",
    "DPSGDPlan",
    "DPState",
    "DPStep",
    "NoisySumState",
    "banded_strategy",
    "coverage",
    "largest_micro_batch",
    "make_dp_step",
    "noisy_sum",
    "per_layer_groups",
    "poisson_batches",
    "restarted",
    "take_batch",
]
