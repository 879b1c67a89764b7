"""Score matching for positive data: against multiplicative noise, and without noise by integration by parts."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_number
from provenn.generative._dale_langevin_process import GeometricBrownianSDE, expand

Reduction = Literal["none", "mean", "sum"]
Weighting = Literal["variance"] | Callable[[Tensor], Tensor]


class MultiplicativeScoreLoss(nn.Module):
    r"""Denoising score matching under multiplicative noise (M-DSM).

    .. math:: \lambda(t) \, \lVert s + 1 + Z / \sqrt{V(t)} \rVert^2

    for data x_0, x_t = ``sde.marginal(x_0, t, Z)`` and a network's value s of x_t ∘ ∇log p_t(x_t). Over the noise it
    equals the explicit loss E λ ‖s − x ∘ ∇log p_t‖² up to a constant.

    Args:
        sde: The noising process.
        weighting: λ: ``"variance"`` for V(t), or a function of time.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over samples; a sample's loss sums its entries.
        t_min: Times below are taken as this, since V(0) = 0.

    Shape:
        ``score`` and ``noise`` (batch, *), ``t`` (batch,); the loss is a scalar, or (batch,).

    Returns:
        The loss, when called.

    Raises:
        ValueError: ``reduction`` or ``weighting`` is unknown, or ``t_min`` is outside (0, T].

    Warns:
        UserWarning: A time below ``t_min`` was given.

    Cost: O(entries).

    Source: arXiv 2510.02730, multiplicative denoising score matching.
    """

    def __init__(
        self,
        sde: GeometricBrownianSDE,
        weighting: Weighting = "variance",
        reduction: Reduction = "mean",
        t_min: float = 1e-3,
    ) -> None:
        super().__init__()
        if not callable(weighting):
            check_choice("weighting", weighting, ("variance",))
        check_choice("reduction", reduction, ("none", "mean", "sum"))
        check_number("t_min", t_min, above=0, at_most=sde.T)
        self.sde, self.weighting, self.reduction, self.t_min = sde, weighting, reduction, t_min

    def forward(
        self, score: Float[Tensor, "batch *shape"], noise: Float[Tensor, "batch *shape"], t: Float[Tensor, " batch"]
    ) -> Float[Tensor, "..."]:
        """Return the loss.

        Args:
            score: The network's output at x_t and t.
            noise: Z, with which x_t was made.
            t: A time for each sample.

        Returns:
            A scalar, or one value a sample.
        """
        if (t < self.t_min).any():
            warnings.warn(
                f"times below t_min = {self.t_min:g} are taken as t_min: at 0 there is no noise", stacklevel=2
            )
            t = t.clamp(min=self.t_min)
        variance = self.sde.moments(t).variance.to(score)
        weight = variance if self.weighting == "variance" else self.weighting(t)
        target = -1 - noise / expand(variance.sqrt(), noise)
        losses = weight * (score - target).square().flatten(1).sum(1)
        return reduced(losses, self.reduction)


class NonnegativeScoreMatching(nn.Module):
    r"""Score matching of data x > 0 without noise, by integration by parts.

    .. math:: \sum_i 2 x_i \psi_i + x_i^2 \, \partial_i \psi_i + \tfrac12 x_i^2 \psi_i^2

    for a model ψ of ∇log p. It is ½ E‖x ∘ ψ − x ∘ ∇log p‖² up to a constant, and needs nothing of the density at 0.

    Args:
        trace: How Σ x_i² ∂_iψ_i is taken: ``"exact"``, by one derivative a dimension, or ``"hutchinson"``, an unbiased
            estimate by one derivative.
        generator: Draws Hutchinson's signs; ``None``: torch's global generator.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over samples.

    Shape:
        ``x`` (batch, features); ``psi`` maps it to the same shape, each sample for itself; the loss is a scalar, or
        (batch,).

    Returns:
        The loss, when called.

    Raises:
        ValueError: ``trace`` or ``reduction`` is unknown.

    Cost: ``exact``: ``features`` forward-mode derivatives of ψ, vectorised, with that much memory; ``hutchinson``: one.

    Source: Hyvärinen, "Some extensions of score matching", Comput. Stat. Data Anal. 51 (2007), section 3; named in
    arXiv 2510.02730 as the loss that it extends.
    """

    def __init__(
        self,
        trace: Literal["exact", "hutchinson"] = "exact",
        generator: torch.Generator | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_choice("trace", trace, ("exact", "hutchinson"))
        check_choice("reduction", reduction, ("none", "mean", "sum"))
        self.trace, self.generator, self.reduction = trace, generator, reduction

    def forward(self, x: Float[Tensor, "batch features"], psi: Callable[[Tensor], Tensor]) -> Float[Tensor, "..."]:
        """Return the loss.

        Args:
            x: Positive data.
            psi: Model of ∇log p.

        Returns:
            A scalar, or one value a sample.
        """
        x = x.contiguous()  # forward mode writes to its input's shape, which an expanded tensor does not allow
        if self.trace == "exact":
            basis = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            columns = torch.func.vmap(lambda e: torch.func.jvp(psi, (x,), (e.expand_as(x),))[1])(basis)
            diagonal = torch.einsum("fbf->bf", columns)
        else:
            where = x.device if self.generator is None else self.generator.device
            signs = torch.randint(0, 2, x.shape, generator=self.generator, device=where).to(x) * 2 - 1
            diagonal = signs * torch.func.jvp(psi, (x,), (signs,))[1]
        value = psi(x)
        losses = (2 * x * value + x.square() * diagonal + (x * value).square() / 2).sum(1)
        return reduced(losses, self.reduction)


def reduced(losses: Float[Tensor, " batch"], reduction: str) -> Tensor:
    """Reduce one loss a sample as ``reduction`` says."""
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()
