"""Learn which data to train on, with transformers' Trainer."""

from hf_bilevel.data import DataCollatorWithOrigin
from hf_bilevel.losses import UnitLosses, unit_losses
from hf_bilevel.subset import SelectedSubset, load_selected_subset
from hf_bilevel.trainers.blade import BladeConfig, BladeMixin, BladeTrainer
from hf_bilevel.trainers.bros import BrosConfig, BrosMixin, BrosTrainer, SampleWeights
from hf_bilevel.trainers.coreset import CoresetConfig, CoresetMixin, CoresetTrainer
from hf_bilevel.trainers.mixture import MixtureConfig, MixtureMixin, MixtureTrainer

__all__ = [
    "BladeConfig",
    "BladeMixin",
    "BladeTrainer",
    "BrosConfig",
    "BrosMixin",
    "BrosTrainer",
    "CoresetConfig",
    "CoresetMixin",
    "CoresetTrainer",
    "DataCollatorWithOrigin",
    "MixtureConfig",
    "MixtureMixin",
    "MixtureTrainer",
    "SampleWeights",
    "SelectedSubset",
    "UnitLosses",
    "load_selected_subset",
    "unit_losses",
]
