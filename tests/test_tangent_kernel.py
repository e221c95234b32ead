"""The tangent kernel against regression on gradients that are computed row by row, and the engine that searches with it."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import make_dataset, make_model
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import default_data_collator

from hf_bilevel import tangent_kernel as module
from hf_bilevel.data import CollatedRows
from hf_bilevel.losses import class_logits
from hf_bilevel.tangent_kernel import KernelEngine

RIDGE = 0.2


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def make_rows(num: int, seed: int, **columns: Any) -> CollatedRows:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (num,), generator=generator)
    items = [{"x": x[i], "labels": int(labels[i]), **{k: v[i] for k, v in columns.items()}} for i in range(num)]
    return CollatedRows(items, default_data_collator, torch.device("cpu"), seed=0)


def rows_of(name: str, num: int) -> CollatedRows:
    return CollatedRows(list(make_dataset(name, num)), default_data_collator, torch.device("cpu"), seed=0)


def make_engine(model: nn.Module, pool: CollatedRows, upper: CollatedRows | None = None) -> KernelEngine:
    return KernelEngine(model, pool, upper or pool, RIDGE, torch.Generator().manual_seed(7))


def features_by_hand(
    model: nn.Module, rows: CollatedRows, num_classes: int, num: int = 3, chosen: slice = slice(None)
) -> torch.Tensor:
    """Gradients of the random combinations of logits that the engine draws, one behind the other."""
    model.eval()
    combinations = torch.randn(num, num_classes, generator=torch.Generator().manual_seed(7))[chosen]
    trained = [p for p in model.parameters() if p.requires_grad]
    found = []
    for row in range(len(rows)):
        logits = class_logits(model, rows.take(torch.tensor([row])))
        parts = [torch.autograd.grad((logits * v).sum(), trained, retain_graph=True) for v in combinations]
        found.append(torch.cat([p.flatten() for part in parts for p in part]))
    return torch.stack(found).double()


def loss_by_hand(pool: CollatedRows, upper: CollatedRows, mask: torch.Tensor, features: tuple) -> float:
    """Ridge regression of one-hot labels on the features, scaled as the engine scales."""
    scale = features[0].square().sum(1).mean().sqrt()
    x, u = (f / scale for f in features)
    y, t = (F.one_hot(rows.batch["labels"], 3).double() - 1 / 3 for rows in (pool, upper))
    x, y = x[mask], y[mask]
    weights = torch.linalg.solve(x.T @ x + RIDGE * torch.eye(x.shape[1], dtype=torch.float64), x.T @ y)
    return float((u @ weights - t).square().sum(1).mean())


@pytest.mark.parametrize("judged_on", ["pool", "target"])
def test_upper_losses_are_those_of_ridge_regression_on_the_gradients(judged_on: str) -> None:
    model, pool = Network(), make_rows(9, 1)
    upper = pool if judged_on == "pool" else make_rows(5, 2)
    engine = make_engine(model, pool, upper)
    masks = torch.tensor([[1, 0, 0, 1, 1, 0, 0, 1, 0], [0, 1, 0, 0, 0, 0, 1, 0, 0]], dtype=torch.bool)
    features = tuple(features_by_hand(model, rows, 3) for rows in (pool, upper))
    expected = [loss_by_hand(pool, upper, mask, features) for mask in masks]
    assert engine.upper_losses(masks, [0, 0]).tolist() == pytest.approx(expected, rel=1e-6)
    losses, differences = engine.losses_and_differences(masks)
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    for c, i in ((0, 3), (0, 5), (1, 0), (1, 6)):
        other = masks[c].clone()
        other[i] = ~other[i]
        change = loss_by_hand(pool, upper, other, features) - expected[c]
        assert float(differences[c, i]) == pytest.approx(-change if masks[c, i] else change, rel=1e-5)


def test_the_pool_is_judged_without_each_row_itself_and_by_the_classes_of_the_target() -> None:
    model, pool, upper = Network(), make_rows(9, 1), make_rows(5, 2)
    arguments = (model, pool, upper, RIDGE)
    engine = KernelEngine(*arguments, torch.Generator().manual_seed(7), pool_share=0.4)
    features = tuple(features_by_hand(model, rows, 3) for rows in (pool, upper))
    labels, wanted = (rows.batch["labels"].tolist() for rows in (pool, upper))
    weights = [(wanted.count(label) + 1 / len(set(labels))) / labels.count(label) for label in labels]
    assert len(set(weights)) > 1
    mask = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1, 0], dtype=torch.bool)
    distances = []
    for i in range(9):
        others = mask.clone()
        others[i] = False
        row = pool.take(torch.tensor([i]))
        as_upper = type("Rows", (), {"batch": row})
        distances.append(weights[i] * loss_by_hand(pool, as_upper, others, (features[0], features[0][i : i + 1])))
    expected = 0.6 * loss_by_hand(pool, upper, mask, features) + 0.4 * sum(distances) / sum(weights)
    assert float(engine.upper_losses(mask[None], [0])) == pytest.approx(expected, rel=1e-6)


def test_classes_that_the_target_misses_count_a_little() -> None:
    pool, upper = (F.one_hot(torch.tensor(labels), 4) for labels in ([0, 0, 0, 0, 1, 1, 2], [1, 1, 1]))
    weights = module._class_weights(pool, upper)
    assert float(weights.mean()) == pytest.approx(1)
    shares = [float(weights[:4].sum() / 7), float(weights[4:6].sum() / 7), float(weights[6:].sum() / 7)]
    assert shares == pytest.approx([1 / 12, 10 / 12, 1 / 12])


def test_combinations_stand_for_the_sum_over_the_classes() -> None:
    model, pool = Network(), make_rows(6, 1)
    engine = make_engine(model, pool)
    engine._combinations = torch.eye(3)  # whose outer products sum to the identity, as random ones do in the mean
    jacobian = torch.stack([features_by_class(model, pool, label) for label in range(3)])
    exact = (jacobian @ jacobian.transpose(1, 2)).sum(0)
    torch.testing.assert_close(engine._kernels()[0], exact / exact.diagonal().mean(), rtol=1e-5, atol=1e-6)


def features_by_class(model: nn.Module, rows: CollatedRows, label: int) -> torch.Tensor:
    model.eval()
    logits = [class_logits(model, rows.take(torch.tensor([row])))[0, label] for row in range(len(rows))]
    return torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(z, model.parameters())]) for z in logits])


def test_blocks_change_nothing_and_many_are_warned_about(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool, upper = Network(), make_rows(19, 1), make_rows(5, 2)
    whole = make_engine(model, pool, upper)._kernels()
    monkeypatch.setattr(module, "BLOCK_NUMBERS", 2 * sum(p.numel() for p in model.parameters()))
    with pytest.warns(UserWarning, match="10 blocks, which takes about 15 .*Freeze"):
        parts = make_engine(model, pool, upper)._kernels()
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_real_models_with_and_without_vmap(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pool = make_model(name, dropout=0.3), rows_of(name, 6)
    model.train()
    attention, before = model.config._attn_implementation, [p.detach().clone() for p in model.parameters()]
    engine = make_engine(model, pool)
    assert engine._goes_row_by_row == (name == "bert")
    features = features_by_hand(model, pool, model.config.num_labels)
    kernel = features @ features.T
    torch.testing.assert_close(engine._kernels()[0], kernel / kernel.diagonal().mean(), rtol=1e-3, atol=1e-4)
    model.train()
    make_engine(model, pool)
    assert model.training and model.config._attn_implementation == attention
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.parameters(), before, strict=True))


def test_a_frozen_body_leaves_the_regression_on_its_features() -> None:
    model, pool = Network(), make_rows(6, 1)
    model.layers[0].requires_grad_(False)
    kernel, _ = make_engine(model, pool)._kernels()
    model.eval()
    with torch.no_grad():
        hidden = F.pad(model.layers[:3](pool.batch["x"]), (0, 1), value=1.0)  # 1 for the bias
    expected = hidden @ hidden.T
    torch.testing.assert_close(kernel, expected / expected.diagonal().mean(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("judged_on", ["pool", "target"])
def test_trainings_leave_the_mean_of_the_kernels_at_their_ends(judged_on: str) -> None:
    model, pool = Network(), make_rows(9, 1)
    upper = pool if judged_on == "pool" else make_rows(5, 2)
    weights = [parameters_to_vector(model.parameters()).detach() * factor for factor in (0.5, 3.0)]

    def go_to(number: int) -> None:
        vector_to_parameters(weights[number], model.parameters())
        model.train()

    trainings = [partial(go_to, number) for number in range(2)]
    engine = KernelEngine(model, pool, upper, RIDGE, torch.Generator().manual_seed(7), trainings=trainings)
    kernel, upper_kernel = 0.0, 0.0
    for number in range(2):  # each by two of four combinations, and of the same scale
        go_to(number)
        of_pool, of_upper = (
            features_by_hand(model, rows, 3, 4, slice(2 * number, 2 * number + 2)) for rows in (pool, upper)
        )
        scale = of_pool.square().sum(1).mean()
        kernel, upper_kernel = (
            kernel + of_pool @ of_pool.T / scale / 2,
            upper_kernel + of_upper @ of_pool.T / scale / 2,
        )
    found = engine._kernels(trainings)
    torch.testing.assert_close(found[0], kernel, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], upper_kernel, rtol=1e-5, atol=1e-6)
    mask = torch.arange(9) < 4
    y, t = (F.one_hot(rows.batch["labels"], 3).double() - 1 / 3 for rows in (pool, upper))
    inverse = torch.linalg.inv(kernel[mask][:, mask] + RIDGE * torch.eye(4, dtype=torch.float64))
    expected = (upper_kernel[:, mask] @ inverse @ y[mask] - t).square().sum(1).mean()
    assert float(engine.upper_losses(mask[None], [0])) == pytest.approx(float(expected), rel=1e-5)


def test_nothing_is_trained_or_passed_after_the_start() -> None:
    model, pool = Network(), make_rows(6, 1)
    engine = make_engine(model, pool)
    model.register_forward_hook(lambda *_: pytest.fail("a pass"))
    engine.losses_and_differences(torch.ones(3, 6, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------------------------------
# What it cannot take


def test_labels_must_be_one_class_for_each_row() -> None:
    real = make_rows(4, 1)
    real.batch["labels"] = torch.rand(4)
    with pytest.raises(ValueError, match="one class for each row; the labels of `train_dataset`"):
        make_engine(Network(), real)
    large = make_rows(4, 1)
    large.batch["labels"] = torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match="`target_dataset` lie between 0 and 3, and the model has the classes 0 to 2"):
        make_engine(Network(), make_rows(4, 1), large)


def test_heads_that_predict_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`LlamaForCausalLM` returns logits of shape \(1, .*one row for each sample"):
        make_engine(make_model("llama"), rows_of("llama", 4))


def test_broken_rows_are_named() -> None:
    pool = make_rows(5, 1)
    pool.batch["x"][3] = torch.nan
    with pytest.raises(ValueError, match=r"not finite for rows \[3\] of `train_dataset`"):
        make_engine(Network(), pool)


def test_a_model_without_trained_parameters_and_a_large_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="trained parameters, and the model has none"):
        make_engine(Network().requires_grad_(False), make_rows(4, 1))
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    with pytest.raises(ValueError, match="takes up to 3 rows; the pool has 4"):
        make_engine(Network(), make_rows(4, 1))


def test_no_warning_for_what_is_usual() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_engine(Network(), make_rows(4, 1))
