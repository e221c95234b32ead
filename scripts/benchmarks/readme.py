"""Write the tables of the READMEs from the committed results, so that no number in it is typed by hand.

python scripts/benchmarks/readme.py [--check]
"""

import argparse
import json
import re
import sys
from pathlib import Path

from hf_bilevel.core.selection import synchronisation_schedule

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
NOISY_ARMS = {
    "all": "all data (`Trainer`)",
    "random": "random, same ratio",
    "loss": "highest loss",
    "static": "static reference (RHO-LOSS)",
    "blade": "**BLADE**",
    "bros": "BROS, a weight for each sample: the model of the first pass",
    "second_pass": "... second pass with the learned weights",
    "bros_bfloat16": '... `auxiliary_dtype="bfloat16"`, first pass',
    "masoba": '... MA-SOBA (`rank="full"`), first pass',
    "bros_network": 'BROS, a network from loss to weight (`upper_variable="network"`): first pass',
    "second_pass_network": "**... second pass** with the learned weights",
    "bros_network_bfloat16": '... `auxiliary_dtype="bfloat16"`, first pass',
    "masoba_network": "... MA-SOBA, first pass",
    "clean": "correct labels only (upper bound)",
}
OVERHEAD_ARMS = {
    "llama/off": "Llama, switched off (`selection_ratio=1`)",
    "vit/off": "ViT, switched off",
    "llama/blade_token": "Llama, token level, between synchronisations",
    "llama/blade_token_auto": "Llama, token level, with the automatic reference phases of a run of 1,250 steps or more (K / T = 0.08)",
    "llama/blade_token_amortised": "Llama, token level, with the published ones (K / T = 0.3, λ = 1)",
    "llama/sft": "Llama, TRL's `SFTTrainer` on all tokens, with its metrics",
    "llama/blade_sft": "... with BLADE in front of it, between synchronisations",
    "llama/blade_sample": "Llama, sample level, ratio 0.5",
    "vit/blade_sample": "ViT, sample level, ratio 0.5",
    "llama/gradients": "Llama, rows chosen by products of gradients (GREATS, first order), ratio 0.5",
    "llama/interval": "Llama, rows with high losses, the pool scored once a pass over it (DataFlex)",
    "llama/bros": "Llama, BROS",
    "vit/bros": "ViT, BROS",
    "llama/bros_large": "Llama, BROS, 32 rows instead of 8",
    "vit/bros_large": "ViT, BROS, 32 rows",
    "llama/bros_every5": "Llama, BROS with `update_every=5`",
    "vit/bros_every5": "ViT, BROS with `update_every=5`",
    "llama/mixture": "Llama, MixtureTrainer (T = 49, K = 4)",
    "vit/mixture": "ViT, MixtureTrainer (T = 49, K = 4)",
    "llama/masoba": 'Llama, MA-SOBA: `rank="full"`, `hessian_action="double_backward"`',
    "vit/masoba": "ViT, MA-SOBA",
}
FULL_SIZE_ARMS = {
    "smollm2/blade_token": "SmolLM2-135M, token level, between synchronisations",
    "smollm2/blade_token_auto": "SmolLM2-135M, token level, with the automatic reference phases (K / T = 0.08)",
    "smollm2/blade_sample": "SmolLM2-135M, sample level, ratio 0.5",
    "vit_s/blade_sample": "ViT-S, sample level, ratio 0.5",
    "vit_s/off": "ViT-S, switched off (`selection_ratio=1`)",
    "smollm2/bros_rank48": "SmolLM2-135M, BROS at rank 48",
    "smollm2/bros": "SmolLM2-135M, BROS at the default rank, an eighth of a layer's inputs",
    "vit_s/bros_rank48": "ViT-S, BROS at rank 48",
    "vit_s/bros": "ViT-S, BROS at the default rank",
    "vit_s/bros_every5": "ViT-S, BROS with `update_every=5`",
}
MODELS = {
    "vit_s": "ViT-S, 64 patches",
    "vit_s/checkpointed": "... with gradient checkpointing",
    "vit_b": "ViT-B, 64 patches",
    "vit_l": "ViT-L, 64 patches",
    "smollm2": "SmolLM2-135M, 256 tokens",
    "smollm2/checkpointed": "... with gradient checkpointing",
}
RANKS = {
    "rank4": "4",
    "rank16": "16",
    "one_sided": "48",
    "bi_probe": "48, bi-probe",
    "rank192": "192",
    "full": "full",
}
MIXTURE_ARMS = {
    "proportional": "all rows (`Trainer`)",
    "uniform": "domains at random, equal probabilities",
    "stratified": 'equal shares in every step (`mixture="uniform"`)',
    "target": "the pool's rows of the target's own domains",
    "alignment": "learned, gradient alignment, T = 1",
    "penalty_1": "learned, twin, T = 1",
    "penalty_5": "learned, twin, T = 5",
    "penalty_auto": "learned, twin, T = {auto} by the rule",
    "penalty_4auto": "learned, twin, T = {4auto}",
    "penalty_default": "**`MixtureTrainer` as it comes**: T = {auto}, domains judged on four times as many rows",
}
SETTINGS = {
    "restricted": "**Restricted**: 600 rows of each of five domains, 100 of the target's",
    "structured": "**Structured**: restricted, with the manual's words in random order as one more domain",
    "blended": "**Blended**: restricted, the target is half manual and half readme",
    "abundant": "**Abundant**: as many rows of each domain as a run of learned weights can use without repeating",
}
CORESET_TASKS = {
    "clean": "1,000 digits",
    "noise20": "... 20 % wrong labels",
    "imbalance50": "... classes of 300 to 6",
    "pairwise20": "... 20 % labels of the next class",
    "transfer": "1,000 digits, another net",
    "split": "SplitMNIST",
    "split_noise": "... 20 % wrong labels",
    "split_tenth": "SplitMNIST, a tenth kept",
    "split_tenth_noise": "... 20 % wrong labels",
    "permuted": "PermMNIST",
    "permuted_noise": "... 20 % wrong labels",
    "streaming": "stream",
    "streaming_noise": "... 20 % wrong labels",
    "pixels": "78 of 784 pixels",
    "text": "1,000 snippets of text, 20 % wrong labels",
}
CORESET_ARMS = {
    "pbcs": "**CoresetTrainer**",
    "pbcs_both": "**... judged on the pool too** (`pool_share=0.5`)",
    "pbcs_beside": "**... beside the memory of earlier tasks** (`required_ids`)",
    "pbcs_initial": "... with the kernel at the initial weights",
    "pbcs_at_size": "... with that, and its search begun at the size",
    "pbcs_trained": "CoresetTrainer, training a small network for each mask (3 seeds)",
    "uniform": "uniform",
    "reservoir": "reservoir sampling",
    "best20": "best of 20 uniform draws",
    "balanced": "uniform in each class",
    "kcenter": "k-center",
    "herding": "herding",
    "hardest": "hardest",
    "greedy": "greedy bilevel (Borsos et al.)",
    "greedy_both": "... judged on the pool too",
    "greedy_beside": "... beside the memory of earlier tasks",
    "variance": "highest variance",
    "mutual_information": "highest mutual information",
    "target": "the clean target rows alone",
    "full": "the whole pool",
}
SHIFT_ARMS = {
    "base": "not trained",
    "all": "all tokens (`Trainer`)",
    "target": "the target dataset alone",
    "random": "random tokens, same ratio",
    "loss": "tokens with the highest loss",
    "static": "static reference (Rho-1)",
    "blade": "**BLADE**, tokens",
    "blade_sample": "BLADE, rows",
    "bros": "BROS, a weight for each domain",
    "mixture": "MixtureTrainer",
    "gradient": "rows whose gradients agree with the target's (GREATS, first order)",
    "interval": "rows with the highest losses of the whole pool",
}
SHIFT_CONCLUSION = (
    "On so few rows the plain Trainer learns the target dataset by heart and ends above all tokens. BLADE is below all tokens and below the "
    "static reference on every seed, on one of them hardly. `MixtureTrainer`, which is told the domain of every row, is far below for less, and "
    "the only one that is level with all tokens at their cost: the others cost more a step and make fewer (the learning rate is constant, so "
    "the last column is the same run, stopped earlier). Training on the rows with the highest losses of the whole pool does about as well as "
    "BLADE here, at the price of reading the whole pool twice, and with twice as many rows in a step. BLADE's settings were chosen on seed 0 with a larger target "
    "dataset. With one as large as the run needs nothing comes near "
    "[training on it alone](scripts/benchmarks/README.md#domain-shift-a-large-target-dataset). From "
    "`scripts/benchmarks/results/domain_shift_small_target.json`; "
    "[what was tried](scripts/benchmarks/README.md#domain-shift-what-was-tried-for-blade)."
)
QUALITIES = {"last": "its last weights", "best": "the best that it shows on the way"}
PROFILED_MODELS = {"vit_s": "ViT-S", "smollm2": "SmolLM2-135M", "vit": "small ViT", "llama": "small Llama"}
PROFILED = {
    "plain": "`Trainer`",
    "blade_token": "BLADE, tokens",
    "blade_sample": "BLADE, rows",
    "bros_rank48": "BROS at rank 48",
    "bros": "BROS",
    "bros_every5": "BROS, `update_every=5`",
    "masoba": "MA-SOBA",
}
SCALED = {
    "tally": "BLADE: what was offered and selected",
    "weights": "BROS: the table of weights",
    "search": "CoresetTrainer: the probabilities",
    "projection": "... their projection alone",
    "order": "for comparison: the order of an epoch",
    "mixture": "MixtureTrainer: domains",
}
ESTIMATORS = {"naive": "naive (biased)", "bi_probe": "bi-probe", "two_sided": "two-sided", "one_sided": "one-sided"}


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def plus_minus(summary: dict, key: str, scale: float = 1.0, digits: int = 1) -> str:
    if key not in summary:
        return ""
    return f"{scale * summary[key]:.{digits}f} ± {scale * summary[key + '/std']:.{digits}f}"


