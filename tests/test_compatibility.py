"""Cells of docs/compatibility.md that no other test shows: each method with a feature of the Trainer, or its refusal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig, get_peft_model
from test_contract import METHODS, build
from tiny import VOCABULARY, make_dataset, make_model, make_trainer, parameters_of
from transformers import (
    DataCollatorWithFlattening,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_bilevel import BladeMixin, BrosMixin, CoresetMixin, MixtureConfig, MixtureMixin, MixtureTrainer
from hf_bilevel.trainers import coreset, reference

pytestmark = [
    pytest.mark.filterwarnings("ignore:The subspaces of"),
    pytest.mark.filterwarnings("ignore:The weights of the domains never move"),
]


def train(method: str, name: str, folder: Path, **kwargs: Any) -> torch.Tensor:
    trainer = build(method, name, folder, **kwargs)
    set_seed(11)
    trainer.train()
    return parameters_of(trainer)


# Where it runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def enable(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the flags that Trainer sets for FSDP and DeepSpeed; test_distributed.py shards for real."""
    create = Trainer.create_accelerator_and_postprocess

    def enable(engine: str, version: int = 2) -> None:
        def create_and_say_so(self: Trainer) -> None:
            create(self)
            setattr(self, f"is_{engine}_enabled", True)
            monkeypatch.setattr(type(self.accelerator), "is_fsdp2", version == 2)

        monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_and_say_so)

    return enable


REFUSED_WITH_DEEPSPEED = {
    "blade": "a dynamic reference is trained beside the model.* Use FSDP2, .* or `reference='static'`",
    "bros": "a random subspace is one of a whole matrix.* Use one device or DDP",
    "mixture": "a twin of the model and of its optimizer, of which an engine gives no copy. Use FSDP2",
}


@pytest.mark.parametrize("method", REFUSED_WITH_DEEPSPEED)
def test_what_an_engine_cannot_do_is_refused(method: str, tmp_path: Path, enable: Callable[..., None]) -> None:
    enable("deepspeed")
    with pytest.raises(ValueError, match=f"does not run so with DeepSpeed: .*{REFUSED_WITH_DEEPSPEED[method]}"):
        build(method, "vit", tmp_path)
    build(method, "vit", tmp_path, on=False)  # the plain Trainer, wherever that runs


def test_what_was_loaded_in_parts_is_refused(tmp_path: Path, enable: Callable[..., None]) -> None:
    enable("deepspeed")
    reference_model = make_model("vit")
    next(reference_model.parameters()).ds_id = 0  # as ZeRO-3 marks it
    with pytest.raises(
        ValueError, match="the search trains was loaded in parts for ZeRO-3. Pass one that is whole as"
    ):
        build("coreset", "vit", tmp_path, model=reference_model)
    settings = {"reference": "static", "sync_steps": "auto", "reference_steps": "auto", "penalty": 0.0}
    with pytest.raises(ValueError, match="`reference_model` was loaded in parts for ZeRO-3.* Load it before"):
        build("blade", "vit", tmp_path, settings=settings, trainer_kwargs={"reference_model": reference_model})


@pytest.mark.parametrize("method", METHODS)
def test_fsdp_of_the_first_version_is_refused(method: str, tmp_path: Path, enable: Callable[..., None]) -> None:
    enable("fsdp", version=1)
    message = "with FSDP: a random subspace" if method == "bros" else "runs with FSDP2 only. Set `fsdp_config"
    with pytest.raises(ValueError, match=message):
        build(method, "vit", tmp_path)
    build(method, "vit", tmp_path, on=False)


REFUSED_WITH_FSDP = {
    "subspaces": (
        "bros",
        {},
        {},
        "does not run with FSDP: a random subspace .* Use one device or DDP",
    ),
    "a reference elsewhere": (
        "blade",
        {"reference_device": "cpu"},
        {},
        "`reference_device` must be \"auto\", got 'cpu'",
    ),
    "a reference in another dtype": ("blade", {"reference_dtype": "bfloat16"}, {}, '`reference_dtype` must be "auto"'),
    "a restart": ("blade", {}, {"auto_find_batch_size": True}, "cannot be copied for a reference. Set `per_device"),
    "gradients": ("mixture", {"hypergradient": "alignment", "reference_steps": "auto"}, {}, 'Use "penalty", or DDP'),
}


@pytest.mark.parametrize("case", REFUSED_WITH_FSDP)
def test_what_a_sharded_model_cannot_do_is_refused(case: str, tmp_path: Path, enable: Callable[..., None]) -> None:
    enable("fsdp")
    method, settings, arguments, message = REFUSED_WITH_FSDP[case]
    with pytest.raises(ValueError, match=message):
        build(method, "vit", tmp_path, settings=settings, **arguments)


def test_a_second_adapter_is_not_sharded(tmp_path: Path, enable: Callable[..., None]) -> None:
    enable("fsdp")
    model = get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match="a second adapter, which is not tested with FSDP. Use DDP, or `reference='static'`"
    ):
        build("blade", "llama", tmp_path, model=model)


