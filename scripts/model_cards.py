"""Train one small model with each method, beside its controls, and write its model card with pictures and what was measured.

    pip install "hf_bilevel[quickstart]"
    python scripts/model_cards.py                                   # all of them into model_cards/, two to four minutes each
    python scripts/model_cards.py --runs digits_blade,text_mixture --seeds 2

Real data that need no network: scikit-learn's scanned digits, half of the pool's labels wrong, with 100 clean ones as the
target dataset and 400 for the test; and text of six domains from the running Python's own installation, with the language
reference as the target.

    digits_blade     BLADE on a small ViT. Random: as many samples of every batch at random.
    digits_bros      BROS on it, with a network from loss to weight, and a second pass: a plain training with the learned
                     weights fixed. Random: the same with the learned weights shuffled over the samples. BROS itself trains in
                     a subspace and has three times the learning rate of the other arms, as their names say.
    digits_coreset   a tenth of the pool by CoresetTrainer's kernel, then training on it. Random: a tenth at random.
    text_mixture     MixtureTrainer on a small Llama from scratch, on bytes. Random: domains with equal shares.

All arms of a run start from the same weights and take the same number of optimizer steps; a table shows mean and standard
deviation over the seeds. The card's own facts and pictures are those of the first seed. Steps are equal, costs are
not: see the cards. Settings are near those of the quickstart and the recipes, and were not tuned on these runs.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

sys.path.insert(0, str(Path(__file__).parent / "mixture"))
sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import numpy as np
import torch
from datasets import Dataset
from domain_mixture import DomainArguments
from domain_mixture import make_data as make_domains
from installed_text import installed_text
from quickstart import make_data as make_digits
from quickstart import make_model as make_vit
from report import mean_and_std, print_table, write_report
from sklearn.metrics import roc_auc_score
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_bilevel import (
    BladeConfig,
    BladeTrainer,
    BrosConfig,
    BrosTrainer,
    CoresetConfig,
    CoresetTrainer,
    MixtureConfig,
    MixtureTrainer,
    SampleWeights,
)

Arms = tuple[dict[str, dict[str, float]], Trainer]  # what each arm measured; the trainer of the method

BLADE = {"selection_ratio": 0.25, "penalty": 0.0, "sync_steps": 50, "reference_steps": 15, "domain_column": "quality"}
ROW_LENGTH = 64


def train(
    trainer_class: type[Trainer],
    folder: Path,
    seed: int,
    make_model: Callable[[], torch.nn.Module],
    pool: Any,
    steps: int,
    batch_size: int,
    learning_rate: float,
    **kwargs: Any,
) -> Trainer:
    set_seed(seed)
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=128,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        logging_steps=max(1, steps // 40),
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )
    trainer = trainer_class(model=make_model(), args=args, train_dataset=pool, **kwargs)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def accuracy(trainer: Trainer, test: Dataset) -> float:
    return float((trainer.predict(test).predictions.argmax(-1) == np.array(test["labels"])).mean())


def wrong_labels(pool: Dataset) -> torch.Tensor:
    return torch.tensor([quality == "wrong" for quality in pool["quality"]])


def digits_blade(seed: int, folder: Path, smoke: bool) -> Arms:
    pool, target, test = make_digits(seed)
    wrong, steps = wrong_labels(pool), 12 if smoke else 300
    config = BladeConfig(**BLADE, first_reference_steps=4 if smoke else 200)
    given = (seed, make_vit, pool, steps, 128, 2e-3)
    with tempfile.TemporaryDirectory() as other:
        plain = train(Trainer, Path(other), *given)
        random = BladeConfig(selection_ratio=config.selection_ratio, score="random")
        trainers = {
            "BLADE": train(BladeTrainer, folder, *given, target_dataset=target, bilevel_config=config),
            "random, same ratio": train(BladeTrainer, Path(other), *given, bilevel_config=random),
        }
    arms = {}
    for name, trainer in trainers.items():
        selected = trainer.sample_tally.state_dict()["selected"]
        arms[name] = {
            "accuracy": accuracy(trainer, test),
            "wrong_share": float(selected[wrong].sum() / selected.sum()),
        }
    arms["all data"] = {"accuracy": accuracy(plain, test), "wrong_share": float(wrong.double().mean())}
    return arms, trainers["BLADE"]


BROS = "BROS, learning rate 6e-3 (others 2e-3)"


def digits_bros(seed: int, folder: Path, smoke: bool) -> Arms:
    pool, target, test = make_digits(seed)
    wrong, steps = wrong_labels(pool), 12 if smoke else 300
    config = BrosConfig(upper_variable="network", rank=0.25, target_batch_size=50)
    learned = train(
        BrosTrainer, folder, seed, make_vit, pool, steps, 64, 6e-3, target_dataset=target, bilevel_config=config
    )
    ids, weights = learned.sample_weights
    shuffled = weights[torch.randperm(len(weights), generator=torch.Generator().manual_seed(seed))]
    fixed, given = BrosConfig(upper_variable="fixed", rank="full"), (seed, make_vit, pool, steps, 64, 2e-3)
    arms = {BROS: {"accuracy": accuracy(learned, test), "wrong_share": share_of_weight(ids, weights, wrong)}}
    arms[BROS]["auroc"] = float(roc_auc_score(~wrong[ids], weights))
    with tempfile.TemporaryDirectory() as other:
        for name, values in (
            ("second pass, learned weights fixed", weights),
            ("random, the weights shuffled", shuffled),
        ):
            trainer = train(
                BrosTrainer, Path(other), *given, bilevel_config=fixed, sample_weights=SampleWeights(ids, values)
            )
            arms[name] = {
                "accuracy": accuracy(trainer, test),
                "wrong_share": share_of_weight(ids, values, wrong),
                "auroc": float(roc_auc_score(~wrong[ids], values)),
            }
        plain = train(Trainer, Path(other), *given)
        arms["all data"] = {"accuracy": accuracy(plain, test), "wrong_share": float(wrong.double().mean())}
    return arms, learned


def share_of_weight(ids: torch.Tensor, weights: torch.Tensor, wrong: torch.Tensor) -> float:
    return float(weights[wrong[ids]].sum() / weights.sum())


def digits_coreset(seed: int, folder: Path, smoke: bool) -> Arms:
    pool, target, test = make_digits(seed)
    wrong, steps = wrong_labels(pool), 12 if smoke else 300
    config = CoresetConfig(
        engine="kernel", initial_size=0.5, num_masks=2, outer_steps=4 if smoke else 100, domain_column="quality"
    )

    def run(trainer_class: type[Trainer], folder: Path, rows: Dataset, **kwargs: Any) -> Trainer:
        return train(trainer_class, folder, seed, make_vit, rows, steps, 32, 2e-3, **kwargs)

    found = run(CoresetTrainer, folder, pool, target_dataset=target, bilevel_config=config)
    ids = found.selected_subset().ids
    random = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[: len(ids)]
    with tempfile.TemporaryDirectory() as other:
        uniform = run(Trainer, Path(other), pool.select(random.tolist()))
        plain = run(Trainer, Path(other), pool)
    rows = {"coreset": (found, ids), "random, same size": (uniform, random), "all data": (plain, slice(None))}
    arms = {
        name: {"accuracy": accuracy(trainer, test), "wrong_share": float(wrong[chosen].double().mean())}
        for name, (trainer, chosen) in rows.items()
    }
    return arms, found


def make_llama() -> LlamaForCausalLM:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=ROW_LENGTH, pad_token_id=None, **size))


def text_mixture(seed: int, folder: Path, smoke: bool) -> Arms:
    task = DomainArguments(row_length=ROW_LENGTH)
    num_rows = max(task.num_pool, task.num_pool_target + 3 * task.num_target)
    data = make_domains(
        seed, task, lambda text: list(text.encode()), installed_text((num_rows + 3) * ROW_LENGTH, seed)
    )
    given = (seed, make_llama, data["pool"], 12 if smoke else 400, 16, 3e-3)
    config, uniform = MixtureConfig(domain_column="domain"), MixtureConfig(domain_column="domain", mixture="uniform")
    with tempfile.TemporaryDirectory() as other:
        trainers = {
            "learned mixture": train(
                MixtureTrainer, folder, *given, target_dataset=data["target"], bilevel_config=config
            ),
            "equal shares": train(MixtureTrainer, Path(other), *given, bilevel_config=uniform),
            "all data": train(Trainer, Path(other), *given),
        }
    arms = {
        name: {"perplexity": math.exp(trainer.predict(data["held_out"]).metrics["test_loss"])}
        for name, trainer in trainers.items()
    }
    return arms, trainers["learned mixture"]


RUNS = {
    "digits_blade": digits_blade,
    "digits_bros": digits_bros,
    "digits_coreset": digits_coreset,
    "text_mixture": text_mixture,
}
DATASETS = {"digits": "scikit-learn digits (half of the labels wrong)", "text": "installed Python text"}
METRICS = {
    "accuracy": "test accuracy",
    "wrong_share": "share of wrong labels in what it trained on",
    "auroc": "AUROC of the weights for right labels",
    "perplexity": "held-out perplexity on the target's domain",
}


def write_card(name: str, seeds: int, smoke: bool, output: Path) -> dict:
    """Run all arms, write card, pictures and results.json, and return what was measured."""
    folder = output / name
    folder.mkdir(parents=True, exist_ok=True)
    rows, trainer = [], None
    for seed in range(seeds):
        arms, method = RUNS[name](seed, folder, smoke)
        trainer = method if trainer is None else trainer
        rows += [{"arm": arm, "seed": seed, **values} for arm, values in arms.items()]
    results: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for metric in METRICS:
            if metric in row:
                results.setdefault(row["arm"], {}).setdefault(metric, []).append(row[metric])
    ordered = {arm: {METRICS[m]: values[m] for m in METRICS if m in values} for arm, values in results.items()}
    command = f"python scripts/model_cards.py --runs {name} --seeds {seeds}" + " --smoke" * smoke
    vars(trainer.model.config).pop("_name_or_path", None)  # empty, which would read as the name of a pretrained model
    images = {"images": True} if name == "digits_coreset" else {}  # digits that anybody may see
    trainer.create_model_card(dataset=DATASETS[name.split("_")[0]], results=ordered, command=command, **images)
    if name == "digits_bros":  # here it is known which labels are wrong
        wrong = wrong_labels(trainer.train_dataset)
        trainer.plot_sample_weights(wrong).savefig(folder / "bros_weights.png", dpi=120)
    summary = {}
    for arm, values in results.items():
        for metric, numbers in values.items():
            summary[f"{metric}/{arm}"], summary[f"{metric}/{arm}/std"] = mean_and_std(numbers)
    metrics = [metric for metric in METRICS if any(metric in values for values in results.values())]
    lines = [[arm, *(shown(values.get(metric)) for metric in metrics)] for arm, values in results.items()]
    print_table([name, *metrics], lines)
    config = {"seeds": seeds, "smoke": smoke, "command": command, **trainer.bilevel_facts()}
    return write_report(name, config, rows, summary, str(folder / "results.json"))


def shown(values: list[float] | None) -> str:
    return "" if values is None else "{:.3f} ± {:.3f}".format(*mean_and_std(values))


def main(argv: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default=",".join(RUNS), help="which, with commas between")
    parser.add_argument("--seeds", type=int, default=3, help="number of repetitions")
    parser.add_argument("--smoke", action="store_true", help="a few steps of one seed: does it run?")
    parser.add_argument("--output", type=Path, default=Path("model_cards"), help="folder for a folder of each run")
    options = parser.parse_args(argv)
    names = options.runs.split(",")
    if unknown := sorted(set(names) - set(RUNS)):
        parser.error(f"`--runs` names unknown runs {unknown}; allowed are {sorted(RUNS)}.")
    if options.seeds < 1:
        parser.error(f"`--seeds` must be at least 1, got {options.seeds}.")
    seeds = 1 if options.smoke else options.seeds
    torch.set_num_threads(1)  # the models are too small for more
    return {name: write_card(name, seeds, options.smoke, options.output) for name in names}


if __name__ == "__main__":
    main()