def noisy_labels() -> str:
    report = load("noisy_labels")
    summary, config = report["summary"], report["config"]
    few = int(config["candidates"] * config["selection_ratio"])
    lines = [
        f"{config['num_pool']:,} MNIST digits of which half have a wrong label, {config['num_target']} clean ones as the "
        f"target dataset, a small ResNet, {config['steps']} steps for every arm, {config['seeds']} seeds (mean ± standard "
        "deviation of the accuracy on 1,000 test digits, in %). *Gap closed*: 0 is all data, 100 the correct labels only. "
        "*Stopped early*: the checkpoint with the best accuracy on the target dataset. *Averaged weights*: an exponential average over "
        f"the run. A step has {config['candidates']} rows for all data and the first passes of BROS, {few} for the correct labels only and "
        f"second passes, and {few} selected of {config['candidates']} for the others, so that *random, same ratio* is the control of second passes "
        f"too. The learning rate is a constant {config['learning_rate']}, but for the first passes of BROS, where it falls to 0 (in subspaces from "
        f"{max(config['bros_learning_rate'].values())}).",
        "",
        "| | last weights | gap closed | averaged weights | stopped early | wrong labels among the selected |",
        "|---|---|---|---|---|---|",
    ]
    for arm, title in NOISY_ARMS.items():
        if f"accuracy/{arm}" not in summary:
            continue
        wrong = f"{100 * summary[f'wrong_share/{arm}']:.0f}" if f"wrong_share/{arm}" in summary else ""
        cells = [plus_minus(summary, f"accuracy/{arm}", 100), f"{100 * summary[f'gap_closed/{arm}']:.0f}"]
        cells += [plus_minus(summary, f"{kind}/{arm}", 100) for kind in ("accuracy_averaged", "accuracy_stopped")]
        lines.append(f"| {title} | {' | '.join(cells)} | {wrong} |")
    lines += [
        "",
        f"BLADE over the static reference, paired by seed: {100 * summary['blade_over_static']:.1f} points, standard error "
        f"{100 * summary['blade_over_static/standard_error']:.1f}. BLADE's settings were chosen on seeds 0 and 1, the others had no part in it. From "
        "`scripts/benchmarks/results/noisy_labels.json`.",
    ]
    if "auroc/bros" in summary:
        equal = [row for row in report["rows"] if row["arm"] == "masoba_network" and row["weight_wrong"] > 0.9]
        names = {
            "bros_network": "BROS with a network",
            "bros_network_bfloat16": "... auxiliary in bfloat16",
            "masoba_network": "MA-SOBA with a network",
            "bros": "BROS with a table",
            "bros_bfloat16": "... auxiliary in bfloat16",
            "masoba": "MA-SOBA with a table",
        }
        lines += [
            "",
            "How well wrong labels are found:",
            "",
            "| | area under the ROC curve | mean weight of wrong labels | of right ones |",
            "|---|---|---|---|",
        ]
        for arm, name in names.items():
            if f"auroc/{arm}" not in summary:
                continue
            weights = [plus_minus(summary, f"weight_{kind}/{arm}", digits=3) for kind in ("wrong", "right")]
            lines.append(f"| {name} | {plus_minus(summary, f'auroc/{arm}', digits=3)} | {' | '.join(weights)} |")
        lines += [
            f"| how often BLADE selects a sample | {plus_minus(summary, 'auroc/blade', digits=3)} | | |",
            "",
            f"With a table, BROS and MA-SOBA make two runs of {config['steps'] // 2} steps, the second with a fresh model and the weights learned "
            f"so far; with a network one of {config['steps']}. A second pass takes {config['steps']} more. Their settings were chosen on seed 0, the "
            f'network\'s on seeds 0 and 1. In full space (`rank="full"`, MA-SOBA) the network gave nearly all samples the weight 1 on {len(equal)} of '
            f"{config['seeds']} seeds.",
        ]
    return "\n".join(lines)


