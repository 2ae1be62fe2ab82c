"""From data to a private model: settings, data, model, loop, checkpoint, report."""

from dpfa_jax.train.config import TrainConfig
from dpfa_jax.train.errors import RunError
from dpfa_jax.train.run import train
from dpfa_jax.train.saved_model import SavedModel, load_model
from dpfa_jax.train.state_checkpoints import Resumed, StateCheckpoints

__all__ = [
    "Resumed",
    "RunError",
    "SavedModel",
    "StateCheckpoints",
    "TrainConfig",
    "load_model",
    "train",
]
