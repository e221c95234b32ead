"""Model cards: what they say of a run, for every method, that text from facts stays text, and that the Hub takes them."""

import builtins
import re
from pathlib import Path
from typing import Any

import pytest
from hostile_text import EVIL
from hub_server import running_hub, validate_model_card
from huggingface_hub import ModelCard
from tiny import make_dataset, make_trainer
from transformers import Trainer

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
from hf_bilevel.cards import MethodSection, check_results, escape_markdown, model_section


def section(text: str, **kwargs: Any) -> str:
    """A section in which everything that is not ours is ``text``."""
    method = MethodSection(
        "Learned mixture",
        ", *often*.",
        "[a paper](https://arxiv.org).",
        "A limit.",
        statistics={f"Rows {text}": text},
        columns=["domain", "weight"],
        rows=[[text, "0.500"]],
    )
    place = {"source": text, "revision": text, "version": text, "fingerprint": text}
    facts = {
        "trainer": "X",
        "num_pool": 1234,
        "num_target": 10,
        "pool": place,
        "target": place,
        "versions": {text: text},
    }
    defaults: dict[str, Any] = {
        "settings": {"domain_names": ([text], None), "penalty": (2.0, 1.0)},
        "cost": {"Device": text},
        "pictures": {"a.png": "A picture"},
        "results": {text: {text: 0.123456, "f1": [0.5, 0.7]}, "all data": {"f1": 1}},
    }
    return model_section(method, facts, **{**defaults, **kwargs})


def test_what_a_section_says() -> None:
    text = section("AAA", command="python run.py --seed 1")
    assert text.startswith(
        "## Learned mixture\n\nTrained with hf_bilevel's `X`, *often*.\n\nMethod: [a paper](https://arxiv.org)."
    )
    rows = [
        "Rows of the pool | 1,234",
        "Pool | AAA",
        "Fingerprint of the pool | AAA",
        "Rows of the target dataset | 10",
    ]
    rows += [
        "Versions | AAA AAA",
        "domain_names | AAA | null",
        "penalty | 2 | 1",
        "Rows AAA | AAA",
        "AAA | 0.500",
        "Device | AAA",
    ]
    rows += ["arm | AAA | f1", "AAA | 0.1235 | 0.6 ± 0.1414", "all data |  | 1"]
    for row in rows:
        assert f"\n| {row} |\n" in text, row
    assert "\n![A picture](a.png)\n" in text and "over 2 runs" in text
    assert "\n```bash\npython run.py --seed 1\n```\n" in text
    assert "- A limit.\n" in text and "No controls" not in text


def test_what_is_not_known_is_left_out() -> None:
    method = MethodSection("T", ".", "P.", "L.")
    text = model_section(method, {"trainer": "X", "num_pool": None}, settings={}, cost={}, pictures={})
    assert "All settings of the method are the defaults." in text and "No controls are recorded" in text
    for absent in ("None", "null", "Rows", "Results", "Reproduce", "![", "± "):
        assert absent not in text
    one_arm = model_section(method, {"trainer": "X"}, settings={}, cost={}, pictures={}, results={"X": {"f1": [0.5]}})
    assert "| X | 0.5 |" in one_arm and "No controls are recorded" in one_arm and "runs" not in one_arm


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_that_is_not_ours_is_taken_for_markup(evil: str) -> None:
    plain, text = section("AAA"), section(evil)
    assert plain.count("AAA") > 12
    assert text.replace(escape_markdown(evil), "AAA").splitlines() == plain.splitlines()


@pytest.mark.parametrize("command", [*EVIL, "a ```` b"])
def test_a_command_does_not_leave_its_block(command: str) -> None:
    text = section("AAA", command=command)
    fence, inside = re.search(r"### Reproduce\n\n(`+)bash\n(.*)\n\1\n\n### Limits", text, re.DOTALL).groups()
    assert inside == command.strip() and fence not in inside


@pytest.mark.parametrize(
    "results",
    [{"a": 1.0}, {"a": {"f1": "0.5"}}, {"a": {"f1": []}}, {"a": {"f1": [0.5, None]}}, {"a": {"f1": True}}, [1]],
)
def test_results_that_are_no_table_are_refused(results: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="`results` must be {arm: {metric: number or one number for each run}}"):
        check_results(results)
    with pytest.raises(TypeError, match="`results` must be"):
        build("blade", tmp_path).create_model_card(results=results)
    assert not (tmp_path / "README.md").exists()


