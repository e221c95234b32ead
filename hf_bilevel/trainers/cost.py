"""What a run costs, in forward passes of one row: for the plan of a run, and for the card of one that is over."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_bilevel.core.mixture import optimal_inner_steps
from hf_bilevel.core.selection import num_selected, synchronisation_schedule

if TYPE_CHECKING:  # the trainers import this module
    from hf_bilevel.trainers.blade import BladeConfig
    from hf_bilevel.trainers.bros import BrosConfig
    from hf_bilevel.trainers.mixture import MixtureConfig

TRAINING = 3  # a forward and backward pass, in forward passes


@dataclass(frozen=True)
class Load:
    """How many rows a run trains on, as the Trainer counts them.

    Args:
        rows_per_step: Candidates of an optimizer step, over processes and accumulation.
        steps: Optimizer steps of the run.
        batch_size: Rows of a training batch of one process.
        num_processes: Processes.

    Example:
        >>> Load(rows_per_step=16, steps=10, batch_size=8, num_processes=2).plain_passes
        480
    """

    rows_per_step: int
    steps: int
    batch_size: int
    num_processes: int

    @property
    def plain_passes(self) -> int:
        """What the plain Trainer needs for as many steps."""
        return TRAINING * self.rows_per_step * self.steps


def blade_passes(config: "BladeConfig", load: Load, selects_tokens: bool) -> float:
    """Count the passes of a run with ``BladeTrainer``, evaluation left out.

    Args:
        config: Its settings.
        load: What it trains on.
        selects_tokens: Whether tokens are selected, not samples.

    Returns:
        Forward passes of one row; a forward and backward pass counts 3.
    """
    rows, steps, size = load.rows_per_step, load.steps, load.batch_size
    if config.selection_ratio == 1:
        return load.plain_passes
    selecting = max(0, steps - config.start_step)
    share = 1.0 if selects_tokens else num_selected(config.selection_ratio, size) / size
    if selects_tokens:
        scoring = int(config.score == "excess_loss")  # the model's own losses come from the training pass
    else:
        scoring = {"excess_loss": 2, "loss": 1, "random": 1}[config.score]  # a loss that is not finite is never drawn
    total = TRAINING * rows * (steps - selecting) + (scoring + TRAINING * share) * rows * selecting
    if (config.score, config.reference) == ("excess_loss", "dynamic") and selecting:
        sync_steps, reference_steps = reference_schedule(config, steps)
        first = reference_steps if config.first_reference_steps == "auto" else config.first_reference_steps
        later = (math.ceil(selecting / sync_steps) - 1) * reference_steps
        target = TRAINING * (config.target_batch_size or size)
        lower = 0 if config.penalty == 0 else size
        per_process = first * (target + TRAINING * lower) + later * (target + (2 + TRAINING * share) * lower)
        total += per_process * load.num_processes
    return total


def bros_passes(config: "BrosConfig", load: Load) -> float:
    """Count the passes of a run with ``BrosTrainer``, evaluation left out.

    Args:
        config: Its settings.
        load: What it trains on.

    Returns:
        Forward passes of one row; a forward and backward pass counts 3.
    """
    rows, steps = load.rows_per_step, load.steps
    updates = (
        0 if config.upper_variable == "fixed" else math.ceil(max(0, steps - config.start_step) / config.update_every)
    )
    extra = {"one_sided": TRAINING, "two_sided": TRAINING + 2, "bi_probe": 3 * TRAINING + 2}[config.estimator]
    target = (config.target_batch_size or load.batch_size) * load.num_processes
    return load.plain_passes + updates * (extra * rows + TRAINING * target)


def mixture_passes(config: "MixtureConfig", load: Load) -> float:
    """Count the passes of a run with ``MixtureTrainer``, evaluation left out.

    Args:
        config: Its settings.
        load: What it trains on.

    Returns:
        Forward passes of one row; a forward and backward pass counts 3.
    """
    rows, steps, plain = load.rows_per_step, load.steps, load.plain_passes
    if config.mixture != "learned":
        return plain
    target = TRAINING * (config.target_batch_size or load.batch_size) * load.num_processes
    if config.hypergradient == "unrolled":
        return plain + steps * 2 * TRAINING * rows  # a Hessian action for every step
    probe = 2 * config.probe_batches * load.batch_size * load.num_processes
    inner, repeated = update_schedule(config, steps)
    if config.hypergradient == "alignment":
        return plain + (steps - 1) // inner * (target + probe)
    return plain + (steps - 1) // inner * (repeated * (TRAINING * rows + target) + probe)


def reference_schedule(config: "BladeConfig", steps: int) -> tuple[int, int]:
    """Resolve T and K of BLADE for a run of so many steps.

    Args:
        config: Its settings.
        steps: Optimizer steps of the run.

    Returns:
        Optimizer steps between synchronisations, and the steps of the reference after each.
    """
    given = (None if value == "auto" else value for value in (config.sync_steps, config.reference_steps))
    return synchronisation_schedule(*given, max_steps=steps)


def update_schedule(config: "MixtureConfig", steps: int) -> tuple[int, int]:
    """Resolve T and K of a mixture for a run of so many steps.

    Args:
        config: Its settings.
        steps: Optimizer steps of the run.

    Returns:
        Optimizer steps between updates of the weights, and how many of them the twin repeats.
    """
    inner = config.inner_steps
    if inner == "auto":
        inner = 1 if config.hypergradient == "alignment" else optimal_inner_steps(steps)
        inner = inner if config.reference_steps == "auto" else max(inner, config.reference_steps)
    return inner, max(1, inner // 10) if config.reference_steps == "auto" else config.reference_steps
