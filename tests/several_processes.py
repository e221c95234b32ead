"""Started by test_distributed.py on two or four gloo processes; any failed assertion fails the run.

torchrun --standalone --nproc_per_node 2 tests/several_processes.py FOLDER [CASE ...]
"""

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from tiny import make_dataset, make_model, make_trainer, parameters_of, wide_norms
from transformers import Trainer, TrainerCallback, set_seed

from hf_bilevel import (
    BladeConfig,
    BladeTrainer,
    BrosConfig,
    BrosTrainer,
    CoresetConfig,
    CoresetTrainer,
    MixtureConfig,
    MixtureTrainer,
    large_vocabulary,
    losses,
)
from hf_bilevel.trainers.sharding import is_partitioned, is_sharded

NUM_PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
UNEVEN = 50  # rows of a pool that no batch divides, in no number of processes; less than the run trains on

# Every run also compares weights and state over the processes after each step.
ON = {
    "check_processes": True,
    "selection_ratio": 0.5,
    "sync_steps": 3,
    "reference_steps": 2,
    "penalty": 0.5,
    "domain_column": "source",
}


BROS_ON = {"check_processes": True, "rank": 0.5, "refresh_steps": 2, "domain_column": "source"}
BROS_OFF = {"upper_variable": "fixed", "rank": "full"}
MIXTURE_ON = {"check_processes": True, "inner_steps": 3, "reference_steps": 2, "domain_column": "source"}
CORESET_ON = {
    "check_processes": True,
    "size": 12,
    "outer_steps": 4,
    "inner_steps": 2,
    "num_masks": 3,
    "num_final_masks": 2,
    "inner_batch_size": 4,
    "engine": "sequential",  # stacked trainings share the random numbers of dropout, as many as a process has
}
KERNEL_ON = {
    "check_processes": True,
    "size": 12,
    "outer_steps": 4,
    "num_masks": 3,
    "engine": "kernel",
    "initial_size": 0.5,
    "kernel_trainings": 2,
    "inner_steps": 3,
    "inner_batch_size": 4,
    "pool_share": 0.5,
}
TRAINERS = {
    BladeConfig: BladeTrainer,
    BrosConfig: BrosTrainer,
    CoresetConfig: CoresetTrainer,
    MixtureConfig: MixtureTrainer,
}
# Runs that see the same global batches as one process: the weights must not be scaled within a rank, and what differs by
# rounding must not be amplified by finite differences or AdamW. Model, settings, arguments of the trainer.
GLOBAL_RUNS: dict[str, tuple[str, BrosConfig | MixtureConfig, dict[str, Any]]] = {
    "table": (
        "vit",
        BrosConfig(rank=0.5, refresh_steps=2, hessian_action="double_backward", normalise_weights=False),
        {},
    ),
    "tokens": (
        "llama",
        BrosConfig(rank=0.5, refresh_steps=2, upper_variable="fixed", normalise_weights=False),
        {"sample_weights": torch.arange(64) / 32},
    ),
    # Drawn domains have their shares in the batch of each process, so only multiplied losses are the same.
    "domains": (
        "vit",
        MixtureConfig(realisation="weight", inner_steps=3, reference_steps=2, domain_column="source"),
        {},
    ),
}
GLOBAL_LEARNING_RATE = 0.1
LAYERS = {"vit": "ViTLayer", "llama": "LlamaDecoderLayer"}  # that FSDP2 gathers one at a time
SMOOTH = {"adam_epsilon": 1e-3}  # AdamW would amplify the rounding of small gradients


def lora_model() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    return model


def run(
    folder: Path,
    name: str,
    config: BladeConfig | BrosConfig | CoresetConfig | MixtureConfig | None,
    resume: Path | bool | None = None,
    trainer_kwargs: dict[str, Any] | None = None,
    evaluates_first: bool = False,
    **kwargs: Any,
) -> Any:
    extra: dict[str, Any] = {}
    trainer_class = Trainer
    if config is not None:
        trainer_class = TRAINERS[type(config)]
        extra = {"target_dataset": make_dataset(name, 10, seed=7), "bilevel_config": config}
    trainer = make_trainer(
        trainer_class,
        name,
        folder,
        ddp_backend="gloo",
        max_steps=6,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=4,
        trainer_kwargs={**extra, **(trainer_kwargs or {})},
        **kwargs,
    )
    assert trainer.args.world_size == NUM_PROCESSES > 1, f"{trainer.args.world_size} of {NUM_PROCESSES} processes"
    if evaluates_first:
        trainer.evaluate(make_dataset(name, 9, seed=5))
    set_seed(11)
    trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    return trainer


