"""BLADE in front of TRL's SFTTrainer. Needs the package trl."""

from typing import Any

from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_bilevel.trainers.blade import BladeMixin


class BladeSFTTrainer(BladeMixin, SFTTrainer):
    """BLADE for ``SFTTrainer``.

    Args:
        *args: As for ``SFTTrainer``.
        **kwargs: As for ``SFTTrainer`` and ``BladeTrainer``.
    """


def sft_arguments(args: TrainingArguments) -> SFTConfig:
    """Turn arguments into those of ``SFTTrainer``, for rows that are encoded already.

    Args:
        args: Arguments.

    Returns:
        The same with nothing cut, packed or joined by TRL.
    """
    given: dict[str, Any] = args.to_dict() | {"hub_token": args.hub_token}
    return SFTConfig(**given, max_length=None, packing=False, padding_free=False)
