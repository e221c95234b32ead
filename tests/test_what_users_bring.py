"""What users bring: samplers, collators, datasets and callbacks of their own, and how they start and stop a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import make_dataset, make_model, make_rows, make_trainer, parameters_of
from torch.utils.data import ChainDataset, DataLoader, IterableDataset, Sampler, WeightedRandomSampler
from transformers import EarlyStoppingCallback, Trainer, default_data_collator

from hf_bilevel import (
    BladeConfig,
    BladeMixin,
    BladeTrainer,
    CoresetConfig,
    CoresetTrainer,
    MixtureConfig,
    MixtureTrainer,
)
from hf_bilevel.data import DataCollatorWithOrigin, NumberedDataset, pop_origin

BLADE = BladeConfig(selection_ratio=0.5, sync_steps=2, reference_steps=1)


def build(folder: Path, trainer_class: type = BladeTrainer, name: str = "vit", **kwargs: Any) -> Any:
    ours = {"target_dataset": make_dataset(name, 8, 1), "bilevel_config": BLADE}
    if not issubclass(trainer_class, BladeMixin):
        ours = {}
    extra = kwargs.pop("trainer_kwargs", {})
    return make_trainer(trainer_class, name, folder, trainer_kwargs={**ours, **extra}, **kwargs)


# Samplers -------------------------------------------------------------------------------------------------------------


class Balanced:
    """The usual way to balance classes: it reads a column of the training dataset."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler:
        assert isinstance(self.train_dataset, Dataset) and train_dataset is self.train_dataset
        labels = torch.tensor(self.train_dataset["labels"][:])
        weights = 1 / labels.bincount()[labels]
        return WeightedRandomSampler(weights, len(labels), generator=torch.Generator().manual_seed(0))


class BalancedTrainer(Balanced, Trainer):
    pass


class Behind(BladeMixin, BalancedTrainer):
    pass


class InFront(Balanced, BladeTrainer):
    pass


@pytest.mark.parametrize("trainer_class", [Behind, InFront])
def test_a_sampler_that_reads_the_training_dataset(trainer_class: type, tmp_path: Path) -> None:
    trainer = build(tmp_path, trainer_class)
    assert trainer.train().global_step == 6
    offered = trainer.sample_tally.state_dict()["offered"]
    expected = torch.tensor(list(Balanced._get_train_sampler(trainer, trainer.train_dataset)))[:48].bincount(
        minlength=64
    )
    assert torch.equal(offered.long(), expected)


def test_the_epoch_is_told_to_the_dataset(tmp_path: Path) -> None:
    class Augmented(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.rows, self.epochs = make_rows("vit", 16), []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, i: int) -> dict[str, Any]:
            return self.rows[i]

    pools = []
    for trainer_class in (Trainer, BladeTrainer):
        pools.append(Augmented())
        build(tmp_path, trainer_class, train_dataset=pools[-1]).train()
    assert pools[0].epochs == pools[1].epochs and {0, 1, 2} <= set(pools[1].epochs)


# Collators ------------------------------------------------------------------------------------------------------------


def brightness(row: dict[str, Any]) -> float:
    return -torch.tensor(row["pixel_values"]).sum().item()


def test_a_collator_that_sorts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The data collator returns rows in an order of its own"):
        build(
            tmp_path,
            trainer_kwargs={"data_collator": lambda rows: default_data_collator(sorted(rows, key=brightness))},
        )