def same_on_all(tensor: torch.Tensor) -> bool:
    copies = [torch.empty_like(tensor) for _ in range(NUM_PROCESSES)]
    dist.all_gather(copies, tensor.contiguous())
    return all(torch.equal(copy, copies[0]) for copy in copies)


@contextmanager
def fsdp_on_cpu(layer: str, **config: Any) -> Iterator[dict[str, Any]]:
    """Let Accelerate shard on the CPU, which its state machine keeps for accelerators: all else is FSDP2's own code, with gloo."""
    init = AcceleratorState.__init__

    def init_as_if_on_accelerators(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        if not AcceleratorState._shared_state:
            PartialState(cpu=True)
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, **kwargs)

    AcceleratorState._reset_state(reset_partial_state=False)
    try:
        with patch.object(AcceleratorState, "__init__", init_as_if_on_accelerators):
            yield {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [layer], **config}}
    finally:
        AcceleratorState._reset_state(reset_partial_state=False)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
        os.environ.pop("ACCELERATE_USE_FSDP", None)


def passed(case: str) -> None:
    if dist.get_rank() == 0:
        print(f"{case}: passed", flush=True)  # noqa: T201


def check(folder: Path, case: str, name: str, **kwargs: Any) -> None:
    make = (lambda: {"model": lora_model()}) if case == "lora" else dict
    plain = parameters_of(run(folder / "plain", name, None, **make(), **kwargs))
    off = parameters_of(run(folder / "off", name, BladeConfig(**{**ON, "selection_ratio": 1.0}), **make(), **kwargs))
    assert torch.equal(off, plain), f"{case}: off is not the plain Trainer"

    whole = run(folder / "on", name, BladeConfig(**ON), **make(), **kwargs)
    parameters = parameters_of(whole)
    assert not torch.equal(parameters, plain), f"{case}: on changes nothing"
    assert same_on_all(parameters), f"{case}: the ranks' models differ"

    dist.barrier()
    state = torch.load(folder / "on" / "checkpoint-6" / "bilevel_state.pt", weights_only=True)["shared"]
    for key, value in state["reference"]["weights"].items():
        assert same_on_all(value), f"{case}: the ranks' references differ in {key}"
    tables = whole.sample_tally.state_dict()
    assert same_on_all(tables["offered"])
    if name == "vit":  # 6 steps x 2 micro-batches x 4 candidates on each process, half of them selected
        offered = 48 * NUM_PROCESSES
        assert tables["offered"].sum() == offered and tables["selected"].sum() == offered / 2
        assert state["domains"]["offered"].sum() == offered

    resume = folder / "on" / "checkpoint-4"
    resumed = run(folder / "resumed", name, BladeConfig(**ON), resume=resume, **make(), **kwargs)
    assert torch.equal(parameters_of(resumed), parameters), f"{case}: resumed differs from uninterrupted"
    for key, value in resumed.sample_tally.state_dict().items():
        assert torch.equal(value, tables[key]), f"{case}: the resumed {key} differs"
    fractions = [entry for entry in resumed.state.log_history if "blade/selected_fraction/web" in entry]
    assert fractions
    passed(case)


def check_a_torn_checkpoint(folder: Path, case: str) -> None:
    """A checkpoint that is torn for one process only is taken by none, and none waits for the other."""
    parameters = parameters_of(run(folder, "vit", BladeConfig(**ON)))
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "checkpoint-6" / "rng_state_1.pth").unlink()
    dist.barrier()
    try:
        run(folder, "vit", BladeConfig(**ON), resume=folder / "checkpoint-6")
    except ValueError as error:
        assert "checkpoint-6/rng_state_1.pth` is missing or torn" in str(error)
    else:
        raise AssertionError(f"{case}: resumed from a torn checkpoint")
    resumed = run(folder, "vit", BladeConfig(**ON), resume=True)
    assert torch.equal(parameters_of(resumed), parameters), f"{case}: not resumed from the checkpoint before"
    passed(case)


