"""Started by test_distributed.py on two gloo processes; any failed assertion fails the run.

torchrun --standalone --nproc_per_node 2 tests/two_processes.py FOLDER
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from tiny import make_dataset, make_model, make_trainer, parameters_of, wide_norms
from transformers import Trainer, set_seed

from hf_bilevel import (
    BladeConfig,
    BladeTrainer,
    BrosConfig,
    BrosTrainer,
    CoresetConfig,
    CoresetTrainer,
    MixtureConfig,
    MixtureTrainer,
)

ON = {"selection_ratio": 0.5, "sync_steps": 3, "reference_steps": 2, "penalty": 0.5, "domain_column": "source"}


BROS_ON = {"rank": 0.5, "refresh_steps": 2, "domain_column": "source"}
BROS_OFF = {"upper_variable": "fixed", "rank": "full"}
MIXTURE_ON = {"inner_steps": 3, "reference_steps": 2, "domain_column": "source"}
CORESET_ON = {
    "size": 12,
    "outer_steps": 4,
    "inner_steps": 2,
    "num_masks": 3,
    "num_final_masks": 2,
    "inner_batch_size": 4,
    "engine": "sequential",  # stacked trainings share the random numbers of dropout, as many as a process has
}
TRAINERS = {
    BladeConfig: BladeTrainer,
    BrosConfig: BrosTrainer,
    CoresetConfig: CoresetTrainer,
    MixtureConfig: MixtureTrainer,
}
# Runs that see the same global batches as one process: the weights must not be scaled within a rank, and what differs by
# rounding must not be amplified by finite differences or AdamW. Model, settings, arguments of the trainer.
GLOBAL_RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "table": (
        "vit",
        {"rank": 0.5, "refresh_steps": 2, "hessian_action": "double_backward", "normalise_weights": False},
        {},
    ),
    "tokens": (
        "llama",
        {"rank": 0.5, "refresh_steps": 2, "upper_variable": "fixed", "normalise_weights": False},
        {"sample_weights": torch.arange(64) / 32},
    ),
}
GLOBAL_LEARNING_RATE = 0.1


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
    assert trainer.args.world_size == 2, f"this test must run on two processes, got {trainer.args.world_size}"
    set_seed(11)
    trainer.train(resume_from_checkpoint=str(resume) if isinstance(resume, Path) else resume)
    return trainer


def same_on_both(tensor: torch.Tensor) -> bool:
    copies = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(copies, tensor.contiguous())
    return torch.equal(*copies)


def check(folder: Path, case: str, name: str, **kwargs: Any) -> None:
    make = (lambda: {"model": lora_model()}) if case == "lora" else dict
    plain = parameters_of(run(folder / "plain", name, None, **make(), **kwargs))
    off = parameters_of(run(folder / "off", name, BladeConfig(**{**ON, "selection_ratio": 1.0}), **make(), **kwargs))
    assert torch.equal(off, plain), f"{case}: off is not the plain Trainer"

    whole = run(folder / "on", name, BladeConfig(**ON), **make(), **kwargs)
    parameters = parameters_of(whole)
    assert not torch.equal(parameters, plain), f"{case}: on changes nothing"
    assert same_on_both(parameters), f"{case}: the ranks' models differ"

    dist.barrier()
    state = torch.load(folder / "on" / "checkpoint-6" / "bilevel_state.pt", weights_only=True)["shared"]
    for key, value in state["reference"]["weights"].items():
        assert same_on_both(value), f"{case}: the ranks' references differ in {key}"
    tables = whole.sample_tally.state_dict()
    assert same_on_both(tables["offered"])
    if name == "vit":  # 6 steps x 2 ranks x 2 micro-batches x 4 candidates, half of them selected
        assert tables["offered"].sum() == 96 and tables["selected"].sum() == 48
        assert state["domains"]["offered"].sum() == 96

    resume = folder / "on" / "checkpoint-4"
    resumed = run(folder / "resumed", name, BladeConfig(**ON), resume=resume, **make(), **kwargs)
    assert torch.equal(parameters_of(resumed), parameters), f"{case}: resumed differs from uninterrupted"
    for key, value in resumed.sample_tally.state_dict().items():
        assert torch.equal(value, tables[key]), f"{case}: the resumed {key} differs"
    fractions = [entry for entry in resumed.state.log_history if "blade/selected_fraction/web" in entry]
    assert fractions
    if dist.get_rank() == 0:
        print(f"{case}: passed")  # noqa: T201


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
    if dist.get_rank() == 0:
        print(f"{case}: passed")  # noqa: T201


def variables(trainer: BrosTrainer) -> dict[str, torch.Tensor]:
    """The lower, the upper and the auxiliary variable, and the average of the hypergradient."""
    found = {
        "parameters": torch.cat([p.detach().flatten() for p in trainer.model.parameters()]),
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
        assert same_on_both(value), f"{case}: the ranks' {key} differ"
    if config.upper_variable == "network":
        assert len(whole["ids"]) == 64, f"{case}: a rank's samples are missing"  # 6 steps of 16, epochs of 64
    dist.barrier()

    resume = folder / "on" / "checkpoint-4"
    resumed = variables(run(folder / "resumed", name, config, resume=resume))
    for key, value in resumed.items():
        assert torch.equal(value, whole[key]), f"{case}: the resumed {key} differ"
    if dist.get_rank() == 0:
        print(f"{case}: passed")  # noqa: T201


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
        assert value.isfinite().all() and same_on_both(value), f"{case}: the ranks' {key} differ"
    assert (whole["weights"] - 1 / 3).abs().max() > 1e-3, f"{case}: the weights did not move"
    dist.barrier()
    state = torch.load(folder / "on" / "checkpoint-2" / "bilevel_state.pt", weights_only=True)
    if config.hypergradient == "penalty":  # in the middle of what the twin repeats
        for key, value in state["shared"]["reference"]["weights"].items():
            assert same_on_both(value), f"{case}: the ranks' twins differ in {key}"
        batches = [rank["twin_steps"][0]["batches"][0]["labels"] for rank in state["ranks"]]
        assert len(batches) == 2 and not torch.equal(*batches), f"{case}: both ranks repeat the same rows"
    for checkpoint in (2, 4):
        resumed = found(run(folder / "resumed", name, config, resume=folder / "on" / f"checkpoint-{checkpoint}"))
        for key, value in resumed.items():
            assert torch.equal(value, whole[key]), f"{case}: the {key} resumed from {checkpoint} differ"
    if dist.get_rank() == 0:
        print(f"{case}: passed")  # noqa: T201


def check_coreset(folder: Path, case: str) -> None:
    """The search is also compared with that of one process, by test_distributed.py."""
    model = make_model("vit", dropout=0.2)
    with torch.no_grad():
        model.classifier.weight.add_(int(os.environ["RANK"]))  # the first rank's model must count
    trainer = run(folder / "on", "vit", CoresetConfig(**CORESET_ON), model=model)
    subset = trainer.selected_subset()
    found = {"ids": subset.ids, "probabilities": subset.probabilities, "parameters": parameters_of(trainer)}
    for key, value in found.items():
        assert same_on_both(value), f"{case}: the ranks' {key} differ"
    resumed = run(
        folder / "resumed",
        "vit",
        CoresetConfig(**CORESET_ON),
        resume=folder / "on" / "checkpoint-2",
        model=make_model("vit", dropout=0.2),
    )
    assert torch.equal(resumed.selected_subset().ids, subset.ids), f"{case}: the coreset was not kept"
    assert torch.equal(parameters_of(resumed), found["parameters"]), f"{case}: resumed differs"
    if dist.get_rank() == 0:
        subset.save(folder / "subset")
        print(f"{case}: passed")  # noqa: T201


def save_global_runs(folder: Path) -> None:
    """For test_distributed.py, which compares them with one process and the doubled batch."""
    results = {}
    for case, (name, settings, kwargs) in GLOBAL_RUNS.items():
        model = wide_norms(make_model(name)).double()
        config, arguments = BrosConfig(**settings), {"optim": "sgd", "learning_rate": GLOBAL_LEARNING_RATE}
        results[case] = variables(run(folder / case, name, config, trainer_kwargs=kwargs, model=model, **arguments))
    if dist.get_rank() == 0:
        torch.save(results, folder / "global.pt")


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    check(folder / "vit", "vit", "vit")
    check_a_torn_checkpoint(folder / "torn", "torn")
    check(folder / "llama", "llama", "llama")
    check(folder / "bert", "bert", "bert")
    check(folder / "lora", "lora", "llama")
    check_bros(folder / "bros vit", "bros vit", "vit", estimator="bi_probe")
    check_bros(folder / "bros llama", "bros llama", "llama", auxiliary_dtype="bfloat16")
    check_bros(folder / "bros network", "bros network", "vit", upper_variable="network")
    check_mixture(folder / "mixture vit", "mixture vit", "vit")
    check_mixture(folder / "mixture llama", "mixture llama", "llama", realisation="weight")
    check_mixture(
        folder / "mixture alignment",
        "mixture alignment",
        "llama",
        hypergradient="alignment",
        inner_steps=2,
        reference_steps="auto",
    )
    check_coreset(folder / "coreset", "coreset")
    save_global_runs(folder)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
