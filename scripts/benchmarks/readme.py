"""Write the tables of the READMEs from the committed results, so that no number in it is typed by hand.

python scripts/benchmarks/readme.py [--check]
"""

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
NOISY_ARMS = {
    "all": "all data (`Trainer`)",
    "random": "random, same ratio",
    "loss": "highest loss",
    "static": "static reference (RHO-LOSS)",
    "blade": "**BLADE**",
    "clean": "correct labels only (upper bound)",
}
OVERHEAD_ARMS = {
    "llama/off": "Llama, switched off (`selection_ratio=1`)",
    "vit/off": "ViT, switched off",
    "llama/blade_token": "Llama, token level, between synchronisations",
    "llama/blade_token_amortised": "Llama, token level, with the published reference phase (K / T = 0.3)",
    "llama/blade_sample": "Llama, sample level, ratio 0.5",
    "vit/blade_sample": "ViT, sample level, ratio 0.5",
}


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def plus_minus(summary: dict, key: str, scale: float = 1.0, digits: int = 1) -> str:
    if key not in summary:
        return ""
    return f"{scale * summary[key]:.{digits}f} ± {scale * summary[key + '/std']:.{digits}f}"


def noisy_labels() -> str:
    report = load("noisy_labels")
    summary, config = report["summary"], report["config"]
    lines = [
        f"{config['num_pool']:,} MNIST digits of which half have a wrong label, {config['num_target']} clean ones as the "
        f"target dataset, a small ResNet, {config['steps']} steps for every arm, {config['seeds']} seeds (mean ± standard "
        "deviation of the accuracy on 1,000 test digits, in %). *Gap closed*: 0 is all data, 100 the correct labels only. "
        "*Stopped early*: the checkpoint with the best accuracy on the target dataset.",
        "",
        "| | last weights | gap closed | averaged weights | stopped early | wrong labels among the selected |",
        "|---|---|---|---|---|---|",
    ]
    for arm, title in NOISY_ARMS.items():
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
    return "\n".join(lines)


def overhead() -> str:
    summary = load("overhead")["summary"]
    lines = ["| | seconds, ratio to `Trainer` | limit by counting passes |", "|---|---|---|"]
    for key, title in OVERHEAD_ARMS.items():
        limit = f"{summary[f'limit/{key}']:.2f}"
        lines.append(f"| {title} | {plus_minus(summary, f'step_ratio/{key}', digits=2)} | {limit} |")
    memory = load("memory")["summary"]
    lines += [
        "",
        f"Scoring 8 × 1,024 tokens at a vocabulary of 49,152 takes {100 * memory['scoring_over_naive']:.0f} % of the peak "
        "memory of computing all logits. From `overhead.json` and `memory.json` beside.",
    ]
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
    ROOT / "README.md": {"noisy_labels": noisy_labels, "overhead": overhead},
    Path(__file__).parent / "README.md": {"sweep": sweep},
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
        up_to_date &= rendered == path.read_text(encoding="utf-8")
        if not options.check:
            path.write_text(rendered, encoding="utf-8")
    return up_to_date


if __name__ == "__main__":
    main()
