"""BrosTrainer against brute force: what each of its three variables does in a step, what it costs, and what it refuses."""

import copy
import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import (
    VOCABULARY,
    arguments,
    make_dataset,
    make_model,
    make_rows,
    make_trainer,
    parameters_of,
    wide_norms,
)
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_bilevel import BrosConfig, BrosMixin, BrosTrainer, SampleWeights, SelectedSubset
from hf_bilevel.core.subspace import bi_probe, two_sided
from hf_bilevel.data import derive_seed
from hf_bilevel.derivatives import RELATIVE_STEP
from hf_bilevel.trainers import bros as bros_module

pytestmark = pytest.mark.filterwarnings("ignore:The subspaces of")  # a few steps cannot cover anything

LEARNING_RATE = 0.05


class RecordingTrainer(BrosTrainer):
    """Keep what each optimizer step starts from."""

    def _begin_training(self) -> None:
        super()._begin_training()
        self.steps: list[tuple[list[Any], list[Any], list[Tensor | None]]] = []
        self.first_upper = copy.deepcopy(self.upper)

    def _select(self, batches: Any, origins: Any, num_items: Any) -> Any:
        result = super()._select(batches, origins, num_items)
        self.steps.append(([dict(batch) for batch in batches], origins, list(self.blocks.bases)))
        return result