def variables(trainer: BrosTrainer | MixtureTrainer) -> dict[str, torch.Tensor]:
    """The lower, the upper and the auxiliary variable, and the average of the hypergradient."""
    parameters = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    if isinstance(trainer, MixtureTrainer):
        return {"parameters": parameters, "weights": torch.tensor(list(trainer.domain_weights.values()))}
    found = {
        "parameters": parameters,
        "weights": trainer.sample_weights.weights,
        "ids": trainer.sample_weights.ids,
    }
    if trainer.upper is not None:
        found["upper variable"] = torch.cat([p.detach().flatten() for p in trainer.upper.parameters()])
        found["auxiliary"] = torch.cat([z.flatten() for z in trainer.auxiliary.blocks])
        found["average"] = torch.cat([h.flatten() for h in trainer.upper_step.average])
    return found


def check_bros(folder: Path, case: str, name: str, **settings: Any) -> None:
    config = BrosConfig(**{**BROS_ON, **settings})
    if name == "vit" and config.upper_variable == "table":
        plain = parameters_of(run(folder / "plain", name, None))
        off = parameters_of(run(folder / "off", name, BrosConfig(**BROS_OFF)))
        assert torch.equal(off, plain), f"{case}: off is not the plain Trainer"

    whole = variables(run(folder / "on", name, config))
    for key, value in whole.items():
        assert value.isfinite().all() and value.any(), f"{case}: the {key} must be something"
        assert same_on_all(value), f"{case}: the ranks' {key} differ"
    if config.upper_variable == "network":
        assert len(whole["ids"]) == 64, f"{case}: a rank's samples are missing"  # 6 steps of 16, epochs of 64
    dist.barrier()

    resume = folder / "on" / "checkpoint-4"
    resumed = variables(run(folder / "resumed", name, config, resume=resume))
    for key, value in resumed.items():
        assert torch.equal(value, whole[key]), f"{case}: the resumed {key} differ"
    passed(case)


def check_mixture(folder: Path, case: str, name: str, **settings: Any) -> None:
    config = MixtureConfig(**{**MIXTURE_ON, **settings})
    if name == "vit":
        plain = parameters_of(run(folder / "plain", name, None))
        off = parameters_of(run(folder / "off", name, MixtureConfig(mixture="proportional")))
        assert torch.equal(off, plain), f"{case}: off is not the plain Trainer"

    def found(trainer: MixtureTrainer) -> dict[str, torch.Tensor]:
        weights = torch.tensor(list(trainer.domain_weights.values()), dtype=torch.float64)
        average = torch.tensor(list(trainer.mixture.values()), dtype=torch.float64)
        return {"parameters": parameters_of(trainer), "weights": weights, "average": average}

    whole = found(run(folder / "on", name, config))
    for key, value in whole.items():
        assert value.isfinite().all() and same_on_all(value), f"{case}: the ranks' {key} differ"
    assert (whole["weights"] - 1 / 3).abs().max() > 1e-3, f"{case}: the weights did not move"
    dist.barrier()
    state = torch.load(folder / "on" / "checkpoint-2" / "bilevel_state.pt", weights_only=True)
    if config.hypergradient == "penalty":  # in the middle of what the twin repeats
        for key, value in state["shared"]["reference"]["weights"].items():
            assert same_on_all(value), f"{case}: the ranks' twins differ in {key}"
        batches = [rank["twin_steps"][0]["batches"][0]["labels"] for rank in state["ranks"]]
        assert len(batches) == NUM_PROCESSES, f"{case}: a rank's batches are missing"
        assert not torch.equal(*batches[:2]), f"{case}: two ranks repeat the same rows"
    for checkpoint in (2, 4):
        resumed = found(run(folder / "resumed", name, config, resume=folder / "on" / f"checkpoint-{checkpoint}"))
        for key, value in resumed.items():
            assert torch.equal(value, whole[key]), f"{case}: the {key} resumed from {checkpoint} differ"
    passed(case)


def model_of_this_rank() -> torch.nn.Module:
    """Of the ranks' models the first one's must count."""
    model = make_model("vit", dropout=0.2)
    with torch.no_grad():
        model.classifier.weight.add_(int(os.environ.get("RANK", "0")))
    return model


