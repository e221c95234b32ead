"""Upper variables of sample reweighting: from ids, domains or losses to weights in the lower loss."""

import torch
from torch import Tensor, nn

MARGIN = 0.01
"""How far from 0 and 1 sigmoid weights start."""


class WeightTable(nn.Module):
    r"""One number for every sample or domain; its weight is :math:`x_i`, :math:`\sigma(x_i)` or :math:`n\,\mathrm{softmax}(x)_i`.

    Projected weights are the numbers themselves, kept in [0, 1] by ``project`` after every step. They can reach 0 and 1 and
    leave them again; a sigmoid weight near 0 or 1 hardly moves any more. Both are free of each other and start at 0.5;
    softmax weights have the mean 1.

    Args:
        num: n, the number of samples or domains.
        function: ``"projected"``, ``"sigmoid"`` or ``"softmax"``.

    Example:
        >>> WeightTable(4, "sigmoid")(torch.tensor([0, 3]))
        tensor([0.5000, 0.5000], grad_fn=<SigmoidBackward0>)
        >>> WeightTable(4, "softmax").all_weights()
        tensor([1., 1., 1., 1.])
        >>> table = WeightTable(2, "sigmoid")
        >>> table.set_weights(torch.tensor([0.25, 1.0]))
        >>> table.all_weights()
        tensor([0.2500, 0.9900])
    """

    def __init__(self, num: int, function: str) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.full((num,), 0.5 if function == "projected" else 0.0))
        self.function = function

    def _weights(self, ids: Tensor | slice) -> Tensor:
        if self.function == "projected":
            return self.values[ids]
        if self.function == "sigmoid":
            return self.values[ids].sigmoid()
        return (len(self.values) * self.values.softmax(0))[ids]

    def forward(self, ids: Tensor) -> Tensor:
        """Return the weights of some ids, differentiable."""
        return self._weights(ids)

    @torch.no_grad()
    def all_weights(self) -> Tensor:
        """Return the weights of all ids."""
        return self._weights(slice(None)).clone()

    @torch.no_grad()
    def set_weights(self, weights: Tensor) -> None:
        """Start from other weights.

        Args:
            weights: ``(n,)``, not negative, and not above 1 but for softmax. Sigmoid weights are set no nearer than
                ``MARGIN`` to 0 and 1, where they would hardly move.
        """
        if self.function == "sigmoid":
            weights = weights.clamp(MARGIN, 1 - MARGIN).logit()
        elif self.function == "softmax":
            weights = weights.clamp(min=torch.finfo(weights.dtype).tiny).log()
        self.values.copy_(weights)

    @torch.no_grad()
    def project(self) -> None:
        """Bring the numbers back into [0, 1] after a step, where they are the weights themselves."""
        if self.function == "projected":
            self.values.clamp_(0, 1)


class WeightNetwork(nn.Module):
    """A small network from a sample's loss to its weight in (0, 1), as in Meta-Weight-Net.

    Args:
        hidden: Units of its one hidden layer.

    References:
        Shu et al., Meta-Weight-Net (arXiv 1902.07379).
    """

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, losses: Tensor) -> Tensor:
        """Map losses ``(n,)``, in nats, to weights ``(n,)``; no gradient flows into the losses."""
        return self.layers(losses.detach().float()[:, None]).flatten().sigmoid()


def loss_coefficients(weights: Tensor, counts: Tensor, num_items: Tensor | float, normalise: bool) -> Tensor:
    r"""Turn sample weights into the coefficients of sample losses in the loss that is trained.

    The loss is :math:`\sum_i w_i c_i \ell_i / N`: with all weights 1 it is the mean over all units, as the Trainer computes
    it. Normalised, the weights are first divided by their mean over the batch's units, so that a batch counts in full
    however small its weights are; one in which all are zero does not count, and has the derivative of weights that are not
    normalised. Of one sample alone the weight then makes no difference.

    Args:
        weights: w, ``(n,)``, not negative.
        counts: c, units (labelled tokens, or 1) of each sample, ``(n,)``.
        num_items: N, units of the whole optimizer step.
        normalise: Whether the weights' mean over the batch is made 1.

    Returns:
        Shape ``(n,)``, differentiable in the weights.

    Example:
        >>> loss_coefficients(torch.tensor([0.1, 0.3]), torch.tensor([1, 1]), 2, normalise=True)
        tensor([0.2500, 0.7500])
        >>> loss_coefficients(torch.zeros(2), torch.tensor([1, 1]), 2, normalise=True)
        tensor([0., 0.])
    """
    if normalise:
        # The quotient first, and exactly 1 where all weights are 1. Where they are all zero it is a constant: its derivative would be
        # huge there, or NaN.
        total, numbers = (weights * counts).sum(), torch.finfo(weights.dtype)
        none = total < numbers.tiny / numbers.eps
        weights = weights * torch.where(none, 1.0, counts.sum() / torch.where(none, 1.0, total))
    return weights * counts / num_items
