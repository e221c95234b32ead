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
from tiny import make_dataset, make_model, make_trainer, parameters_of
from transformers import Trainer, set_seed

from hf_bilevel import BladeConfig, BladeTrainer

ON = {"selection_ratio": 0.5, "sync_steps": 3, "reference_steps": 2, "penalty": 0.5, "domain_column": "source"}


def lora_model() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    return model


def run(folder: Path, name: str, settings: dict[str, Any] | None, resume: Path | None = None, **kwargs: Any) -> Any:
    extra: dict[str, Any] = {}
    trainer_class = Trainer
    if settings is not None:
        trainer_class = BladeTrainer
        extra = {"target_dataset": make_dataset(name, 10, seed=7), "bilevel_config": BladeConfig(**settings)}
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
        trainer_kwargs=extra,
        **kwargs,
    )
    assert trainer.args.world_size == 2, f"this test must run on two processes, got {trainer.args.world_size}"
    set_seed(11)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def same_on_both(tensor: torch.Tensor) -> bool:
    copies = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(copies, tensor.contiguous())
    return torch.equal(*copies)


def check(folder: Path, case: str, name: str, **kwargs: Any) -> None:
    make = (lambda: {"model": lora_model()}) if case == "lora" else dict
    plain = parameters_of(run(folder / "plain", name, None, **make(), **kwargs))
    off = parameters_of(run(folder / "off", name, {**ON, "selection_ratio": 1.0}, **make(), **kwargs))
    assert torch.equal(off, plain), f"{case}: off is not the plain Trainer"

    whole = run(folder / "on", name, ON, **make(), **kwargs)
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

    resumed = run(folder / "resumed", name, ON, resume=folder / "on" / "checkpoint-4", **make(), **kwargs)
    assert torch.equal(parameters_of(resumed), parameters), f"{case}: resumed differs from uninterrupted"
    for key, value in resumed.sample_tally.state_dict().items():
        assert torch.equal(value, tables[key]), f"{case}: the resumed {key} differs"
    fractions = [entry for entry in resumed.state.log_history if "blade/selected_fraction/web" in entry]
    assert fractions
    if dist.get_rank() == 0:
        print(f"{case}: passed")  # noqa: T201


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    check(folder / "vit", "vit", "vit")
    check(folder / "llama", "llama", "llama")
    check(folder / "bert", "bert", "bert")
    check(folder / "lora", "lora", "llama")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
