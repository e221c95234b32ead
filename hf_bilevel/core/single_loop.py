r"""Single-loop bilevel optimisation: the lower variable y, the auxiliary z and the upper variable x move together.

For :math:`\min_x f(x, y^*(x))` with :math:`y^*(x) = \arg\min_y g(x, y)` the hypergradient is :math:`\nabla_x f -
\nabla^2_{xy} g\,z` where :math:`\nabla^2_{yy} g\,z = \nabla_y f`. Neither the lower problem nor the linear system is
solved: each takes one stochastic step for every step of x, and a moving average of the hypergradient removes the noise
(MA-SOBA). With a random subspace for every matrix-shaped block of y the steps of y and z see restricted gradients only
(BROS); y and z themselves stay full size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_bilevel.core.subspace import Bases, haar_basis, lift, one_sided, restrict

CURVATURE_MEMORY = 0.99
"""How much of the largest curvature seen is remembered from one auxiliary step to the next."""


class Auxiliary:
    r"""The auxiliary variable z: a running solution of :math:`(H + \delta I)\,z = \nabla_y f`, full size.

    One step is :math:`z \leftarrow z - \gamma\,(\tilde P(\hat h - b) + \delta z)` with the coordinates :math:`\hat h` of
    the estimated Hessian action on z and :math:`b` of the upper gradient. The restricted terms are amplified by up to
    m / r, so a block in a subspace takes :math:`\gamma = (r/m)\,\gamma_0`, which leaves the solution where it is.

    Without a learning rate, :math:`\gamma_0 = 1/(2(\hat L + \delta))`, where :math:`\hat L` is the largest
    :math:`\lVert\hat h\rVert/\lVert z\rVert` of recent steps: a z that is about to diverge aligns with the largest
    curvature and so lowers its own step. That keeps z bounded and its step as long as it may be; z then settles only up to
    an oscillation along the largest curvature, which the moving average of the hypergradient damps. A learning rate below
    :math:`2/(L + \delta)` converges exactly. A network's Hessian has negative curvature, along which z would grow without
    end; the damping must exceed it.

    Args:
        blocks: One tensor for each block of y; copied shapes, zeros to begin with.
        dtype: Of the stored z. In bfloat16 steps are rounded stochastically, since nearest rounding would lose them.
        device: Where z is kept; None for each block's own device.
        learning_rate: :math:`\gamma_0`, or None for the rule above.
        damping: :math:`\delta`, relative to :math:`\hat L` without a learning rate, absolute with one; not negative.

    Example:
        >>> hessian, upper_gradient = torch.diag(torch.tensor([1.0, 4.0])), torch.tensor([[1.0, 2.0]])
        >>> auxiliary = Auxiliary([torch.zeros(1, 2)], learning_rate=0.2)
        >>> for _ in range(100):
        ...     auxiliary.step([auxiliary.blocks[0] @ hessian], [upper_gradient], [None])
        >>> auxiliary.blocks[0]
        tensor([[1.0000, 0.5000]])
    """

    def __init__(
        self,
        blocks: list[Tensor],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        learning_rate: float | None = None,
        damping: float = 0.0,
    ) -> None:
        self.blocks = [torch.zeros_like(b, dtype=dtype, device=device, requires_grad=False) for b in blocks]
        self.learning_rate = learning_rate
        self.damping = damping
        home = blocks[0]
        self.curvature = torch.zeros((), dtype=torch.promote_types(home.dtype, torch.float32), device=home.device)

    def norm(self) -> Tensor:
        """Return the norm of z over all blocks, on the device of the first one's gradients."""
        return _norm(self.blocks).to(self.curvature)

    @torch.no_grad()
    def step(
        self,
        hessian: list[Tensor],
        upper_gradient: list[Tensor],
        bases: Bases,
        generator: torch.Generator | None = None,
    ) -> None:
        """Take one step; a step with a NaN or an infinity in it leaves z as it is.

        Args:
            hessian: Coordinates of the estimated Hessian action on z, per block.
            upper_gradient: Coordinates of the upper gradient, per block.
            bases: The bases both were restricted with.
            generator: Source of the rounding of a bfloat16 z, on the CPU; not used otherwise.

        Cost: O(size of z · r); no host sync.
        """
        hessian_norm, z_norm = _norm(hessian).to(self.curvature), self.norm()
        measured = hessian_norm / z_norm.clamp(min=torch.finfo(z_norm.dtype).tiny)
        usable = hessian_norm.isfinite() & _norm(upper_gradient).to(self.curvature).isfinite()
        measured = torch.where(usable & (z_norm > 0), measured, 0.0)
        torch.maximum(CURVATURE_MEMORY * self.curvature, measured, out=self.curvature)
        rate, damping = self.rate_and_damping()
        for z, h, b, basis in zip(self.blocks, hessian, upper_gradient, bases, strict=True):
            share = 1.0 if basis is None else basis.shape[1] / basis.shape[0]
            dtype = torch.promote_types(h.dtype, torch.float32)
            residual = (h - b).to(dtype).mul_(rate * share).masked_fill_(~usable, 0.0)  # may be large, so in place
            wide = z.to(device=h.device, dtype=dtype)  # z itself where that is what it is
            wide.mul_(torch.where(usable, 1 - rate * share * damping, 1.0))
            if basis is None:
                wide.sub_(residual)
            else:
                wide.addmm_(residual, basis.T.to(dtype), alpha=-1)
            if wide is not z:
                z.copy_(stochastically_rounded(wide, z.dtype, generator))

    def rate_and_damping(self) -> tuple[Tensor, Tensor]:
        """Return the current learning rate and the absolute damping."""
        if self.learning_rate is not None:
            return self.curvature.new_tensor(self.learning_rate), self.curvature.new_tensor(self.damping)
        # The first step, before any curvature is known, sets a direction; its length does not matter.
        curvature = torch.where(self.curvature > 0, self.curvature, 1.0)
        damping = self.damping * curvature
        return 0.5 / (curvature + damping), damping

    def state_dict(self) -> dict[str, Any]:
        """Return z and the curvature, on the CPU."""
        return {"blocks": [block.cpu() for block in self.blocks], "curvature": self.curvature.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        for block, value in zip(self.blocks, state["blocks"], strict=True):
            block.copy_(value)
        self.curvature.copy_(state["curvature"])


def stochastically_rounded(value: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """Round to a shorter dtype up or down at random, so that the expected result is the value.

    Args:
        value: Any shape and floating dtype; rounded by way of float32.
        dtype: ``torch.bfloat16`` is rounded stochastically; any other dtype is cast.
        generator: Source of randomness, on the CPU; its seed rules the device's own generator.

    Returns:
        The rounded tensor.

    Example:
        >>> value = torch.full((10_000,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
        >>> rounded = stochastically_rounded(value, torch.bfloat16, torch.Generator().manual_seed(0))
        >>> sorted(set(rounded.tolist())), bool((rounded.float().mean() - value[0]).abs() < 2e-4)
        ([1.0, 1.0078125], True)
    """
    if dtype != torch.bfloat16:
        return value.to(dtype)
    if generator is not None and generator.device != value.device:
        seed = int(torch.randint(2**31, (), generator=generator))
        generator = torch.Generator(value.device).manual_seed(seed)
    noise = torch.randint(0, 2**16, value.shape, generator=generator, device=value.device, dtype=torch.int32)
    bits = value.float().contiguous().view(torch.int32)
    rounded = ((bits + noise) & -(2**16)).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(dtype)


class UpperStep:
    r"""The step of the upper variable along a moving average of its hypergradient.

    .. math:: x \leftarrow x - \alpha h, \quad h \leftarrow (1 - \theta) h + \theta D.

    Normalised, :math:`\alpha` is the learning rate over the root mean square of the entries of D that are not zero, itself
    averaged over the last steps: one number for all entries, so that what matters more moves more, and a visit to one
    sample moves its logit by about the learning rate, whatever the batch size and the scale of the losses.

    Args:
        variables: x, leaf tensors, changed in place.
        learning_rate: Positive.
        moving_average: :math:`\theta`, in (0, 1]; 1 is SOBA, without averaging.
        normalised: As above; otherwise :math:`\alpha` is the learning rate, as in the paper.

    Attributes:
        average: h, one tensor for each of x.

    Raises:
        ValueError: If ``moving_average`` is outside (0, 1].

    Example:
        >>> x = torch.zeros(3)
        >>> upper = UpperStep([x], learning_rate=0.1, moving_average=1.0, normalised=True)
        >>> upper.step([torch.tensor([5e-4, -5e-4, 0.0])]); upper.step([torch.zeros(3)])
        >>> x
        tensor([-0.1000,  0.1000,  0.0000])
    """

    MEMORY = 0.99

    def __init__(
        self, variables: list[Tensor], *, learning_rate: float, moving_average: float, normalised: bool
    ) -> None:
        if not 0 < moving_average <= 1:
            raise ValueError(f"`moving_average` must be in (0, 1], got {moving_average}.")
        self.variables = variables
        self.learning_rate = learning_rate
        self.moving_average = moving_average
        self.normalised = normalised
        self.average = [torch.zeros_like(x, requires_grad=False) for x in variables]
        self._square = torch.zeros((), dtype=torch.float64, device=variables[0].device)
        self._mass = torch.zeros_like(self._square)  # of the steps in the mean square, 1 - MEMORY ** steps

    @torch.no_grad()
    def step(self, hypergradient: list[Tensor], schedule: float = 1.0) -> None:
        """Take one step; a hypergradient with a NaN or an infinity in it counts as zero.

        Args:
            hypergradient: D, one tensor for each of x.
            schedule: Factor on the learning rate.

        Cost: O(size of x); no host sync.
        """
        norm = torch.nn.utils.get_total_norm(hypergradient).to(self._square)
        usable = norm.isfinite()
        num = torch.stack([d.count_nonzero() for d in hypergradient]).sum()
        seen = usable & (num > 0)
        weight = torch.where(seen, 1 - self.MEMORY, 0.0)
        self._square.lerp_(torch.where(seen, norm.square() / num.clamp(min=1), 0.0), weight)
        self._mass.lerp_(torch.ones_like(self._mass), weight)
        rate = self.learning_rate * schedule
        if self.normalised:
            scale = (self._square / self._mass.clamp(min=1e-12)).sqrt()
            rate = torch.where(scale > 0, rate / scale.clamp(min=1e-300), 0.0)
        for x, h, d in zip(self.variables, self.average, hypergradient, strict=True):
            x.sub_((rate * h).to(x))
            h.lerp_(torch.where(usable, d, 0.0), self.moving_average)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, on the CPU."""
        average = [h.cpu() for h in self.average]
        return {"average": average, "square": self._square.cpu(), "mass": self._mass.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        for h, value in zip(self.average, state["average"], strict=True):
            h.copy_(value)
        self._square.copy_(state["square"])
        self._mass.copy_(state["mass"])


class SingleLoop:
    r"""MA-SOBA and BROS for any pair of differentiable losses, by double backward.

    One ``step`` takes the three updates of the single loop at once, all at the current point:

    .. math:: y \leftarrow y - \beta\,\tilde P\tilde P^\top\nabla_y g, \quad
              z \leftarrow z - \gamma\,\tilde P(\hat h[z] - \tilde P^\top\nabla_y f), \quad
              x \leftarrow x - \alpha h,\; h \leftarrow (1-\theta)h + \theta(\nabla_x f - \nabla^2_{xy} g\,z).

    It suits problems small enough for double backward; ``BrosTrainer`` does the same to a model with finite differences.

    Args:
        upper: The upper variable x, leaf tensors with ``requires_grad``; changed in place.
        lower: The lower variable y, leaf tensors with ``requires_grad``; changed in place.
        upper_learning_rate: :math:`\alpha`, positive.
        lower_learning_rate: :math:`\beta`, positive.
        auxiliary: z; its learning rate is :math:`\gamma`.
        moving_average: :math:`\theta`, in (0, 1].
        rank: r of a fresh subspace at every step for blocks of y with two dimensions of which the last is larger than r;
            None for full space, which is MA-SOBA.
        estimate: How the Hessian action is estimated, (action, z, bases) -> coordinates; ``one_sided`` by default.
        generator: Source of the bases; needed with a rank.

    Attributes:
        upper_step: Holds h.

    Raises:
        ValueError: If ``moving_average`` is out of range, or a rank has no generator.

    References:
        BROS (arXiv 2605.10288); MA-SOBA (Chen, Xiao, Balasubramanian, JMLR 25, 2024).

    Example:
        >>> x = torch.ones(1, dtype=torch.float64, requires_grad=True)
        >>> y = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        >>> loop = SingleLoop([x], [y], upper_learning_rate=0.1, lower_learning_rate=0.5,
        ...                   auxiliary=Auxiliary([y], learning_rate=0.5), moving_average=0.5)
        >>> for _ in range(300):  # y* = (x, 0), so x should be 3
        ...     losses = loop.step(lambda x, y: 0.5 * (y[0][0, 0] - x[0]).square() + 0.5 * y[0][0, 1].square(),
        ...                        lambda x, y: 0.5 * (y[0][0, 0] - 3).square())
        >>> round(x.item(), 6)
        3.0
    """

    def __init__(
        self,
        upper: list[Tensor],
        lower: list[Tensor],
        *,
        upper_learning_rate: float,
        lower_learning_rate: float,
        auxiliary: Auxiliary,
        moving_average: float = 0.1,
        rank: int | None = None,
        estimate: Callable[..., list[Tensor]] = one_sided,
        generator: torch.Generator | None = None,
    ) -> None:
        if rank is not None and generator is None:
            raise ValueError("A `rank` needs a `generator` to draw subspaces with.")
        self.upper = upper
        self.lower = lower
        self.upper_step = UpperStep(
            upper, learning_rate=upper_learning_rate, moving_average=moving_average, normalised=False
        )
        self.lower_learning_rate = lower_learning_rate
        self.auxiliary = auxiliary
        self.rank = rank
        self.estimate = estimate
        self.generator = generator

    def draw_bases(self) -> Bases:
        """Draw a basis for every block that has room for one."""
        return [
            haar_basis(y.shape[1], self.rank, self.generator, y.dtype).to(y.device)
            if self.rank is not None and y.ndim == 2 and y.shape[1] > self.rank
            else None
            for y in self.lower
        ]

    def step(
        self,
        lower_loss: Callable[[list[Tensor], list[Tensor]], Tensor],
        upper_loss: Callable[[list[Tensor], list[Tensor]], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Take one step of y, z and x.

        Args:
            lower_loss: g, from (x, y) to a scalar, twice differentiable.
            upper_loss: f, from (x, y) to a scalar.

        Returns:
            The two losses at the point before the step, detached.

        Cost: the gradients of both losses and one double backward for each Hessian action and for the cross term.
        """
        bases = self.draw_bases()
        g = lower_loss(self.upper, self.lower)
        lower_gradient = torch.autograd.grad(g, self.lower, create_graph=True)

        def action(directions: list[Tensor]) -> list[Tensor]:
            along = _inner(lower_gradient, directions)
            return restrict(_gradients(along, self.lower), bases)

        z = [block.to(y) for block, y in zip(self.auxiliary.blocks, self.lower, strict=True)]
        hessian = self.estimate(action, z, bases)
        cross = _gradients(_inner(lower_gradient, z), self.upper)
        f = upper_loss(self.upper, self.lower)
        upper_gradient, direct = _gradients(f, self.lower), _gradients(f, self.upper)

        with torch.no_grad():
            descent = lift(restrict([d.detach() for d in lower_gradient], bases), bases)
            self.auxiliary.step(hessian, restrict(upper_gradient, bases), bases, self.generator)
            for y, d in zip(self.lower, descent, strict=True):
                y.sub_(d, alpha=self.lower_learning_rate)
            self.upper_step.step([d - c for d, c in zip(direct, cross, strict=True)])
        return g.detach(), f.detach()


def _gradients(value: Tensor, variables: list[Tensor]) -> list[Tensor]:
    """Differentiate; zero for what the value does not depend on."""
    if not value.requires_grad:
        return [torch.zeros_like(variable) for variable in variables]
    return list(torch.autograd.grad(value, variables, retain_graph=True, allow_unused=True, materialize_grads=True))


def _inner(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return sum((x * y).sum() for x, y in zip(a, b, strict=True))


def _norm(blocks: list[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(blocks)