def test_a_collator_that_sorts_in_place_is_followed(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        rows.sort(key=brightness)
        return default_data_collator(rows)

    trainer, seen = build(tmp_path, trainer_kwargs={"data_collator": collate}), []
    select = trainer._select
    trainer._select = lambda batches, origins, num: (
        seen.extend(zip(batches, origins, strict=True)) or select(batches, origins, num)
    )
    trainer.train()
    pixels = torch.tensor(trainer.train_dataset["pixel_values"][:])
    for batch, origin in seen:
        assert torch.equal(batch["pixel_values"], pixels[origin.sample_ids])
        assert origin.sample_ids.tolist() != sorted(origin.sample_ids.tolist())


@pytest.mark.parametrize("kind", ["list", "stream"])
def test_a_collator_that_sorts_in_place_is_followed_where_columns_are_removed(kind: str, tmp_path: Path) -> None:
    """Of anything but a `datasets.Dataset` the Trainer removes unused columns in front of the collator."""
    rows = [{**row, "place": i} for i, row in enumerate(make_rows("vit", 64))]

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        items.sort(key=brightness)
        return default_data_collator(items)

    pool = Dataset.from_list(rows).to_iterable_dataset() if kind == "stream" else rows
    trainer, seen = build(tmp_path, train_dataset=pool, trainer_kwargs={"data_collator": collate}), []
    select = trainer._select
    trainer._select = lambda batches, origins, num: (
        seen.extend(zip(batches, origins, strict=True)) or select(batches, origins, num)
    )
    trainer.train()
    pixels = torch.tensor([row["pixel_values"] for row in rows])
    assert len(seen) == 6 and all(torch.equal(b["pixel_values"], pixels[o.sample_ids]) for b, o in seen)


def test_one_object_at_two_places() -> None:
    shared, other = (torch.ones(2), 0), (torch.zeros(2), 1)
    numbered = NumberedDataset([shared, other, shared])
    keep = DataCollatorWithOrigin(lambda items: {"x": torch.stack([x for x, _ in items])})
    assert pop_origin(keep([numbered[i] for i in (0, 1, 2)])).sample_ids.tolist() == [0, 1, 2]
    last_first = DataCollatorWithOrigin(lambda items: items.reverse() or {"x": torch.stack([x for x, _ in items])})
    ids = pop_origin(last_first([numbered[i] for i in (0, 1)])).sample_ids.tolist()
    assert ids == [1, 0]
    assert sorted(pop_origin(last_first([numbered[i] for i in (0, 1, 2)])).sample_ids.tolist()) == [0, 1, 2]


def test_a_collator_that_draws_and_rows_that_are_the_same(tmp_path: Path) -> None:
    """Two rows alike, with other masks: the batch is the same either way round, and nothing is sorted."""
    rows = make_rows("vit", 16)

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_data_collator(items)
        return {**batch, "pixel_values": batch["pixel_values"] + torch.randn(batch["pixel_values"].shape)}

    build(tmp_path, train_dataset=[rows[0], *rows], trainer_kwargs={"data_collator": collate}).train()


def test_a_collator_with_a_generator_of_its_own_is_left_as_it_was(tmp_path: Path) -> None:
    class Masks:
        seed, generator = 5, None

        def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
            self.generator = self.generator or torch.Generator().manual_seed(self.seed)
            return default_data_collator(items)

    trainer = build(tmp_path, trainer_kwargs={"data_collator": Masks()})
    assert trainer.data_collator.generator is None
    trainer.train()


def test_a_loader_of_the_users_own_behind_the_mixin(tmp_path: Path) -> None:
    class Own(Trainer):
        def get_train_dataloader(self) -> DataLoader:
            loader = DataLoader(self.train_dataset, 8, shuffle=True, collate_fn=self.data_collator)
            return self.accelerator.prepare(loader)

    class Ours(BladeMixin, Own):
        pass

    trainer = build(tmp_path, Ours, remove_unused_columns=False, train_dataset=make_rows("vit", 64))
    trainer.train()
    assert int(trainer.sample_tally.state_dict()["offered"].sum()) == 48


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_a_collator_that_leaves_rows_out_is_said(name: str, tmp_path: Path) -> None:
    key = {"vit": "pixel_values", "llama": "input_ids"}[name]
    pool = make_rows(name, 64)
    broken = pool[40][key]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return default_data_collator([row for row in rows if row[key] is not broken])

    trainer = build(tmp_path, name=name, train_dataset=pool, trainer_kwargs={"data_collator": collate}, max_steps=8)
    with pytest.raises(ValueError, match="A batch of 8 samples gave 7 losses.*filter the dataset before"):
        trainer.train()


# Streams --------------------------------------------------------------------------------------------------------------


class Numbers(IterableDataset):
    def __init__(self, first: int, num: int) -> None:
        self.rows = make_rows("vit", num)
        self.first = first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i, row in enumerate(self.rows, self.first):
            pixels = torch.tensor(row["pixel_values"])
            pixels[0, 0, 0] = float(i)
            yield {"pixel_values": pixels, "labels": row["labels"]}


class First(BladeTrainer):
    """Notes the rows of its first step."""

    first: tuple[int, ...] = ()

    def _select(self, batches: Any, *args: Any) -> Any:
        self.first = self.first or tuple(batches[0]["pixel_values"][:, 0, 0, 0].int().tolist())
        return super()._select(batches, *args)


@pytest.mark.parametrize("num_rows", [1000, 24])  # within the first pass, and after it
@pytest.mark.parametrize("max_steps", [6, 12, 5])
def test_a_stream_is_resumed_where_it_was_with_another_number_of_steps(
    max_steps: int, num_rows: int, tmp_path: Path
) -> None:
    kwargs = {"train_dataset": Numbers(0, num_rows), "save_strategy": "steps", "save_steps": 4}
    build(tmp_path, First, **kwargs, max_steps=6).train()
    again = build(tmp_path, First, **kwargs, max_steps=max_steps)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.first == tuple(i % num_rows for i in range(32, 40))


def test_a_chain_of_streams_whose_length_is_an_error(tmp_path: Path) -> None:
    class Wrapped(ChainDataset):
        def __len__(self) -> int:
            raise TypeError("no length")

    pool = Wrapped([Numbers(0, 100), Numbers(100, 100)])
    assert build(tmp_path, train_dataset=pool, save_strategy="steps", save_steps=2).train().global_step == 6


# Callbacks, and how runs begin ------------------------------------------------------------------------------------------


def stops_early(folder: Path, held_out: Any, metric: str, patience: int, config: MixtureConfig, rate: float) -> Any:
    watches = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
    }
    best = {"load_best_model_at_end": True, "metric_for_best_model": metric, "greater_is_better": False}
    ours = {"target_dataset": make_dataset("llama", 8, 1), "eval_dataset": held_out, "bilevel_config": config}
    kwargs = {**ours, "callbacks": [EarlyStoppingCallback(patience)]}
    trainer = make_trainer(
        MixtureTrainer, "llama", folder, max_steps=60, learning_rate=rate, trainer_kwargs=kwargs, **watches, **best
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("metric", "kind"),
    [("eval_weighted_loss", "column"), ("eval_code_loss", "column"), ("eval_weighted_loss", "dict")],
)
def test_early_stopping_by_the_loss_of_a_domain(metric: str, kind: str, tmp_path: Path) -> None:
    held_out = make_dataset("llama", 24, 5)
    if kind == "dict":
        names = held_out["source"][:]
        held_out = {d: held_out.select([i for i, n in enumerate(names) if n == d]) for d in ("web", "books", "code")}
    config = MixtureConfig(domain_column="source", inner_steps=5, reference_steps=1)
    trainer = stops_early(tmp_path, held_out, metric, 2, config, rate=0.1)
    values = [entry[metric] for entry in trainer.state.log_history if metric in entry]
    best = values.index(min(values))
    assert len(values) == best + 3 == trainer.state.global_step // 2 < 30


