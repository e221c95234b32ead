"""Learn which data to train on, with transformers' Trainer."""

from hf_bilevel.data import DataCollatorWithOrigin
from hf_bilevel.losses import UnitLosses, unit_losses
from hf_bilevel.trainers.blade import BladeConfig, BladeMixin, BladeTrainer

__all__ = ["BladeConfig", "BladeMixin", "BladeTrainer", "DataCollatorWithOrigin", "UnitLosses", "unit_losses"]