def check_coreset(folder: Path, case: str, settings: dict[str, Any], fresh: bool = False) -> None:
    """The search is also compared with that of one process, by test_distributed.py."""
    given = {"trainer_kwargs": {"model_init": model_of_this_rank}} if fresh else {"model": model_of_this_rank()}
    trainer = run(folder / "on", "vit", CoresetConfig(**settings), **given)
    subset = trainer.selected_subset()
    found = {"ids": subset.ids, "probabilities": subset.probabilities, "parameters": parameters_of(trainer)}
    for key, value in found.items():
        assert same_on_all(value), f"{case}: the ranks' {key} differ"
    checkpoint = folder / "on" / "checkpoint-2"
    resumed = run(folder / "resumed", "vit", CoresetConfig(**settings), resume=checkpoint, **given)
    assert torch.equal(resumed.selected_subset().ids, subset.ids), f"{case}: the coreset was not kept"
    assert torch.equal(parameters_of(resumed), found["parameters"]), f"{case}: resumed differs"
    if dist.get_rank() == 0:
        subset.save(folder / "subset")
        print(f"{case}: passed")  # noqa: T201


def save_global_runs(folder: Path) -> None:
    """For test_distributed.py, which compares them with one process and the doubled batch."""
    results = {}
    for case, (name, config, kwargs) in GLOBAL_RUNS.items():
        model = wide_norms(make_model(name)).double()
        arguments = {"optim": "sgd", "learning_rate": GLOBAL_LEARNING_RATE}
        results[case] = variables(run(folder / case, name, config, trainer_kwargs=kwargs, model=model, **arguments))
    if dist.get_rank() == 0:
        torch.save(results, folder / "global.pt")


def whole_weights(model: torch.nn.Module) -> Any:
    """Let a model that ZeRO-3 keeps in parts be read."""
    if not is_partitioned(model):
        return nullcontext()
    import deepspeed

    assert all(p.numel() == 0 for p in model.parameters()), "nothing is in parts"
    return deepspeed.zero.GatheredParameters(list(model.parameters()))


def found(trainer: Any) -> dict[str, torch.Tensor]:
    """What a run ends with."""
    with whole_weights(trainer.model):
        values = {"parameters": parameters_of(trainer)}
    if isinstance(trainer, BladeTrainer):
        values |= trainer.sample_tally.state_dict()
    elif isinstance(trainer, MixtureTrainer):
        values["weights"] = torch.tensor(list(trainer.domain_weights.values()), dtype=torch.float64)
    else:
        values["ids"] = trainer.selected_subset().ids
    return values


def check_parts(
    folder: Path,
    case: str,
    expected: dict[str, torch.Tensor] | None,
    part: str,
    resumed_from: tuple[int, ...],
    run: Any,
) -> None:
    """Compare a model in parts with one that is whole, its run with resumed ones, and tear the newest checkpoint."""
    trainer = run(folder / "on")
    whole = found(trainer)
    for key, value in whole.items() if expected is not None else ():
        torch.testing.assert_close(
            value, expected[key], rtol=0, atol=1e-5, msg=lambda text, k=key: f"{case}, {k}: {text}"
        )
    dist.barrier()
    for number in resumed_from:
        resumed = found(run(folder / "resumed", folder / "on" / f"checkpoint-{number}"))
        for key, value in resumed.items():
            assert torch.equal(value, whole[key]), f"{case}: the {key} resumed from {number} differ"
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "on" / "checkpoint-6" / part).unlink()
    dist.barrier()
    for key, value in found(run(folder / "on", True)).items():
        assert torch.equal(value, whole[key]), f"{case}: the {key} resumed from the newest whole checkpoint differ"
    passed(case)


@cache
def plain_trainer_agrees(folder: Path, name: str) -> bool:
    """Say whether the plain Trainer's FSDP2 is its DDP: with torch 2.8 and a Llama it is not."""
    runs = [parameters_of(run(folder / "plain ddp", name, None, **SMOOTH))]
    with fsdp_on_cpu(LAYERS[name]) as arguments:
        runs.append(parameters_of(run(folder / "plain fsdp", name, None, **SMOOTH, **arguments)))
    return torch.allclose(*runs, rtol=0, atol=1e-5)