@pytest.mark.filterwarnings("ignore:`target_dataset` is ignored")
def test_callbacks_hear_of_a_loss_once(tmp_path: Path) -> None:
    """With a dict of datasets each is evaluated by itself: patience would run out twice as fast."""
    parts = {name: make_dataset("llama", 8, i) for i, name in enumerate(("web", "books"))}
    config = MixtureConfig(domain_column="source", mixture="uniform")
    assert stops_early(tmp_path, parts, "eval_web_loss", 4, config, rate=0.0).state.global_step == 10


def test_a_loader_is_evaluated_again_and_after_a_failure(tmp_path: Path) -> None:
    config = MixtureConfig(domain_column="source", mixture="uniform")
    held_out = make_dataset("llama", 24, 5)
    trainer = make_trainer(
        MixtureTrainer, "llama", tmp_path, trainer_kwargs={"eval_dataset": held_out, "bilevel_config": config}
    )
    whole = trainer.evaluate()
    loader = trainer.get_eval_dataloader()
    for _ in range(2):
        metrics = trainer.evaluation_loop(loader, "again").metrics
        assert metrics["eval_code_loss"] == pytest.approx(whole["eval_code_loss"])
    step = trainer.model.forward
    trainer.model.forward = lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("no memory"))
    with pytest.raises(RuntimeError, match="no memory"):
        trainer.evaluate()
    trainer.model.forward = step
    assert "test_code_loss" not in trainer.predict(held_out.remove_columns("source")).metrics