def build(
    name: str,
    folder: Path,
    settings: dict[str, Any] | None = None,
    *,
    trainer_class: type[Trainer] = BrosTrainer,
    trainer_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    extra = {"target_dataset": make_dataset(name, 10, seed=7), "bilevel_config": BrosConfig(**(settings or {}))}
    return make_trainer(trainer_class, name, folder, trainer_kwargs={**extra, **(trainer_kwargs or {})}, **kwargs)


def train(*args: Any, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
    trainer = build(*args, **kwargs)
    set_seed(11)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    return trainer


# One step by hand -----------------------------------------------------------------------------------------------------


@pytest.fixture
def wide() -> Iterator[None]:
    """Everything in float64, the logits of the samples too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sample_losses(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean loss of every row and its number of predictions."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        inputs = {key: batch[key] for key in ("pixel_values", "input_ids", "attention_mask") if key in batch}
        logits = model(**inputs).logits
    if logits.ndim == 2:
        return F.cross_entropy(logits, batch["labels"], reduction="none"), torch.ones(len(logits))
    labels = batch["labels"][:, 1:]
    tokens = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
    counts = (labels != -100).sum(1)
    return tokens.sum(1) / counts, counts


class BruteForce:
    """The method written out for a recorded run: dense Hessians by double backward, one sample and one block at a time.

    Attributes:
        model: At the end of the run.
        z: By name.
        x: The upper variable, flat.
        average: The moving average of the hypergradient.
        seen: Last weight of every sample.
    """

    def __init__(
        self,
        trainer: RecordingTrainer,
        model: nn.Module,
        x: Tensor,
        weights: Callable[..., Tensor],
    ) -> None:
        config, args, names = trainer.bilevel_config, trainer.args, trainer.blocks.names
        self.model = model
        self.z = {name: torch.zeros_like(dict(model.named_parameters())[name]) for name in names}
        self.x, self.average, self.seen = x, torch.zeros_like(x), {}
        self.curvature = self.square = self.mass = 0.0
        self.norms: list[float] = []
        loader, drawn = trainer._endless_loader(trainer.target_dataset, 8, 5), 0
        for step, (batches, origins, bases) in enumerate(trainer.steps):
            params = dict(model.named_parameters())
            lower = [params[name] for name in names]
            bases = dict(zip(names, bases, strict=True))
            rate = LEARNING_RATE * (1 - step / args.max_steps)
            start = 0 if config.start_step == "auto" else config.start_step
            updates = config.upper_variable != "fixed" and step >= start
            updates = updates and (step - start) % config.update_every == 0
            seed = derive_seed(args.seed, step)
            gradient, hessian, upper, hyper = {}, {}, {}, torch.zeros_like(x)
            all_counts = []
            for batch in batches:
                labels = batch["labels"] if batch["labels"].ndim == 1 else batch["labels"][:, 1:]
                all_counts.append((labels != -100).sum())
            for batch, origin, num in zip(batches, origins, all_counts, strict=True):
                losses, counts = sample_losses(model, batch)
                # BERT's loss is the mean over a micro-batch; the others' over the whole step.
                num_items = sum(all_counts) if trainer.model_accepts_loss_kwargs else num * len(batches)

                def coefficients(
                    x: Tensor, losses: Any = losses, counts: Any = counts, origin: Any = origin, num: Any = num_items
                ) -> Tensor:
                    w = weights(x, origin, losses.detach())
                    if config.normalise_weights:
                        w = w / ((w * counts).sum() / counts.sum())
                    return w * counts / num

                for i, w in zip(origin.sample_ids.tolist(), weights(self.x, origin, losses.detach()), strict=True):
                    self.seen[i] = float(w)
                c = coefficients(self.x)
                full = torch.autograd.grad(
                    (c * losses).sum(), lower, create_graph=True, allow_unused=True, materialize_grads=True
                )
                self._add(gradient, names, full, bases)
                if not updates:
                    continue

                def action(
                    direction: list[Tensor], full: Any = full, lower: Any = lower, bases: Any = bases
                ) -> list[Tensor]:
                    along = sum((g * d.view_as(g)).sum() for g, d in zip(full, direction, strict=True))
                    second = torch.autograd.grad(along, lower, retain_graph=True, allow_unused=True)
                    second = [torch.zeros_like(p) if h is None else h for p, h in zip(lower, second, strict=True)]
                    return [
                        h if bases[n] is None else h.flatten(1) @ bases[n] for n, h in zip(names, second, strict=True)
                    ]

                z = [self.z[n] if bases[n] is None else self.z[n].flatten(1) for n in names]
                in_order = [bases[n] for n in names]
                if config.estimator == "bi_probe":
                    signs = torch.Generator().manual_seed(derive_seed(seed, 2))
                    estimate = bi_probe(action, z, in_order, signs)
                elif config.estimator == "two_sided":
                    estimate = two_sided(action, z, in_order, trainer.blocks.draw(derive_seed(seed, 1)))
                else:
                    estimate = action(z)
                for name, h in zip(names, estimate, strict=True):
                    hessian[name] = hessian.get(name, 0) + h
                slopes = []
                for loss in losses:
                    own = torch.autograd.grad(loss, lower, retain_graph=True, allow_unused=True)
                    pairs = zip(names, own, strict=True)
                    slopes.append(sum((self.z[n] * g).sum() for n, g in pairs if g is not None))
                jacobian = torch.autograd.functional.jacobian(coefficients, self.x)
                hyper = hyper - jacobian.T @ torch.stack(slopes).detach()
                target_losses, target_counts = sample_losses(model, loader.batch_at(drawn))
                drawn += 1
                target = (target_losses * target_counts).sum() / target_counts.sum() / len(batches)
                target_gradient = torch.autograd.grad(target, lower, allow_unused=True, materialize_grads=True)
                self._add(upper, names, target_gradient, bases)
            with torch.no_grad():
                self._lower_step(params, gradient, bases, rate, args)
                if updates:
                    self._upper_step(config, hyper, rate / LEARNING_RATE)
                    if config.weight_function == "projected":
                        self.x = self.x.clamp(0, 1)
                    self._auxiliary_step(config, hessian, upper, bases)

    @staticmethod
    def _add(total: dict[str, Any], names: list[str], full: Any, bases: dict[str, Tensor | None]) -> None:
        for name, g in zip(names, full, strict=True):
            g = g.detach() if bases[name] is None else g.detach().flatten(1) @ bases[name]
            total[name] = total.get(name, 0) + g

    def _lower_step(self, params: dict, gradient: dict, bases: dict, rate: float, args: Any) -> None:
        norm = torch.stack([g.square().sum() for g in gradient.values()]).sum().sqrt()
        self.norms.append(float(norm))
        clip = min(1.0, args.max_grad_norm / (float(norm) + 1e-6)) if args.max_grad_norm else 1.0
        for name, g in gradient.items():
            basis, parameter = bases[name], params[name]
            g = g if basis is None else (g @ basis.T).view_as(parameter)
            decay = args.weight_decay if parameter.ndim > 1 else 0.0
            parameter.copy_((1 - rate * decay) * parameter - rate * clip * g)

    def _upper_step(self, config: BrosConfig, hyper: Tensor, schedule: float) -> None:
        rate = (0.3 if config.upper_learning_rate == "auto" else config.upper_learning_rate) * schedule
        if config.normalise_hypergradient:
            if hyper.any():
                self.square = 0.99 * self.square + 0.01 * float(hyper[hyper != 0].square().mean())
                self.mass = 0.99 * self.mass + 0.01
            rate = rate / math.sqrt(self.square / self.mass) if self.square else 0.0
        self.x = self.x - rate * self.average
        self.average = (1 - config.moving_average) * self.average + config.moving_average * hyper

    def _auxiliary_step(self, config: BrosConfig, hessian: dict, upper: dict, bases: dict) -> None:
        rate, damping = config.auxiliary_learning_rate, config.damping
        if rate == "auto":
            h, z = (math.sqrt(sum(float(t.square().sum()) for t in d.values())) for d in (hessian, self.z))
            self.curvature = max(0.99 * self.curvature, h / z if z else 0.0)
            curvature = self.curvature or 1.0
            damping = config.damping * curvature
            rate = 0.5 / (curvature + damping)
        for name, z in self.z.items():
            basis, residual, share = bases[name], hessian[name] - upper[name], 1.0
            if basis is not None:
                share = basis.shape[1] / basis.shape[0]
                residual = (residual @ basis.T).view_as(z)
            self.z[name] = z - rate * share * (residual + damping * z)


def compare(trainer: RecordingTrainer, expected: BruteForce, tolerance: float) -> None:
    def close(got: Tensor, want: Tensor, scale: float) -> None:
        torch.testing.assert_close(got.double(), want.double().view_as(got), rtol=0, atol=tolerance * scale)

    weights = dict(trainer.model.named_parameters())
    for name, parameter in expected.model.named_parameters():
        close(weights[name].detach(), parameter.detach(), 1.0)
    if not trainer._learns():
        return
    z_scale = max(float(z.abs().max()) for z in expected.z.values())
    assert z_scale > 0
    for name, got in zip(trainer.blocks.names, trainer.auxiliary.blocks, strict=True):
        close(got, expected.z[name], z_scale)
    assert expected.average.any() and expected.x.any()
    flat = torch.cat([p.detach().flatten() for p in trainer.upper.parameters()])
    close(flat, expected.x, max(1.0, float(expected.x.abs().max())))
    average = torch.cat([h.flatten() for h in trainer.upper_step.average])
    close(average, expected.average, float(expected.average.abs().max()))


def exact_run(name: str, folder: Path, settings: dict[str, Any], **kwargs: Any) -> RecordingTrainer:
    trainer = build(
        name,
        folder,
        settings,
        trainer_class=RecordingTrainer,
        model=wide_norms(make_model(name)).double(),
        **{
            "optim": "sgd",
            "learning_rate": LEARNING_RATE,
            "max_grad_norm": 0.0,
            "max_steps": 3,
            "num_pool": 20,
            "logging_steps": 1,
            **kwargs,
        },
    )
    trainer.bilevel_config.auxiliary_dtype = "float64"
    trainer.train()
    return trainer


BY_HAND = {"auxiliary_learning_rate": 0.3, "damping": 0.2, "normalise_hypergradient": False, "upper_learning_rate": 9.0,
           "moving_average": 0.4}  # fmt: skip
FULL = {**BY_HAND, "rank": "full"}
HALF = {**BY_HAND, "rank": 0.5, "refresh_steps": 2}
DOUBLE = {"hessian_action": "double_backward"}
UNSCALED = {"normalise_weights": False}

CASES = {
    "full": ("vit", FULL, {}),
    "full, double backward": ("vit", {**FULL, **DOUBLE, **UNSCALED}, {"gradient_accumulation_steps": 2}),
    "accumulation": ("vit", HALF, {"gradient_accumulation_steps": 2}),  # windows of 16 and of 4 samples
    "accumulation, a mean of its own": ("bert", {**HALF, **DOUBLE}, {"gradient_accumulation_steps": 2}),
    "tokens": ("llama", HALF, {"gradient_accumulation_steps": 2}),
    "tokens, double backward": ("llama", {**FULL, **DOUBLE, **UNSCALED}, {"gradient_accumulation_steps": 3}),
    "softmax": ("vit", {**HALF, **DOUBLE, "weight_function": "softmax"}, {}),
    "softmax, unscaled": ("vit", {**HALF, **DOUBLE, **UNSCALED, "weight_function": "softmax"}, {}),
    "projected": ("vit", {**HALF, **DOUBLE, "weight_function": "projected", "upper_learning_rate": 400.0}, {}),
    "bi-probe": ("vit", {**HALF, "estimator": "bi_probe"}, {}),
    "bi-probe, double backward": ("vit", {**HALF, **DOUBLE, "estimator": "bi_probe"}, {}),
    "two-sided": ("vit", {**HALF, "estimator": "two_sided"}, {"gradient_accumulation_steps": 2}),
    "clipping": ("vit", {**HALF, **DOUBLE}, {"max_grad_norm": 0.4}),
    "clipping, full": ("vit", {**FULL, **DOUBLE}, {"max_grad_norm": 0.4}),
    "weight decay": ("vit", {**HALF, **DOUBLE}, {"weight_decay": 0.7}),
    "frozen rest": ("vit", {**HALF, "rest": "frozen"}, {}),
    "some modules": ("vit", {**HALF, **DOUBLE, "modules": ["q_proj", "classifier"]}, {}),
    "every second step": ("vit", {**HALF, "update_every": 2}, {"max_steps": 5}),
    "warm-up": ("vit", {**HALF, "start_step": 2}, {"max_steps": 5}),
    "automatic": ("vit", {"rank": 0.5, "moving_average": 1.0, **DOUBLE}, {"max_steps": 4}),
    "automatic, full": ("vit", {"rank": "full", **DOUBLE}, {"max_steps": 4, "gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_by_brute_force(case: str, wide: None, tmp_path: Path) -> None:
    """Finite differences to 1e-5, what is exact to 1e-10."""
    name, settings, kwargs = CASES[case]
    trainer = exact_run(name, tmp_path, settings, **kwargs)
    function = {
        "sigmoid": lambda x: 1 / (1 + (-x).exp()),
        "softmax": lambda x: len(x) * x.exp() / x.exp().sum(),
        "projected": lambda x: x,
    }[trainer.bilevel_config.weight_function]

    def weights(x: Tensor, origin: Any, losses: Tensor) -> Tensor:
        return function(x)[origin.sample_ids]

    start = torch.full((20,), 0.5 if "projected" in case else 0.0)
    expected = BruteForce(trainer, wide_norms(make_model(name)).double(), start, weights)
    compare(trainer, expected, 1e-10 if "hessian_action" in settings else 1e-5)
    ids, got = trainer.sample_weights
    assert torch.equal(ids, torch.arange(20))
    torch.testing.assert_close(got, function(expected.x), rtol=0, atol=1e-4)
    if case == "projected":
        assert {0.0, 1.0} < set(got.tolist())
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(expected.norms, rel=1e-5)  # of the coordinates
    if kwargs.get("max_grad_norm"):
        assert min(expected.norms) > kwargs["max_grad_norm"], "nothing was clipped"
    if "frozen" in case:
        start, moved = make_model(name).double().state_dict(), trainer.model.state_dict()
        frozen = set(start) - set(trainer.blocks.names)
        assert frozen and all(torch.equal(start[key], moved[key]) for key in frozen)


@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
def test_domains_by_brute_force(function: str, wide: None, tmp_path: Path) -> None:
    settings = {**HALF, **DOUBLE, "upper_variable": "domain", "domain_column": "source", "weight_function": function}
    trainer = exact_run("vit", tmp_path, settings, gradient_accumulation_steps=2)
    assert trainer.domain_names == ["books", "code", "web"]
    domain_of = torch.tensor([[2, 0, 1][i % 3] for i in range(20)])

    def weights(x: Tensor, origin: Any, losses: Tensor) -> Tensor:
        w = 3 * x.softmax(0) if function == "softmax" else x.sigmoid()
        return w[domain_of[origin.sample_ids]]

    expected = BruteForce(trainer, make_model("vit").double(), torch.zeros(3), weights)
    compare(trainer, expected, 1e-10)
    w = 3 * expected.x.softmax(0) if function == "softmax" else expected.x.sigmoid()
    assert trainer.domain_weights == pytest.approx(dict(zip(["books", "code", "web"], w.tolist(), strict=True)))
    ids, sample_weights = trainer.sample_weights
    torch.testing.assert_close(sample_weights, w[domain_of], rtol=0, atol=1e-9)
    assert torch.equal(ids, torch.arange(20))
    last = [entry for entry in trainer.state.log_history if "bros/weight/web" in entry][-1]
    assert last["bros/weight/web"] == pytest.approx(float(w[2]))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("action", ["double_backward", "finite_differences"])
def test_network_by_brute_force(action: str, normalise: bool, tmp_path: Path) -> None:
    """A network in float32, as it always is, to 1e-4; from the losses of the pair's first evaluation, to 2e-2."""
    tolerance = 1e-4 if action == "double_backward" else 2e-2
    settings = {**HALF, "upper_variable": "network", "normalise_weights": normalise, "upper_learning_rate": 1.0}
    settings["hessian_action"] = action
    trainer = exact_run("vit", tmp_path, settings, gradient_accumulation_steps=2)
    network = copy.deepcopy(trainer.first_upper).double()
    start = torch.cat([p.detach().flatten() for p in network.parameters()])
    shapes = {name: p.shape for name, p in network.named_parameters()}

    def weights(x: Tensor, origin: Any, losses: Tensor) -> Tensor:
        first, bias, second, last = (
            part.view(shape)
            for part, shape in zip(x.split([math.prod(s) for s in shapes.values()]), shapes.values(), strict=True)
        )
        hidden = (losses[:, None] * first.T + bias).clamp(min=0)
        return 1 / (1 + (-(hidden @ second.T + last)).exp().flatten())

    expected = BruteForce(trainer, make_model("vit").double(), start.clone(), weights)
    assert float((expected.x - start).abs().max()) > 1e-3, "the network must have learned"
    compare(trainer, expected, tolerance)
    ids, got = trainer.sample_weights
    assert ids.tolist() == sorted(expected.seen)
    torch.testing.assert_close(
        got.double(),
        torch.tensor([expected.seen[i] for i in ids.tolist()], dtype=torch.float64),
        rtol=0,
        atol=tolerance,
    )


def test_a_second_pass_with_given_weights_by_brute_force(tmp_path: Path) -> None:
    """Weights in float32, as the trainer keeps them: to 1e-7."""
    given = torch.arange(20) / 16
    settings = {"upper_variable": "fixed", "rank": 0.5, "refresh_steps": 2}
    trainer = exact_run("vit", tmp_path, settings, trainer_kwargs={"sample_weights": given})

    def weights(x: Tensor, origin: Any, losses: Tensor) -> Tensor:
        return given.double()[origin.sample_ids]

    compare(trainer, BruteForce(trainer, make_model("vit").double(), torch.zeros(20), weights), 1e-7)
    assert torch.equal(trainer.sample_weights.weights, given)


def test_a_step_in_a_subspace_is_the_projected_gradient(tmp_path: Path) -> None:
    """W moves by minus lr P P' G, with G from torch's own backward pass."""
    settings = {"upper_variable": "fixed", "rank": 3}
    trainer = train("vit", tmp_path, settings, trainer_class=RecordingTrainer, model=make_model("vit").double(),
                    optim="sgd", max_steps=1, max_grad_norm=0.0, learning_rate=LEARNING_RATE)  # fmt: skip
    (((batch,), _, bases),) = trainer.steps
    model = make_model("vit").double()
    model(**batch).loss.backward()
    moved = dict(trainer.model.named_parameters())
    for i, name in enumerate(trainer.blocks.names):
        before = dict(model.named_parameters())[name]
        expected = before.grad
        if i in trainer.blocks.projected:
            assert bases[i].shape[1] == 3
            expected = (before.grad.flatten(1) @ bases[i] @ bases[i].T).view_as(before)
        torch.testing.assert_close(moved[name], before - LEARNING_RATE * expected, rtol=0, atol=1e-12)
    assert len(trainer.blocks.projected) == 13


def lora(name: str, dtype: torch.dtype = torch.float32) -> Any:
    peft = pytest.importorskip("peft")
    targets = {"llama": ["q_proj", "v_proj"], "vit": ["q_proj", "v_proj"], "bert": ["query", "value"]}[name]
    torch.manual_seed(1)
    model = peft.get_peft_model(make_model(name).to(dtype), peft.LoraConfig(r=4, target_modules=targets))
    with torch.no_grad():  # B starts at 0, where A has no gradient
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(std=0.1)
    return model


AS_PLAIN: dict[str, dict[str, Any]] = {
    "vit": {},
    "llama": {},
    "bert_mlm": {},
    "lora": {},
    "accumulation, vit": {"gradient_accumulation_steps": 2},
    "accumulation, llama": {"gradient_accumulation_steps": 2},
    "dropout, bert": {"dropout": 0.1},
    "label smoothing, vit": {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2},
    "checkpointing, llama": {"activation_checkpointing": True},
    "clipping, vit": {"max_grad_norm": 0.1, "weight_decay": 0.1},
    "adamw, vit": {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1},
}
AS_TRAINER = {"upper_variable": "fixed", "rank": "full"}


@pytest.mark.parametrize("case", AS_PLAIN)
def test_weights_of_one_in_full_space_are_the_plain_trainer(case: str, tmp_path: Path) -> None:
    """In float64, with weights in float32: to 1e-7. Without weights it is so to the bit, see the contract."""
    name, kwargs = case.split(", ")[-1], {"optim": "sgd", "learning_rate": LEARNING_RATE, **AS_PLAIN[case]}
    dropout = kwargs.pop("dropout", 0.0)
    runs, losses, norms = [], [], []
    for trainer_class in (Trainer, BrosTrainer):
        model = lora("llama", torch.float64) if case == "lora" else make_model(name, dropout).double()
        own = {"sample_weights": torch.ones(20), "bilevel_config": BrosConfig(**AS_TRAINER)}
        trainer = make_trainer(
            trainer_class,
            "llama" if case == "lora" else name,
            tmp_path,
            model=model,
            num_pool=20,
            max_steps=4,
            trainer_kwargs=own if trainer_class is BrosTrainer else {},
            **kwargs,
        )
        set_seed(11)
        start = parameters_of(trainer)
        trainer.train()
        runs.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        norms.append([float(entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
        assert (parameters_of(trainer) - start).abs().max() > 1e-3
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=1e-7)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) != []
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)


def test_accumulation_is_a_larger_batch_where_the_trainer_s_is_not(tmp_path: Path) -> None:
    """BERT takes the number of items and ignores it, so the Trainer's gradient is the sum of its micro-batches' means."""
    kwargs = {"model": make_model("bert").double(), "optim": "sgd", "learning_rate": LEARNING_RATE, "num_pool": 32}
    plain = make_trainer(Trainer, "bert", tmp_path, per_device_train_batch_size=16, max_steps=2, **kwargs)
    set_seed(11)
    plain.train()
    kwargs["model"] = make_model("bert").double()
    own = {"sample_weights": torch.ones(32)}
    split = train(
        "bert", tmp_path, AS_TRAINER, gradient_accumulation_steps=2, max_steps=2, trainer_kwargs=own, **kwargs
    )
    torch.testing.assert_close(parameters_of(split), parameters_of(plain), rtol=0, atol=1e-7)


def test_own_losses_are_weighted_and_averaged(tmp_path: Path) -> None:
    def compute_sample_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.multi_margin_loss(model(pixel_values=batch["pixel_values"]).logits, batch["labels"], reduction="none")

    class OwnTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return compute_sample_losses(model, inputs).mean() / self.current_gradient_accumulation_steps

    class OwnBrosTrainer(BrosMixin, OwnTrainer):
        pass

    kwargs = {"num_pool": 20, "gradient_accumulation_steps": 2, "max_steps": 3, "optim": "sgd"}
    plain = make_trainer(OwnTrainer, "vit", tmp_path, model=make_model("vit").double(), **kwargs)
    set_seed(11)
    plain.train()
    extra = {"compute_sample_losses": compute_sample_losses, "sample_weights": torch.ones(20)}
    bros = train("vit", tmp_path, {"upper_variable": "fixed", "rank": "full"}, trainer_class=OwnBrosTrainer,
                 trainer_kwargs=extra, model=make_model("vit").double(), **kwargs)  # fmt: skip
    torch.testing.assert_close(parameters_of(bros), parameters_of(plain), rtol=0, atol=1e-7)
    learned = train("vit", tmp_path, trainer_kwargs={"compute_sample_losses": compute_sample_losses})
    assert (learned.sample_weights.weights != 0.5).any()


# The optimizer --------------------------------------------------------------------------------------------------------


def test_weight_decay_is_that_of_adamw_on_the_weights(tmp_path: Path) -> None:
    """One step with and one without: the difference is learning rate times rate times W, biases and norms excepted."""
    settings = {"upper_variable": "fixed", "rank": 0.5}
    runs = [
        dict(
            train(
                "vit", tmp_path, settings, model=make_model("vit").double(), max_steps=1, weight_decay=decay
            ).model.named_parameters()
        )
        for decay in (0.0, 0.3)
    ]
    for name, start in make_model("vit").double().named_parameters():
        expected = -1e-2 * 0.3 * start if start.ndim > 1 else torch.zeros_like(start)
        torch.testing.assert_close(runs[1][name] - runs[0][name], expected, rtol=0, atol=1e-12)


class WatchesState(BrosTrainer):
    def _select(self, batches: Any, origins: Any, num_items: Any) -> Any:
        def state() -> list[dict[str, Tensor]]:
            return [{k: v.clone() for k, v in self.optimizer.state[leaf].items()} for leaf in self.blocks.leaves]

        before, old = state(), list(self.blocks.bases)
        result = super()._select(batches, origins, num_items)
        self.__dict__.setdefault("seen", []).append((before, state(), old, list(self.blocks.bases)))
        return result


def test_adamw_state_is_carried_over_at_a_refresh(tmp_path: Path) -> None:
    trainer = train("vit", tmp_path, {"rank": 0.5, "refresh_steps": 2}, trainer_class=WatchesState, max_steps=4)
    projected = trainer.blocks.projected
    assert len(trainer.seen) == 4 and projected
    for step, (before, after, old, new) in enumerate(trainer.seen):
        for i, (a, b) in enumerate(zip(before, after, strict=True)):
            if step == 0:
                assert not a and not b
            elif step == 2 and i in projected:
                assert not torch.equal(old[i], new[i])
                assert a["exp_avg"].any() and not b["exp_avg"].any() and a["step"] == b["step"]
                rows = a["exp_avg_sq"].mean(1, keepdim=True).expand_as(a["exp_avg_sq"])
                assert rows.any() and torch.equal(b["exp_avg_sq"], rows)
            else:
                assert old[i] is new[i]
                assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_the_optimizer_holds(tmp_path: Path) -> None:
    """Coordinates and full-space parameters once each, and of a projected weight nothing."""
    trainer = train("vit", tmp_path, {"rank": 2}, max_steps=1, weight_decay=0.1)
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(leaf) for leaf in trainer.blocks.leaves} and len(held) == len(
        trainer.blocks.leaves
    )
    assert all(p.requires_grad for p in trainer.model.parameters())
    sizes = sum(p.numel() for p in held)
    assert sizes < sum(p.numel() for p in trainer.model.parameters()) / 2
    by_decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, leaf in zip(trainer.blocks.names, trainer.blocks.leaves, strict=True):
        assert by_decay[id(leaf)] == (0.0 if name.endswith("bias") or "layernorm" in name else 0.1), name


def test_frozen_rest_is_not_in_the_optimizer(tmp_path: Path) -> None:
    trainer = train("llama", tmp_path, {"rank": 4, "rest": "frozen"})
    start = dict(make_model("llama").named_parameters())
    for name, parameter in trainer.model.named_parameters():
        moved = name in trainer.blocks.names
        assert moved == name.endswith("_proj.weight")
        assert torch.equal(parameter, start[name]) != moved and parameter.requires_grad


def test_refresh_steps(tmp_path: Path) -> None:
    """A basis lasts for so many steps, and "auto" is what covers the narrowest layer ten times."""
    trainer = train("vit", tmp_path, {"rank": 4, "refresh_steps": 3}, trainer_class=RecordingTrainer, max_steps=7)
    first = trainer.blocks.projected[0]
    bases = [bases[first] for *_, bases in trainer.steps]
    assert [torch.equal(a, b) for a, b in zip(bases, bases[1:], strict=False)] == [
        True,
        True,
        False,
        True,
        True,
        False,
    ]
    automatic = build("vit", tmp_path, {"rank": 8}, max_steps=400)
    automatic._begin_training()
    automatic.state.max_steps = 400
    assert automatic.refresh_steps == 400 * 8 // 32 // 10  # 32 inputs in the second half of the MLPs
    assert automatic.bilevel_facts()["refresh_steps"] == 10 and automatic.bilevel_facts()["num_projected_layers"] == 13


# Cost -----------------------------------------------------------------------------------------------------------------


class CountForwards(TrainerCallback):
    """Forward passes of each optimizer step, with and without gradients."""

    def __init__(self) -> None:
        self.counts: list[list[int]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        def count(module: nn.Module, inputs: Any) -> None:
            self.counts[-1][not torch.is_grad_enabled()] += 1

        model.register_forward_pre_hook(count)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.counts.append([0, 0])


ONE, THREE = [1, 0], [3, 0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [THREE] * 3),
        ({"rank": "full"}, [THREE] * 3),
        ({"update_every": 3}, [THREE, ONE, ONE, THREE, ONE, ONE]),
        ({"update_every": 2, "start_step": 1}, [ONE, THREE, ONE, THREE, ONE, THREE]),
        ({"start_step": 4}, [ONE, ONE, ONE, ONE, THREE, THREE]),
        ({"rank": 0.5, "estimator": "bi_probe"}, [[5, 2]] * 3),
        ({"rank": 0.5, "estimator": "two_sided"}, [[3, 2]] * 3),
        ({"hessian_action": "double_backward"}, [[2, 0]] * 3),
        ({"upper_variable": "fixed"}, [ONE] * 3),
        ({"upper_variable": "network"}, [THREE] * 3),
    ],
)
def test_number_of_forward_passes(settings: dict, expected: list[list[int]], tmp_path: Path) -> None:
    counter = CountForwards()
    train("vit", tmp_path, settings, gradient_accumulation_steps=2, max_steps=len(expected), num_pool=32,
          per_device_train_batch_size=2, trainer_kwargs={"callbacks": [counter]})  # fmt: skip
    assert counter.counts == [[2 * n for n in step] for step in expected]


