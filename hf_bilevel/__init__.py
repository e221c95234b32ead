"""Learn which data to train on, with transformers' Trainer."""

from hf_bilevel.data import DataCollatorWithOrigin
from hf_bilevel.losses import UnitLosses, unit_losses
from hf_bilevel.subset import SelectedSubset
from hf_bilevel.trainers.blade import BladeConfig, BladeMixin, BladeTrainer
from hf_bilevel.trainers.bros import BrosConfig, BrosMixin, BrosTrainer, SampleWeights

__all__ = [
    "BladeConfig",
    "BladeMixin",
    "BladeTrainer",
    "BrosConfig",
    "BrosMixin",
    "BrosTrainer",
    "DataCollatorWithOrigin",
    "SampleWeights",
    "SelectedSubset",
    "UnitLosses",
    "unit_losses",
]