def test_training_while_an_exception_is_handled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`except ValueError: trainer.train()` after nothing could be resumed: results of all processes are merged all the same."""
    trainer, merged = build(tmp_path), []
    merge = trainer._merge
    monkeypatch.setattr(trainer, "_merge", lambda tally: merged.append(tally) or merge(tally))
    try:
        trainer.train(resume_from_checkpoint=True)
    except ValueError:
        trainer.train()
    assert merged == [trainer.sample_tally, trainer.domain_tally]


def test_a_look_at_the_loader_before_training_with_an_adapter(tmp_path: Path) -> None:
    def model() -> torch.nn.Module:
        torch.manual_seed(1)
        return get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    trained = []
    for looks in (False, True):
        trainer = make_trainer(
            MixtureTrainer,
            "llama",
            tmp_path,
            model=model(),
            trainer_kwargs={
                "target_dataset": make_dataset("llama", 8, 1),
                "bilevel_config": MixtureConfig(domain_column="source", inner_steps=2, reference_steps=1),
            },
        )
        if looks:
            assert len(trainer.get_train_dataloader()) == 8
        trainer.train()
        assert list(trainer.model.peft_config) == ["default"]
        trained.append(parameters_of(trainer))
    assert torch.equal(*trained)


def test_alignment_with_weights_in_half_precision_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Weights are kept in half precision"):
        make_trainer(
            MixtureTrainer,
            "llama",
            tmp_path,
            model=make_model("llama").bfloat16(),
            trainer_kwargs={
                "target_dataset": make_dataset("llama", 8, 1),
                "bilevel_config": MixtureConfig(domain_column="source", hypergradient="alignment"),
            },
        )


def test_a_coreset_larger_than_what_helps_is_said(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    pixels = torch.randn(200, 1, 8, 8, generator=generator) + 0.5 * labels.view(-1, 1, 1, 1)
    given = labels.clone()
    given[:150] = 1 - given[:150]
    rows = {"pixel_values": pixels.tolist(), "labels": given.tolist()}
    clean = torch.randn(32, 1, 8, 8, generator=generator) + 0.5 * labels[:32].view(-1, 1, 1, 1)
    trainer = make_trainer(
        CoresetTrainer,
        "vit",
        tmp_path,
        train_dataset=Dataset.from_dict(rows),
        trainer_kwargs={
            "target_dataset": Dataset.from_dict({"pixel_values": clean.tolist(), "labels": labels[:32].tolist()}),
            "bilevel_config": CoresetConfig(size=120, engine="kernel", initial_size=0.6, num_masks=2, outer_steps=200),
        },
    )
    with pytest.warns(UserWarning, match="The search settled on .* samples, .* fewer than asked for"):
        subset = trainer.search()
    rest = subset.ids[subset.probabilities == 0]
    assert len(subset) == 120 and len(rest) > 5 and rest.max() > 100, "not the first ones of the pool"