# What a run leaves ----------------------------------------------------------------------------------------------------


def trained_table(folder: Path, trainer_kwargs: dict[str, Any] | None = None, **settings: Any) -> BrosTrainer:
    settings = {"rank": 0.5, "domain_column": "source", **settings}
    trainer = train("vit", folder, settings, num_pool=8, max_steps=1, trainer_kwargs=trainer_kwargs)
    with torch.no_grad():
        trainer.upper.values.copy_(torch.arange(len(trainer.upper.values)).sub(3).float().mul(0.5))
    return trainer


def test_sample_weights_by_hand(tmp_path: Path) -> None:
    trainer = trained_table(tmp_path)
    with torch.no_grad():
        trainer.upper.values[1] = 5.0
    ids, weights = trainer.sample_weights
    expected = [1 / (1 + math.exp(-x)) for x in (-1.5, 5.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)]
    assert ids.tolist() == list(range(8)) and weights.tolist() == pytest.approx(expected)
    assert isinstance(trainer.sample_weights, SampleWeights)
    weights.zero_()  # the user's own
    assert trainer.sample_weights.weights.all()
    assert trainer.suspicious_samples().tolist() == [0, 2, 3, 4, 5, 6, 7, 1]
    assert trainer.suspicious_samples(2).tolist() == [0, 2]
    assert trainer.suspicious_samples(0).tolist() == []
    subset = trainer.selected_subset(fraction=0.3)  # 2.4 of 8: 3
    assert subset.ids.tolist() == [1, 7, 6] and subset.num_pool == 8
    assert subset.weights.tolist() == pytest.approx([expected[1], expected[7], expected[6]])
    assert subset.facts["method"] == "bros" and subset.facts["num_pool"] == 8
    assert subset.to_dataset(trainer.train_dataset)["labels"][:] == [1, 3, 2]
    assert trainer.selected_subset(min_weight=0.6).ids.tolist() == [1, 7, 6, 5, 4]
    assert len(trainer.selected_subset(fraction=1.0)) == 8 and len(trainer.selected_subset(min_weight=1.0)) == 0


