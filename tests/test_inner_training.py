"""Trainings on masks: each engine against a loop written by hand, against the masked pool, and against the other engine."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import make_dataset, make_model
from torch import nn
from transformers import default_data_collator

from hf_bilevel.data import CollatedRows
from hf_bilevel.inner_training import BatchedEngine, InnerProblem, InnerTraining, SequentialEngine, stacking_pays
from hf_bilevel.losses import UnitLosses, unit_losses

NUM_POOL = 12
ENGINES = [SequentialEngine, BatchedEngine]


def make_network(dropout: float = 0.0, **kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)]
    return nn.Sequential(*layers).to(torch.float64)


def network_losses(model: nn.Module, batch: Any) -> UnitLosses:
    losses = F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
    return UnitLosses(losses, torch.ones_like(losses, dtype=torch.int64))


def make_rows(num: int, seed: int) -> CollatedRows:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (num,), generator=generator)
    items = [{"x": x[i], "labels": int(labels[i])} for i in range(num)]
    return CollatedRows(items, default_data_collator, torch.device("cpu"), seed=0)


def make_engine(kind: type, training: InnerTraining, model: nn.Module | None = None, upper_batch_size: int = 4) -> Any:
    model = make_network() if model is None else model
    rows = make_rows(NUM_POOL, 1), training, make_rows(10, 2), upper_batch_size
    return kind(InnerProblem(model, network_losses, *rows))


def make_masks() -> torch.Tensor:
    masks = torch.zeros(4, NUM_POOL, dtype=torch.bool)
    masks[0, [1, 3, 4, 8, 11]] = True
    masks[1, [0, 2]] = True  # 2 is empty
    masks[3] = True
    return masks


def by_hand(mask: torch.Tensor, training: InnerTraining, seed: int) -> float:
    """Train on the whole pool with weights 0 and 1, as the problem is defined."""
    model, pool, upper = make_network(), make_rows(NUM_POOL, 1).batch, make_rows(10, 2).batch
    if training.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=training.learning_rate)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=training.learning_rate, momentum=0.9)
    rows = mask.nonzero().flatten()
    for step in range(training.num_steps if mask.any() else 0):
        weights = mask.double()
        if training.batch_size is not None:
            chosen = training.schedule(rows, torch.Generator().manual_seed(seed))[step]
            weights = torch.zeros(NUM_POOL, dtype=torch.float64).index_add(
                0, chosen, torch.ones(len(chosen), dtype=torch.float64)
            )
        losses = F.cross_entropy(model(pool["x"]), pool["labels"], reduction="none")
        optimizer.zero_grad()
        ((weights * losses).sum() / weights.sum()).backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(upper["x"]), upper["labels"]))


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("kind", ENGINES)
def test_upper_losses_are_those_of_training_on_the_weighted_pool(kind, optimizer, batch_size):
    training = InnerTraining(7, batch_size, 0.05, optimizer)
    masks, seeds = make_masks(), [5, 6, 7, 8]
    expected = [by_hand(mask, training, seed) for mask, seed in zip(masks, seeds, strict=True)]
    assert len(set(expected)) == 4
    losses = make_engine(kind, training).upper_losses(masks, seeds)
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ENGINES)
def test_upper_rows_are_those_asked_for(kind):
    training, rows = InnerTraining(3, None, 0.05), torch.tensor([7, 2, 5])
    engine = make_engine(kind, training, upper_batch_size=2)
    loss = engine.upper_losses(make_masks()[:1], [0], rows)
    model = make_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    batch = make_rows(NUM_POOL, 1).take(make_masks()[0].nonzero().flatten())
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(batch["x"]), batch["labels"]).backward()
        optimizer.step()
    upper = make_rows(10, 2).take(rows)
    torch.testing.assert_close(loss[0], F.cross_entropy(model(upper["x"]), upper["labels"]).detach())


@pytest.mark.parametrize("kind", ENGINES)
def test_the_model_and_the_generators_are_as_before(kind):
    model = make_network(dropout=0.5).eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = [p.detach().clone() for p in model.parameters()]
    engine = make_engine(kind, InnerTraining(3, None, 0.1), model)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with engine.restored():
        engine.upper_losses(make_masks(), [0, 1, 2, 3])
    assert torch.equal(torch.rand(1), expected)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[3].weight.grad is None


def test_weights_are_restored_when_a_training_fails():
    model = make_network()
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def losses(model: nn.Module, batch: Any) -> UnitLosses:
        calls.append(0)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return network_losses(model, batch)

    rows = make_rows(NUM_POOL, 1), InnerTraining(9, None, 0.1), make_rows(3, 2), 4
    engine = SequentialEngine(InnerProblem(model, losses, *rows))
    with pytest.raises(RuntimeError, match="out of memory"), engine.restored():
        engine.upper_losses(make_masks(), [0, 1, 2, 3])
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_training_depends_on_its_own_seed_only():
    training = InnerTraining(4, 3, 0.05)
    masks = make_masks()[[0, 0, 3]]
    engine = make_engine(SequentialEngine, training, make_network(dropout=0.5))
    with engine.restored():
        first = engine.upper_losses(masks, [1, 2, 3])
        assert torch.equal(engine.upper_losses(masks[[2, 0]], [3, 1]), first[[2, 0]])
    assert first[0] != first[1]  # same mask, other batches and dropout


def test_dropout_is_on_in_training_and_off_in_the_upper_loss():
    masks = make_masks()[:1]
    for kind in ENGINES:
        engine = make_engine(kind, InnerTraining(1, None, 0.05), make_network(dropout=0.5))
        with engine.restored():
            losses = torch.cat([engine.upper_losses(masks, [seed]) for seed in range(4)])
            assert len(losses.unique()) > 1
            assert torch.equal(
                engine.upper_losses(make_masks()[2:3], [0]), engine.upper_losses(make_masks()[2:3], [1])
            )


def test_stacked_trainings_draw_their_own_dropout():
    engine = make_engine(BatchedEngine, InnerTraining(1, None, 0.05), make_network(dropout=0.5))
    with engine.restored():
        losses = engine.upper_losses(make_masks()[[0, 0, 0]], [0, 1, 2])
    assert len(losses.unique()) == 3


@pytest.mark.parametrize("kind", ENGINES)
def test_a_training_that_diverges_takes_no_other_with_it(kind):
    results = []
    for broken in (0.0, torch.inf):
        pool = make_rows(NUM_POOL, 1)
        pool.batch["x"][[3, 9]] += broken  # masks 0 and 3 hold one of them
        rows = pool, InnerTraining(3, None, 0.05), make_rows(10, 2), 4
        engine = kind(InnerProblem(make_network(), network_losses, *rows))
        results.append(engine.upper_losses(make_masks(), [0, 1, 2, 3]))
    intact, result = results
    assert result.isfinite().tolist() == [False, True, True, False]
    assert torch.equal(result[1:3], intact[1:3])


@pytest.mark.parametrize("kind", ENGINES)
def test_parameters_without_gradient_stay_fixed(kind):
    model = make_network()
    model[0].requires_grad_(False)
    losses = make_engine(kind, InnerTraining(5, None, 0.1), model).upper_losses(make_masks(), [0, 1, 2, 3])
    free = make_engine(kind, InnerTraining(5, None, 0.1)).upper_losses(make_masks(), [0, 1, 2, 3])
    assert losses[2] == free[2] and not torch.isclose(losses[[0, 1, 3]], free[[0, 1, 3]]).any()


def test_passes_are_those_of_the_docstring():
    counts = {"rows": 0, "forward": 0}

    def losses(model: nn.Module, batch: Any) -> UnitLosses:
        counts["forward"] += 1
        counts["rows"] += len(batch["labels"])
        return network_losses(model, batch)

    parts = (make_rows(NUM_POOL, 1), InnerTraining(3, None, 0.05), make_rows(10, 2), 4)
    SequentialEngine(InnerProblem(make_network(), losses, *parts)).upper_losses(make_masks()[:2], [0, 1])
    assert counts == {"forward": 2 * (3 + 3), "rows": 3 * (5 + 2) + 2 * 10}
    engine = BatchedEngine(InnerProblem(make_network(), losses, *parts))
    counts.update(forward=0)
    engine.upper_losses(make_masks()[:2], [0, 1])
    assert counts["forward"] == 3 + 3


def test_every_row_is_trained_on_equally_often():
    rows = torch.tensor([4, 6, 9, 10, 11])
    batches = InnerTraining(10, 3, 0.1).schedule(rows, torch.Generator().manual_seed(0))
    assert batches.shape == (10, 3)
    assert batches.flatten().bincount(minlength=12)[rows].tolist() == [6] * 5
    assert batches[:5].flatten().bincount(minlength=12)[rows].tolist() == [3] * 5


@pytest.mark.parametrize("name", ["vit", "llama"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_engines_agree_on_real_architectures(name, dropout):
    def losses(model: nn.Module, batch: Any) -> UnitLosses:
        return unit_losses(model, batch, "sample")

    columns = make_dataset(name, 10).remove_columns("source")
    rows = CollatedRows(columns, default_data_collator, torch.device("cpu"), seed=0)
    training = InnerTraining(3, None, 0.01)
    masks = torch.rand(3, 10, generator=torch.Generator().manual_seed(0)) < 0.4
    results = []
    for kind in ENGINES:
        model = make_model(name, dropout=dropout if kind is BatchedEngine else 0.0)
        attention = model.config._attn_implementation
        engine = kind(InnerProblem(model, losses, rows, training, rows, 4))
        with engine.restored():
            results.append(engine.upper_losses(masks, [1, 2, 3]))
        assert model.config._attn_implementation == attention
    assert len(results[0].unique()) == 3
    if dropout == 0:
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_batch_statistics_are_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(torch.float64)
    with pytest.raises(ValueError, match=r"batch statistics \(`1`\).*engine='sequential'"):
        make_engine(BatchedEngine, InnerTraining(1, None, 0.1), model)


def test_batch_statistics_start_afresh_for_every_mask():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to(torch.float64)
    engine = make_engine(SequentialEngine, InnerTraining(3, None, 0.1), model)
    with engine.restored():
        alone = engine.upper_losses(make_masks()[3:], [0])
        assert torch.equal(engine.upper_losses(make_masks()[[0, 3]], [1, 0])[1:], alone)
    assert torch.equal(model[1].running_mean, torch.zeros(3, dtype=torch.float64))
    assert int(model[1].num_batches_tracked) == 0


def test_a_model_that_vmap_cannot_take_is_refused():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=torch.float64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.layer(x)
            return out if out.sum() > 0 else -out

    with pytest.raises(ValueError, match=r"`Branching` cannot run as one model.*engine='sequential'"):
        make_engine(BatchedEngine, InnerTraining(1, None, 0.1), Branching())


def test_when_stacking_pays():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert stacking_pays(make_network(), cpu) and stacking_pays(make_model("vit"), cpu)
    overlapping = nn.Sequential(nn.Conv2d(1, 8, 5), nn.Flatten())
    assert not stacking_pays(overlapping, cpu) and stacking_pays(overlapping, gpu)
    large = nn.Linear(4000, 4000)
    assert not stacking_pays(large, gpu)
    large.weight.requires_grad_(False)
    assert stacking_pays(large, gpu)
