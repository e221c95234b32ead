"""The rules of other libraries in the benchmarks, against gradients of single rows."""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import arguments, make_dataset, make_model

BENCHMARKS = Path(__file__).parents[1] / "scripts" / "benchmarks"


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    sys.modules.pop("peer_rules", None)
    return import_module("peer_rules")


def adapted(bias: str = "none") -> torch.nn.Module:
    model = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], bias=bias))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # 0 at first, and then the other half has no gradient
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.double()


def batch_of(num: int, seed: int) -> dict[str, torch.Tensor]:
    return {
        key: torch.tensor(column)
        for key, column in make_dataset("llama", num, seed).to_dict().items()
        if key != "source"
    }


def test_products_are_those_of_the_gradients_of_single_rows(rules: ModuleType) -> None:
    model, batch, target = adapted(), batch_of(6, 0), batch_of(4, 5)
    products = rules.gradient_products(model, batch, target)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradient(rows: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = [
            model(**{key: entry[i : i + 1] for key, entry in rows.items()}).loss for i in range(len(rows["labels"]))
        ]
        return torch.cat([part.flatten() for part in torch.autograd.grad(torch.stack(losses).mean(), trained)])

    wanted = gradient(target)
    expected = [gradient({key: entry[i : i + 1] for key, entry in batch.items()}) @ wanted for i in range(6)]
    assert torch.allclose(products.double(), torch.stack(expected), rtol=1e-5, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())


def test_products_need_linear_layers(rules: ModuleType) -> None:
    with pytest.raises(ValueError, match="linear layers"):
        rules.gradient_products(make_model("llama"), batch_of(2, 0), batch_of(2, 1))


def test_gradient_products_choose_the_candidates_of_a_step(rules: ModuleType, tmp_path: Path) -> None:
    target = make_dataset("llama", 8, seed=5)
    trainer = rules.GradientProductTrainer(
        0.25, target, model=adapted(), args=arguments(tmp_path, max_steps=2), train_dataset=make_dataset("llama", 32)
    )
    loader = iter(trainer.get_train_dataloader())
    candidates = next(iter(trainer.get_train_dataloader()))
    target_batch = trainer._target.batch_at(0)
    (picked,), num_items = trainer.get_batch_samples(loader, 1, torch.device("cpu"))
    products = rules.gradient_products(trainer.model, candidates, target_batch)
    best = products.topk(2).indices.sort().values
    assert torch.equal(picked["input_ids"], candidates["input_ids"][best])
    assert int(num_items) == int((picked["labels"][:, 1:] != -100).sum())


def test_the_highest_losses_of_the_pool_are_chosen_again_after_an_interval(rules: ModuleType, tmp_path: Path) -> None:
    pool = make_dataset("bert", 20)
    trainer = rules.IntervalTrainer(
        0.25,
        2,
        model=make_model("bert").double(),
        args=arguments(tmp_path, max_steps=4, per_device_train_batch_size=4, learning_rate=0.1),
        train_dataset=pool,
    )
    chosen = []
    choose = trainer._pool_losses

    def losses() -> torch.Tensor:
        found = choose()
        rows = [{key: torch.tensor([value]) for key, value in row.items() if key != "source"} for row in pool]
        expected = torch.stack([trainer.model.eval()(**row).loss for row in rows])
        trainer.model.train()
        assert torch.allclose(found, expected.to(found), atol=1e-9)
        chosen.append(set(found.topk(5).indices.tolist()))
        return found

    trainer._pool_losses = losses
    trainer.train()
    assert len(chosen) == 2 and trainer.num_times_chosen.sum() == 4 * 4
    assert set(trainer.num_times_chosen.nonzero().flatten().tolist()) <= chosen[0] | chosen[1]