def test_a_subset_says_where_it_came_from(tmp_path: Path) -> None:
    evaluated = {"eval_dataset": make_dataset("vit", 8, seed=5)}
    trainer = trained_table(tmp_path, trainer_kwargs=evaluated)
    trainer.evaluate()
    subset, weights = trainer.selected_subset(fraction=0.5), trainer.sample_weights.weights
    assert subset.domain_names == ["books", "code", "web"]
    assert subset.domain_ids.tolist() == [[2, 0, 1][i % 3] for i in subset.ids.tolist()]
    facts = subset.facts
    assert facts["domains"]["pool"] == [3, 2, 3]  # of web, books, code, web, ...
    assert facts["domains"]["subset"] == [subset.domain_ids.tolist().count(j) for j in range(3)]
    assert facts["ranking"]["ranked_by"] == "sample weight"
    assert (sum(facts["ranking"]["kept"]), sum(facts["ranking"]["dropped"])) == (4, 4)
    assert facts["ranking"]["edges"][-1] == pytest.approx(float(weights.max()))
    assert facts["ranking"]["kept"][-1] >= 1 and facts["ranking"]["dropped"][0] >= 1
    assert facts["selection"] == {"fraction": 0.5} and facts["model"] == "ViTForImageClassification"
    assert trainer.selected_subset(min_weight=0.1).facts["selection"] == {"min_weight": 0.1}
    assert set(facts["metrics"]) == {"eval_loss"} and facts["metrics"]["eval_loss"] > 0
    assert (facts["seed"], facts["global_step"], facts["config"]["rank"]) == (3, 1, 0.5)
    assert subset.fingerprint == trainer.train_dataset._fingerprint
    subset.save(tmp_path / "subset")
    assert torch.equal(SelectedSubset.load(tmp_path / "subset").weights, subset.weights)
    trainer.model.config._name_or_path = str(tmp_path / "my model")  # folders of this machine are nobody's business
    assert trainer.selected_subset(fraction=0.5).facts["model"] == "my model"
    snapshot = "/cache/models--me--large/snapshots/4e20de36"
    for given, name in (
        ("../ours/model", "model"),
        ("~/ours/model", "model"),
        ("a/b/model", "model"),
        (snapshot, "me/large"),
    ):
        trainer.model.config._name_or_path = given
        assert trainer.selected_subset(fraction=0.5).facts["model"] == name
    trainer.model.config._name_or_path = "me/model"
    assert trainer.selected_subset(fraction=0.5).facts["model"] == "me/model"


def test_softmax_weights_have_mean_one(tmp_path: Path) -> None:
    weights = trained_table(tmp_path, weight_function="softmax").sample_weights.weights
    expected = torch.tensor([math.exp(0.5 * (i - 3)) for i in range(8)])
    torch.testing.assert_close(weights, 8 * expected / expected.sum())


def test_selected_subset_rejects(tmp_path: Path) -> None:
    trainer = trained_table(tmp_path)
    for kwargs in ({}, {"fraction": 0.5, "min_weight": 0.5}):
        with pytest.raises(ValueError, match="Give one of `fraction` and `min_weight`"):
            trainer.selected_subset(**kwargs)
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"`fraction` must be in \(0, 1\], got {fraction}"):
            trainer.selected_subset(fraction=fraction)


def test_plot_of_sample_weights(tmp_path: Path) -> None:
    trainer = trained_table(tmp_path)
    figure = trainer.plot_sample_weights()
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 8
    wrong = torch.tensor([True, False] * 4)
    figure = trainer.plot_sample_weights(wrong)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["intact", "corrupted"]


def test_there_is_nothing_before_training(tmp_path: Path) -> None:
    trainer = build("vit", tmp_path)
    for attribute in ("sample_weights", "suspicious_samples", "selected_subset", "plot_sample_weights"):
        with pytest.raises(RuntimeError, match="There are no sample weights before training, and for a stream"):
            value = getattr(trainer, attribute)
            value(**({"fraction": 0.5} if attribute == "selected_subset" else {}))
    with pytest.raises(RuntimeError, match="Domain weights need `upper_variable='domain'` and a training"):
        _ = trainer.domain_weights
    trainer = build("vit", tmp_path, {"upper_variable": "domain", "domain_column": "source"})
    with pytest.raises(RuntimeError, match="Domain weights need"):
        _ = trainer.domain_weights


def test_fixed_without_weights_has_weights_of_one(tmp_path: Path) -> None:
    trainer = train("vit", tmp_path, {"upper_variable": "fixed", "rank": 0.5}, num_pool=16, max_steps=1)
    assert torch.equal(trainer.sample_weights.weights, torch.ones(16))


@pytest.mark.parametrize("bias, value", [(9.0, "1"), (-9.0, "0.00011"), (0.0, None)])
def test_a_network_that_has_run_away_is_said(bias: float, value: str | None, tmp_path: Path) -> None:
    class BiasedTrainer(BrosTrainer):
        def _make_weights(self) -> None:
            super()._make_weights()
            self.upper.layers[2].bias.data += bias

    settings = {"upper_variable": "network", "upper_learning_rate": 1e-6}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train("vit", tmp_path, settings, trainer_class=BiasedTrainer, max_steps=6, logging_steps=2)
    said = [str(warning.message) for warning in caught if "gives nearly all samples" in str(warning.message)]
    assert len(said) == (value is not None), said
    assert value is None or f"By step 2 the network gives nearly all samples the weight {value}, " in said[0]


def test_unseen_samples_have_no_weight_from_a_network(tmp_path: Path) -> None:
    trainer = train("vit", tmp_path, {"upper_variable": "network"}, trainer_class=RecordingTrainer, max_steps=2)
    seen = sorted(i for _, origins, _ in trainer.steps for o in origins for i in o.sample_ids.tolist())
    assert trainer.sample_weights.ids.tolist() == seen and len(seen) == 16
    assert len(trainer.selected_subset(min_weight=0.0)) == 16
    assert len(trainer.selected_subset(fraction=0.25)) == 16
    with pytest.raises(ValueError, match="`fraction=0.26` of 64 rows is 17, and .* only 16 .* at most 0.25, or train"):
        trainer.selected_subset(fraction=0.26)


def test_a_second_pass_takes_the_weights_of_the_first(tmp_path: Path) -> None:
    first = train("vit", tmp_path, {"rank": 0.5}, max_steps=3)
    fixed = {"upper_variable": "fixed", "rank": "full"}
    for given in (first.sample_weights, first.sample_weights.weights):
        kwargs = {"sample_weights": given, "target_dataset": None}
        second = train("vit", tmp_path, fixed, max_steps=2, trainer_kwargs=kwargs)
        assert torch.equal(second.sample_weights.weights, first.sample_weights.weights)
        assert not torch.equal(parameters_of(second), parameters_of(first))
    some = SampleWeights(torch.tensor([3, 5]), torch.tensor([0.0, 2.0]))
    second = train("vit", tmp_path, fixed, max_steps=1, trainer_kwargs={"sample_weights": some})
    expected = torch.ones(64).index_put((torch.tensor([3, 5]),), torch.tensor([0.0, 2.0]))
    assert torch.equal(second.sample_weights.weights, expected)