def check_sharded(
    folder: Path, case: str, name: str, config: Any, trainer_kwargs: Any = dict, fsdp_config: Any = None, **kwargs: Any
) -> None:
    """FSDP2 is DDP with the model, the reference and their optimizers in parts."""
    kwargs |= SMOOTH
    expected = found(run(folder / "ddp", name, config, trainer_kwargs=trainer_kwargs(), **kwargs))
    part = "optimizer_0/.metadata" if fsdp_config else "optimizer.bin"
    # With bf16 FSDP2 casts elsewhere than autocast.
    comparable = not kwargs.get("bf16") and plain_trainer_agrees(folder.parent, name)
    assert comparable or kwargs.get("bf16") or torch.__version__ < "2.13", f"{case}: the plain Trainer's runs differ"
    with fsdp_on_cpu(LAYERS[name], **(fsdp_config or {})) as arguments:

        def run_sharded(place: Path, resume: Path | bool | None = None) -> Any:
            trainer = run(place, name, config, resume, trainer_kwargs(), **kwargs, **arguments)
            assert is_sharded(trainer.model), f"{case}: nothing was sharded"
            return trainer

        check_parts(folder, case, expected if comparable else None, part, (2, 4), run_sharded)


def check_deepspeed(
    folder: Path, case: str, name: str, config: Any, stage: int, trainer_kwargs: Any = dict, **kwargs: Any
) -> None:
    """ZeRO is DDP with the optimizer in parts, and with stage 3 the model."""
    kwargs |= SMOOTH
    expected = found(run(folder / "ddp", name, config, trainer_kwargs=trainer_kwargs(), **kwargs))
    settings = dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    engine = {
        **settings,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    part = "global_step6/zero_pp_rank_1_mp_rank_00_optim_states.pt"

    def run_parts(place: Path, resume: Path | bool | None = None) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        return run(place, name, config, resume, trainer_kwargs(), **kwargs, deepspeed=engine)

    check_parts(folder, case, expected, part, (4,), run_parts)


def check_large_vocabulary(folder: Path, case: str) -> None:
    """Losses in chunks of the output embedding need its weights after its forward pass, which a sharded model does not have."""
    chunk = patch.multiple(large_vocabulary, CHUNK=480, MIN_ROWS=1)
    with patch.object(losses, "LARGE_VOCABULARY", 10), chunk:
        check_sharded(folder, case, name="llama", config=BladeConfig(**ON))


def check_uneven(folder: Path, case: str) -> None:
    """The last batch of an epoch is filled up from its beginning, as the plain Trainer does: no process waits for another."""
    for config in (
        BladeConfig(**ON),
        BrosConfig(**BROS_ON),
        MixtureConfig(**MIXTURE_ON),
        CoresetConfig(**{**CORESET_ON, "size": 13}),
    ):
        trainer = run(folder / type(config).__name__, "vit", config, num_pool=UNEVEN)
        assert trainer.state.global_step == 6 and same_on_all(parameters_of(trainer)), (
            f"{case}: {type(config).__name__}"
        )
    passed(case)


def check_evaluated_before(folder: Path, case: str) -> None:
    """An evaluation before training leaves the processes with one model; Accelerate then wraps it for the evaluation alone."""
    for config in (BladeConfig(**ON), BrosConfig(**BROS_ON), MixtureConfig(**MIXTURE_ON), CoresetConfig(**CORESET_ON)):
        name = type(config).__name__
        one, two = (run(folder / name, "vit", config, evaluates_first=first) for first in (True, False))
        assert same_on_all(parameters_of(one)) and torch.equal(parameters_of(one), parameters_of(two)), (
            f"{case}: {name}"
        )
    lora = run(folder / "lora", "llama", BladeConfig(**ON), evaluates_first=True, model=lora_model())
    assert same_on_all(parameters_of(lora)), f"{case}: lora"
    logged = [entry[key] for entry in lora.state.log_history for key in sorted(entry) if "_loss_q" in key]
    assert logged and same_on_all(torch.tensor(logged)), f"{case}: quantiles"
    passed(case)


def check_split_batches(folder: Path, case: str) -> None:
    """Each process has a part of the batch that the arguments name, and selects from that."""
    data = {"target_dataset": make_dataset("vit", 10, seed=7), "bilevel_config": BladeConfig(**ON)}
    settings = {"accelerator_config": {"split_batches": True}, "trainer_kwargs": data, "ddp_backend": "gloo"}
    try:
        make_trainer(BladeTrainer, "vit", folder, per_device_train_batch_size=NUM_PROCESSES, **settings)
    except ValueError as error:
        assert "selects all of it" in str(error), f"{case}: {error}"
    else:
        raise AssertionError(f"{case}: one candidate was not noticed")
    trainer = make_trainer(BladeTrainer, "vit", folder, per_device_train_batch_size=4 * NUM_PROCESSES, **settings)
    trainer.train()
    assert trainer._pool_loader.batch_size == 4, f"{case}: {trainer._pool_loader.batch_size}"
    shares = [entry["blade/selected_fraction"] for entry in trainer.state.log_history if "loss" in entry]
    assert shares and all(share == 0.5 for share in shares), f"{case}: {shares}"
    passed(case)


def check_statistics(folder: Path, case: str) -> None:
    """Batch normalisation: every process scores with the first one's running statistics, and so does a resumed run."""
    from transformers import ResNetConfig, ResNetForImageClassification

    def once(resume: Path | None = None) -> Any:
        torch.manual_seed(0)
        size = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=4, **size))
        return run(folder, "vit", BladeConfig(**ON), resume, model=model)  # which compares after every step

    whole = once()
    again = once(folder / "checkpoint-4")
    assert torch.equal(parameters_of(again), parameters_of(whole)), f"{case}: resumed"
    tallies = [trainer.sample_tally.state_dict()["selected"] for trainer in (whole, again)]
    assert torch.equal(*tallies), f"{case}: selected"
    passed(case)


