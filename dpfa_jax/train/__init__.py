"""From data to a private model: settings, data, model, loop, checkpoint, report."""

from dpfa_jax.train.config import TrainConfig
from dpfa_jax.train.errors import RunError
from dpfa_jax.train.run import train
from dpfa_jax.train.saved_model import SavedModel, load_model

__all__ = ["RunError", "SavedModel", "TrainConfig", "load_model", "train"]