# Logs -----------------------------------------------------------------------------------------------------------------


def test_logs(tmp_path: Path) -> None:
    settings = {"upper_variable": "domain", "domain_column": "source"}
    trainer = train("vit", tmp_path, settings, gradient_accumulation_steps=2)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = {
        "hypergradient_norm",
        "auxiliary_norm",
        "auxiliary_learning_rate",
        "target_loss",
        "weight_mean",
        "weight_std",
    }
    assert len(logged) == 3
    for entry in logged:
        own = {key.removeprefix("bros/") for key in entry if key.startswith("bros/")}
        assert own == names | {"weight/books", "weight/code", "weight/web"}
        assert all(math.isfinite(entry[f"bros/{name}"]) for name in names)
        assert 0 < entry["bros/weight_mean"] < 1 and 0.5 < entry["bros/target_loss"] < 3


# PEFT and saved models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_adapters_are_trained_in_full_space(name: str, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    model = lora(name)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    whole = train(name, tmp_path / "whole", model=model, **settings)
    assert whole.rank == "full" and not whole.blocks.projected
    assert all("lora_" in key for key in whole.blocks.names) and whole.blocks.names
    for key, parameter in whole.model.named_parameters():
        assert parameter.requires_grad == ("lora_" in key)
        assert torch.equal(parameter, before[key]) != ("lora_" in key), key
    for checkpoint in (tmp_path / "whole").glob("checkpoint-*"):
        assert (checkpoint / "adapter_model.safetensors").exists()
        assert not (checkpoint / "model.safetensors").exists()
        state = torch.load(checkpoint / "bilevel_state.pt", weights_only=True)["shared"]
        num_adapter = sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
        assert sum(z.numel() for z in state["auxiliary"]["blocks"]) == num_adapter
    loaded = type(whole.model).from_pretrained(make_model(name), tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(torch.cat([p.detach().flatten() for p in loaded.parameters()]), parameters_of(whole))
    resumed = train(name, tmp_path / "resumed", model=lora(name), **settings,
                    resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))  # fmt: skip
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    assert torch.equal(resumed.sample_weights.weights, whole.sample_weights.weights)


def tied_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, tie_word_embeddings=True, **size)
    return LlamaForCausalLM(config)


def test_tied_embeddings_are_saved_as_they_came(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train("llama", tmp_path / "whole", {"rank": 4}, model=tied_llama(), **settings)
    assert whole.model.lm_head.weight is whole.model.model.embed_tokens.weight
    assert not torch.equal(whole.model.lm_head.weight, tied_llama().lm_head.weight)
    for folder in (tmp_path / "whole" / "checkpoint-4",):
        model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), parameters_of(whole))
    resumed = train("llama", tmp_path / "resumed", {"rank": 4}, model=tied_llama(), **settings,
                    resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))  # fmt: skip
    assert torch.equal(parameters_of(resumed), parameters_of(whole))


# The auxiliary variable -----------------------------------------------------------------------------------------------


def test_where_and_how_the_auxiliary_is_kept(tmp_path: Path) -> None:
    runs = {
        key: train("vit", tmp_path, {"rank": 0.5, **settings}, model=make_model("vit"))
        for key, settings in {
            "plain": {},
            "cpu": {"auxiliary_device": "cpu"},
            "bfloat16": {"auxiliary_dtype": "bfloat16"},
        }.items()
    }
    assert torch.equal(parameters_of(runs["plain"]), parameters_of(runs["cpu"]))

    def joined(trainer: BrosTrainer) -> Tensor:
        return torch.cat([z.flatten().float() for z in trainer.auxiliary.blocks])

    assert {z.dtype for z in runs["plain"].auxiliary.blocks} == {torch.float32}
    assert {z.dtype for z in runs["bfloat16"].auxiliary.blocks} == {torch.bfloat16}
    wide, narrow = joined(runs["plain"]), joined(runs["bfloat16"])
    assert 0 < float((narrow - wide).norm() / wide.norm()) < 0.02


# Learning -------------------------------------------------------------------------------------------------------------


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 32), nn.ReLU())
        self.classifier = nn.Linear(32, 4)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.classifier(self.body(pixels))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def cross_entropies(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(**batch)["logits"], batch["labels"], reduction="none")