def check_skipped_layers(folder: Path, case: str) -> None:
    """Layers that one process skips have a gradient on the others, and the reference is the same on all."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    torch.manual_seed(0)
    size = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "vocab_size": 8,
    }
    convolutions = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
    config = Wav2Vec2Config(**size, **convolutions, **positions, num_labels=3, layerdrop=0.5, apply_spec_augment=False)
    generator = torch.Generator().manual_seed(1)
    sounds = [{"input_values": torch.randn(64, generator=generator), "labels": i % 3} for i in range(80)]
    settings = {"check_processes": True, "selection_ratio": 0.5, "sync_steps": 2, "reference_steps": 4}
    trainer = make_trainer(
        BladeTrainer,
        "vit",
        folder,
        model=Wav2Vec2ForSequenceClassification(config),
        train_dataset=sounds[:64],
        ddp_backend="gloo",
        ddp_find_unused_parameters=True,
        max_steps=4,
        trainer_kwargs={"target_dataset": sounds[64:], "bilevel_config": BladeConfig(**settings)},
    )
    trainer.train()
    assert trainer.state.global_step == 4
    passed(case)


def check_weights_when_last_seen(folder: Path, case: str) -> None:
    """Sample weights of a network are the last that any process gave, however often the run saves."""
    shown: dict[int, tuple[int, float]] = {}

    class Recording(BrosTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            ids, loss = self._pending[0].sample_ids, super().training_step(*args, **kwargs)
            shown.update(
                {i: (self.state.global_step, w) for i, w in zip(ids.tolist(), self._table[ids].tolist(), strict=True)}
            )
            return loss

    settings = {"rank": 0.5, "upper_variable": "network", "start_step": 0, "upper_learning_rate": 0.01}
    for steps in (100, 2):
        shown.clear()
        trainer = make_trainer(
            Recording,
            "vit",
            folder / str(steps),
            ddp_backend="gloo",
            max_steps=20,
            save_strategy="steps",
            save_steps=steps,
            trainer_kwargs={
                "target_dataset": make_dataset("vit", 16, seed=7),
                "bilevel_config": BrosConfig(**settings),
            },
        )
        trainer.train()
        everywhere: list[Any] = [None] * NUM_PROCESSES
        dist.all_gather_object(everywhere, shown)
        last: dict[int, tuple[int, float]] = {}
        for entries in everywhere:
            for i, (step, weight) in entries.items():
                if last.get(i, (-1, 0.0))[0] < step:
                    last[i] = step, weight
        ids, weights = trainer.sample_weights
        expected = torch.tensor([last[i][1] for i in ids.tolist()])
        assert torch.allclose(weights, expected, atol=1e-6), f"{case}: saving every {steps} steps"
        assert len({step for step, _ in last.values()}) > 1, f"{case}: too few steps to tell"
    passed(case)


def check_disagreement(folder: Path, case: str) -> None:
    """What one process alone changes is noticed after that step, on all processes, and named."""

    class Disturbance(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            if args.process_index == NUM_PROCESSES - 1 and state.global_step == 2:
                next(p for n, p in model.named_parameters() if n.endswith("classifier.bias")).grad.mul_(1 + 1e-6)

    try:
        run(folder, "vit", BladeConfig(**ON), trainer_kwargs={"callbacks": [Disturbance()]})
    except RuntimeError as error:
        assert "do not agree after step 3: model.classifier.bias differ" in str(error), str(error)
    else:
        raise AssertionError(f"{case}: a difference was not noticed")
    passed(case)


def fail_on_one(folder: Path, case: str) -> None:
    """The candidates of one process alone have no finite loss, so it cannot go on, and the others must not wait for it."""
    rows = make_dataset("vit", 64)
    if int(os.environ["RANK"]) == NUM_PROCESSES - 1:
        rows = rows.map(lambda row: {"pixel_values": [[[math.nan] * 8] * 8]})
    config = BladeConfig(**{**ON, "penalty": 0.0})  # the reference sees the target dataset alone
    run(folder, "vit", config, train_dataset=rows)
    raise AssertionError(f"{case}: there was nothing to train on")


CASES: dict[str, Callable[[Path, str], None]] = {
    "vit": partial(check, name="vit"),
    "torn": check_a_torn_checkpoint,
    "llama": partial(check, name="llama"),
    "bert": partial(check, name="bert"),
    "lora": partial(check, name="llama"),
    "bros vit": partial(check_bros, name="vit", estimator="bi_probe"),
    "bros llama": partial(check_bros, name="llama", auxiliary_dtype="bfloat16"),
    "bros network": partial(check_bros, name="vit", upper_variable="network"),
    "mixture vit": partial(check_mixture, name="vit"),
    "mixture llama": partial(check_mixture, name="llama", realisation="weight"),
    "mixture alignment": partial(
        check_mixture, name="llama", hypergradient="alignment", inner_steps=2, reference_steps="auto"
    ),
    "coreset": partial(check_coreset, settings=CORESET_ON),
    "coreset kernel": partial(check_coreset, settings=KERNEL_ON, fresh=True),
    "uneven": check_uneven,
    "evaluated before": check_evaluated_before,
    "split batches": check_split_batches,
    "statistics": check_statistics,
    "skipped layers": check_skipped_layers,
    "weights when last seen": check_weights_when_last_seen,
    "disagreement": check_disagreement,
}


STATIC = {
    "config": BladeConfig(selection_ratio=0.5, reference="static"),
    "trainer_kwargs": lambda: {"reference_model": make_model("vit", dropout=0.2)},
}
SHARDED_CASES: dict[str, Callable[[Path, str], None]] = {
    "fsdp vit": partial(check_sharded, name="vit", config=BladeConfig(**ON)),
    "fsdp llama": partial(check_sharded, name="llama", config=BladeConfig(**ON)),
    "fsdp static": partial(check_sharded, name="vit", **STATIC),
    "fsdp parts": partial(
        check_sharded,
        name="llama",
        config=BladeConfig(**ON),
        bf16=True,
        fsdp_config={"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True},
    ),
    "fsdp rows": partial(check_sharded, name="llama", config=BladeConfig(**ON, granularity="sample")),
    "fsdp large vocabulary": check_large_vocabulary,
    "fsdp mixture": partial(check_sharded, name="vit", config=MixtureConfig(**MIXTURE_ON)),
    "fsdp coreset": partial(check_sharded, name="vit", config=CoresetConfig(**CORESET_ON)),
}

DRAWN = MixtureConfig(mixture="uniform", domain_column="source")
DEEPSPEED_CASES: dict[str, Callable[[Path, str], None]] = {
    f"zero-{stage} {case}": partial(check_deepspeed, stage=stage, **arguments)
    for stage in (2, 3)
    for case, arguments in {
        "static": {"name": "vit", **STATIC},
        "tokens": {"name": "llama", "config": BladeConfig(selection_ratio=0.5, score="loss")},
        "mixture": {"name": "vit", "config": DRAWN},
        "coreset": {"name": "vit", "config": CoresetConfig(**CORESET_ON)},
    }.items()
}


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    if wanted == ["one fails"]:
        fail_on_one(folder, *wanted)
    for case in wanted or CASES:
        (CASES | SHARDED_CASES | DEEPSPEED_CASES)[case](folder / case, case)
    if not wanted:
        save_global_runs(folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