def shift_table(report: dict) -> list[str]:
    summary = report["summary"]
    seeds = {arm: len([row for row in report["rows"] if row["arm"] == arm]) for arm in SHIFT_ARMS}
    most = max(seeds.values())
    lines = [
        "| | perplexity, same steps | log-perplexity less that of all tokens | less that of the static reference | off target among the trained | forward-equivalents | "
        "perplexity at those of all tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, title in SHIFT_ARMS.items():
        if not seeds[arm]:
            continue
        fewer = "" if seeds[arm] == most else f" ({seeds[arm]} seed{'s' if seeds[arm] > 1 else ''})"
        share = f"{100 * summary[f'off_target_share/{arm}']:.0f} %" if f"off_target_share/{arm}" in summary else ""
        cells = [plus_minus(summary, f"perplexity/{arm}", digits=2)]
        cells += [plus_minus(summary, f"log_ratio/{arm}_over_{control}", digits=3) for control in ("all", "static")]
        cells += [share, f"{summary[f'cost/{arm}']:.2f}", plus_minus(summary, f"perplexity_same_cost/{arm}", digits=2)]
        if seeds[arm] == 1:  # no spread
            cells = [cell.split(" ± ")[0] for cell in cells]
        lines.append(f"| {title}{fewer} | {' | '.join(cells)} |")
    return lines


def domain_shift() -> str:
    report = load("domain_shift_small_target")
    config, num_seeds = report["config"], len({row["seed"] for row in report["rows"]})
    off = 1 - config["num_pool"][config["target"]] / sum(config["num_pool"].values())
    lines = [
        f"SmolLM2-135M goes on with text, by LoRA in its last {config['trained_layers']} layers, {config['steps']} steps of "
        f"{config['candidates']} rows of {config['row_length']} tokens. {100 * off:.0f} % of the pool is off target or damaged (licences, "
        "code, a scrape with shuffled or repeated words); the target is the language reference of Python, and the target dataset has "
        f"{config['num_target']} rows of it, too few to train on. Perplexity on held-out rows of it, mean ± standard deviation over "
        f"{num_seeds} seeds; differences of the log-perplexity are paired by seed.",
        "",
        *shift_table(report),
        "",
        SHIFT_CONCLUSION,
    ]
    return "\n".join(lines)


def large_target() -> str:
    return "\n".join(shift_table(load("domain_shift")))


def trials() -> str:
    report = load("domain_shift_trials")
    summary = report["summary"]
    lines = [
        "| BLADE with | perplexity, same steps | log less all tokens | off target among the trained | forward-equivalents | perplexity at "
        "those of all tokens |",
        "|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in report["rows"] if row["arm"] != "base"):
        setting = arm.removeprefix("blade").strip()
        title = {"all": "all tokens, for comparison", "blade": "the settings of the main table"}.get(arm, setting)
        cells = [f"{summary[f'perplexity/{arm}']:.2f}"]
        cells.append(f"{summary[f'log_ratio/{arm}_over_all']:+.3f}" if arm != "all" else "")
        cells += [f"{100 * summary[f'off_target_share/{arm}']:.0f} %", f"{summary[f'cost/{arm}']:.2f}"]
        lines.append(f"| {title} | {' | '.join(cells)} | {summary[f'perplexity_same_cost/{arm}']:.2f} |")
    return "\n".join(lines)


def lm_eval() -> str:
    report = load("domain_shift_lm_eval")
    rows = {(row["arm"], row["task"], row["metric"]): row for row in report["rows"]}
    tasks = {"held_out_perplexity": ("token_perplexity", 2), "cloze": ("acc_norm", 3)}
    lines = [
        "| | perplexity by token | its logarithm less that of the model not trained | cloze, accuracy | less that of the model not trained |",
        "|---|---|---|---|---|",
    ]
    for arm in report["config"]["names"]:
        cells = []
        for task, (metric, digits) in tasks.items():
            row = rows[arm, task, metric]
            cells.append(f"{row['value']:.{digits}f} ± {row['stderr']:.{digits}f}")
            first = row["difference"] is None
            cells.append("" if first else f"{row['difference']:+.3f} ± {row['difference_stderr']:.3f}")
        lines.append(f"| {SHIFT_ARMS[arm]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def overhead() -> str:
    lines, rounds = ["| | seconds, ratio to `Trainer` | predicted by counting passes |", "|---|---|---|"], set()
    for name, arms in {"overhead_full_size": FULL_SIZE_ARMS, "overhead": OVERHEAD_ARMS}.items():
        report = load(name)
        summary = report["summary"]
        rounds |= {len(row["ratios"]) for row in report["rows"]}
        for key, title in arms.items():
            if f"step_ratio/{key}" not in summary:
                continue
            limit = f"{summary[f'limit/{key}']:.2f}"
            lines.append(f"| {title} | {plus_minus(summary, f'step_ratio/{key}', digits=2)} | {limit} |")
    memory, padding = load("memory")["summary"], load("padding")
    cells = {
        row["arm"]: f"{row['ratio']:.2f} ({row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f})"
        for row in padding["rows"]
    }
    lines += [
        "",
        f"With rows of many lengths a step by rows costs less, since padding is left out: at the ratio "
        f"{padding['config']['selection_ratio']} it takes {cells['blade_sample']} of a plain step on all candidates, "
        f"{cells['all_padding']} with all of the padding "
        "([lengths](scripts/benchmarks/README.md#rows-of-many-lengths)).",
        "",
        f"Scoring 8 × 1,024 tokens at a vocabulary of 49,152 takes {100 * memory['scoring_over_naive']:.0f} % of the peak "
        "memory of computing all logits. ViT-S takes 16 rows, SmolLM2-135M 4 of 256 tokens, both with random weights "
        "(`overhead_full_size.json`); the other ViT and Llama are small, with 8 rows (`overhead.json`). Medians of "
        f"{' to '.join(map(str, sorted({min(rounds), max(rounds)})))} rounds "
        "that take turns with the `Trainer`, ± their standard deviation, one seed. For products of gradients only the linear layers "
        "of the blocks are trained. Of the passes a forward counts 1 and a backward 2; a step can be above (work beside the passes) or below (BROS "
        "takes its gradients in subspaces). Scoring is from `memory.json`.",
    ]
    return "\n".join(lines)


def time_to_quality() -> str:
    report = load("time_to_quality")
    summary, seeds = report["summary"], report["config"]["seeds"]
    lines = [
        "| | last accuracy, in % | cost of its whole run | "
        + " | ".join(f"cost until all data's {name}" for name in ("last accuracy", "best accuracy"))
        + " |",
        "|---|---|---|---|---|",
    ]
    for arm in ("all", "random", "loss", "static", "blade"):
        cells = [plus_minus(summary, f"accuracy/{arm}", 100), f"{summary[f'whole_run/passes/{arm}']:.2f}"]
        for quality in QUALITIES:
            reached = summary[f"{quality}/reached/{arm}"]
            few = "" if reached == seeds else f" ({reached} of {seeds} seeds)"
            cells.append(plus_minus(summary, f"{quality}/passes/{arm}", digits=2) + few if reached else "never")
        lines.append(f"| {NOISY_ARMS[arm]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def schedules() -> str:
    report = load("schedules")
    summary, config = report["summary"], report["config"]
    steps = [str(config["steps"] // part) for part in (4, 2, 1)]
    automatic = "**BLADE as it comes**, T={}, K={}".format(*synchronisation_schedule(None, None, config["steps"]))
    titles = {"all": "all tokens (`Trainer`)", "random": "random tokens, same ratio", "auto": automatic}
    lines = [
        f"Mean ± standard deviation over {config['seeds']} seeds; differences of the log-perplexity are paired by seed.",
        "",
        f"| | {' | '.join(f'perplexity after {int(step):,} steps' for step in steps)} | log less all tokens | forward-equivalents |",
        "|---|---|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in report["rows"]):
        cells = [plus_minus(summary, f"perplexity/{arm}/{step}", digits=2) for step in steps]
        cells.append("" if arm == "all" else plus_minus(summary, f"log/{arm}", digits=3))
        lines.append(f"| {titles.get(arm, f'BLADE, {arm}')} | {' | '.join(cells)} | {summary[f'cost/{arm}']:.2f} |")
    return "\n".join(lines)


def compiled() -> str:
    report = load("compiled")
    titles = {"plain": "`Trainer`", "blade_token": "BLADE, tokens", "blade_sample": "BLADE, rows"}
    lines = ["| | not compiled | compiled | compiled again by selection |", "|---|---|---|---|"]
    rows = {(row["model"], row["arm"]): row for row in report["rows"]}
    for model, arm in rows:
        if arm.endswith("_compiled"):
            continue
        pair = rows[model, arm], rows[model, f"{arm}_compiled"]
        cells = [f"{row['ratio']:.2f} ({row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f})" for row in pair]
        name = {"vit": "ViT", "llama": "Llama"}[model]
        lines.append(f"| {name}, {titles[arm]} | {' | '.join(cells)} | {pair[1]['recompilations']} |")
    return "\n".join(lines)


def profiles() -> str:
    reports = [load("profile_steps_full_size"), load("profile_steps")]
    summary = reports[0]["summary"] | reports[1]["summary"]
    rows = [row for report in reports for row in report["rows"]]
    kinds = list(rows[0]["shares"])
    lines = [f"| | {' | '.join(kinds)} | sum | limit |", f"|---|{'---|' * (len(kinds) + 2)}"]
    for row in rows:
        key = f"{row['model']}/{row['arm']}"
        cells = [f"{summary[f'{kind}/{key}']:.2f}" for kind in (*kinds, "operators", "limit")]
        lines.append(f"| {PROFILED_MODELS[row['model']]}, {PROFILED[row['arm']]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def padding() -> str:
    titles = {
        "plain": "`Trainer`, all candidates",
        "all_padding": "BLADE by rows, with all of the padding",
        "blade_sample": "BLADE by rows",
    }
    rows = {row["arm"]: row for row in load("padding")["rows"]}
    lines = ["| | seconds, ratio to `Trainer` | range | positions that models ran on |", "|---|---|---|---|"]
    for arm, title in titles.items():
        ends = "{:.2f} to {:.2f}".format(*rows[arm]["ratio_range"])
        lines.append(f"| {title} | {rows[arm]['ratio']:.2f} | {ends} | {rows[arm]['columns']:.2f} |")
    return "\n".join(lines)


def scale() -> str:
    lines = ["| | rows or domains | ms a step | MB kept | MB in a checkpoint |", "|---|---|---|---|---|"]
    for row in load("scale")["rows"]:
        if row["part"] in SCALED:
            sizes = [f"{row[name] / 1e6:,.1f}" if row[name] else "" for name in ("bytes", "checkpoint_bytes")]
            cells = [f"{row['size']:,}", f"{row['milliseconds']:,.2f}", *sizes]
            lines.append(f"| {SCALED[row['part']]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory() -> str:
    report = load("memory")
    summary, rows = report["summary"], report["rows"]
    lines = [
        "Peak MiB of a training step above the idle process with the model loaded, float32, gradients and optimizer state "
        "included; BROS at rank 48 with the one-sided estimator.",
        "",
        "| | batch | AdamW | MA-SOBA | BROS | BROS / MA-SOBA | BROS / AdamW | auxiliary in bfloat16 | ... / AdamW |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, title in MODELS.items():
        sizes = [row["batch_size"] for row in rows if (row["part"], row["model"]) == ("training", model)]
        measured = ("adamw", "masoba", "bros_one_sided", "bros_bfloat16")
        adamw, masoba, bros, short = (summary.get(f"peak_mib/{model}/{arm}") for arm in measured)
        if sizes:
            cells = [f"{adamw:,.0f}", f"{masoba:,.0f}", f"{bros:,.0f}", f"{bros / masoba:.2f}", f"{bros / adamw:.2f}"]
            cells += ["", ""] if short is None else [f"{short:,.0f}", f"{short / adamw:.2f}"]
            lines.append(f"| {title} | {sizes[0]} | {' | '.join(cells)} |")
    arms = {
        title: f"peak_mib/vit_s/bros_{arm}" for arm, title in RANKS.items() if f"peak_mib/vit_s/bros_{arm}" in summary
    }
    lines += [
        "",
        f"| ViT-S, rank | {' | '.join(arms)} |",
        f"|---|{'---|' * len(arms)}",
        f"| MiB | {' | '.join(f'{summary[key]:,.0f}' for key in arms.values())} |",
    ]
    return "\n".join(lines)


def estimators() -> str:
    report = load("estimators")
    summary, config = report["summary"], report["config"]
    ranks = list(dict.fromkeys(row["rank"] for row in report["rows"]))
    lines = [
        f"Relative root mean square error of one draw of H[Z], at the end of {config['steps']} steps of BROS on MNIST digits with "
        f"half of the labels wrong (ViT, {config['width']} wide, {config['layers']} layers; {config['draws']} draws, "
        f"{config['seeds']} seeds, mean ± standard deviation over seeds). Z is the run's auxiliary variable; below, the gradient "
        "on a target batch.",
        "",
        f"| rank | {' | '.join(ESTIMATORS.values())} |",
        f"|---|{'---|' * len(ESTIMATORS)}",
    ]
    for end, title in (("", ""), ("/upper_gradient", ", upper gradient")):
        for rank in ranks:
            cells = [plus_minus(summary, f"relative_rms/{name}/{rank}{end}", digits=2) for name in ESTIMATORS]
            lines.append(f"| {rank}{title} | {' | '.join(cells)} |")
    lines += [
        "",
        "Bias, over the norm of H[Z], and in brackets what an unbiased estimator shows with so many draws:",
        "",
        f"| rank | {' | '.join(ESTIMATORS.values())} |",
        f"|---|{'---|' * len(ESTIMATORS)}",
    ]
    for rank in ranks:
        cells = [
            f"{summary[f'bias/{name}/{rank}']:.2f} ({summary[f'bias_if_unbiased/{name}/{rank}']:.2f})"
            for name in ESTIMATORS
        ]
        lines.append(f"| {rank} | {' | '.join(cells)} |")
    lines += [
        "",
        "Finite differences in full space, as the trainer takes them, have a relative error of "
        f"{summary['finite_differences']:.4f}: the noise is the subspace's.",
    ]
    return "\n".join(lines)


def mixture_lines(setting: str) -> list[str]:
    report = load("mixture")
    summary, inner_steps = report["summary"], report["config"]["inner_steps"]
    lines = [
        "| | perplexity, same updates | same forward-equivalents | forward-equivalents of an update | log-perplexity, T by the rule less this arm |",
        "|---|---|---|---|---|",
    ]
    for arm, title in MIXTURE_ARMS.items():
        if f"perplexity/{setting}/{arm}" not in summary:
            continue
        title = title.replace("{auto}", str(inner_steps["penalty_auto"]))
        title = title.replace("{4auto}", str(inner_steps["penalty_4auto"]))
        cells = [
            plus_minus(summary, f"{kind}/{setting}/{arm}", digits=2) for kind in ("perplexity", "perplexity_same_cost")
        ]
        cells.append(f"{3 * summary[f'cost/{setting}/{arm}']:.1f}")
        cells.append(plus_minus(summary, f"log_ratio/{setting}/penalty_auto_over_{arm}", digits=3))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def weights_line(setting: str, arm: str) -> str:
    summary = load("mixture")["summary"]
    prefix = f"weight/{setting}/{arm}/"
    weights = {
        k.removeprefix(prefix): v for k, v in summary.items() if k.startswith(prefix) and not k.endswith("/std")
    }
    ordered = sorted(weights.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {weight:.2f}" for name, weight in ordered)


def mixture() -> str:
    report = load("mixture")
    config, seeds = report["config"], len({row["seed"] for row in report["rows"]})
    return "\n".join(
        [
            "Bytes of six domains of text from the running Python's own installation, 600 rows of each but 100 of the target's, the "
            f"language reference; a small Llama from scratch, {config['steps']} updates of {config['batch']} rows, {seeds} seeds (mean ± "
            "standard deviation of the perplexity on held-out rows of the target). The last column compares arms of one seed.",
            "",
            *mixture_lines("restricted"),
            "",
            f"Learned mixture, mean over seeds: {weights_line('restricted', 'penalty_default')}. From "
            "`scripts/benchmarks/results/mixture.json`; [other settings](scripts/benchmarks/README.md#mixtures), abundant data among "
            "them.",
        ]
    )


def mixtures() -> str:
    summary = load("mixture")["summary"]
    lines = []
    for setting, title in SETTINGS.items():
        if f"perplexity/{setting}/penalty_auto" in summary:
            learned = [
                arm for arm in ("alignment", "penalty_auto", "penalty_default") if f"cost/{setting}/{arm}" in summary
            ]
            weights = [f"Learned by {arm}: {weights_line(setting, arm)}." for arm in learned]
            lines += [f"{title}.", "", *mixture_lines(setting), "", " ".join(weights), ""]
    return "\n".join(lines[:-1])


def coreset_table(tasks: list[str]) -> list[str]:
    """A row for each arm, a column for each task; in brackets the share of wrong labels in the coreset."""
    summary = load("coreset")["summary"]
    lines = ["| | " + " | ".join(CORESET_TASKS[task] for task in tasks) + " |", "|---|" + "---|" * len(tasks)]
    for arm, title in CORESET_ARMS.items():
        cells = []
        for task in tasks:
            cell = plus_minus(summary, f"accuracy/{task}/{arm}", 100)
            wrong = summary.get(f"wrong_share/{task}/{arm}")
            if wrong and arm != "full":
                cell += f" ({100 * wrong:.0f})"
            cells.append(cell)
        if any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def coreset_lines(tasks: tuple[str, ...]) -> list[str]:
    report = load("coreset")
    found = [task for task in tasks if any(row["task"] == task for row in report["rows"])]
    return coreset_table(found) if found else []


def coreset() -> str:
    report = load("coreset")
    config = report["config"]["clean"]
    columns = ("clean", "noise20", "pairwise20", "imbalance50")
    seeds = {task: len({row["seed"] for row in report["rows"] if row["task"] == task}) for task in columns}
    search_seconds = round(report["summary"]["seconds/clean/pbcs"])
    summary = report["summary"]

    def ahead(name: str, controls: tuple[str, ...]) -> list[str]:
        cells = []
        for task in (*columns, "text"):
            known = [arm for arm in controls if f"{name}/{task}/{arm}" in summary]
            best = min(known, key=lambda arm: summary[f"{name}/{task}/{arm}"], default=None)
            cells.append(plus_minus(summary, f"{name}/{task}/{best}", 100))
        return cells

    def of_text(arm: str) -> str:
        return plus_minus(summary, f"accuracy/text/{arm}", 100)

    def of_transfer(arm: str) -> str:
        return plus_minus(summary, f"accuracy/transfer/{arm}", 100)

    clean = {(row["arm"], row["seed"]): row["accuracy"] for row in report["rows"] if row["task"] == "clean"}
    seeds_ahead = sum(clean["pbcs", seed] > clean["greedy", seed] for arm, seed in clean if arm == "pbcs")

    controls = tuple(arm for arm in CORESET_ARMS if not arm.startswith("pbcs") and arm not in ("full", "target"))
    ahead_table = [
        "| | " + " | ".join([*(CORESET_TASKS[task] for task in columns), "text"]) + " |",
        "|---|" + "---|" * (len(columns) + 1),
        *(
            f"| {CORESET_ARMS[arm]} | {' | '.join(ahead(name, controls))} |"
            for arm, name in (("pbcs", "gain"), ("pbcs_both", "gain_both"))
        ),
    ]
    return "\n".join(
        [
            f"{config['size']} of {config['num_pool']:,} MNIST digits for the convolutional network of the paper, mean ± standard "
            f"deviation of the test accuracy in % over {', '.join(map(str, seeds.values()))} seeds (the columns in order); in brackets the "
            "share of wrong labels in the coreset. The "
            f'search (`engine="kernel"`, {config["outer_steps"]} outer steps, {search_seconds} s on a core of a busy CPU) fits the tangent '
            f"kernel of that network, on the 1,000 digits after {config['kernel_trainings']} trainings on uniform draws and judging each "
            f"row by the others too (`kernel_trainings={config['kernel_trainings']}`, `pool_share=0.5`, `model_init`); with 20 % wrong "
            "labels and with unequal classes 100 clean digits are the target dataset.",
            "",
            *coreset_lines(columns),
            "",
            "100 of 1,000 snippets of six kinds of text for MiniLM, 20 % with a wrong label, 60 clean rows as the target dataset: "
            f"{of_text('pbcs_both')} with `pool_share=0.5` and {of_text('pbcs')} without it; greedy {of_text('greedy')}, judged on the pool too {of_text('greedy_both')}, herding {of_text('herding')}, uniform "
            f"{of_text('uniform')}, the clean rows alone {of_text('target')}, the whole pool {of_text('full')}.",
            "",
            "Points ahead of the best other rule, paired by seed (a minus: behind; the clean rows alone and the whole pool are no rules):",
            "",
            *ahead_table,
            "",
            "Where labels are wrong, the pool should judge too. Where nothing is wrong, the trainings "
            f"in front of the kernel put the search ahead of greedy bilevel selection, which takes seconds, on {seeds_ahead} of "
            f"{seeds['clean']} seeds, and make its coreset one for this network: a perceptron learns {of_transfer('pbcs')} from it, "
            f"{of_transfer('pbcs_initial')} from that of the kernel at the initial weights and {of_transfer('greedy')} from greedy's. "
            "Where classes are rare, greedy selection (`scripts/benchmarks/coreset_controls.py`) and training on the clean rows alone are "
            "as good. How the pool judges was chosen on two of the five seeds with wrong labels, and that the trainings start from "
            "weights of their own on other seeds of the 1,000 digits and four of these.",
            "",
            "From `scripts/benchmarks/results/coreset.json`; [other tasks](scripts/benchmarks/README.md#coresets).",
        ]
    )


def coresets() -> str:
    groups = (
        ("clean", "noise20", "pairwise20", "imbalance50", "transfer"),
        (
            "split",
            "split_noise",
            "split_tenth",
            "split_tenth_noise",
            "permuted",
            "permuted_noise",
            "streaming",
            "streaming_noise",
        ),
        ("pixels", "text"),
    )
    tables = [lines for group in groups if (lines := coreset_lines(group))]
    summary = load("coreset")["summary"]
    names = {
        "split": "SplitMNIST",
        "split_noise": "with 20 % wrong labels",
        "split_tenth": "with a tenth kept",
        "split_tenth_noise": "with both",
        "permuted": "PermMNIST",
    }
    others = {"pbcs": "separate searches", "greedy": "greedy", "greedy_beside": "greedy beside the memory"}
    gains = [
        f"{name} "
        + ", ".join(f"{plus_minus(summary, f'gain_beside/{task}/{o}', 100)} ({title})" for o, title in others.items())
        for task, name in names.items()
    ]
    beside = f"Points of the search beside the memory less those of others, paired by seed: {'; '.join(gains)}."
    return "\n\n".join(["\n".join(lines) for lines in tables] + [beside])


def coreset_speed() -> str:
    report = load("coreset_speed")
    config, summary = report["config"], report["summary"]
    lines = [
        f"| {config['num_masks']} masks of {config['size']} of {config['num_pool']:,} rows: steps a second | on the masked pool | "
        'one after another (`"auto"` on a CPU) | as one model | `"auto"` over masked |',
        "|---|---|---|---|---|",
    ]
    titles = {"mlp": "a perceptron", "cheap": "a small convolutional network", "conv": "the paper's network"}
    for net in config["nets"]:
        values = [summary[f"steps_per_second/{net}/{way}"] for way in ("masked", "sequential", "batched")]
        speeds = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
        lines.append(f"| {titles[net]} | {' | '.join(speeds)} | {summary[f'search_speedup/{net}']:.1f} |")
    small, large = config["growth_sizes"]
    lines += ["", f"| seconds for a coreset of | {small} | {large} | ratio |", "|---|---|---|---|"]
    search = f"{config['outer_steps']} outer steps of a search"
    for arm, title in {"pbcs": search, "greedy": "greedy bilevel (Borsos et al.), whole"}.items():
        seconds = [f"{summary[f'seconds/{arm}/{size}']:.2f}" for size in (small, large)]
        lines.append(f"| {title} | {' | '.join(seconds)} | {summary[f'growth/{arm}']:.1f} |")
    return "\n".join(lines)


def sweep() -> str:
    report = load("noisy_labels_sweep")
    summary = report["summary"]
    lines = [
        f"| BLADE with | last weights | averaged weights | wrong labels selected ({report['config']['seeds']} seeds) |",
        "|---|---|---|---|",
    ]
    for arm in dict.fromkeys(row["arm"] for row in report["rows"]):
        cells = [plus_minus(summary, f"{kind}/{arm}", 100) for kind in ("accuracy", "accuracy_averaged")]
        title = arm.removeprefix("blade").strip()
        wrong = f"{100 * summary[f'wrong_share/{arm}']:.0f} %"
        lines.append(
            f"| {f'`{title}`' if title else 'the settings of the main table'} | {' | '.join(cells)} | {wrong} |"
        )
    return "\n".join(lines)


PAGES = {
    ROOT / "README.md": {
        "noisy_labels": noisy_labels,
        "domain_shift": domain_shift,
        "mixture": mixture,
        "coreset": coreset,
        "overhead": overhead,
    },
    Path(__file__).parent / "README.md": {
        "memory": memory,
        "estimators": estimators,
        "mixtures": mixtures,
        "coresets": coresets,
        "coreset_speed": coreset_speed,
        "sweep": sweep,
        "large_target": large_target,
        "trials": trials,
        "lm_eval": lm_eval,
        "time_to_quality": time_to_quality,
        "profiles": profiles,
        "schedules": schedules,
        "compiled": compiled,
        "padding": padding,
        "scale": scale,
    },
}


def render(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    for name, table in PAGES[path].items():
        pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)"
        text, count = re.subn(pattern, lambda m, table=table: m[1] + table() + "\n" + m[2], text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{path} has {count} places for the table {name}, expected one.")
    return text


def main(argv: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    options = parser.parse_args(argv)
    up_to_date = True
    for path in PAGES:
        rendered = render(path)
        if rendered != path.read_text(encoding="utf-8"):
            up_to_date = False
            print(f"{path.relative_to(ROOT)}: {'out of date' if options.check else 'written'}")
            if not options.check:
                path.write_text(rendered, encoding="utf-8")
    return up_to_date


if __name__ == "__main__":
    raise SystemExit(not main() and "--check" in sys.argv)