def digits(noise: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Tensor]:
    """A pool of handwritten 0 to 3, some of them with another label, a clean target, and which are wrong."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(n_class=4, return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)[:240].tolist()
    wrong = torch.rand(240, generator=generator) < noise
    shifts = torch.where(wrong, torch.randint(1, 4, (240,), generator=generator), 0).tolist()
    pixels = torch.tensor(images / 8 - 1, dtype=torch.float32)
    rows = [
        {"pixels": pixels[i], "labels": int(labels[i] + shift) % 4} for i, shift in zip(order, shifts, strict=True)
    ]
    clean = [{"pixels": pixels[i], "labels": int(labels[i])} for i in order[200:]]
    return rows[:200], clean, wrong[:200]


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0.25},
        pytest.param({"rank": "full"}, marks=pytest.mark.slow),
        pytest.param(
            {"weight_function": "projected", "rank": 0.25, "upper_learning_rate": 0.1}, marks=pytest.mark.slow
        ),
    ],
)
def test_wrong_labels_get_smaller_weights(settings: dict, tmp_path: Path) -> None:
    rows, clean, wrong = digits(0.4)
    trainer = train(
        "vit",
        tmp_path,
        settings,
        model=Perceptron(),
        train_dataset=rows,
        trainer_kwargs={"target_dataset": clean, "compute_sample_losses": cross_entropies},
        per_device_train_batch_size=40,
        max_steps=100,
        learning_rate=3e-3,
        logging_steps=100,
    )
    ids, weights = trainer.sample_weights
    wrong = wrong[ids]
    pairs = weights[wrong][:, None] < weights[~wrong][None]
    assert float(pairs.float().mean()) > 0.8  # the area under the ROC curve
    assert weights[wrong].mean() < weights[~wrong].mean() - 0.1


# What a user writes around it -------------------------------------------------------------------------------------------


class OwnOptimizer(Trainer):
    def create_optimizer(self) -> torch.optim.Optimizer:  # without the argument, as users of the Trainer write it
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


def test_an_optimizer_of_the_users_own_behind_the_mixin(tmp_path: Path) -> None:
    class Mine(BrosMixin, OwnOptimizer):
        pass

    trainer = train("llama", tmp_path, {"rank": 0.5}, trainer_class=Mine)
    usual = train("llama", tmp_path, {"rank": 0.5}, optim="sgd")
    assert torch.equal(parameters_of(trainer), parameters_of(usual))


def test_an_optimizer_without_the_subspaces_is_refused(tmp_path: Path) -> None:
    class Mine(OwnOptimizer, BrosTrainer):
        pass

    with pytest.raises(ValueError, match="projected layers would never be trained: `Mine` makes it without"):
        train("llama", tmp_path, {"rank": 0.5}, trainer_class=Mine)
    assert train("llama", tmp_path, {"rank": "full"}, trainer_class=Mine).state.global_step == 6


class OwnStep(Trainer):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.num_steps = getattr(self, "num_steps", 0) + 1
        return super().training_step(*args, **kwargs)


def test_a_training_step_behind_the_mixin_would_not_be_called(tmp_path: Path) -> None:
    class Behind(BrosMixin, OwnStep):
        pass

    class InFront(OwnStep, BrosTrainer):
        pass

    with pytest.raises(ValueError, match="`OwnStep.training_step` would not be called"):
        build("vit", tmp_path, trainer_class=Behind)
    assert train("vit", tmp_path, trainer_class=InFront).num_steps == 6
    assert train("vit", tmp_path, {"upper_variable": "fixed", "rank": "full"}, trainer_class=Behind).num_steps == 6


# State ----------------------------------------------------------------------------------------------------------------


def saved_run(folder: Path, settings: dict[str, Any], resume: Path | None = None, **kwargs: Any) -> BrosTrainer:
    return train(
        "vit",
        folder,
        {"rank": 0.5, **({} if settings.get("rank") == "full" else {"refresh_steps": 3}), **settings},
        save_strategy="steps",
        save_steps=2,
        dropout=0.1,
        resume_from_checkpoint=None if resume is None else str(resume),
        **kwargs,
    )


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({}, {"upper_variable": "network"}, "upper_variable='table', this one has upper_variable='network'"),
        ({"upper_variable": "fixed"}, {}, "upper_variable='fixed', this one has upper_variable='table'"),
        ({}, {"rank": "full"}, "rank=0.5, this one has rank='full'"),
        ({}, {"upper_variable": "fixed", "rank": "full"}, "upper_variable='table', rank=0.5, this one has"),
    ],
)
def test_settings_that_a_state_does_not_fit(
    before: dict[str, Any], now: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved_run(tmp_path / "whole", before, max_steps=2)
    with pytest.raises(ValueError, match=f"{message}.*Resume with the same settings, or start a new run"):
        saved_run(tmp_path / "resumed", now, resume=tmp_path / "whole" / "checkpoint-2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"upper_variable": "network"},
        {"upper_variable": "domain", "domain_column": "source", "weight_function": "softmax"},
        {"auxiliary_dtype": "bfloat16", "estimator": "two_sided"},
        {"update_every": 3, "start_step": 1, "hessian_action": "double_backward"},
        {"upper_variable": "fixed"},
    ],
)
def test_resuming_is_not_visible(settings: dict, tmp_path: Path) -> None:
    whole = saved_run(tmp_path / "whole", settings)
    resumed = saved_run(tmp_path / "resumed", settings, resume=tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    for a, b in zip(resumed.sample_weights, whole.sample_weights, strict=True):
        assert torch.equal(a, b)
    own = [
        [{k: v for k, v in entry.items() if k.startswith("bros/")} for entry in trainer.state.log_history]
        for trainer in (whole, resumed)
    ]
    assert own[0] == own[1] and any(own[0]) == (settings.get("upper_variable") != "fixed")


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[BrosTrainer, Path]]:
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("table", "network")}
    return {
        kind: (saved_run(folder, {"upper_variable": kind}, logging_steps=6), folder / "checkpoint-2")
        for kind, folder in folders.items()
    }


@pytest.mark.parametrize(
    "part", ["auxiliary", "curvature", "upper", "average", "square", "target_position", "sums", "table"]
)
def test_every_part_of_the_state_matters(part: str, whole_runs: dict, tmp_path: Path) -> None:
    """If a part were not saved, or not used, the test of resuming would not notice its loss."""
    settings = {"upper_variable": "network" if part == "table" else "table"}
    whole, original = whole_runs[settings["upper_variable"]]
    checkpoint = Path(shutil.copytree(original, tmp_path / "checkpoint-2"))
    state = torch.load(checkpoint / "bilevel_state.pt", weights_only=True)
    shared, (rank,) = state["shared"], state["ranks"]
    if part == "auxiliary":
        shared["auxiliary"]["blocks"][0].add_(1)
    elif part == "curvature":
        shared["auxiliary"]["curvature"].mul_(3)
    elif part == "upper":
        shared["upper"]["values"].copy_(torch.randn(64, generator=torch.Generator().manual_seed(0)))
    elif part == "average":
        shared["upper_step"]["average"][0].mul_(-5)
    elif part == "square":
        shared["upper_step"]["square"].mul_(9)
    elif part == "table":
        assert shared["table"].isfinite().sum() == 16
        shared["table"].fill_(torch.nan)
    elif part == "sums":
        rank["sums"].mul_(2)
    else:
        rank["target_position"] += 1
    torch.save(state, checkpoint / "bilevel_state.pt")
    resumed = saved_run(tmp_path / "other", settings, resume=checkpoint, logging_steps=6)
    if part == "sums":
        norms = [t.state.log_history[0]["bros/target_loss"] for t in (whole, resumed)]
        assert norms[0] != norms[1]
    elif part == "table":
        assert len(resumed.sample_weights.ids) == len(whole.sample_weights.ids) - 16
    else:
        assert not torch.equal(resumed.sample_weights.weights, whole.sample_weights.weights)


def test_a_second_training_starts_over(tmp_path: Path) -> None:
    """SGD has no state, so from the same weights the same run follows."""
    trainer = build("vit", tmp_path, {"rank": 0.5, "refresh_steps": 2}, optim="sgd", weight_decay=0.1)
    start = copy.deepcopy(trainer.model.state_dict())
    runs = []
    for _ in range(2):
        trainer.model.load_state_dict(start)
        set_seed(11)
        trainer.train()
        runs.append((parameters_of(trainer), trainer.sample_weights.weights, trainer.auxiliary.norm()))
    assert not torch.equal(runs[0][0], torch.cat([p.flatten() for p in start.values()]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_new_model_for_each_training(tmp_path: Path) -> None:
    trainer = BrosTrainer(
        model_init=lambda: make_model("vit"),
        args=arguments(tmp_path),
        train_dataset=make_dataset("vit", 64),
        target_dataset=make_dataset("vit", 10, seed=7),
        bilevel_config=BrosConfig(rank=0.5, refresh_steps=2),
    )
    runs, models = [], []
    for _ in range(2):
        trainer.train()
        assert trainer.blocks.model is trainer.model
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        assert held == {id(leaf) for leaf in trainer.blocks.leaves}
        runs.append(parameters_of(trainer))
        models.append(trainer.model)
    assert models[0] is not models[1] and torch.equal(*runs)
    assert not torch.equal(runs[0], torch.cat([p.detach().flatten() for p in make_model("vit").parameters()]))


def test_a_pool_replaced_after_construction(tmp_path: Path) -> None:
    trainer = build("vit", tmp_path, num_pool=16)
    trainer.train_dataset = make_dataset("vit", 90)
    trainer.train()
    assert len(trainer.sample_weights.ids) == 90


def test_evaluation_alone_needs_no_target(tmp_path: Path) -> None:
    trainer = BrosTrainer(model=make_model("vit"), args=arguments(tmp_path))
    assert trainer.evaluate(make_dataset("vit", 8))["eval_loss"] > 0


def test_global_generators_end_where_those_of_a_plain_run_do(tmp_path: Path) -> None:
    """The target's dropout and the pair's second evaluation draw nothing of the global generators."""
    states = []
    for trainer in (
        make_trainer(Trainer, "vit", tmp_path, dropout=0.1),
        build("vit", tmp_path, {"rank": 0.5}, dropout=0.1),
        build("vit", tmp_path, {"rank": "full", "hessian_action": "double_backward"}, dropout=0.1),
    ):
        set_seed(11)
        trainer.train()
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


# Non-finite losses ----------------------------------------------------------------------------------------------------


def test_a_hypergradient_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    rows = make_rows("vit", 64)
    rows[5]["pixel_values"] = (torch.tensor(rows[5]["pixel_values"]) * float("nan")).tolist()
    message = (
        r"A hypergradient was NaN or infinite before step \d+; it was left out, and the sample weights are as they were. "
        r"Norm of the auxiliary variable: .*; largest curvature seen: .*; learning rate of the model: .*raise `damping` "
        r"\(now 0.3\).*lower `learning_rate` or look for broken samples"
    )
    with pytest.raises(FloatingPointError, match=message):
        train("vit", tmp_path, {"rank": 0.5}, train_dataset=rows, max_steps=8)


def test_a_broken_run_is_not_saved_over_a_good_one(tmp_path: Path) -> None:
    rows = make_rows("vit", 64)
    rows[5]["pixel_values"] = (torch.tensor(rows[5]["pixel_values"]) * float("nan")).tolist()
    with pytest.raises(FloatingPointError, match="A hypergradient was NaN or infinite"):
        train("vit", tmp_path, train_dataset=rows, max_steps=8, save_strategy="steps", save_steps=1, logging_steps=100)


# Bad input ------------------------------------------------------------------------------------------------------------


def refused(name: str, folder: Path, message: str, settings: dict[str, Any] | None = None, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, folder, settings, **kwargs)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank": 0}, ValueError, r"`rank` must be a whole number, a fraction in \(0, 1\), or 'full'; got 0"),
        ({"rank": -2}, ValueError, "`rank` must be a whole number.*got -2"),
        ({"rank": 1.5}, ValueError, "got 1.5"),
        ({"rank": float("nan")}, ValueError, "got nan"),
        ({"rank": float("inf")}, ValueError, "got inf"),
        ({"rank": "half"}, TypeError, "`rank` must be float or 'full', got 'half'"),
        ({"rank": True}, TypeError, "`rank` must be float or 'full', got True of type bool"),
        (
            {"rank": 1, "estimator": "bi_probe"},
            ValueError,
            "`estimator='bi_probe'` needs a `rank` of at least 2, got 1. Raise it, or use `estimator='one_sided'`",
        ),
        ({"refresh_steps": 0}, ValueError, "`refresh_steps` must be at least 1, got 0"),
        ({"refresh_steps": "often"}, TypeError, "`refresh_steps` must be int or 'auto', got 'often'"),
        ({"update_every": 0}, ValueError, "`update_every` must be at least 1, got 0"),
        ({"start_step": -1}, ValueError, "`start_step` must not be negative, got -1"),
        ({"upper_learning_rate": 0.0}, ValueError, "`upper_learning_rate` must be positive and finite, got 0.0"),
        ({"upper_learning_rate": float("inf")}, ValueError, "`upper_learning_rate` must be positive and finite"),
        ({"auxiliary_learning_rate": -1.0}, ValueError, "`auxiliary_learning_rate` must be positive.*got -1.0"),
        (
            {"auxiliary_learning_rate": "fast"},
            TypeError,
            "`auxiliary_learning_rate` must be float or 'auto', got 'fast'",
        ),
        ({"moving_average": 0.0}, ValueError, r"`moving_average` must be in \(0, 1\], got 0.0"),
        ({"moving_average": 1.1}, ValueError, r"`moving_average` must be in \(0, 1\], got 1.1"),
        ({"damping": -0.1}, ValueError, "`damping` must be finite and not negative, got -0.1"),
        ({"damping": float("nan")}, ValueError, "`damping` must be finite and not negative, got nan"),
        (
            {"upper_variable": "domain"},
            ValueError,
            "`upper_variable='domain'` needs `domain_column`, the column that names the domains",
        ),
        ({"upper_variable": "sample"}, ValueError, "must be one of domain, fixed, network, table; got 'sample'"),
        (
            {"weight_function": "relu"},
            ValueError,
            "`weight_function` must be one of projected, sigmoid, softmax; got 'relu'",
        ),
        ({"rest": "half"}, ValueError, "`rest` must be one of frozen, full; got 'half'"),
        ({"estimator": "naive"}, ValueError, "`estimator` must be one of bi_probe, one_sided, two_sided"),
        ({"hessian_action": "exact"}, ValueError, "must be one of double_backward, finite_differences; got 'exact'"),
        ({"auxiliary_dtype": "float16"}, ValueError, "`auxiliary_dtype` must be one of bfloat16, float32"),
        ({"auxiliary_device": "cuda"}, ValueError, "`auxiliary_device` must be one of auto, cpu; got 'cuda'"),
        ({"modules": "q_proj"}, TypeError, "`modules` must be"),
        ({"normalise_weights": 1}, TypeError, "`normalise_weights` must be bool, got 1 of type int"),
        ({"target_batch_size": 0}, ValueError, "`target_batch_size` must be at least 1"),
    ],
)
def test_config_is_checked_on_construction(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BrosConfig(**settings)


def test_config_from_command_line_and_json(tmp_path: Path) -> None:
    parser = HfArgumentParser(BrosConfig)
    command = "--rank 48 --refresh_steps 20 --auxiliary_learning_rate 0.1 --modules q_proj v_proj --damping 0.5"
    (config,) = parser.parse_args_into_dataclasses(command.split())
    assert (config.rank, config.refresh_steps, config.auxiliary_learning_rate) == (48, 20, 0.1)
    assert type(config.rank) is int and config.modules == ["q_proj", "v_proj"] and config.damping == 0.5
    (config,) = parser.parse_args_into_dataclasses(["--rank", "full", "--normalise_weights", "false"])
    assert config.rank == "full" and not config.normalise_weights
    (config,) = parser.parse_args_into_dataclasses([])
    assert config == BrosConfig() and config.rank == 0.125
    for settings in ({"rank": 48}, {"rank": 0.25}, {"rank": "full", "modules": None}):
        trainer = build("vit", tmp_path, {**settings, "rank": 8} if settings["rank"] == 48 else settings)
        trainer.save_model(tmp_path / "saved")
        assert BrosConfig.from_json_file(tmp_path / "saved" / "bilevel_config.json") == trainer.bilevel_config
    with pytest.raises(TypeError, match="`bilevel_config` must be a BrosConfig, got dict"):
        BrosTrainer(model=make_model("vit"), args=arguments(tmp_path), bilevel_config={"rank": 0.5})


def test_target_dataset_is_checked(tmp_path: Path) -> None:
    refused("vit", tmp_path, "BrosTrainer needs `target_dataset`", trainer_kwargs={"target_dataset": None})
    refused("vit", tmp_path, "`target_dataset` is empty", trainer_kwargs={"target_dataset": []})
    stream = make_dataset("vit", 4).to_iterable_dataset()
    refused("vit", tmp_path, "`target_dataset` is a stream", trainer_kwargs={"target_dataset": stream})
    silent = make_dataset("llama", 20).map(lambda row: {"labels": [-100] * 12})
    refused("llama", tmp_path, "All labels of `target_dataset` are -100", trainer_kwargs={"target_dataset": silent})
    fixed = {"upper_variable": "fixed"}  # needs none, but a pool with labels
    refused("llama", tmp_path, "All labels of `train_dataset` are -100", fixed, train_dataset=silent)
    build("vit", tmp_path, fixed, trainer_kwargs={"target_dataset": None})


class OwnTrainer(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


class BrosOwnTrainer(BrosMixin, OwnTrainer):
    pass


class BrosWithLoss(BrosTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().compute_loss(*args, **kwargs)


def test_a_loss_of_the_user_s_own_is_refused_without_losses_of_samples(tmp_path: Path) -> None:
    for trainer_class, owner in ((BrosOwnTrainer, "OwnTrainer"), (BrosWithLoss, "BrosWithLoss")):
        message = (
            rf"{trainer_class.__name__} weights the losses of single samples, so `{owner}.compute_loss` would not be "
            r"called. Pass `compute_sample_losses=`, \(model, batch\) -> losses of shape \(n,\)"
        )
        refused("vit", tmp_path, message, trainer_class=trainer_class)
    loss = {"compute_loss_func": lambda *args, **kwargs: None}
    refused("vit", tmp_path, "so `compute_loss_func` would not be called", trainer_kwargs=loss)
    own = {"compute_sample_losses": lambda model, batch: model(**batch).logits.sum(1)}
    build("vit", tmp_path, trainer_class=BrosOwnTrainer, trainer_kwargs=own)
    config = BertConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    unknown = "`BertForQuestionAnswering` is not known; known heads: causal_lm.*Pass `compute_sample_losses=`"
    refused("bert", tmp_path, unknown, model=BertForQuestionAnswering(config))


def test_streams_have_no_table(tmp_path: Path) -> None:
    stream = make_dataset("vit", 32).to_iterable_dataset()
    message = "`train_dataset` is a stream, whose samples have no number.*Use `upper_variable='network'` or 'domain', or a map"
    refused("vit", tmp_path, message, train_dataset=stream)
    weights = {"sample_weights": torch.ones(32)}
    refused("vit", tmp_path, message, {"upper_variable": "fixed"}, train_dataset=stream, trainer_kwargs=weights)
    settings = {"upper_variable": "domain", "domain_column": "source", "domain_names": ["web", "books", "code"]}
    for upper in (settings, {"upper_variable": "network"}):
        trainer = train("vit", tmp_path, upper, train_dataset=stream, max_steps=3)
        with pytest.raises(RuntimeError, match="for a stream there are none at all"):
            _ = trainer.sample_weights
    domains = train("vit", tmp_path, settings, train_dataset=stream, max_steps=4).domain_weights
    assert list(domains) == ["web", "books", "code"] and len(set(domains.values())) == 3


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            torch.ones(63),
            "`sample_weights` has 63 weights for 64 ids and `train_dataset` 64 rows. Pass the `sample_weights` of",
        ),
        (torch.ones(65), "has 65 weights for 64 ids"),
        (SampleWeights(torch.tensor([0, 64]), torch.ones(2)), "has 2 weights for 2 ids and `train_dataset` 64 rows"),
        (SampleWeights(torch.tensor([-1, 3]), torch.ones(2)), "has 2 weights for 2 ids"),
        (SampleWeights(torch.tensor([0, 1]), torch.ones(3)), "has 3 weights for 2 ids"),
        (-torch.ones(64), "`sample_weights` must be finite and not negative"),
        (torch.full((64,), torch.nan), "`sample_weights` must be finite and not negative"),
    ],
)
def test_wrong_sample_weights(weights: Any, message: str, tmp_path: Path) -> None:
    refused("vit", tmp_path, message, {"upper_variable": "fixed"}, trainer_kwargs={"sample_weights": weights})


def test_sample_weights_that_others_would_replace(tmp_path: Path) -> None:
    message = "`sample_weights` are given and `upper_variable='network'` would learn others. Use"
    refused("vit", tmp_path, message, {"upper_variable": "network"}, trainer_kwargs={"sample_weights": torch.ones(64)})
    message = "`sample_weights` to start from must not be above 1.*the largest is 2"
    refused("vit", tmp_path, message, trainer_kwargs={"sample_weights": 2 * torch.ones(64)})


@pytest.mark.parametrize("weight_function", ["sigmoid", "projected", "softmax"])
def test_learning_starts_from_given_weights(weight_function: str, tmp_path: Path) -> None:
    given = torch.linspace(0.02, 0.98, 64)
    settings = {"weight_function": weight_function, "start_step": 1}  # one step without an update
    start = given / given.mean() if weight_function == "softmax" else given
    trainer = train("vit", tmp_path, settings, max_steps=1, trainer_kwargs={"sample_weights": given})
    torch.testing.assert_close(trainer.sample_weights.weights, start)
    some = SampleWeights(torch.tensor([5]), torch.tensor([0.25]))
    trainer = train("vit", tmp_path, settings, max_steps=1, trainer_kwargs={"sample_weights": some})
    assert trainer.sample_weights.weights.argmin() == 5
    if weight_function != "softmax":
        assert trainer.sample_weights.weights.tolist() == pytest.approx([0.5] * 5 + [0.25] + [0.5] * 58)
    learned = train("vit", tmp_path, {**settings, "start_step": 0}, trainer_kwargs={"sample_weights": given})
    assert not torch.equal(learned.sample_weights.weights, start)


def test_settings_are_checked_against_model_and_arguments(tmp_path: Path) -> None:
    refused("vit", tmp_path, "`rank=17` is larger than the input size 16", {"rank": 17})
    refused("vit", tmp_path, r"`modules=\['nothing'\]` names", {"modules": ["nothing"]})
    refused("vit", tmp_path, "kept in half precision", model=make_model("vit").to(torch.bfloat16))
    refused(
        "vit", tmp_path, "`train_dataset` has no column `kind`", {"upper_variable": "domain", "domain_column": "kind"}
    )
    model = make_model("vit")
    optimizers = {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.1), None)}
    given = (
        "In a subspace the optimizer steps on coordinates.*cannot be given.*Choose it by `TrainingArguments.optim` or "
        "`optimizer_cls_and_kwargs`, or use `rank='full'`"
    )
    refused("vit", tmp_path, given, model=model, trainer_kwargs=optimizers)
    refused("vit", tmp_path, given, optim_target_modules=["q_proj"], optim="adamw_torch")
    checkpointing = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    refused(
        "vit",
        tmp_path,
        "Reentrant checkpointing works with `.backward..` only. Drop `use_reentrant=True`",
        **checkpointing,
    )
    flash = make_model("vit")
    flash.config._attn_implementation = "flex_attention"
    message = (
        "`hessian_action='double_backward'` differentiates twice, which attention by 'flex_attention' cannot. Load the model "
        "with `attn_implementation='sdpa'` .*or use `hessian_action='finite_differences'`"
    )
    refused("vit", tmp_path, message, {"hessian_action": "double_backward"}, model=flash)


def test_an_optimizer_may_be_given_in_full_space(tmp_path: Path) -> None:
    runs = []
    for given in (True, False):
        model = make_model("vit")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2) if given else None
        trainer = train(
            "vit",
            tmp_path,
            {"rank": "full"},
            model=model,
            optim="sgd",
            trainer_kwargs={"optimizers": (optimizer, None)} if given else {},
        )
        runs.append(parameters_of(trainer))
    assert torch.equal(*runs)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_precision_may_come_from_the_launcher(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch --mixed_precision` sets the accelerator's, and not that of the arguments."""
    trainer = build("vit", tmp_path)
    monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", precision)
    assert not trainer.args.fp16 and not trainer.args.bf16 and trainer.accelerator.mixed_precision == precision
    if precision == "fp16":
        with pytest.raises(ValueError, match="BrosTrainer is not tested with fp16. Use `bf16=True`, or neither"):
            trainer._check_bilevel_setup()
        return
    steps = []
    differences = bros_module.FiniteDifferences
    monkeypatch.setattr(bros_module, "FiniteDifferences", lambda *args: steps.append(args[2]) or differences(*args))
    trainer.train()
    assert set(steps) == {RELATIVE_STEP[torch.bfloat16]}


