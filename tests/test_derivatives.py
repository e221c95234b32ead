"""Derivatives by what the lower level trains, against dense Hessians and difference quotients that share no step with them."""

import copy
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import VOCABULARY, make_model, make_rows, wide_norms
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ResNetConfig, ResNetForImageClassification

from hf_bilevel import large_vocabulary
from hf_bilevel import losses as losses_module
from hf_bilevel.core.subspace import bi_probe, lift, two_sided
from hf_bilevel.derivatives import (
    RELATIVE_STEP,
    DoubleBackward,
    FiniteDifferences,
    LowerBlocks,
    gradient_at_weights,
    preserved_buffers,
)
from hf_bilevel.losses import unit_losses, weighted_loss


class Toy(nn.Module):
    """Every kind of block with 88 weights in all, so that dense Hessians are cheap."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 4, bias=False))
        self.convolutions = nn.Sequential(nn.Conv1d(4, 2, 2))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.body(self.embedding(tokens))
        mixed = self.convolutions(hidden.transpose(1, 2)).mean((1, 2)).tanh()
        return self.head(hidden.mean(1) + self.scale * mixed[:, None])


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=4,
            hidden_sizes=[4, 8],
            depths=[1, 1],
            layer_type="basic",
            num_labels=4,
            downsample_in_first_stage=True,
        )
    )


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, tie_word_embeddings=True, **size)
    )


def make(name: str, dropout: float = 0.0) -> nn.Module:
    if name == "toy":
        torch.manual_seed(0)
        return Toy()
    own = {"resnet": resnet, "tied": tied_llama}
    return wide_norms(own[name]() if name in own else make_model(name, dropout))


NUM = 5


def batch_for(name: str) -> dict[str, Tensor]:
    if name == "toy":
        return {"tokens": torch.tensor([[0, 1, 2], [3, 4, 0], [1, 1, 4], [2, 3, 3], [4, 0, 2]])}
    kind = {"resnet": "vit", "tied": "llama"}.get(name, name)
    rows = make_rows(kind, NUM)
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    if name == "resnet":
        generator = torch.Generator().manual_seed(1)
        batch["pixel_values"] = torch.randn(NUM, 1, 32, 32, generator=generator)
    return batch


def sample_losses(name: str, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    if name == "toy":
        return F.cross_entropy(model(batch["tokens"]), torch.arange(NUM) % 5, reduction="none")
    if "pixel_values" in batch:
        logits = model(pixel_values=batch["pixel_values"].to(next(model.parameters()).dtype)).logits
        return F.cross_entropy(logits, batch["labels"], reduction="none")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if logits.ndim == 2:
        return F.cross_entropy(logits, batch["labels"], reduction="none")
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=-100
    )
    return losses.mean(1)


COEFFICIENTS = torch.tensor([0.1, 0.35, 0.0, 0.3, 0.05])


class Case:
    """A model, a weighted batch and the blocks that are trained."""

    def __init__(
        self,
        name: str,
        rank: Any = 0.5,
        dtype: torch.dtype = torch.float64,
        dropout: float = 0.0,
        change: Callable[[nn.Module], None] | None = None,
        **kwargs: Any,
    ) -> None:
        self.name = name
        self.model = make(name, dropout).to(dtype).train()
        if change is not None:
            change(self.model)
        self.blocks = LowerBlocks(self.model, rank, **kwargs)
        self.blocks.bases = self.blocks.draw(3)
        self.batch = batch_for(name)
        self.coefficients = COEFFICIENTS.to(dtype)
        self.autocast = False
        generator = torch.Generator().manual_seed(7)
        noise = [torch.randn(p.shape, generator=generator, dtype=dtype) for p in self.blocks.parameters]
        length = join([p.detach() for p in self.blocks.parameters]).norm() / join(noise).norm()
        self.direction = [length.to(dtype) * n for n in noise]  # of the length of the weights

    def __call__(self) -> tuple[Tensor, Tensor]:
        losses, coefficients = self.separately()
        return (losses * coefficients).sum(), losses.detach()

    def separately(self) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            losses = sample_losses(self.name, self.model, self.batch)
        return losses.to(self.coefficients.dtype), self.coefficients

    def matrices_of_direction(self) -> list[Tensor]:
        """The direction as the trainer holds it: matrices for what is projected, the weights' shapes else."""
        pairs = zip(self.direction, self.blocks.matrices(), strict=True)
        return [d.view_as(m) for d, m in pairs]

    def finite_differences(self, relative_step: float | None = None) -> FiniteDifferences:
        kind = torch.bfloat16 if self.autocast else self.blocks.parameters[0].dtype
        norm = torch.nn.utils.get_total_norm([p.detach() for p in self.blocks.parameters])
        return FiniteDifferences(self.blocks, self, relative_step or RELATIVE_STEP[kind], norm)

    def restricted(self, full: list[Tensor]) -> list[Tensor]:
        """Full-size gradients in coordinates, written out."""
        result = []
        for gradient, basis in zip(full, self.blocks.bases, strict=True):
            if basis is not None:
                gradient = torch.einsum("nm,mr->nr", gradient.reshape(gradient.shape[0], -1), basis)
            result.append(gradient)
        return result

    def losses_at(self, step: float) -> tuple[Tensor, list[Tensor]]:
        model = copy.deepcopy(self.model)
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, d in zip(self.blocks.names, self.direction, strict=True):
                weights[name].add_(step * d)
        return sample_losses(self.name, model, self.batch), [weights[name] for name in self.blocks.names]

    def gradient_at(self, step: float) -> list[Tensor]:
        losses, weights = self.losses_at(step)
        return list(torch.autograd.grad((losses * self.coefficients).sum(), weights, materialize_grads=True))

    def by_differences(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Gradient, Hessian action and slopes, without differentiating twice: a stencil of fourth order on copies."""
        h = 3e-5
        plus, minus, twice_plus, twice_minus = (self.gradient_at(s * h) for s in (1, -1, 2, -2))
        action = [
            (8 * (a - b) - (c - d)) / (12 * h) for a, b, c, d in zip(plus, minus, twice_plus, twice_minus, strict=True)
        ]
        with torch.no_grad():
            a, b, c, d = (self.losses_at(s * h)[0] for s in (1, -1, 2, -2))
        return self.gradient_at(0.0), action, (8 * (a - b) - (c - d)) / (12 * h)

    def by_double_backward(self) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The same on a float64 copy's own parameters, sample by sample."""
        model = copy.deepcopy(self.model).double()
        weights = [dict(model.named_parameters())[name] for name in self.blocks.names]
        direction = [d.double() for d in self.direction]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            losses = sample_losses(self.name, model, self.batch)
        kwargs = {"materialize_grads": True, "create_graph": True}
        gradient = torch.autograd.grad((losses * self.coefficients.double()).sum(), weights, **kwargs)
        along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
        action = torch.autograd.grad(along, weights, retain_graph=True, materialize_grads=True)
        slopes = []
        for loss in losses:
            own = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
            slopes.append(sum((g * d).sum() for g, d in zip(own, direction, strict=True)))
        return [g.detach() for g in gradient], list(action), torch.stack(slopes).detach()


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Every block to a tolerance relative to the largest entry of all, and not everything zero."""
    scale = max(float(e.detach().abs().max()) for e in expected)
    assert scale > 0, "nothing to compare"
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * scale)


def join(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.double().flatten() for t in tensors])


def relative_error(got: list[Tensor], expected: list[Tensor]) -> float:
    return float((join(got) - join(expected)).norm() / join(expected).norm())


def cosine(got: list[Tensor], expected: list[Tensor]) -> float:
    return float(F.cosine_similarity(join(got), join(expected), dim=0))


@contextmanager
def untouched(model: nn.Module, buffers: bool = True) -> Iterator[None]:
    """Nothing of a model is another object, another value, or another flag afterwards."""

    def picture() -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
        structure = [
            (
                name,
                list(vars(m)),
                [(k, id(p), None if p is None else p.requires_grad) for k, p in m._parameters.items()],
            )
            for name, m in model.named_modules()
        ]
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        gradients = {n: p.grad for n, p in model.named_parameters()}
        return (structure, gradients), weights, {n: b.clone() for n, b in model.named_buffers()}

    before = picture()
    try:
        yield
    finally:
        after = picture()
        assert before[0] == after[0]
        assert all(torch.equal(before[1][n], after[1][n]) for n in before[1])
        assert not buffers or all(torch.equal(before[2][n], after[2][n]) for n in before[2])


# What is projected ----------------------------------------------------------------------------------------------------


def projected_names(blocks: LowerBlocks) -> set[str]:
    return {blocks.names[i] for i in blocks.projected}


def all_matrices(model: nn.Module) -> set[str]:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("vit", {"classifier.weight"}),
        ("llama", {"lm_head.weight"}),
        ("tied", {"lm_head.weight"}),
        ("bert", {"classifier.weight"}),
        ("bert_mlm", {"cls.predictions.decoder.weight"}),
        ("resnet", {"classifier.1.weight"}),
        ("toy", {"head.weight"}),
    ],
)
def test_all_matrices_but_the_head_are_projected(name: str, left_out: set[str]) -> None:
    model = make(name)
    blocks = LowerBlocks(model, 0.5)
    assert all_matrices(model) > left_out
    assert projected_names(blocks) == all_matrices(model) - left_out
    assert blocks.names == [name for name, _ in model.named_parameters()]  # the rest is trained, tied weights once
    for i, (parameter, leaf) in enumerate(zip(blocks.parameters, blocks.leaves, strict=True)):
        if i in blocks.projected:
            rows, dim = parameter.flatten(1).shape
            assert leaf.shape == (rows, max(1, round(dim / 2))) and leaf.requires_grad and not leaf.any()
        else:
            assert leaf is parameter


def test_modules_are_named_by_the_end_of_their_names() -> None:
    model = make("llama")
    attention = {f"model.layers.{i}.self_attn.{k}_proj.weight" for i in (0, 1) for k in "qv"}
    assert projected_names(LowerBlocks(model, 2, modules=["q_proj", "v_proj"])) == attention
    only = {"model.layers.1.mlp.up_proj.weight"}
    assert projected_names(LowerBlocks(model, 2, modules=["layers.1.mlp.up_proj"])) == only
    assert projected_names(LowerBlocks(model, 2, modules=["lm_head"])) == {"lm_head.weight"}  # a head by name
    with pytest.raises(ValueError, match=r"no linear layer .* that `modules=\['proj'\]` names"):
        LowerBlocks(model, 2, modules=["proj"])  # the end of a name, not of a word
    with pytest.raises(ValueError, match="no linear layer or convolution"):
        LowerBlocks(make("tied"), 2, modules=["lm_head"])  # tied weights are embeddings as well


def test_the_rest_can_be_frozen() -> None:
    model = make("bert")
    blocks = LowerBlocks(model, 4, rest="frozen")
    assert set(blocks.names) == projected_names(blocks) == all_matrices(model) - {"classifier.weight"}
    assert len(blocks.projected) == len(blocks.leaves) == len(blocks.parameters)


def test_a_frozen_rest_is_constant_in_an_evaluation() -> None:
    """Its gradients are not even computed."""
    model = make("bert")
    blocks = LowerBlocks(model, 4, rest="frozen")
    blocks.bases = blocks.draw(0)
    frozen = [name for name, _ in model.named_parameters() if name not in blocks.names]
    for evaluation in (blocks.shifted, blocks.full_space):
        with evaluation():
            seen = {
                n: w for m_name, m in model.named_modules() for k, w in m._parameters.items() if (n := f"{m_name}.{k}")
            }
            assert frozen and not any(seen[name].requires_grad for name in frozen)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_without_requires_grad_are_constants() -> None:
    model = make("vit")
    model.vit.requires_grad_(False)
    model.vit.layers[1].requires_grad_(True)
    blocks = LowerBlocks(model, 4)
    assert all(name.startswith(("vit.layers.1.", "classifier.")) for name in blocks.names)
    assert projected_names(blocks) == {n for n in all_matrices(model) if n.startswith("vit.layers.1.")}


def test_full_rank_trains_the_parameters_themselves() -> None:
    model = make("vit")
    blocks = LowerBlocks(model, "full")
    assert not blocks.projected and blocks.draw(0) == [None] * len(blocks.leaves)
    assert [id(leaf) for leaf in blocks.leaves] == [id(p) for p in model.parameters()]


def quantised() -> nn.Module:
    model = make("vit")
    for module in model.vit.modules():
        if isinstance(module, nn.Linear):
            del module.weight
            module.weight = nn.Parameter(torch.zeros(module.out_features, 8, dtype=torch.uint8), requires_grad=False)
        elif isinstance(module, nn.Conv2d):
            module.weight.requires_grad_(False)
    return model


def without_gradients() -> nn.Module:
    return make("vit").requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "kwargs", "message"),
    [
        (
            lambda: make("vit"),
            {"rank": 17},
            r"`rank=17` is larger than the input size 16 of `vit\..*`. Lower it, give a fraction such as 0.125, or name "
            "the layers to project in `modules`",
        ),
        (
            lambda: make("vit"),
            {"rank": 4, "modules": ["nothing"]},
            r"`ViTForImageClassification` has no linear layer or convolution with trainable weights that "
            r"`modules=\['nothing'\]` names to put into a subspace. Trainable ones: vit.*Name some of them in `modules`, "
            "or use `rank='full'`",
        ),
        (lambda: nn.Sequential(nn.Linear(3, 3)), {"rank": 2}, "`Sequential` has no linear.*Trainable ones: 0"),
        (without_gradients, {"rank": 4}, "Trainable ones: none"),
        (without_gradients, {"rank": "full"}, "`ViTForImageClassification` has nothing to train: no parameter"),
        (
            quantised,
            {"rank": 4},
            r"The weights of `ViTForImageClassification` are quantised \(`vit\..*`\) and cannot be trained in a subspace. "
            "Load the model in float32, or add LoRA adapters with PEFT",
        ),
        (
            lambda: make("vit").to(torch.bfloat16),
            {"rank": 4},
            r"Weights are kept in half precision \(`vit\..*`\), which loses small updates and finite differences. Load the "
            r"model with `dtype=torch.float32` and set `bf16=True`",
        ),
        (lambda: make("llama").half(), {"rank": "full"}, "kept in half precision"),
        (lambda: make("vit"), {"rank": "full", "rest": "frozen"}, "rest"),
    ],
)
def test_what_cannot_be_trained_is_refused(model: Callable[[], nn.Module], kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowerBlocks(model(), **kwargs)


def test_half_precision_constants_are_allowed() -> None:
    model = make("llama")
    model.model.embed_tokens.requires_grad_(False).to(torch.bfloat16)
    assert "model.embed_tokens.weight" not in LowerBlocks(model, 4).names


def test_bases_are_drawn_for_projected_blocks_by_seed() -> None:
    blocks = LowerBlocks(make("resnet"), 0.5)
    first, again, other = blocks.draw(1), blocks.draw(1), blocks.draw(2)
    for i, (a, b, c) in enumerate(zip(first, again, other, strict=True)):
        if i not in blocks.projected:
            assert a is b is c is None
            continue
        dim, rank = blocks.parameters[i].flatten(1).shape[1], blocks.leaves[i].shape[1]
        assert a.shape == (dim, rank) and torch.equal(a, b) and not torch.equal(a, c)
        torch.testing.assert_close(a.T @ a, dim / rank * torch.eye(rank), rtol=0, atol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.125, [0.0, 0.5, 0.25]])
def test_merge_by_hand(decay: float | list[float]) -> None:
    case = Case("toy", rank=2)
    blocks = case.blocks
    before = [p.detach().clone() for p in blocks.parameters]
    decays = iter(decay if isinstance(decay, list) else [decay] * 3)
    expected = []
    for i, weight in enumerate(before):
        if i in blocks.projected:
            with torch.no_grad():
                blocks.leaves[i].normal_(generator=torch.Generator().manual_seed(i))
            blocks.leaves[i].grad = torch.ones_like(blocks.leaves[i])
            step = torch.einsum("nr,mr->nm", blocks.leaves[i].detach(), blocks.bases[i])
            weight = (1 - next(decays)) * weight + step.view_as(weight)
        expected.append(weight)
    blocks.merge(decay)
    assert len(blocks.projected) == 3
    for i, (parameter, weight) in enumerate(zip(blocks.parameters, expected, strict=True)):
        torch.testing.assert_close(parameter.detach(), weight, rtol=0, atol=1e-14)
        if i in blocks.projected:
            assert not blocks.leaves[i].any() and blocks.leaves[i].grad is None
    for matrix, parameter in zip(blocks.matrices(), blocks.parameters, strict=True):
        assert matrix.data_ptr() == parameter.data_ptr()  # no copies


def test_convolutions_with_channels_last_are_merged() -> None:
    """Their weights are no matrices in memory."""
    merged = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = make("resnet").to(memory_format=memory_format)
        blocks = LowerBlocks(model, 2)
        blocks.bases = blocks.draw(0)
        before = [p.detach().clone() for p in blocks.parameters]
        with torch.no_grad():
            for i in blocks.projected:
                blocks.leaves[i].normal_(generator=torch.Generator().manual_seed(i))
        blocks.merge(0.25)
        assert all(not torch.equal(blocks.parameters[i], before[i]) for i in blocks.projected)
        merged.append([p.detach() for p in blocks.parameters])
    assert any(not p.is_contiguous() for p in merged[1])
    torch.testing.assert_close(merged[1], merged[0], rtol=0, atol=1e-6)


# The gradient ---------------------------------------------------------------------------------------------------------

ALL = ["toy", "vit", "llama", "tied", "bert", "resnet"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rank", [1, 0.5, "full"])
def test_gradient_is_the_dense_one_restricted(name: str, rank: Any) -> None:
    case = Case(name, rank)
    expected = case.gradient_at(0.0)
    losses, _ = case.losses_at(0.0)
    with untouched(case.model, buffers=False):
        got_losses, got = gradient_at_weights(case.blocks, case)
    assert not got_losses.requires_grad and not any(g.requires_grad for g in got)
    torch.testing.assert_close(got_losses, losses.detach(), rtol=0, atol=1e-12)
    assert_close(got, case.restricted(expected), 1e-12)


def test_frozen_rest_and_named_modules_have_the_same_gradient() -> None:
    for kwargs in ({"rest": "frozen"}, {"modules": ["q_proj", "classifier"]}):
        case = Case("vit", 4, **kwargs)
        _, got = gradient_at_weights(case.blocks, case)
        assert_close(got, case.restricted(case.gradient_at(0.0)), 1e-12)


def hook_all(model: nn.Module) -> None:
    """Layers that another tool watches are computed in the ordinary way."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: output)


class TwoTerms(nn.Module):
    """Two parameters that are only added: autograd gives both the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.one, self.two = (nn.Parameter(torch.ones(4, 2)) for _ in range(2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + (self.one + self.two)


def test_every_gradient_may_be_written_over() -> None:
    model = TwoTerms()
    blocks = LowerBlocks(model, "full")
    for _ in range(2):  # the first call looks for more
        with blocks.shifted() as variables:
            found = blocks.gradient(model(torch.ones(4, 3)).square().sum(), variables)
        assert len({g.data_ptr() for g in found}) == len(found) == 4
        by_name = dict(zip(blocks.names, found, strict=True))
        assert torch.equal(by_name["one"], by_name["two"]) and by_name["one"].any()


class OwnLinear(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(2 * inputs)


def own_layers(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OwnLinear


@pytest.mark.parametrize("change", [hook_all, own_layers])
def test_layers_that_do_more_than_a_linear_layer(change: Callable[[nn.Module], None]) -> None:
    case = Case("vit", 4, change=change)
    gradient, action, slopes = case.by_double_backward()
    _, got = gradient_at_weights(case.blocks, case)
    assert_close(got, case.restricted(gradient), 1e-12)
    oracle = case.finite_differences()
    assert_close(oracle.hessian_action(case.direction), case.restricted(action), 1e-6)
    assert_close([oracle.slopes(case.direction)], [slopes], 1e-6)


def test_a_subspace_layer_keeps_its_input_projected() -> None:
    """What is kept for the backward pass: r numbers for each input, where a linear layer keeps all m."""
    model = nn.Sequential(nn.Sequential(nn.Linear(64, 3)))
    blocks = LowerBlocks(model, 5)
    blocks.bases = blocks.draw(0)
    inputs = torch.randn(11, 7, 64)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        with blocks.shifted():
            model(inputs)
        in_subspace, kept[:] = list(kept), []
        model(inputs)
    assert (11, 7, 5) in in_subspace and not any(shape.numel() >= inputs.numel() for shape in in_subspace)
    assert any(shape.numel() == inputs.numel() for shape in kept)


# Finite differences ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("rank", [0.5, "full"])
def test_finite_differences_in_float64(name: str, rank: Any) -> None:
    """Against double backward: errors of the order of the squared step, 1e-10, and of rounding over the step."""
    case = Case(name, rank)
    gradient, action, slopes = case.by_double_backward()
    oracle = case.finite_differences()
    direction = case.matrices_of_direction()
    with untouched(case.model, buffers=False):
        got = oracle.hessian_action(direction)
    assert_close(got, case.restricted(action), 1e-6)
    assert_close(oracle.gradient, case.restricted(gradient), 1e-6)
    assert_close([oracle.slopes(direction)], [slopes], 1e-6)
    assert_close([oracle.losses], [case.losses_at(0.0)[0].detach()], 1e-3)  # of the evaluation at W + step D
    fresh = case.finite_differences()
    assert_close([fresh.slopes(direction)], [slopes], 1e-6)
    assert fresh.gradient is None


def realistic(case: Case) -> Case:
    """A direction with as much of the gradient in it as of noise, as the auxiliary variable has."""
    gradient = case.gradient_at(0.0)
    length = join(gradient).norm() / join(case.direction).norm()
    case.direction = [(g + length * d).to(d.dtype).detach() for g, d in zip(gradient, case.direction, strict=True)]
    return case


@pytest.mark.parametrize("name", ["toy", "vit", "llama", "bert", "resnet"])
def test_finite_differences_in_float32(name: str) -> None:
    case = realistic(Case(name, dtype=torch.float32))
    gradient, action, slopes = case.by_double_backward()
    oracle = case.finite_differences()
    got = oracle.hessian_action(case.direction)
    assert all(g.dtype == torch.float32 for g in got)
    assert relative_error(got, case.restricted([a.float() for a in action])) < 0.02
    assert relative_error(oracle.gradient, case.restricted([g.float() for g in gradient])) < 0.002
    assert relative_error([oracle.slopes(case.direction)], [slopes]) < 0.02


@pytest.mark.parametrize("name", ["vit", "llama", "bert"])
def test_finite_differences_under_autocast(name: str) -> None:
    """bfloat16 keeps three digits, of which the difference loses most: the direction is what must survive."""
    case = realistic(Case(name, dtype=torch.float32))
    gradient, action, slopes = case.by_double_backward()
    case.autocast = True
    oracle = case.finite_differences()
    got = oracle.hessian_action(case.direction)
    assert all(g.dtype == torch.float32 for g in got)
    expected = case.restricted([a.float() for a in action])
    assert relative_error(got, expected) < 0.2 and cosine(got, expected) > 0.98
    expected = case.restricted([g.float() for g in gradient])
    assert relative_error(oracle.gradient, expected) < 0.05 and cosine(oracle.gradient, expected) > 0.995
    got_slopes = [oracle.slopes(case.direction)]
    assert relative_error(got_slopes, [slopes]) < 0.05 and cosine(got_slopes, [slopes]) > 0.998


def test_weights_are_perturbed_before_they_are_rounded() -> None:
    """1 + 3/1024 is 1 in bfloat16 and 1 + 5/1024 is 1 + 8/1024; a step of 2/1024 taken after rounding is no step."""
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1, bias=False)))
    with torch.no_grad():
        model[0][0].weight.fill_(1 + 3 / 1024)
    blocks = LowerBlocks(model, 1)
    blocks.bases = blocks.draw(0)
    inputs = torch.ones(1, 1, requires_grad=True)
    for step, expected in ((0.0, 1.0), (2 / 1024, 1 + 8 / 1024)):
        with torch.autocast("cpu", torch.bfloat16), blocks.shifted([torch.ones(1, 1)], torch.tensor(step)):
            output = model(inputs)
            (gradient,) = torch.autograd.grad(output.sum(), inputs)
        assert output.dtype == torch.bfloat16 and float(output.detach()) == float(gradient) == expected


@pytest.mark.parametrize("name", ["vit", "llama", "bert"])
def test_both_evaluations_see_the_same_dropout_masks(name: str) -> None:
    """Other masks would leave noise over the step, a hundred thousand times too much."""
    case = Case(name, dropout=0.3)
    torch.manual_seed(5)
    gradient, action, slopes = case.by_double_backward()
    after_one_forward = torch.get_rng_state()
    oracle = case.finite_differences()
    torch.manual_seed(5)
    got = oracle.hessian_action(case.direction)
    assert torch.equal(torch.get_rng_state(), after_one_forward)
    assert_close(got, case.restricted(action), 1e-6)
    assert_close(oracle.gradient, case.restricted(gradient), 1e-6)
    assert_close([oracle.slopes(case.direction)], [slopes], 1e-6)
    fresh = case.finite_differences()
    torch.manual_seed(5)
    assert_close([fresh.slopes(case.direction)], [slopes], 1e-6)
    assert torch.equal(torch.get_rng_state(), after_one_forward)
    torch.manual_seed(6)
    assert relative_error(case.finite_differences().hessian_action(case.direction), got) > 0.01  # masks do matter


def test_running_statistics_move_once() -> None:
    expected = Case("resnet")
    expected.losses_at(0.0)  # on a copy
    sample_losses("resnet", expected.model, expected.batch)
    initial = dict(make("resnet").double().named_buffers())
    for evaluate in (
        lambda case: gradient_at_weights(case.blocks, case),
        lambda case: case.finite_differences().hessian_action(case.direction),
        lambda case: DoubleBackward(case.blocks, case.separately).hessian_action(case.direction),
    ):
        case = Case("resnet")
        evaluate(case)
        for name, buffer in expected.model.named_buffers():
            tolerance = 1e-3 * float((buffer - initial[name]).abs().max())  # the pair's first is not quite at W
            torch.testing.assert_close(dict(case.model.named_buffers())[name], buffer, rtol=0, atol=tolerance)
        assert not torch.equal(initial["resnet.embedder.embedder.normalization.running_mean"], buffer)
    case = Case("resnet")
    with untouched(case.model):
        case.finite_differences().slopes(case.direction)


def test_running_statistics_move_once_with_the_bi_probe() -> None:
    case = Case("toy", rank=2)
    oracle = case.finite_differences()
    z = case.matrices_of_direction()
    bi_probe(oracle.hessian_action, z, case.blocks.bases, torch.Generator().manual_seed(0))
    oracle.slopes(z)
    assert int(case.model.calls) == 1


def test_buffers_are_preserved_when_the_model_fails() -> None:
    model = make("resnet")
    with untouched(model), pytest.raises(RuntimeError, match="stop"):
        with preserved_buffers(model):
            model(torch.randn(2, 1, 32, 32))
            raise RuntimeError("stop")


# Double backward ------------------------------------------------------------------------------------------------------


def dense(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, Hessian matrix and Jacobian of the sample losses by all weights, flattened and joined."""
    weights = {name: p.detach() for name, p in zip(case.blocks.names, case.blocks.parameters, strict=True)}
    sizes = [w.numel() for w in weights.values()]

    def losses(flat: Tensor) -> Tensor:
        parts = zip(weights.items(), flat.split(sizes), strict=True)
        values = {name: part.view_as(w) for (name, w), part in parts}
        logits = torch.func.functional_call(case.model, values, (case.batch["tokens"],))
        return F.cross_entropy(logits, torch.arange(NUM) % 5, reduction="none")

    flat = join(list(weights.values()))
    jacobian = torch.autograd.functional.jacobian(losses, flat)
    hessian = torch.autograd.functional.hessian(lambda f: (losses(f) * case.coefficients).sum(), flat)
    return case.coefficients @ jacobian, hessian, jacobian


@pytest.mark.parametrize("rank", [1, 2, 0.75, "full"])
@pytest.mark.parametrize("kind", ["double_backward", "finite_differences"])
def test_dense_hessian_of_every_kind_of_block(kind: str, rank: Any) -> None:
    case = Case("toy", rank)
    gradient, hessian, jacobian = dense(case)
    assert len(hessian) == 88 and torch.linalg.matrix_rank(hessian) > 40
    z = join(case.direction)
    shapes = [p.shape for p in case.blocks.parameters]

    def split(flat: Tensor) -> list[Tensor]:
        parts = flat.split([shape.numel() for shape in shapes])
        return case.restricted([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])

    exact = kind == "double_backward"
    oracle = DoubleBackward(case.blocks, case.separately) if exact else case.finite_differences()
    direction = case.matrices_of_direction()
    action = oracle.hessian_action(direction)
    tolerance = 1e-11 if exact else 1e-7
    assert_close(oracle.gradient, split(gradient), tolerance)
    assert_close(action, split(hessian @ z), tolerance)
    assert_close([oracle.slopes(direction)], [jacobian @ z], tolerance)


@pytest.mark.parametrize("name", ["vit", "llama", "tied", "bert", "resnet"])
def test_double_backward_against_difference_quotients(name: str) -> None:
    """With fused attention in the model: its math kernel is chosen, since the fused one cannot be differentiated twice."""
    case = Case(name)
    gradient, action, slopes = case.by_differences()
    with untouched(case.model, buffers=name != "resnet"):
        oracle = DoubleBackward(case.blocks, case.separately)
        direction = case.matrices_of_direction()
        got = oracle.hessian_action(direction)
    assert not any(t.requires_grad for t in (*got, *oracle.gradient, oracle.losses))
    assert_close(oracle.gradient, case.restricted(gradient), 1e-11)
    assert_close(got, case.restricted(action), 1e-6)
    assert_close([oracle.slopes(direction)], [slopes], 1e-8)
    other = DoubleBackward(case.blocks, case.separately)
    assert_close([other.slopes(direction)], [slopes], 1e-8)  # without a Hessian action before
    assert_close(other.hessian_action(direction), got, 1e-11)  # and the graph is still there


def test_a_graph_that_is_not_retained_is_good_for_one_action() -> None:
    case = Case("vit")
    direction = case.matrices_of_direction()
    kept, freed = (DoubleBackward(case.blocks, case.separately, retain_graph=retain) for retain in (True, False))
    assert_close(freed.hessian_action(direction), kept.hessian_action(direction), 1e-14)
    assert_close([freed.slopes(direction)], [kept.slopes(direction)], 1e-14)
    assert_close(freed.gradient, kept.gradient, 1e-14)
    kept.hessian_action(direction)
    with pytest.raises((RuntimeError, TypeError)):
        freed.hessian_action(direction)


# Both -----------------------------------------------------------------------------------------------------------------


def oracle_of(kind: str, case: Case) -> FiniteDifferences | DoubleBackward:
    return DoubleBackward(case.blocks, case.separately) if kind == "double_backward" else case.finite_differences()


KINDS = ["finite_differences", "double_backward"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])  # without dropout attention is fused
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_checkpointing_gives_the_same_numbers(kind: str, name: str, dropout: float) -> None:
    results = []
    for checkpointing in (False, True):
        case = Case(name, dropout=dropout)
        if checkpointing:
            case.model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(4)
        oracle = oracle_of(kind, case)
        action = oracle.hessian_action(case.direction)
        _, gradient = gradient_at_weights(case.blocks, case)
        results.append([*action, *oracle.gradient, oracle.slopes(case.direction), *gradient, torch.get_rng_state()])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-9)