def test_a_model_that_is_sharded_already_is_neither_copied_nor_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method, module, message in (
        ("blade", reference, "sharded the model already.* Build a new trainer"),
        (
            "coreset",
            coreset,
            "The model that the search trains is in parts.* Search before training, or .*`search_model`",
        ),
    ):
        trainer = build(method, "vit", tmp_path)
        trainer.is_fsdp_enabled = True
        monkeypatch.setattr(module, "is_sharded", lambda model: True)
        with pytest.raises(ValueError, match=message):
            trainer.train()


@pytest.mark.parametrize("method", METHODS)
def test_a_model_on_several_devices_is_refused(method: str, tmp_path: Path) -> None:
    model = make_model("vit")
    model.hf_device_map = {"vit": 0, "classifier": 1}
    message = "does not run a model that `device_map` spreads over several devices. Load it on one device"
    with pytest.raises(ValueError, match=message):
        build(method, "vit", tmp_path, model=model)


@pytest.mark.parametrize("method", METHODS)
def test_data_parallel_is_refused(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(
        ValueError, match="does not run under torch.nn.DataParallel .2 devices.*one process per device"
    ):
        build(method, "vit", tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("name", ["vit", "llama"])
@pytest.mark.parametrize("method", ["blade", "mixture", "coreset"])
def test_compiled_models_give_the_same_run(method: str, name: str, tmp_path: Path) -> None:
    """The graph is captured and split as on a GPU, and run by ATen: to rounding, the same."""
    settings = {"optim": "sgd", "learning_rate": 0.1}
    plain = train(method, name, tmp_path, **settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # What is selected changes from step to step and its shape does not, so that nothing is compiled twice.
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = train(method, name, tmp_path, torch_compile=True, torch_compile_backend="aot_eager", **settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


# Precision, memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "llama"])
@pytest.mark.parametrize("method", ["blade", "mixture", "coreset"])
def test_weights_in_bfloat16(method: str, name: str, tmp_path: Path) -> None:
    model = make_model(name).bfloat16()
    trainer = build(method, name, tmp_path, model=model)
    before = parameters_of(trainer)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.bfloat16}
    assert parameters_of(trainer).isfinite().all() and not torch.equal(parameters_of(trainer), before)


@pytest.mark.parametrize("name", ["vit", "llama"])
@pytest.mark.parametrize("method", ["blade", "mixture", "coreset"])
def test_reentrant_checkpointing_gives_the_same_numbers(method: str, name: str, tmp_path: Path) -> None:
    plain = train(method, name, tmp_path)
    kwargs = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    torch.testing.assert_close(train(method, name, tmp_path, **kwargs), plain, rtol=0, atol=1e-5)


ADAPTERS = {
    "ia3": lambda: IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[]),
    "head": lambda: LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # of older versions of peft
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("method", ["bros", "coreset"])
def test_other_adapters(method: str, kind: str, tmp_path: Path) -> None:
    model = get_peft_model(make_model("llama"), ADAPTERS[kind]())
    settings = {"rank": "full", "refresh_steps": "auto", "estimator": "one_sided"} if method == "bros" else {}
    trainer = build(method, "llama", tmp_path, model=model, settings=settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved and moved <= trained
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("method", ["blade", "coreset"])
def test_an_optimizer_may_be_given(method: str, tmp_path: Path) -> None:
    """It trains the model, at its own learning rate; reference and search have theirs, by name."""
    settings = {"reference_learning_rate": 0.1} if method == "blade" else {"inner_learning_rate": 0.1}
    model = make_model("vit")
    optimizers = (torch.optim.SGD(model.parameters(), lr=0.1), None)
    kwargs = {"model": model, "trainer_kwargs": {"optimizers": optimizers}}
    given = train(method, "vit", tmp_path, optim="sgd", learning_rate=0.01, settings=settings, **kwargs)
    assert torch.equal(given, train(method, "vit", tmp_path, optim="sgd", learning_rate=0.1, settings=settings))


# Data -----------------------------------------------------------------------------------------------------------------


def test_padding_free_batches_of_a_fixed_mixture(tmp_path: Path) -> None:
    trainer = make_trainer(
        MixtureTrainer,
        "llama",
        tmp_path,
        train_dataset=make_dataset("llama", 60).remove_columns("attention_mask"),
        trainer_kwargs={
            "bilevel_config": MixtureConfig(mixture="uniform", domain_column="source"),
            "data_collator": DataCollatorWithFlattening(),
        },
    )
    before = parameters_of(trainer)
    trainer.train()
    assert parameters_of(trainer).isfinite().all() and not torch.equal(parameters_of(trainer), before)


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_save_only_model_writes_no_state(method: str, tmp_path: Path) -> None:
    trainer = build(method, "vit", tmp_path, save_strategy="steps", save_steps=2, save_only_model=True)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert (checkpoint / "model.safetensors").exists() and not (checkpoint / "bilevel_state.pt").exists()
    with pytest.raises(ValueError, match="`.*checkpoint-2/bilevel_state.pt` is missing.*`save_only_model=True`"):
        build(method, "vit", tmp_path, max_steps=8).train(resume_from_checkpoint=str(checkpoint))


# Other trainers -------------------------------------------------------------------------------------------------------


class BladeSeq2SeqTrainer(BladeMixin, Seq2SeqTrainer):
    pass


class BrosSeq2SeqTrainer(BrosMixin, Seq2SeqTrainer):
    pass


class MixtureSeq2SeqTrainer(MixtureMixin, Seq2SeqTrainer):
    pass


class CoresetSeq2SeqTrainer(CoresetMixin, Seq2SeqTrainer):
    pass


@pytest.mark.parametrize(
    "trainer_class", [BladeSeq2SeqTrainer, BrosSeq2SeqTrainer, MixtureSeq2SeqTrainer, CoresetSeq2SeqTrainer]
)
def test_seq2seq_trainer_with_generation(trainer_class: type[Seq2SeqTrainer], tmp_path: Path) -> None:
    size = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        predict_with_generate=True,
        generation_max_length=4,
        max_steps=3,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = make_dataset("bert_mlm", 16)
    trainer = trainer_class(
        model=T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **size)),
        args=arguments,
        train_dataset=data,
        target_dataset=make_dataset("bert_mlm", 10, seed=7),
        bilevel_config=trainer_class.config_class(**METHODS[trainer_class.method].on),
    )
    assert trainer_class is not BladeSeq2SeqTrainer or trainer.granularity == "token"
    before = parameters_of(trainer)
    trainer.train()
    assert parameters_of(trainer).isfinite().all() and not torch.equal(parameters_of(trainer), before)
    assert trainer.predict(data).predictions.ndim == 2  # generated tokens, not logits


class DoubledTrainer(Trainer):
    """A user's trainer with a loss of its own."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        return (2 * loss, outputs) if return_outputs else 2 * loss


class CoresetDoubledTrainer(CoresetMixin, DoubledTrainer):
    pass


def test_a_loss_of_ones_own_trains_on_the_coreset(tmp_path: Path) -> None:
    """The search judges by the head's loss; the training is the user's."""
    settings = {
        "trainer_kwargs": {
            "target_dataset": make_dataset("vit", 10, seed=7),
            "bilevel_config": CoresetMixin.config_class(**METHODS["coreset"].on, inner_learning_rate=0.1),
        },
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    runs = []
    for trainer_class, rate in ((CoresetDoubledTrainer, 0.1), (METHODS["coreset"].trainer_class, 0.2)):
        trainer = make_trainer(trainer_class, "vit", tmp_path, learning_rate=rate, **settings)
        set_seed(11)
        trainer.train()
        runs.append(trainer)
    assert torch.equal(*(trainer.selected_subset().ids for trainer in runs))
    torch.testing.assert_close(*map(parameters_of, runs), rtol=0, atol=1e-6)


def test_a_loss_function_of_ones_own_with_drawn_domains(tmp_path: Path) -> None:
    """The training uses it; the weights are learned from `compute_sample_losses`."""

    def compute_sample_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return F.multi_margin_loss(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="none")

    def compute_loss_func(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return F.multi_margin_loss(outputs.logits, labels, reduction="sum") / num_items_in_batch

    trainer = build(
        "mixture",
        "vit",
        tmp_path,
        trainer_kwargs={"compute_loss_func": compute_loss_func, "compute_sample_losses": compute_sample_losses},
    )
    trainer.train()
    assert parameters_of(trainer).isfinite().all()
    assert max(abs(weight - 1 / 3) for weight in trainer.domain_weights.values()) > 1e-3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("method", ["blade", "mixture", "coreset"])
def test_steps_that_overflow_in_fp16_are_skipped(method: str, device: str, tmp_path: Path) -> None:
    """The scaler starts so high that the first gradients overflow; the weights stay finite, and training goes on below it."""
    settings = {
        "blade": {"reference": "static", "sync_steps": "auto", "reference_steps": "auto", "penalty": 0.0},
        "mixture": {"mixture": "uniform", "inner_steps": "auto", "reference_steps": "auto"},
        "coreset": {},
    }
    given = {"reference_model": make_model("vit", dropout=0.1), "target_dataset": None}
    trainer = build(
        method,
        "vit",
        tmp_path,
        fp16=True,
        use_cpu=device == "cpu",
        max_steps=24,
        settings=settings[method],
        trainer_kwargs={"blade": given, "mixture": {"target_dataset": None}}.get(method, {}),
    )
    trainer.accelerator.scaler = torch.amp.GradScaler(device, init_scale=2.0**24)
    trainer.accelerator.native_amp = True  # Accelerate ignores fp16 on a CPU, which computes in it all the same
    half: list[bool] = []
    trainer.model.classifier.register_forward_hook(lambda m, args, output: half.append(output.dtype == torch.float16))
    before = parameters_of(trainer)
    trainer.train()
    assert any(half), "nothing was computed in fp16"
    assert trainer.accelerator.scaler.get_scale() < 2.0**24, "no step overflowed"
    assert parameters_of(trainer).isfinite().all() and not torch.equal(parameters_of(trainer).cpu(), before.cpu())
