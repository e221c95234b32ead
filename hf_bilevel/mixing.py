"""Drawing by mixture probabilities: which domain comes next, and which of its samples."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Sampler, get_worker_info

from hf_bilevel.core.mixture import apportion
from hf_bilevel.data import derive_seed, number_item

_ORDER, _ROWS = 1, 2  # tell seeds apart


class MixtureDraws:
    """An endless sequence of domains with exact shares in every window, that can be replayed.

    Every ``window`` draws hold each domain as often as its probability says, rounded so that what a domain is owed is made up
    for in the next window; inside a window the order is random. New probabilities take effect at the next draw and cut the
    window there.

    The sequence of an epoch is a pure function of the seed, the epoch, what was owed at its start, and at which draw which
    probabilities were set. All of it is in the state, so that a resumed run, whose loader reads the epoch from its start again,
    sees the same draws.

    Args:
        probabilities: Of the domains, ``(M,)``, float64, summing to 1.
        window: Draws with exact shares, positive: the rows of an optimizer step.
        seed: Of the order inside the windows.

    Attributes:
        probabilities: Those set last.

    Example:
        >>> draws = MixtureDraws(torch.tensor([0.75, 0.25], dtype=torch.float64), window=4, seed=0)
        >>> sorted(domain for domain, _ in draws.epoch(0, num=4))
        [0, 0, 0, 1]
    """

    def __init__(self, probabilities: Tensor, window: int, seed: int) -> None:
        self.probabilities = probabilities.clone()
        self.window = window
        self.seed = seed
        num_domains = len(probabilities)
        self._number = -1  # of the epoch that was begun last
        self._replays = False  # that epoch, when the next is begun
        self._position = 0  # draws taken from it
        self._changes: list[tuple[int, Tensor]] = []  # in it: draws taken before, probabilities
        zeros = torch.zeros(num_domains, dtype=torch.float64)
        # What each domain is owed, how often it was drawn, and the probabilities: at the epoch's start, and now.
        self._start = (zeros, zeros.long(), self.probabilities)
        self._owed, self._taken = zeros.clone(), zeros.long()

    def set_probabilities(self, probabilities: Tensor) -> None:
        """Draw with other probabilities from the next draw on."""
        self.probabilities = probabilities.clone()
        self._changes.append((self._position, self.probabilities))

    def epoch(self, number: int, num: int) -> Iterator[tuple[int, int]]:
        """Draw an epoch; the first after a state was loaded replays the one begun last, if it is not over.

        Args:
            number: Of the epoch, as far as is known: one that was begun before and ended early has the next.
            num: How many draws.

        Yields:
            A domain, and how often it was drawn before.
        """
        is_replay, self._replays = self._replays and number <= self._number, False
        number = self._number if is_replay else max(number, self._number + 1)
        if not is_replay:
            self._number, self._changes = number, []
            self._start = (self._owed, self._taken, self.probabilities)
        owed, taken, current = self._start
        self._owed, self._taken = owed.clone(), taken.clone()
        self._position = num_applied = 0
        while self._position < num:
            if num_applied < len(self._changes) and self._changes[num_applied][0] <= self._position:
                current = self._changes[num_applied][1]
                num_applied += 1
                continue
            size = min(self.window - self._position % self.window, num - self._position)
            # A domain that is left out now is not made up for what it was owed before.
            self._owed = self._owed.where(current > 0, 0.0)
            self._owed += (size - self._owed.sum()) * current
            counts = apportion(self._owed, size)
            self._owed -= counts
            generator = torch.Generator().manual_seed(derive_seed(self.seed, _ORDER, number, self._position))
            block = torch.repeat_interleave(counts)[torch.randperm(size, generator=generator)].tolist()
            for place, domain in enumerate(block):
                if num_applied < len(self._changes) and self._changes[num_applied][0] <= self._position:
                    # The rest of the window is neither drawn nor owed.
                    left = torch.bincount(torch.tensor(block[place:]), minlength=len(current))
                    self._owed += left - left.sum() * current
                    break
                index = int(self._taken[domain])
                self._taken[domain] += 1
                self._position += 1
                yield domain, index

    def state_dict(self) -> dict[str, Any]:
        """Return what a replay needs."""
        return {
            "window": self.window,
            "number": self._number,
            "changes": [[position, p.clone()] for position, p in self._changes],
            "start": [part.clone() for part in self._start],
            "now": [self._owed.clone(), self._taken.clone()],
            "probabilities": self.probabilities.clone(),
        }

    def load_state_dict(self, state: dict[str, Any], replay: bool = True) -> None:
        """Restore it.

        Args:
            state: What ``state_dict`` returned.
            replay: Whether the epoch begun last is drawn again from its start; else the next one goes on from here.

        Raises:
            ValueError: If the window is another one: the batch size or the number of processes changed.
        """
        if state["window"] != self.window:
            raise ValueError(
                f"The checkpoint was written with {state['window']} rows in an optimizer step over all processes, this run has "
                f"{self.window}, so its draws cannot be repeated. Resume with the same batch size, accumulation and number of "
                "processes."
            )
        self._number, self._replays = state["number"], replay
        self._changes = [(position, p.clone()) for position, p in state["changes"]]
        self._start = tuple(part.clone() for part in state["start"])
        self._owed, self._taken = (part.clone() for part in state["now"])
        self.probabilities = state["probabilities"].clone()


class MixtureSampler(Sampler[int]):
    """Draw rows of a map-style dataset by domain; an epoch is as long as the dataset.

    Every pass over a domain is a new permutation of its rows, so a domain is repeated only as often as its probability says.

    Args:
        draws: The sequence of domains.
        domain_ids: Domain of every row, int64, ``(n,)``; every domain with a positive probability has rows.
        epoch: Called when an iteration begins: the number of the epoch. Asked for and not counted, since a sampler behind a
            prepared loader is not told where a resumed run begins.
    """

    def __init__(self, draws: MixtureDraws, domain_ids: Tensor, epoch: Callable[[], int]) -> None:
        self._draws = draws
        self._epoch = epoch
        self._num = len(domain_ids)
        self._rows = [(domain_ids == j).nonzero().flatten() for j in range(len(draws.probabilities))]
        self._passes: dict[int, tuple[int, Tensor]] = {}  # the running permutation of each domain

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[int]:
        for domain, index in self._draws.epoch(self._epoch(), self._num):
            rows = self._rows[domain]
            number, place = divmod(index, len(rows))
            if self._passes.get(domain, (-1, None))[0] != number:
                generator = torch.Generator().manual_seed(derive_seed(self._draws.seed, _ROWS, domain, number))
                self._passes[domain] = (number, rows[torch.randperm(len(rows), generator=generator)])
            yield int(self._passes[domain][1][place])


class MixtureStream(IterableDataset):
    """Draw items of several streams by domain.

    Args:
        streams: One for each domain; endless, or long enough for the run.
        names: Of the domains, for errors.

    Attributes:
        draws: The sequence of domains; with equal shares until a trainer sets its own.
    """

    def __init__(self, streams: list[Any], names: list[str]) -> None:
        self._streams = streams
        self._names = names
        num = len(streams)
        self.draws = MixtureDraws(torch.full((num,), 1 / num, dtype=torch.float64), num, seed=0)

    def drawn(self) -> Iterator[tuple[int, Any]]:
        """Draw domains and items."""
        if get_worker_info() is not None:
            raise ValueError("Streams are drawn from in the main process. Set `dataloader_num_workers=0`.")
        iterators = [iter(stream) for stream in self._streams]
        for domain, index in self.draws.epoch(0, 2**62):
            try:
                item = next(iterators[domain])
            except StopIteration:
                raise ValueError(
                    f"The stream of the domain {self._names[domain]!r} ended after {index} items. Make it repeat "
                    "(`stream.repeat(None)` of a `datasets.IterableDataset`), or lower `max_steps`."
                ) from None
            yield domain, item

    def __iter__(self) -> Iterator[Any]:
        for _, item in self.drawn():
            yield item


class NumberedMixtureStream(IterableDataset):
    """The items of a mixture of streams, with their position and their domain.

    Args:
        stream: The mixture.
    """

    def __init__(self, stream: MixtureStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[Any]:
        for i, (domain, item) in enumerate(self._stream.drawn()):
            yield number_item(item, i, domain)


def stratified_rows(rows: list[Tensor], num_each: int, seed: int) -> list[int]:
    """Pick rows of every domain at random, without repeating one.

    Args:
        rows: Of each domain, int64.
        num_each: How many of each domain, or all where it has fewer.
        seed: Of the choice.

    Returns:
        The rows, domain by domain.

    Example:
        >>> sorted(stratified_rows([torch.tensor([0, 2, 4]), torch.tensor([1])], num_each=3, seed=0))
        [0, 1, 2, 4]
    """
    generator = torch.Generator().manual_seed(seed)
    picks = [own[torch.randperm(len(own), generator=generator)[:num_each]] for own in rows]
    return torch.cat(picks).tolist()
