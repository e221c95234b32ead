"""Derivatives of a model's losses by what the lower level trains: gradients in subspaces, Hessian actions, slopes.

``LowerBlocks`` lets a model compute with ``W + step * D`` without writing to ``W``. ``FiniteDifferences`` and
``DoubleBackward`` answer the same three questions about a weighted batch: its gradient, its Hessian action along a direction,
and the directional derivative of every sample's loss.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_bilevel.core.subspace import Bases, haar_basis, restrict

RELATIVE_STEP = {torch.float32: 1e-4, torch.float64: 1e-5, torch.bfloat16: 1e-3}
"""Length of a finite difference over the norm of the weights, by the dtype that the model computes in (measured)."""

WeightedLoss = Callable[[], tuple[Tensor, Tensor]]
"""Runs the model: the loss that is trained, a scalar, and the loss of each sample ``(n,)``, detached."""

SeparateLosses = Callable[[], tuple[Tensor, Tensor]]
"""Runs the model: the loss of each sample ``(n,)``, differentiable twice, and its coefficient ``(n,)`` in the loss that is trained."""

_MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LowerBlocks:
    """The lower variable: every parameter that is trained, matrices in a random subspace and the rest in full space.

    A block in a subspace is trained through its *leaf*, a coordinate matrix outside of the module tree that is zero except
    between an optimizer's step and ``merge``; so the model stays a normal model. For ``nn.Linear`` the layer then keeps its
    input times the basis, r wide, instead of its input for the backward pass. Weights of convolutions count as matrices of
    shape (out, everything else); they save gradient and optimizer state, not activations.

    A linear layer in a subspace must be called: what a model computes from its ``weight`` itself gives no gradient.
    ``gradient`` looks for that once.

    Args:
        model: The model without wrappers. Parameters without ``requires_grad`` are constants.
        rank: ``"full"``, a number, or a fraction of a layer's input size in (0, 1).
        modules: Names, or ends of names, of the modules to put into subspaces; None for all linear layers and convolutions
            except output heads and layers with tied weights.
        rest: ``"full"`` to train all other parameters in full space, ``"frozen"`` to leave them as they are.

    Attributes:
        names: Name of each block's parameter.
        parameters: The parameters.
        leaves: What the optimizer steps on: coordinates ``(n, r)``, or the parameter itself in full space.
        bases: ``(m, r)`` or None, per block.

    Raises:
        ValueError: If nothing can be projected, a rank is larger than a layer, ``modules`` matches nothing, or weights are
            quantised or kept in half precision.
    """

    def __init__(
        self, model: nn.Module, rank: str | int | float, modules: list[str] | None = None, rest: str = "full"
    ) -> None:
        self.model = model
        self.rank = rank
        owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    owners.setdefault(parameter, []).append((module, name))
        matrices = {} if rank == "full" else _projectable(model, owners, modules)
        if rank != "full" and not matrices:
            _refuse_unprojectable(model, modules)
        self.names, self.parameters, self._layers, frozen = [], [], [], []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (rest == "full" or parameter in matrices):
                self.names.append(name)
                self.parameters.append(parameter)
                self._layers.append(matrices.get(parameter))
            elif parameter.requires_grad:
                frozen.append(parameter)
        if not self.parameters:
            reason = "no parameter with `requires_grad`"
            if rest == "frozen":
                reason = "nothing in a subspace, and `rest='frozen'` leaves all else as it is: use `rest='full'`"
            raise ValueError(f"`{type(model).__name__}` has nothing to train: {reason}.")
        half = [
            n for n, p in zip(self.names, self.parameters, strict=True) if p.dtype in (torch.float16, torch.bfloat16)
        ]
        if half:
            raise ValueError(
                f"Weights are kept in half precision (`{half[0]}`), which loses small updates and finite differences. Load "
                "the model with `dtype=torch.float32` and set `bf16=True` for mixed precision."
            )
        self._owners = [owners[parameter] for parameter in self.parameters]
        self._frozen = [(parameter, owners[parameter]) for parameter in frozen]
        self.bases: Bases = [None] * len(self.parameters)
        self.leaves: list[Tensor] = [
            parameter if layer is None else self._new_leaf(name, parameter)
            for name, parameter, layer in zip(self.names, self.parameters, self._layers, strict=True)
        ]
        self._fast = [
            type(layer) is nn.Linear and "forward" not in vars(layer) and not layer._forward_hooks
            for layer in self._layers
        ]
        self._looked = False  # for layers that no gradient reaches

    def _new_leaf(self, name: str, parameter: Tensor) -> Tensor:
        rows, dim = parameter.flatten(1).shape
        rank = max(1, round(self.rank * dim)) if isinstance(self.rank, float) else self.rank
        if rank > dim:
            raise ValueError(
                f"`rank={rank}` is larger than the input size {dim} of `{name}`. Lower it, give a fraction such as 0.125, "
                "or name the layers to project in `modules`."
            )
        return torch.zeros(rows, rank, dtype=parameter.dtype, device=parameter.device, requires_grad=True)

    @property
    def projected(self) -> list[int]:
        """Indices of the blocks in a subspace."""
        return [i for i, layer in enumerate(self._layers) if layer is not None]

    def matrices(self) -> list[Tensor]:
        """Return every block as the matrix that a basis acts on, full-space blocks as they are; no copies."""
        pairs = zip(self.parameters, self._layers, strict=True)
        return [p.detach() if layer is None else p.detach().flatten(1) for p, layer in pairs]

    def draw(self, seed: int) -> Bases:
        """Draw a basis for every block in a subspace; the same for the same seed on every device."""
        generator = torch.Generator().manual_seed(seed)
        return [
            None if layer is None else haar_basis(p[0].numel(), leaf.shape[1], generator, p.dtype).to(p.device)
            for p, leaf, layer in zip(self.parameters, self.leaves, self._layers, strict=True)
        ]

    @torch.no_grad()
    def merge(self, decay: float | list[float] = 0.0) -> None:
        """Add what the optimizer has written into the leaves to the weights, and zero the leaves.

        Args:
            decay: Decoupled weight decay of this step, learning rate times rate, taken off the projected weights first: a
                leaf is zero before the step, so the optimizer's own decay does nothing to it.
        """
        decays = decay if isinstance(decay, list) else [decay] * len(self.projected)
        for i, rate in zip(self.projected, decays, strict=True):
            leaf, weight = self.leaves[i], self.parameters[i]
            if weight.ndim == 2:
                weight.addmm_(leaf, self.bases[i].T, beta=1 - rate)
            else:  # a convolution's, which is no matrix in memory where channels come last
                weight.mul_(1 - rate).add_((leaf @ self.bases[i].T).view(weight.shape))
            leaf.zero_()
            leaf.grad = None

    @contextmanager
    def shifted(self, direction: list[Tensor] | None = None, step: Tensor | None = None) -> Iterator[list[Tensor]]:
        """Let the model compute with ``W + step * direction``, forward and backward; W is read only.

        Args:
            direction: Full-size, one tensor per block, any device and dtype; None for W itself.
            step: Scalar tensor.

        Yields:
            The tensors to differentiate by, one per block: leaves, or stand-ins for full-space parameters.
        """
        stand_ins, swapped, patched = [], [], []
        try:
            for i, parameter in enumerate(self.parameters):
                along = None if direction is None else direction[i]
                if self._fast[i]:
                    layer = self._layers[i]
                    layer.forward = partial(self._subspace_linear, i, along, step)
                    patched.append(layer)
                    stand_ins.append(self.leaves[i])
                    continue
                weight = _shift(parameter.detach(), along, step)
                if self._layers[i] is None:
                    weight.requires_grad_()
                    stand_ins.append(weight)
                else:
                    lifted = self.leaves[i] @ self.bases[i].T
                    weight = weight + lifted.view_as(weight)
                    stand_ins.append(self.leaves[i])
                self._swap(self._owners[i], weight, swapped)
            for parameter, owners in self._frozen:
                self._swap(owners, parameter.detach(), swapped)
            yield stand_ins
        finally:
            for module, name, parameter in swapped:
                module._parameters[name] = parameter
            for layer in patched:
                del layer.forward  # uncovers the method of the class

    def gradient(self, loss: Tensor, variables: list[Tensor]) -> list[Tensor]:
        """Differentiate a loss that was computed with shifted weights.

        Args:
            loss: Scalar.
            variables: What ``shifted`` gave; still inside of it.

        Returns:
            The gradient in coordinates, per block; zeros where none arrives.

        Raises:
            ValueError: In the first call, if the model reads the weights of a layer in a subspace without calling the layer.

        Cost: a backward pass. The first call warns of layers in subspaces that no gradient reaches.
        """
        if self._looked:
            return _gradients(loss, variables)
        # Gradients by the weights themselves arrive only where they are read: else this computes nothing more.
        fast = [i for i, is_fast in enumerate(self._fast) if is_fast]
        weights = [self.parameters[i] for i in fast]
        gradients = list(torch.autograd.grad(loss, [*variables, *weights], allow_unused=True))
        read = [i for i, g in zip(fast, gradients[len(variables) :], strict=True) if g is not None]
        if read:
            raise ValueError(
                f"`{type(self.model).__name__}` reads the weights of layers without calling them: {self._listed(read)}. In a "
                "subspace they would get no gradient. Leave them out by naming the layers to project in `modules`, or use "
                "`rank='full'`."
            )
        gradients = gradients[: len(variables)]
        missing = [i for i in self.projected if gradients[i] is None]
        self._looked = True
        if missing:
            warnings.warn(
                f"In the first training step no gradient reached {len(missing)} of {len(self.projected)} layers in subspaces: "
                f"{self._listed(missing)}. If the loss does not depend on them, or only for other samples, nothing is lost. "
                "Otherwise they are not trained: leave them out by naming the layers to project in `modules`, or use "
                "`rank='full'`.",
                stacklevel=2,
            )
        return _own(gradients, variables)

    def _listed(self, blocks: list[int]) -> str:
        names = [f"`{self.names[i].removesuffix('.weight')}`" for i in blocks]
        return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

    @contextmanager
    def full_space(self, stand_ins: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
        """Let the model compute with stand-ins for all its trained weights, to differentiate twice by.

        Args:
            stand_ins: Those of an earlier call, to compute with again; None for new ones.

        Yields:
            The stand-ins, full size, sharing memory with the weights.
        """
        swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
        if stand_ins is None:
            stand_ins = [parameter.detach().requires_grad_() for parameter in self.parameters]
        try:
            for stand_in, owners in zip(stand_ins, self._owners, strict=True):
                self._swap(owners, stand_in, swapped)
            for parameter, owners in self._frozen:
                self._swap(owners, parameter.detach(), swapped)
            yield stand_ins
        finally:
            for module, name, parameter in swapped:
                module._parameters[name] = parameter

    @staticmethod
    def _swap(owners: list[tuple[nn.Module, str]], weight: Tensor, swapped: list) -> None:
        for module, name in owners:
            swapped.append((module, name, module._parameters[name]))
            module._parameters[name] = weight

    def _subspace_linear(self, i: int, along: Tensor | None, step: Tensor | None, inputs: Tensor) -> Tensor:
        weight = self.parameters[i].detach()
        return _SubspaceLinear.apply(inputs, weight, self._layers[i].bias, self.leaves[i], self.bases[i], along, step)


class _SubspaceLinear(torch.autograd.Function):
    """A linear layer with the weight W + step D, and the gradient of B where W stands for W + B P'.

    Keeps the input times P for the backward pass, not the input; W + step D is rebuilt, not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        leaf: Tensor,
        basis: Tensor,
        direction: Tensor | None,
        step: Tensor | None,
    ) -> Tensor:
        kind = inputs.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            inputs, bias = inputs.to(dtype), None if bias is None else bias.to(dtype)
        ctx.save_for_backward(inputs @ basis.to(inputs.dtype), weight, basis, direction, step)
        # Perturbed in the weights' own dtype and cast afterwards: in bfloat16 the step would be rounded away.
        outputs = F.linear(inputs, _shift(weight, direction, step).to(inputs.dtype), bias)
        # Of sequences they are a view, which no one could change in place.
        return torch.ops.aten._unsafe_view(outputs, outputs.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projected, weight, basis, direction, step = ctx.saved_tensors
        needs_inputs, _, needs_bias, needs_leaf, *_ = ctx.needs_input_grad
        grad_inputs = grad_bias = grad_leaf = None
        rows = grad.flatten(0, -2)
        if needs_inputs:
            grad_inputs = grad @ _shift(weight, direction, step).to(grad.dtype)
        if needs_bias:
            grad_bias = rows.sum(0)
        if needs_leaf:
            # The product of the transposes: faster on a CPU where outputs are wider than inputs.
            grad_leaf = (projected.flatten(0, -2).T @ rows).T.to(weight.dtype, memory_format=torch.contiguous_format)
        return grad_inputs, None, grad_bias, grad_leaf, None, None, None


def _shift(weight: Tensor, direction: Tensor | None, step: Tensor | None) -> Tensor:
    if direction is None:
        return weight.detach()
    return torch.addcmul(weight, direction.to(weight).view_as(weight), step)


def gradient_at_weights(blocks: LowerBlocks, compute: WeightedLoss) -> tuple[Tensor, list[Tensor]]:
    """Compute the restricted gradient of a weighted batch at W.

    Args:
        blocks: The lower variable.
        compute: Runs the model on the batch.

    Returns:
        Sample losses ``(n,)``, detached, and the gradient in coordinates, per block.

    Cost: one forward and backward pass.
    """
    with blocks.shifted() as variables:
        loss, losses = compute()
        return losses, blocks.gradient(loss, variables)


class FiniteDifferences:
    r"""Gradient, Hessian action and slopes of a weighted batch from evaluations at W + εD and W - εD.

    With :math:`g = \sum_i c_i \ell_i` the antithetic pair gives, up to O(ε²): the gradient, half the sum of the two
    gradients; :math:`H[D]`, their difference over 2ε; and :math:`\langle\nabla\ell_i, D\rangle`, the difference of the
    sample losses over 2ε. All gradients are taken in the subspace only, no graph is differentiated twice, so fused attention
    works, and W is never written. All evaluations see the same dropout masks, and buffers (running statistics) move once.

    Args:
        blocks: The lower variable.
        compute: Runs the model on the batch.
        relative_step: ε‖D‖ over the norm of the weights; see ``RELATIVE_STEP``.
        weights_norm: Norm of the weights, a scalar tensor.

    Attributes:
        losses: Sample losses at W, half the sum of the first pair's, detached.
        gradient: In coordinates, from the first pair.

    Cost: one pair, two forward and backward passes, for each Hessian action; ``slopes`` along a direction that has had its
    pair is free, else two forward passes.
    """

    def __init__(self, blocks: LowerBlocks, compute: WeightedLoss, relative_step: float, weights_norm: Tensor) -> None:
        self.blocks = blocks
        self.compute = compute
        self.length = relative_step * weights_norm
        self.gradient: list[Tensor] | None = None
        self._before: tuple[torch.device, Tensor, Tensor | None] | None = None  # randomness of the first evaluation
        self._seen: tuple[list[Tensor], Tensor] | None = None

    def _step(self, direction: list[Tensor]) -> Tensor:
        norm = torch.nn.utils.get_total_norm(direction).to(self.length)
        # A direction of zero, the auxiliary's start, has no length to scale: any step evaluates W itself.
        return torch.where(norm > 0, self.length / norm.clamp(min=torch.finfo(norm.dtype).tiny), 1.0)

    def hessian_action(self, direction: list[Tensor]) -> list[Tensor]:
        """Return the restricted H[D]; the first call also sets ``gradient`` and ``losses``."""
        self._seen = None  # a direction of full size, which need not live beside the next
        step = self._step(direction)
        if self._before is None:
            self._before = random_state(self.blocks.parameters[0].device)
            plus, plus_losses = self._evaluate(direction, step)
        else:
            with replayed(self.blocks.model, self._before):
                plus, plus_losses = self._evaluate(direction, step)
        with replayed(self.blocks.model, self._before):
            minus, minus_losses = self._evaluate(direction, -step)
        self._seen = (direction, (plus_losses - minus_losses) / (2 * step))
        # In place, block by block: full-space blocks may be large.
        for a, b in zip(plus, minus, strict=True):
            b.sub_(a)
            a.add_(b, alpha=0.5)  # half the sum
            b.mul_(-0.5 / step)
        if self.gradient is None:
            self.gradient, self.losses = plus, (plus_losses + minus_losses) / 2
        return minus

    def _evaluate(self, direction: list[Tensor], step: Tensor) -> tuple[list[Tensor], Tensor]:
        with self.blocks.shifted(direction, step) as variables:
            loss, losses = self.compute()
            return self.blocks.gradient(loss, variables), losses

    @torch.no_grad()
    def slopes(self, direction: list[Tensor]) -> Tensor:
        """Return the derivative of every sample's loss along a direction, ``(n,)``."""
        if self._seen is not None and self._seen[0] is direction:
            return self._seen[1]
        before = self._before if self._before is not None else random_state(self.blocks.parameters[0].device)
        step, losses = self._step(direction), []
        for signed in (step, -step):
            with replayed(self.blocks.model, before), self.blocks.shifted(direction, signed):
                losses.append(self.compute()[1])
        return (losses[0] - losses[1]) / (2 * step)


class DoubleBackward:
    """The same three answers, exact, by differentiating the gradient once more, in full space.

    For comparison and for small models: the graph of the gradient holds several times the memory of a training step, and
    attention must be computed without fused kernels, which this class selects.

    Args:
        blocks: The lower variable.
        compute: Runs the model on the batch.
        retain_graph: Keep the graph for more than one Hessian action. Without it one action, and slopes along the same
            direction, are all there is.

    Attributes:
        losses: Sample losses, detached.
        gradient: In coordinates.

    Cost: a forward and backward pass, and about two more for each Hessian action.
    """

    def __init__(self, blocks: LowerBlocks, compute: SeparateLosses, retain_graph: bool = True) -> None:
        self.blocks = blocks
        self._retain_graph = retain_graph
        self._seen: tuple[list[Tensor], Tensor] | None = None
        with blocks.full_space() as self._variables, sdpa_kernel(SDPBackend.MATH):
            losses, coefficients = compute()
            self._coefficients = coefficients.detach().requires_grad_()
            loss = (losses * self._coefficients).sum()
            self._gradient = torch.autograd.grad(
                loss, self._variables, create_graph=True, allow_unused=True, materialize_grads=True
            )
        self.losses = losses.detach()
        self.gradient = self._restrict([g.detach() for g in self._gradient])

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        """Let gradient checkpointing run parts of the model again as they were run."""
        with self.blocks.full_space(self._variables), sdpa_kernel(SDPBackend.MATH):
            yield

    def _restrict(self, full: list[Tensor]) -> list[Tensor]:
        pairs = zip(full, self.blocks.bases, strict=True)
        return restrict([g if basis is None else g.flatten(1) for g, basis in pairs], self.blocks.bases)

    def _along(self, direction: list[Tensor]) -> Tensor:
        pairs = zip(self._gradient, direction, strict=True)
        return sum((g * d.to(g).view_as(g)).sum() for g, d in pairs)

    def hessian_action(self, direction: list[Tensor]) -> list[Tensor]:
        """Return the restricted H[D]; slopes along the same direction come with it."""
        along = self._along(direction)
        variables = [*self._variables, self._coefficients]
        if not self._retain_graph:
            self._gradient = None  # what is differentiated is freed on the way
        with self._recomputing():
            *full, slopes = _gradients(along, variables, retain_graph=self._retain_graph)
        self._seen = (direction, slopes)
        return self._restrict(full)

    def slopes(self, direction: list[Tensor]) -> Tensor:
        """Return the derivative of every sample's loss along a direction, ``(n,)``."""
        if self._seen is not None and self._seen[0] is direction:
            return self._seen[1]
        with self._recomputing():
            (slopes,) = _gradients(self._along(direction), [self._coefficients], retain_graph=True)
        return slopes


def _gradients(loss: Tensor, variables: list[Tensor], retain_graph: bool = False) -> list[Tensor]:
    gradients = torch.autograd.grad(loss, variables, retain_graph=retain_graph, allow_unused=True)
    # Not `materialize_grads`, whose zeros ask for gradients in older versions of torch.
    return _own(gradients, variables)


def _own(gradients: Sequence[Tensor | None], variables: list[Tensor]) -> list[Tensor]:
    """Give every variable a gradient that may be written over: zeros where none came, a copy of one that two of them share."""
    owned: dict[int, Tensor] = {}
    for variable, gradient in zip(variables, gradients, strict=True):
        if gradient is None:
            gradient = torch.zeros_like(variable)
        elif id(gradient) in owned:  # autograd gives both terms of a sum the same tensor
            gradient = gradient.clone()
        owned[id(gradient)] = gradient
    return list(owned.values())


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Keep a model's buffers, such as running statistics, as they are."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def random_state(device: torch.device) -> tuple[torch.device, Tensor, Tensor | None]:
    """Return the state of the global generators, for ``replayed``."""
    own = None if device.type in ("cpu", "meta") else torch.get_device_module(device).get_rng_state(device)
    return device, torch.get_rng_state(), own


def restore_random_state(state: tuple[torch.device, Tensor, Tensor | None]) -> None:
    """Set the global generators to a state from ``random_state``."""
    device, cpu, own = state
    torch.set_rng_state(cpu)
    if own is not None:
        torch.get_device_module(device).set_rng_state(own, device)


@contextmanager
def replayed(model: nn.Module, state: tuple[torch.device, Tensor, Tensor | None]) -> Iterator[None]:
    """Repeat the randomness since a state, and keep the model's buffers as they are."""
    restore_random_state(state)
    with preserved_buffers(model):
        yield


def _projectable(
    model: nn.Module, owners: dict[nn.Parameter, list[tuple[nn.Module, str]]], modules: list[str] | None
) -> dict[nn.Parameter, nn.Module]:
    """Find the layers whose weights go into subspaces, by weight."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    backbone = set(getattr(model, "base_model", model).modules())
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, _MATRICES) or weight not in owners or len(owners[weight]) > 1:
            continue
        wanted = any(name == end or name.endswith(f".{end}") for end in modules or ())
        # A classifier is too small to gain from it; the output embedding of a language model is embedding as much as layer.
        is_classifier = module not in backbone and weight.shape[0] == num_labels
        is_head = module is output or is_classifier or "." not in name
        if wanted or modules is None and not is_head:
            found[weight] = module
    return found


def _refuse_unprojectable(model: nn.Module, modules: list[str] | None) -> None:
    name = type(model).__name__
    quantised = [n for n, p in model.named_parameters() if not p.is_floating_point()]
    if quantised:
        raise ValueError(
            f"The weights of `{name}` are quantised (`{quantised[0]}`) and cannot be trained in a subspace. Load the model "
            "in float32, or add LoRA adapters with PEFT; they are trained in full space."
        )
    trainable = [
        n
        for n, m in model.named_modules()
        if isinstance(m, _MATRICES) and m.weight is not None and m.weight.requires_grad
    ]
    asked = "" if modules is None else f" that `modules={modules}` names"
    raise ValueError(
        f"`{name}` has no linear layer or convolution with trainable weights{asked} to put into a subspace. Trainable ones: "
        f"{', '.join(trainable[:8]) or 'none'}; those outside any block count as heads, and stay. Name some of them in `modules`, or "
        "use `rank='full'`."
    )