def test_compilation_is_ignored(tmp_path: Path) -> None:
    trainer = build("vit", tmp_path)
    trainer.args.torch_compile = True
    with pytest.warns(UserWarning, match="`torch_compile` is ignored by BrosTrainer in training steps"):
        trainer._check_bilevel_setup()


@pytest.mark.parametrize("settings", [{}, {"upper_variable": "network"}, {"upper_variable": "fixed"}])
def test_weights_of_one_row_cannot_be_normalised(settings: dict[str, Any], tmp_path: Path) -> None:
    more = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    if settings.get("upper_variable") == "fixed":
        more["trainer_kwargs"] = {"sample_weights": torch.rand(64)}
    with pytest.raises(
        ValueError, match="with `per_device_train_batch_size=1` what is left of each is 1: nothing would be"
    ):
        build("vit", tmp_path, settings, **more)
    build("vit", tmp_path, {**settings, "normalise_weights": False}, **more)


@pytest.mark.parametrize("given", [True, False])
def test_the_upper_rate_follows_the_schedule_and_no_other_number(given: bool, tmp_path: Path) -> None:
    """`learning_rate` says nothing of an optimizer that is given."""
    model, seen = make_model("vit"), []
    kwargs: dict[str, Any] = {"learning_rate": 0.01}
    if given:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
        kwargs = {"trainer_kwargs": {"optimizers": (optimizer, None)}, "learning_rate": 5e-5}
    trainer = build("vit", tmp_path, {"rank": "full"}, model=model, lr_scheduler_type="linear", max_steps=4, **kwargs)
    step = trainer._schedule
    trainer._schedule = lambda: seen.append(step()) or seen[-1]
    trainer.train()
    assert seen == pytest.approx([1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("kind", ["one_cycle", "cyclic", "plateau"])
def test_schedules_that_begin_low_or_know_no_beginning(kind: str, tmp_path: Path) -> None:
    model = make_model("vit")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    rates = torch.optim.lr_scheduler
    schedule = {
        "one_cycle": lambda: rates.OneCycleLR(optimizer, max_lr=0.05, total_steps=7),
        "cyclic": lambda: rates.CyclicLR(optimizer, base_lr=0.001, max_lr=0.1, step_size_up=2),
        "plateau": lambda: rates.ReduceLROnPlateau(optimizer),
    }[kind]()
    trainer, seen = (
        build(
            "vit",
            tmp_path,
            {"rank": "full"},
            model=model,
            learning_rate=5e-5,
            trainer_kwargs={"optimizers": (optimizer, schedule)},
        ),
        [],
    )
    step = trainer._schedule
    trainer._schedule = lambda: seen.append(step()) or seen[-1]
    if kind == "plateau":
        trainer.args.eval_strategy = "no"
        trainer.lr_scheduler.step = lambda *args: None
        trainer.optimizer = optimizer
        assert trainer._schedule() == 1
        return
    trainer.train()
    assert 0.5 < max(seen) <= 1.001


def test_batches_that_shrink_to_one_row_are_refused(tmp_path: Path) -> None:
    trainer = build("vit", tmp_path)
    trainer.args.per_device_train_batch_size = 1
    with pytest.raises(ValueError, match="what is left of each is 1"):
        trainer.train()


def test_a_broken_hypergradient_is_said_at_the_end(tmp_path: Path) -> None:
    target = make_dataset("vit", 8, seed=7).to_list()
    target[3]["pixel_values"][0][0][0] = math.nan
    trainer = build("vit", tmp_path, logging_steps=500, trainer_kwargs={"target_dataset": target})
    with pytest.raises(FloatingPointError, match="A hypergradient was NaN or infinite"):
        trainer.train()


def test_padding_free_batches_are_refused(tmp_path: Path) -> None:
    def flatten(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        joined = {key: sum((row[key] for row in rows), []) for key in ("input_ids", "labels")}
        return {key: torch.tensor(value)[None, :32] for key, value in joined.items()}

    trainer = build("llama", tmp_path)  # with another collator it would have been refused here
    trainer.data_collator = flatten
    with pytest.raises(ValueError, match="A batch of 8 samples gave 1 losses. Padding-free batches.*padding collator"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"upper_variable": "fixed", "estimator": "bi_probe"}, "`estimator` is ignored with `upper_variable='fixed'`"),
        ({"upper_variable": "fixed", "update_every": 3}, "`update_every` is ignored with `upper_variable='fixed'`"),
        ({"upper_variable": "fixed", "damping": 0.1}, "`damping` is ignored with `upper_variable='fixed'`"),
        (
            {"upper_variable": "fixed", "normalise_weights": False},
            "`normalise_weights` is ignored with weights that are all",
        ),
        ({"upper_variable": "network", "weight_function": "softmax"}, "ignored with `upper_variable='network'`"),
        ({"rank": "full", "modules": ["q_proj"]}, "`modules` is ignored with `rank='full'`"),
        ({"rank": "full", "refresh_steps": 3}, "`refresh_steps` is ignored with `rank='full'`"),
        ({"rank": 4, "peft": True}, "`rank` is ignored with a PEFT model, whose adapters are trained in full space"),
    ],
)
def test_ignored_settings_are_warnings(settings: dict, expected: str, tmp_path: Path) -> None:
    settings = dict(settings)
    model = lora("vit") if settings.pop("peft", False) else None
    with pytest.warns(UserWarning, match=expected) as record:
        build("vit", tmp_path, settings, model=model)
    assert len(record) == 1