# Of trainers ----------------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[type, Any, str]] = {
    "blade": (
        BladeTrainer,
        BladeConfig(selection_ratio=0.5, domain_column="source", sync_steps=1, reference_steps=1, penalty=0.5),
        "vit",
    ),
    "blade_token": (BladeTrainer, BladeConfig(selection_ratio=0.5, reference_steps=1), "llama"),
    "bros": (BrosTrainer, BrosConfig(rank=0.5), "vit"),
    "mixture": (MixtureTrainer, MixtureConfig(domain_column="source", inner_steps=2), "vit"),
    "coreset": (CoresetTrainer, CoresetConfig(size=8, outer_steps=3, inner_steps=2, domain_column="source"), "vit"),
}
RESULTS = {"mine": {"accuracy": [0.9, 0.8]}, "all data": {"accuracy": 0.7}}


def build(method: str, folder: Path, **kwargs: Any) -> Trainer:
    trainer_class, config, model = METHODS[method]
    given = {
        "target_dataset": make_dataset(model, 8, seed=1),
        "bilevel_config": config,
        **kwargs.pop("trainer_kwargs", {}),
    }
    return make_trainer(trainer_class, model, folder, trainer_kwargs=given, num_pool=24, **kwargs)


@pytest.mark.filterwarnings("ignore:The subspaces of")
@pytest.mark.parametrize("method", METHODS)
def test_the_card_of_a_run(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build(method, tmp_path / "run")
    trainer.create_model_card()
    trained_by = f"Trained with hf_bilevel's `{type(trainer).__name__}`"
    assert trained_by not in (tmp_path / "run" / "README.md").read_text(encoding="utf-8"), "there is no outcome yet"
    trainer.train()
    for _ in range(2):  # written anew, not added to
        trainer.create_model_card(results=RESULTS, command="python run.py", tags=["mine"])
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert text.index("## Training procedure") < text.index(trained_by) and text.count(trained_by) == 1
    for row in (
        "Rows of the pool | 24",
        "Rows of the target dataset | 8",
        "mine | 0.85 ± 0.07071",
        "Optimizer steps | 6",
    ):
        assert f"| {row} |" in text
    assert f"| Fingerprint of the pool | {trainer.train_dataset._fingerprint} |" in text
    assert f"| Fingerprint of the target dataset | {trainer.target_dataset._fingerprint} |" in text
    assert "```bash\npython run.py\n```" in text and "No controls are recorded" not in text
    assert "None" not in text.split(trained_by)[1].split("| setting |")[0]
    pictures = re.findall(r"!\[.+\]\((.+)\)", text)
    assert pictures and all((tmp_path / "run" / path).stat().st_size > 2_000 for path in pictures)
    EXPECTED[method](trainer, text)
    assert validate_model_card(text) == [] and "mine" in ModelCard(text).data.tags
    with running_hub(monkeypatch, tmp_path):
        ModelCard(text).validate()  # through the client's request to the Hub
        with pytest.raises(ValueError, match="unknown key"):
            ModelCard(text.replace("library_name", "library")).validate()


def expect_blade(trainer: BladeTrainer, text: str) -> None:
    offered, selected = (trainer.sample_tally.state_dict()[name] for name in ("offered", "selected"))
    assert (
        f"| Share of the candidate samples that was selected | {float(selected.sum() / offered.sum()):.1%} |" in text
    )
    assert (
        f"| Of them never selected | {int((selected == 0).sum())} (" in text
        and "| Passes over the pool | 2.0 |" in text
    )
    assert (
        "arXiv 2606.18650" in text
        and "| selection_ratio | 0.5 | 0.6 |" in text
        and "on the 50 % of the samples" in text
    )
    shares = [float(share) for share in re.findall(r"\| (?:web|books|code) \| ([\d.]+)% \|", text)]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=0.2)
    assert "](blade_scores.png)" in text and "](blade_domains.png)" in text
    # Two forwards of 8 candidates and a backward of 4; a synchronisation a step, of 1 step on 8 target rows and, weighted, on
    # the pool: all 8 candidates the first time, later 4 after scoring 8.
    assert "and, weighted 0.5, on the selected samples" in text
    passes = 6 * (2 * 8 + 3 * 4) + 6 * 3 * 8 + 3 * 8 + 5 * (2 * 8 + 3 * 4)
    assert f"(forward and backward count 3) | {passes} |" in text


