"""Upper variables of sample reweighting: from ids, domains or losses to weights in the lower loss."""

import torch
from torch import Tensor, nn


class WeightTable(nn.Module):
    r"""One logit for every sample or domain; its weight is :math:`\sigma(x_i)`, or :math:`n\,\mathrm{softmax}(x)_i`.

    Sigmoid weights are free of each other, in (0, 1); softmax weights have the mean 1.

    Args:
        num: n, the number of samples or domains.
        function: ``"sigmoid"`` or ``"softmax"``.

    Example:
        >>> WeightTable(4, "sigmoid")(torch.tensor([0, 3]))
        tensor([0.5000, 0.5000], grad_fn=<SigmoidBackward0>)
        >>> WeightTable(4, "softmax").all_weights()
        tensor([1., 1., 1., 1.])
    """

    def __init__(self, num: int, function: str) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num))
        self.function = function

    def _weights(self) -> Tensor:
        if self.function == "sigmoid":
            return self.logits.sigmoid()
        return len(self.logits) * self.logits.softmax(0)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the weights of some ids, differentiable."""
        if self.function == "sigmoid":
            return self.logits[ids].sigmoid()
        return self._weights()[ids]

    @torch.no_grad()
    def all_weights(self) -> Tensor:
        """Return the weights of all ids."""
        return self._weights()


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
    however small its weights are.

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
    """
    if normalise:
        total = (weights * counts).sum()
        weights = weights * (counts.sum() / total.clamp(min=torch.finfo(weights.dtype).tiny))
    return weights * counts / num_items
