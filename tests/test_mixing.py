"""Drawing by domains: exact shares, replays, and the loaders that read ahead."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from hf_bilevel.mixing import MixtureDraws, MixtureSampler, MixtureStream, NumberedMixtureStream, stratified_rows

PARTS = st.lists(st.one_of(st.just(0.0), st.floats(0.01, 1)), min_size=2, max_size=6).filter(any)


def shares(*parts: float) -> Tensor:
    p = torch.tensor(parts, dtype=torch.float64)
    return p / p.sum()


def counts_of(drawn: list[tuple[int, int]], num_domains: int) -> Tensor:
    return torch.bincount(torch.tensor([domain for domain, _ in drawn], dtype=torch.int64), minlength=num_domains)


@settings(max_examples=60)
@given(PARTS, st.integers(1, 20), st.integers(0, 2**31), st.integers(1, 130))
def test_every_window_has_its_shares(parts: list[float], window: int, seed: int, num: int) -> None:
    p = shares(*parts)
    drawn = list(MixtureDraws(p, window, seed).epoch(0, num))
    assert len(drawn) == num
    total = torch.zeros(len(p), dtype=torch.int64)
    for start in range(0, num, window):
        counts = counts_of(drawn[start : start + window], len(p))
        total += counts
        n = min(start + window, num)
        # What a domain was owed before a window is less than 1, and so is what it is owed after it.
        assert float((total - n * p).abs().max()) < 1 + 1e-9
        assert float((counts - (n - start) * p).abs().max()) < 2 + 1e-9
    assert int(total[p == 0].sum()) == 0
    for j in range(len(p)):
        assert [index for domain, index in drawn if domain == j] == list(range(int(total[j])))


def test_a_share_that_fits_is_exact_in_every_window() -> None:
    drawn = list(MixtureDraws(shares(5, 2, 1), window=8, seed=3).epoch(0, 80))
    for start in range(0, 80, 8):
        assert counts_of(drawn[start : start + 8], 3).tolist() == [5, 2, 1]
    orders = {tuple(domain for domain, _ in drawn[start : start + 8]) for start in range(0, 80, 8)}
    assert len(orders) > 5  # no periodic pattern
    other = list(MixtureDraws(shares(5, 2, 1), window=8, seed=4).epoch(0, 80))
    assert other != drawn


def test_epochs_differ_and_carry_over_what_is_owed() -> None:
    draws = MixtureDraws(shares(0.3, 0.7), window=4, seed=0)
    epochs = [list(draws.epoch(number, 5)) for number in range(6)]
    assert len({tuple(domain for domain, _ in epoch) for epoch in epochs}) > 2
    for num in range(1, 7):
        total = counts_of(sum(epochs[:num], []), 2)
        assert float((total - 5 * num * shares(0.3, 0.7)).abs().max()) < 1
    assert [index for domain, index in sum(epochs, []) if domain == 1] == list(range(21))


class Consumer:
    """Takes draws over several epochs, ``ahead`` of what it hands out, as a loader that prefetches."""

    def __init__(self, draws: MixtureDraws, num: int, ahead: int, start: int = 0) -> None:
        self.draws, self.num, self.ahead = draws, num, ahead
        self.taken = start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        while True:
            number, done = divmod(self.taken, self.num)
            epoch, buffer = self.draws.epoch(number, self.num), []
            for position in range(self.num):
                while len(buffer) <= self.ahead and (item := next(epoch, None)) is not None:
                    buffer.append(item)
                item = buffer.pop(0)
                if position < done:
                    continue  # a resumed run reads the epoch again from its start
                self.taken += 1
                yield item


CHANGES = st.dictionaries(st.integers(0, 59), st.lists(st.floats(0.01, 1), min_size=3, max_size=3), max_size=6)


@settings(max_examples=60)
@given(CHANGES, st.integers(0, 59), st.integers(1, 9), st.integers(5, 30), st.integers(0, 7))
def test_a_replay_continues_where_the_run_was(
    changes: dict[int, list[float]], stop: int, window: int, num: int, ahead: int
) -> None:
    def run(draws: MixtureDraws, start: int, length: int) -> tuple[list[tuple[int, int]], dict[str, Any]]:
        consumer = iter(Consumer(draws, num, ahead, start))
        drawn, state = [], draws.state_dict()
        for n in range(start, length):
            if n == stop:  # a checkpoint, perhaps between two epochs
                state = draws.state_dict()
            drawn.append(next(consumer))
            if n in changes:
                draws.set_probabilities(shares(*changes[n]))
        return drawn, state

    whole, state = run(MixtureDraws(shares(1, 2, 3), window, seed=0), 0, 60)
    resumed = MixtureDraws(shares(1, 1, 1), window, seed=0)
    resumed.load_state_dict(state)
    rest, _ = run(resumed, stop, 60)
    assert rest == whole[stop:]
    assert torch.equal(resumed.probabilities, shares(*([1, 2, 3], *(changes[n] for n in sorted(changes)))[-1]))


@pytest.mark.parametrize("position", [0, 3, 4, 11, 16, 30])
def test_a_change_takes_effect_at_the_next_draw(position: int) -> None:
    draws = MixtureDraws(shares(0.5, 0.5, 0), window=8, seed=1)
    epoch = draws.epoch(0, 200)
    before = list(itertools.islice(epoch, position))
    draws.set_probabilities(shares(0, 0, 1))
    after = list(epoch)
    assert {domain for domain, _ in before} <= {0, 1}
    assert {domain for domain, _ in after} == {2} and len(after) == 200 - position
    assert [index for _, index in after] == list(range(len(after)))


@settings(max_examples=50)
@given(CHANGES, st.integers(1, 9))
def test_counts_follow_changing_probabilities(changes: dict[int, list[float]], window: int) -> None:
    draws = MixtureDraws(shares(1, 2, 3), window, seed=0)
    epoch, expected, total = draws.epoch(0, 60), torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    for n in range(60):
        if n in changes:
            draws.set_probabilities(shares(*changes[n]))
        expected += draws.probabilities
        total[next(epoch)[0]] += 1
    assert float((total - expected).abs().max()) < window + 2  # at the end of a window less than 1, and changes cut it
    assert next(epoch, None) is None


def test_a_domain_whose_probability_became_zero_is_not_owed_anything() -> None:
    for num in range(1, 30):
        draws = MixtureDraws(shares(0.5, 0.3, 0.2), window=5, seed=num)
        epoch = draws.epoch(0, 100)
        seen = list(itertools.islice(epoch, num))
        draws.set_probabilities(shares(0, 0.6, 0.4))
        rest = list(epoch)
        assert int(counts_of(rest, 3)[0]) == 0
        draws.set_probabilities(shares(1, 1, 1))
        later = list(draws.epoch(1, 99))
        assert (counts_of(later, 3) - 33).abs().max() <= 3
        assert len(seen) + len(rest) == 100


def test_a_cut_window_is_filled_up() -> None:
    """A change to what was set already leaves the shares of every window as they are."""
    for position in range(17):
        draws = MixtureDraws(shares(2, 1, 1), window=8, seed=position)
        epoch = draws.epoch(0, 40)
        drawn = list(itertools.islice(epoch, position))
        draws.set_probabilities(shares(2, 1, 1))
        drawn += list(epoch)
        for start in range(0, 40, 8):
            assert counts_of(drawn[start : start + 8], 3).tolist() == [4, 2, 2]


def test_the_rest_of_a_cut_window_has_the_new_shares() -> None:
    for seed in range(20):
        draws = MixtureDraws(shares(1, 1), window=8, seed=seed)
        epoch = draws.epoch(0, 8)
        drawn = list(itertools.islice(epoch, 3))
        draws.set_probabilities(shares(1, 3))
        drawn += list(epoch)
        assert abs(int(counts_of(drawn, 2)[0]) - (3 * 0.5 + 5 * 0.25)) < 1


def test_set_twice_before_a_draw_the_last_one_counts() -> None:
    draws = MixtureDraws(shares(1, 1), window=4, seed=0)
    epoch = draws.epoch(0, 20)
    next(epoch)
    draws.set_probabilities(shares(1, 0))
    draws.set_probabilities(shares(0, 1))
    assert {domain for domain, _ in epoch} == {1}


def test_a_state_is_for_one_window() -> None:
    state = MixtureDraws(shares(1, 1), window=4, seed=0).state_dict()
    with pytest.raises(ValueError, match="written with 4 rows .* this run has 8.*Resume with the same batch size"):
        MixtureDraws(shares(1, 1), window=8, seed=0).load_state_dict(state)


def test_a_state_does_not_change_with_the_run() -> None:
    draws = MixtureDraws(shares(1, 2), window=4, seed=0)
    epoch = draws.epoch(0, 50)
    list(itertools.islice(epoch, 10))
    draws.set_probabilities(shares(2, 1))
    state = draws.state_dict()
    before = repr(state)
    resumed = MixtureDraws(shares(1, 1), window=4, seed=0)
    resumed.load_state_dict(state)
    list(resumed.epoch(0, 50))
    list(epoch)
    draws.set_probabilities(shares(1, 1))
    assert repr(state) == before


# ---------------------------------------------------------------------------------------------------------------------
# Rows of a dataset

IDS = torch.tensor([0] * 12 + [1] * 3 + [2] * 9)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]


def make_sampler(*parts: float, epoch: int = 0, window: int = 6) -> MixtureSampler:
    return MixtureSampler(MixtureDraws(shares(*parts), window, seed=0), IDS, lambda: epoch)


def test_a_pass_over_a_domain_is_a_permutation_of_its_rows() -> None:
    epochs = iter(range(100))
    sampler = MixtureSampler(MixtureDraws(shares(1, 2, 1), 6, seed=0), IDS, lambda: next(epochs))
    assert len(sampler) == 24
    rows = torch.tensor([row for _ in range(20) for row in sampler])
    assert len(rows) == 480
    assert counts_of([(int(IDS[row]), 0) for row in rows], 3).tolist() == [120, 240, 120]
    for j in range(3):
        own = rows[IDS[rows] == j]
        passes = own[: len(own) // int((IDS == j).sum()) * int((IDS == j).sum())].view(-1, int((IDS == j).sum()))
        assert (passes.sort().values == (IDS == j).nonzero().flatten()).all()
        assert len({tuple(p) for p in passes.tolist()}) > min(len(passes), 6) / 2


def test_a_domain_without_probability_is_not_read() -> None:
    assert {int(IDS[row]) for row in make_sampler(1, 0, 1)} == {0, 2}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_through_a_loader(workers: int) -> None:
    sampler = make_sampler(1, 1, 1)
    loader = DataLoader(IDS, batch_size=6, sampler=sampler, num_workers=workers)
    batches = [sorted(batch.tolist()) for batch in loader]
    assert batches == [[0, 0, 1, 1, 2, 2]] * 4  # the drawn rows' domains
    again = [sorted(batch.tolist()) for batch in loader]  # the next epoch
    assert again == batches


def test_domains_of_one_size_have_orders_of_their_own() -> None:
    sampler = MixtureSampler(MixtureDraws(shares(1, 1), 4, seed=0), torch.arange(40) // 20, lambda: 0)
    rows = list(sampler)
    assert [row for row in rows if row < 20] != [row - 20 for row in rows if row >= 20]


def test_a_replayed_epoch_reads_the_same_rows() -> None:
    sampler, resumed = make_sampler(3, 1, 2), make_sampler(3, 1, 2)
    rows = list(sampler)
    assert rows == list(make_sampler(3, 1, 2)) != list(make_sampler(3, 1, 2, epoch=1))
    resumed._draws.load_state_dict(sampler._draws.state_dict())
    assert list(resumed) == rows


def test_an_epoch_that_ended_early_is_not_read_again() -> None:
    sampler = make_sampler(3, 1, 2)  # always told that it is in epoch 0
    epoch = iter(sampler)
    first = [next(epoch) for _ in range(6)]
    assert [row for row, _ in zip(sampler, range(6), strict=False)] != first


def test_a_run_that_skips_no_data_goes_on_with_the_weights_of_now() -> None:
    draws = MixtureDraws(shares(1, 1), 4, seed=0)
    epoch = draws.epoch(0, 40)
    for _ in range(8):
        next(epoch)
    draws.set_probabilities(shares(0, 1))
    state = draws.state_dict()
    replayed, going_on = MixtureDraws(shares(1, 1), 4, seed=0), MixtureDraws(shares(1, 1), 4, seed=0)
    replayed.load_state_dict(state)
    domains = [domain for domain, _ in replayed.epoch(0, 40)]
    assert sum(domains[:8]) == 4 and domains[8:] == [1] * 32
    going_on.load_state_dict(state, replay=False)
    assert [domain for domain, _ in going_on.epoch(0, 40)] == [1] * 40


# ---------------------------------------------------------------------------------------------------------------------
# Streams


class Count(IterableDataset):
    def __init__(self, name: str, num: int = 10**6) -> None:
        self.name, self.num = name, num

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return ({"x": f"{self.name}{i}"} for i in range(self.num))


def test_streams_are_read_in_their_order() -> None:
    stream = MixtureStream([Count("a"), Count("b")], ["a", "b"])
    items = [item["x"] for item in itertools.islice(stream, 20)]
    assert [x for x in items if x[0] == "a"] == [
        f"a{i}" for i in range(10)
    ]  # equal shares before a trainer sets others
    stream.draws = MixtureDraws(shares(3, 1), window=4, seed=0)
    numbered = list(itertools.islice(NumberedMixtureStream(stream), 20))
    assert [item["bilevel_sample_id"] for item in numbered] == list(range(20))
    assert [item["bilevel_domain_id"] for item in numbered] == ["ab".index(item["x"][0]) for item in numbered]
    assert sum(item["bilevel_domain_id"] for item in numbered) == 5


def test_a_stream_that_ends_is_named() -> None:
    stream = MixtureStream([Count("a"), Count("b", 3)], ["web", "books"])
    with pytest.raises(ValueError, match=r"domain 'books' ended after 3 items.*repeat\(None\).*max_steps"):
        list(stream)


def test_streams_are_not_read_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_bilevel.mixing.get_worker_info", lambda: object())  # a worker that fails costs seconds
    with pytest.raises(ValueError, match="main process.*dataloader_num_workers=0"):
        next(iter(MixtureStream([Count("a"), Count("b")], ["a", "b"])))


def test_stratified_rows() -> None:
    rows = [(IDS == j).nonzero().flatten() for j in range(3)]
    picked = torch.tensor(stratified_rows(rows, num_each=5, seed=1))
    assert IDS[picked].tolist() == [0] * 5 + [1] * 3 + [2] * 5
    assert len(picked.unique()) == len(picked)
    assert stratified_rows(rows, 5, 1) == picked.tolist() != stratified_rows(rows, 5, 2)
    assert len(stratified_rows(rows, 1, 0)) == 3
