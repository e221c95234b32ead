"""Say what a run would do and cost, without doing it."""

import dataclasses
import math
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from hf_bilevel.commands.arguments import DataArguments, ModelArguments, RunArguments
from hf_bilevel.commands.sources import AnyDataset
from hf_bilevel.core.selection import num_selected
from hf_bilevel.derivatives import LowerBlocks
from hf_bilevel.losses import LM_HEADS, find_head
from hf_bilevel.tangent_kernel import num_draws, rows_at_once
from hf_bilevel.trainers.blade import BladeConfig
from hf_bilevel.trainers.bros import BrosConfig
from hf_bilevel.trainers.config import BilevelConfig
from hf_bilevel.trainers.coreset import NUM_UNIFORM, CoresetConfig
from hf_bilevel.trainers.cost import TRAINING, Load
from hf_bilevel.trainers.mixture import MixtureConfig
from hf_bilevel.trainers.reference_models import is_peft_model

SHOWN = ("output_dir", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed")

Settings = tuple[ModelArguments, DataArguments, RunArguments, TrainingArguments, BilevelConfig]


@dataclasses.dataclass(frozen=True)
class Batches:
    """The arithmetic of batches, as the Trainer does it.

    Args:
        num_rows: Rows of what is trained on; None for a stream.
        args: The arguments.

    Example:
        >>> args = TrainingArguments("output", per_device_train_batch_size=8, gradient_accumulation_steps=2, use_cpu=True)
        >>> batches = Batches(100, args)
        >>> batches.rows_per_step, batches.steps_per_epoch, batches.steps
        (16, 7, 21)
    """

    num_rows: int | None
    args: TrainingArguments

    @property
    def rows_per_step(self) -> int:
        """Candidates of an optimizer step, over devices and accumulation."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        per_loader = self.num_rows / (self.args.train_batch_size * self.args.world_size)
        length = math.floor(per_loader) if self.args.dataloader_drop_last else math.ceil(per_loader)
        return max(1, math.ceil(length / self.args.gradient_accumulation_steps))

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self.steps_per_epoch)


def describe(method: str, settings: Settings, parts: dict[str, AnyDataset], model: nn.Module) -> str:
    """Describe a run.

    Args:
        method: The command.
        settings: What was parsed.
        parts: The encoded datasets.
        model: The model, on the device ``meta``.

    Returns:
        Settings that differ from their defaults, the arithmetic of batches, cost and memory, as text.
    """
    *_, job, args, config = settings
    if getattr(job, "mixture_file", None) is not None:
        config = dataclasses.replace(config, mixture="uniform")  # fixed, so as many passes
    num_pool = num_trained = _length(parts["train"])
    if isinstance(config, CoresetConfig) and config.size != "pool" and num_pool is not None:
        num_trained = min(num_pool, _in_rows(config.size, num_pool))
    batches = Batches(num_trained, args)
    lines = [
        f"hf-bilevel {method}, a dry run: nothing is trained and nothing is written.",
        "",
        "Settings that differ:",
    ]
    lines += [f"  {name}: {value}" for name, value in _differing(settings).items()]
    lines += ["", "Data:"]
    for name, part in parts.items():
        length = _length(part)
        lines.append(f"  {name}: {'a stream' if length is None else f'{length:,} rows'}")
    lines += ["", "Batches:", *(f"  {line}" for line in _batches(batches, config, model))]
    lines += ["", "Cost, in forward passes of one row (forward and backward count 3), evaluation left out:"]
    lines += [f"  {line}" for line in _cost(batches, config, model, num_pool, parts)]
    lines += [
        "",
        "Memory, for one process, in MiB:",
        *(f"  {line}" for line in _memory(args, config, model, num_pool)),
    ]
    return "\n".join(lines)


def _length(dataset: AnyDataset) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _in_rows(size: int | float, num: int) -> int:
    return math.ceil(size * num) if isinstance(size, float) else size


def _differing(settings: Settings) -> dict[str, Any]:
    model, data, job, args, config = settings
    default_args = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu).to_dict()  # which hides tokens
    values = {name: value for name, value in args.to_dict().items() if name in SHOWN or value != default_args[name]}
    for part in (model, data, job, config):
        for entry in dataclasses.fields(part):
            value = getattr(part, entry.name)
            default = entry.default
            if str(value) != str(default):  # fields that are a number or a word have the default as a word
                values[entry.name] = value
    return values


def _selects_tokens(config: BladeConfig, model: nn.Module) -> bool:
    return config.granularity == "token" or config.granularity == "auto" and find_head(model) in LM_HEADS


def _batches(batches: Batches, config: BilevelConfig, model: nn.Module) -> list[str]:
    args, rows = batches.args, batches.rows_per_step
    name = "candidates" if isinstance(config, BladeConfig) else "rows"
    lines = [
        f"{name} of a step: {args.train_batch_size} per device × {args.gradient_accumulation_steps} accumulated × "
        f"{args.world_size} processes = {rows:,}"
    ]
    if isinstance(config, BladeConfig):
        if _selects_tokens(config, model):
            lines.append(f"selected: {config.selection_ratio:.0%} of their tokens")
        else:
            num = num_selected(config.selection_ratio, args.train_batch_size) * rows // args.train_batch_size
            lines.append(f"selected: {num:,} rows")
    if batches.num_rows is not None:
        lines.append(f"steps of an epoch: {batches.steps_per_epoch:,} ({batches.num_rows:,} rows)")
    lines.append(f"steps of the run: {batches.steps:,}")
    if _has_dynamic_reference(config):
        sync_steps, reference_steps = config.schedule(batches.steps)[:2]
        lines.append(f"reference: every {sync_steps:,} steps it is made anew and takes {reference_steps:,}")
    return lines


def _has_dynamic_reference(config: BilevelConfig) -> bool:
    if isinstance(config, MixtureConfig):
        return (config.mixture, config.hypergradient) == ("learned", "penalty")
    if not isinstance(config, BladeConfig) or config.selection_ratio == 1:
        return False
    return (config.score, config.reference) == ("excess_loss", "dynamic")


# Cost ---------------------------------------------------------------------------------------------------------------


def _cost(
    batches: Batches, config: BilevelConfig, model: nn.Module, num_pool: int | None, parts: dict[str, AnyDataset]
) -> list[str]:
    args = batches.args
    load = Load(batches.rows_per_step, batches.steps, args.train_batch_size, args.world_size)
    plain = load.plain_passes
    if isinstance(config, CoresetConfig):
        num_target = _length(parts["target"]) if "target" in parts else None
        num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        search = _coreset_search(config, num_pool, num_target, num_parameters)
        on_pool = TRAINING * batches.rows_per_step * Batches(num_pool, args).steps
        return [
            f"search: {search:,.0f}",
            f"training on the coreset: {plain:,}",
            f"whole run: {search + plain:,.0f}, {(search + plain) / on_pool:.2f} times the plain Trainer on the pool ({on_pool:,})",
        ]
    if isinstance(config, BladeConfig):
        total = config.forward_passes(load, _selects_tokens(config, model))
    else:
        total = config.forward_passes(load)
    return [
        f"a step, on average: {total / batches.steps:,.1f}; with the plain Trainer {TRAINING * batches.rows_per_step:,}",
        f"whole run: {total:,.0f}, {total / plain:.2f} times the plain Trainer ({plain:,})",
    ]


def _coreset_search(config: CoresetConfig, num_pool: int, num_target: int | None, num_parameters: int) -> float:
    if config.size == "pool":
        return 0.0
    num_upper = num_pool if num_target is None else num_target
    masked = min(num_pool, _in_rows(config.size, num_pool))
    training = config.inner_steps * TRAINING * min(config.inner_batch_size or masked, masked)
    if config.engine == "kernel":  # each block of rows beside all that come after it; masks take no pass
        starts = range(0, num_pool, rows_at_once(num_parameters))
        rows = sum(num_pool - start for start in starts) + len(starts) * (num_target or 0)
        gradients = num_draws(config.kernel_trainings) * TRAINING * rows
        return float(config.kernel_trainings * training + gradients)
    compared = min(config.num_upper_rows or num_upper, num_upper)
    at_the_end = max(1, config.num_final_masks) + NUM_UNIFORM
    return config.outer_steps * config.num_masks * (training + compared) + at_the_end * (training + num_upper)


# Memory -------------------------------------------------------------------------------------------------------------


def _memory(args: TrainingArguments, config: BilevelConfig, model: nn.Module, num_pool: int | None) -> list[str]:
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(p.numel() * p.element_size() for p in trained)
    states = _state_bytes(args.optim.value, trained)
    found: dict[str, float | None] = {"weights": weights}
    if isinstance(config, BrosConfig) and config.upper_variable != "fixed":
        rank = "full" if is_peft_model(model) else config.rank
        blocks = LowerBlocks(model, rank, config.modules, config.rest)
        size = 4 if config.auxiliary_dtype == "float32" else 2
        found["gradients, of the loss and along the auxiliary variable"] = 2 * _bytes(blocks.leaves)
        found["optimizer"] = _state_bytes(args.optim.value, blocks.leaves)
        found["auxiliary variable"] = size * sum(p.numel() for p in blocks.parameters)
        if num_pool is not None and config.upper_variable == "table":
            found["sample weights"] = 8 * num_pool
    else:
        found |= {"gradients": gradients, "optimizer": states}
    if _has_dynamic_reference(config):
        adapter = is_peft_model(model)
        found["reference, " + ("a second adapter" if adapter else "a copy")] = gradients if adapter else weights
        found["its optimizer, while it is trained"] = states
    if (
        isinstance(config, CoresetConfig)
        and config.size != "pool"
        and config.engine == "kernel"
        and num_pool is not None
    ):
        at_once = min(num_pool, rows_at_once(sum(p.numel() for p in trained)))
        found["gradients of two blocks of rows, while the kernel is made"] = 2 * at_once * gradients
        found["matrices of pool by pool"] = (3 if config.pool_share else 2) * 8 * num_pool**2
    elif isinstance(config, CoresetConfig) and config.size != "pool":
        found[f"search, one model of {config.num_masks} at a time; the batched engine holds all"] = 4 * gradients
    total = sum(value for value in found.values() if value is not None)
    lines = [f"{name}: {'not known' if value is None else f'{value / 2**20:,.1f}'}" for name, value in found.items()]
    return [*lines, f"sum: {total / 2**20:,.1f}", "not counted: activations, data, and what the libraries need"]


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _state_bytes(optim: str, tensors: list[torch.Tensor]) -> float | None:
    """Bytes of an optimizer's state; None where it is not known here."""
    if optim == "sgd":
        return 0
    if not optim.startswith("adamw"):
        return None
    return 2 * sum(t.numel() for t in tensors) if "8bit" in optim else 2 * _bytes(tensors)