class LargeVocabulary(Case):
    """Losses by ``weighted_loss`` and ``unit_losses``, with label smoothing."""

    def __call__(self) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            loss, units = weighted_loss(
                self.model, self.batch, "sample", lambda counts: self.coefficients, label_smoothing=0.1
            )
        return loss, units.losses

    def separately(self) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            losses = unit_losses(self.model, self.batch, "sample", label_smoothing=0.1).losses
        return losses.to(self.coefficients.dtype), self.coefficients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("llama", {}), ("tied", {}), ("llama", {"modules": ["lm_head", "q_proj"]}), ("llama", {"rest": "frozen"})],
)
def test_output_embedding_in_chunks_gives_the_same_numbers(
    kind: str, name: str, kwargs: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output embedding in full space, tied, in a subspace, and constant."""
    monkeypatch.setattr(large_vocabulary, "CHUNK", 16 * VOCABULARY)  # of 5 * 12 rows
    monkeypatch.setattr(large_vocabulary, "MIN_ROWS", 1)
    results = []
    for chunks in (False, True):
        monkeypatch.setattr(losses_module, "LARGE_VOCABULARY", VOCABULARY if chunks else VOCABULARY + 1)
        case = LargeVocabulary(name, **kwargs)
        with torch.no_grad():
            case()
        assert hasattr(case.model, "_bilevel_scores_logits") == chunks
        oracle = oracle_of(kind, case)
        direction = case.matrices_of_direction()
        action = oracle.hessian_action(direction)
        _, gradient = gradient_at_weights(case.blocks, case)
        fresh = oracle_of(kind, case)
        results.append([*action, *oracle.gradient, oracle.slopes(direction), fresh.slopes(direction), *gradient])
    # Differences of gradients lose digits of what is the same to the last one or two.
    tolerance = 1e-10 if kind == "double_backward" else 1e-9
    for whole, chunked in zip(*results, strict=True):
        assert whole.abs().max() > 1e-5
        torch.testing.assert_close(chunked, whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_output_embedding_in_chunks_in_bfloat16(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_vocabulary, "CHUNK", 16 * VOCABULARY)
    monkeypatch.setattr(large_vocabulary, "MIN_ROWS", 1)
    results = []
    for chunks in (False, True):
        monkeypatch.setattr(losses_module, "LARGE_VOCABULARY", VOCABULARY if chunks else VOCABULARY + 1)
        case = LargeVocabulary("llama", dtype=torch.float32)
        case.autocast = True
        with torch.no_grad():
            case()
        oracle = oracle_of(kind, case)
        action = oracle.hessian_action(case.matrices_of_direction())
        assert all(h.isfinite().all() for h in action)
        results.append((action, oracle.gradient))
    (action, gradient), (chunked_action, chunked_gradient) = results
    assert relative_error(chunked_gradient, gradient) < 0.02
    assert relative_error(chunked_action, action) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_estimators_from_inside_the_subspace(kind: str) -> None:
    """Both estimators, given the dense Hessian, are what they are given an evaluation of the model."""
    case = Case("toy", rank=2)
    _, hessian, jacobian = dense(case)
    z, shapes = case.matrices_of_direction(), [p.shape for p in case.blocks.parameters]

    def action(direction: list[Tensor]) -> list[Tensor]:
        parts = (hessian @ join(direction)).split([shape.numel() for shape in shapes])
        return case.restricted([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])

    oracle, bases, other = oracle_of(kind, case), case.blocks.bases, case.blocks.draw(9)

    def signs() -> torch.Generator:
        return torch.Generator().manual_seed(1)

    tolerance = 1e-11 if kind == "double_backward" else 1e-6
    assert_close(bi_probe(oracle.hessian_action, z, bases, signs()), bi_probe(action, z, bases, signs()), tolerance)
    assert_close(two_sided(oracle.hessian_action, z, bases, other), two_sided(action, z, bases, other), tolerance)
    assert_close([oracle.slopes(z)], [jacobian @ join(z)], tolerance)  # along z itself, not along what was probed
    assert relative_error(lift(oracle.hessian_action(z), bases), z) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_direction_of_zero(kind: str, dtype: torch.dtype) -> None:
    case = Case("vit", dtype=dtype)
    zero = [torch.zeros_like(m) for m in case.blocks.matrices()]
    oracle = oracle_of(kind, case)
    assert all(not h.any() for h in oracle.hessian_action(zero))
    assert not oracle.slopes(zero).any()
    _, gradient = gradient_at_weights(case.blocks, case)
    assert_close(oracle.gradient, gradient, 1e-6 if dtype == torch.float32 else 1e-12)
    fresh = oracle_of(kind, case)
    assert not fresh.slopes(zero).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_direction_of_another_dtype_on_its_own(kind: str) -> None:
    """The auxiliary may be kept in bfloat16: what is asked for is the action on the rounded direction."""
    case = Case("vit", dtype=torch.float32)
    rounded = [d.to(torch.bfloat16) for d in case.direction]
    action = oracle_of(kind, case).hessian_action(rounded)
    expected = oracle_of(kind, case).hessian_action([d.float() for d in rounded])
    assert all(a.dtype == torch.float32 for a in action)
    assert_close(action, expected, 0.02)


class Counter:
    def __init__(self, model: nn.Module) -> None:
        self.counts = {True: 0, False: 0}
        model.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        self.counts[torch.is_grad_enabled()] += 1


def count(case: Case, evaluate: Callable[[], Any]) -> tuple[int, int]:
    """Forward passes with and without gradients."""
    counter = Counter(case.model)
    evaluate()
    return counter.counts[True], counter.counts[False]


@pytest.mark.parametrize(
    ("kind", "estimator", "expected"),
    [
        ("finite_differences", "one_sided", (2, 0)),
        ("finite_differences", "bi_probe", (4, 2)),
        ("finite_differences", "two_sided", (2, 2)),
        ("double_backward", "one_sided", (1, 0)),
        ("double_backward", "bi_probe", (1, 0)),
        ("double_backward", "two_sided", (1, 0)),
    ],
)
def test_number_of_passes(kind: str, estimator: str, expected: tuple[int, int]) -> None:
    case = Case("toy", rank=2)
    z, bases = case.matrices_of_direction(), case.blocks.bases

    def evaluate() -> None:
        oracle = oracle_of(kind, case)
        if estimator == "one_sided":
            oracle.hessian_action(z)
        elif estimator == "bi_probe":
            bi_probe(oracle.hessian_action, z, bases, torch.Generator().manual_seed(0))
        else:
            two_sided(oracle.hessian_action, z, bases, case.blocks.draw(1))
        oracle.slopes(z)

    assert count(case, evaluate) == expected


def test_a_gradient_alone_is_one_pass() -> None:
    case = Case("toy", rank=2)
    assert count(case, lambda: gradient_at_weights(case.blocks, case)) == (1, 0)


EVALUATIONS: dict[str, Callable[[Case], Any]] = {
    "gradient_at_weights": lambda case: gradient_at_weights(case.blocks, case),
    "hessian_action": lambda case: case.finite_differences().hessian_action(case.direction),
    "slopes": lambda case: case.finite_differences().slopes(case.direction),
    "double_backward": lambda case: DoubleBackward(case.blocks, case.separately).hessian_action(case.direction),
}


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("kwargs", [{"rank": 0.5}, {"rank": 0.5, "rest": "frozen"}, {"rank": "full"}])
@pytest.mark.parametrize("name", ["toy", "tied", "resnet"])
def test_an_evaluation_leaves_no_trace(name: str, kwargs: dict, evaluation: str) -> None:
    case = Case(name, **kwargs)
    leaves = [leaf.detach().clone() for leaf in case.blocks.leaves]
    direction = [d.clone() for d in case.direction]
    with untouched(case.model, buffers=False):
        EVALUATIONS[evaluation](case)
    assert all(torch.equal(a, b) for a, b in zip(leaves, case.blocks.leaves, strict=True))
    assert all(leaf.grad is None for leaf in case.blocks.leaves)
    assert all(torch.equal(a, b) for a, b in zip(direction, case.direction, strict=True))


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("name", ["toy", "resnet"])
def test_a_failed_evaluation_leaves_no_trace(name: str, fails_at: int, evaluation: str) -> None:
    """In the middle of a forward pass, of the first evaluation and of the second."""
    case = Case(name)
    calls = itertools.count(1)
    late = list(case.model.modules())[-1]  # the head

    def fail(module: nn.Module, inputs: Any) -> None:
        if next(calls) == fails_at:
            raise RuntimeError("out of memory")

    late.register_forward_pre_hook(fail)
    buffers = evaluation == "slopes"
    if fails_at == 2 and evaluation in ("gradient_at_weights", "double_backward"):
        EVALUATIONS[evaluation](case)
    with untouched(case.model, buffers=buffers), pytest.raises(RuntimeError, match="out of memory"):
        EVALUATIONS[evaluation](case)
    with untouched(case.model, buffers=False):
        EVALUATIONS[evaluation](case)  # and works afterwards
