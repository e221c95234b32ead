"""What a run trains on, from which each config counts its cost: for the plan of a run, and for the card of one that is over."""

from dataclasses import dataclass

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