def expect_blade_token(trainer: BladeTrainer, text: str) -> None:
    assert "on the 50 % of the tokens" in text and "| Share of the candidate tokens that was selected |" in text
    assert "blade_domains.png" not in text and "](blade_scores.png)" in text


def expect_bros(trainer: BrosTrainer, text: str) -> None:
    weights = trainer.sample_weights.weights
    assert f"| Mean of the weights | {float(weights.double().mean()):.3f} |" in text
    assert f", {float(weights.median()):.3f}, " in text and "| Rows with a weight | 24 of 24 |" in text
    assert "arXiv 2605.10288" in text and "`rank=0.5`" in text and "](bros_weights.png)" in text
    assert "as many steps | 3.00 |" in text


def expect_mixture(trainer: MixtureTrainer, text: str) -> None:
    for name, weight in trainer.mixture.items():
        assert f"| {name} | 0.333 | {weight:.3f} |" in text
    assert "every 2 optimizer steps" in text and "](mixture.png)" in text and "arXiv 2602.19510" in text


def expect_coreset(trainer: CoresetTrainer, text: str) -> None:
    facts = trainer.selected_subset().facts
    assert "| Size | 8 of 24 (33.3%) |" in text and "| Outer steps of the search | 3 |" in text
    assert f"after training (in nats) | {facts['metrics']['upper_loss']:.4g} |" in text
    assert f"mean of 10 | {facts['controls']['uniform']['upper_loss']:.4g} |" in text
    assert re.search(r"\| Search \| [\d.]+ s \|", text) and "forward and backward count 3" not in text
    for name in ("search", "ranking", "domains"):
        assert f"](coreset_{name}.png)" in text


EXPECTED = {
    name.removeprefix("expect_"): check for name, check in list(globals().items()) if name.startswith("expect_")
}


def test_off_is_the_plain_trainers_card(tmp_path: Path) -> None:
    plain = make_trainer(Trainer, "vit", tmp_path / "plain" / "run", num_pool=24)
    off = build("blade", tmp_path / "off" / "run", trainer_kwargs={"bilevel_config": BladeConfig(selection_ratio=1.0)})
    for trainer in (plain, off):
        trainer.train()
        trainer.create_model_card()
    cards = [(tmp_path / name / "run" / "README.md").read_text(encoding="utf-8") for name in ("plain", "off")]
    assert cards[0] == cards[1] and list((tmp_path / "off" / "run").glob("*.png")) == []


@pytest.mark.parametrize(
    ("method", "config", "said"),
    [
        ("blade", BladeConfig(selection_ratio=0.5, score="random"), "chosen at random."),
        ("blade", BladeConfig(selection_ratio=0.5, score="loss"), "chosen with the highest loss."),
        ("bros", BrosConfig(upper_variable="fixed"), "## Training with fixed weights"),
        ("bros", BrosConfig(upper_variable="domain", domain_column="source", rank="full"), "(MA-SOBA)"),
        ("mixture", MixtureConfig(domain_column="source", mixture="uniform"), "none, nothing was learned"),
    ],
)
@pytest.mark.filterwarnings("ignore:The subspaces of")
def test_controls_and_variants_are_called_what_they_are(method: str, config: Any, said: str, tmp_path: Path) -> None:
    trainer = build(method, tmp_path, trainer_kwargs={"bilevel_config": config})
    if method == "mixture":  # equal shares of equal domains would be off
        trainer.train_dataset = make_dataset("vit", 22)
    trainer.train()
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert said in text and "arXiv 2606.18650" not in text


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build("blade", tmp_path)
    trainer.train()
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert list(tmp_path.glob("*.md")) == list(tmp_path.glob("*.png")) == []


def test_without_matplotlib_the_tables_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = build("mixture", tmp_path)
    trainer.train()
    real = builtins.__import__

    def no_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## Learned mixture" in text and "![" not in text and list(tmp_path.glob("*.png")) == []