def test_fixed_weights_that_are_scaled_are_no_reason_to_warn(tmp_path: Path) -> None:
    settings = {"upper_variable": "fixed", "normalise_weights": False, "rank": "full"}
    build("vit", tmp_path, settings, trainer_kwargs={"sample_weights": torch.rand(64)})  # warnings are errors


@pytest.mark.filterwarnings("error")
def test_subspaces_that_do_not_cover_the_space_are_a_warning(tmp_path: Path) -> None:
    message = (
        "The subspaces of 6 steps, each kept for `refresh_steps=2`, cover the space of a layer 1.5 times; below 10 the "
        "learned weights suffer. Lower `refresh_steps`, raise `rank` or train longer"
    )
    with pytest.warns(UserWarning, match=message) as record:
        train("vit", tmp_path, {"rank": 0.5, "refresh_steps": 2})
    assert len(record) == 1  # not at every step
    ten_times = {"rank": 16, "modules": ["q_proj"], "refresh_steps": 1}
    train("vit", tmp_path, ten_times, max_steps=10)
    with pytest.warns(UserWarning, match="cover the space of a layer 9.0 times; below 10"):
        train("vit", tmp_path, ten_times, max_steps=9)
    train("vit", tmp_path, {"rank": "full"}, max_steps=1)


class Layers(nn.Module):
    """Uses its second layer in a way of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({"first": nn.Linear(64, 8), "second": nn.Linear(8, 8)})
        self.head = nn.Linear(8, 4)
        self.how = how

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        hidden, second = self.body["first"](pixel_values.flatten(1)).tanh(), self.body["second"]
        if self.how in ("called", "called and read"):
            hidden = hidden + second(hidden)
        if self.how in ("read", "called and read"):
            hidden = hidden + F.linear(hidden, second.weight, second.bias)
        if self.how == "detached":
            hidden = hidden + F.linear(hidden, second.weight.detach(), second.bias)
        logits = self.head(hidden)
        return (logits,) if labels is None else (F.cross_entropy(logits, labels), logits)


def train_layers(how: str, settings: dict[str, Any], folder: Path) -> Any:
    def compute_sample_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["pixel_values"])[0], batch["labels"], reduction="none")

    extra = {"compute_sample_losses": compute_sample_losses}
    return train("vit", folder, settings, model=Layers(how), trainer_kwargs=extra, max_steps=3)


EVALUATIONS = [{}, {"upper_variable": "fixed"}, {"hessian_action": "double_backward"}, {"start_step": 2}]


@pytest.mark.parametrize("settings", EVALUATIONS)
@pytest.mark.parametrize("how", ["read", "called and read"])
def test_weights_that_are_read_without_a_call_are_refused(how: str, settings: dict, tmp_path: Path) -> None:
    message = (
        r"`Layers` reads the weights of layers without calling them: `body.second`. In a subspace .* by naming the layers to "
        r"project in `modules`, or use `rank='full'`"
    )
    with pytest.raises(ValueError, match=message):
        train_layers(how, {"rank": 0.5, **settings}, tmp_path)
    for remedy in ({"rank": 0.5, "modules": ["first"]}, {"rank": "full"}):
        trainer = train_layers(how, {**settings, **remedy}, tmp_path)  # warnings are errors
        assert not torch.equal(trainer.model.body.second.weight, Layers(how).body.second.weight)


@pytest.mark.parametrize("settings", EVALUATIONS)
@pytest.mark.parametrize("how", ["unused", "detached"])
def test_layers_that_no_gradient_reaches_are_a_warning(how: str, settings: dict, tmp_path: Path) -> None:
    message = (
        "In the first training step no gradient reached 1 of 2 layers in subspaces: `body.second`. If the loss does not depend "
        "on them, or only for other samples, nothing is lost. Otherwise .* naming the layers to project in `modules`, or use `rank='full'`"
    )
    with pytest.warns(UserWarning, match=message) as record:
        train_layers(how, {"rank": 0.5, **settings}, tmp_path)
    assert sum("no gradient reached" in str(warning.message) for warning in record) == 1  # not at every step
    for remedy in ({"modules": ["first"]}, {"rank": "full"}):
        train_layers(how, {"rank": 0.5, **settings, **remedy}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("settings", EVALUATIONS)
def test_looking_for_unreached_layers_changes_nothing(settings: dict, tmp_path: Path, monkeypatch: Any) -> None:
    runs = []
    for looked in (False, True):
        begin = BrosTrainer._begin_training

        def begin_training(self: Any, looked: bool = looked, begin: Any = begin) -> None:
            begin(self)
            self.blocks._looked = looked

        with monkeypatch.context() as patch:
            patch.setattr(BrosTrainer, "_begin_training", begin_training)
            trainer = train_layers("called", {"rank": 0.5, **settings}, tmp_path)
        assert trainer.blocks._looked
        runs.append(parameters_of(trainer))
    assert torch.equal(*runs)


def test_an_auxiliary_variable_that_grows_without_end_is_said(tmp_path: Path) -> None:
    settings = {"auxiliary_learning_rate": 30.0, "damping": 0.0}
    with pytest.warns(
        UserWarning, match="The auxiliary variable grows without end: its norm is .* Raise `damping`, or give"
    ) as said:
        build("vit", tmp_path, settings, max_steps=6, logging_steps=1, learning_rate=1e-4).train()
    assert sum("grows without end" in str(entry.message) for entry in said) == 1
