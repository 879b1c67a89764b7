"""Dale meets Langevin: A Multiplicative Denoising Diffusion Model.

arXiv 2510.02730 (2025). https://arxiv.org/abs/2510.02730

A diffusion model of positive data whose noise multiplies: geometric Brownian motion forward, a network that learns
x ∘ ∇log p_t(x), and a sampler that multiplies by exponentials, so that no sign ever flips.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.experiment.recording import evaluating
from provenn.generative._dale_langevin_losses import MultiplicativeScoreLoss, NonnegativeScoreMatching
from provenn.generative._dale_langevin_process import GeometricBrownianSDE, PositiveTransform
from provenn.generative._dale_langevin_training import AdditiveScoreBaseline, MultiplicativeDiffusionTrainer

__all__ = [
    "AdditiveScoreBaseline",
    "DaleLangevinSampler",
    "GeometricBrownianSDE",
    "MultiplicativeDiffusionTrainer",
    "MultiplicativeScoreLoss",
    "NonnegativeScoreMatching",
    "PositiveTransform",
    "exponentiated_gradient_step",
]


class DaleLangevinSampler:
    r"""Sample from a multiplicative diffusion model, from the end of time back.

    Each step is :meth:`GeometricBrownianSDE.reverse_step`, over equal steps of time from T to ``t_min``. At the end,
    ``denoise`` replaces log x by its posterior mean (Tweedie's formula in log space),
    E[log x_0 | x_t] = log x_t − M(t) + V(t) (1 + s).

    Args:
        model: ``model(log_x, t)`` → x ∘ ∇log p_t(x), for a batch and a time for each sample; a network is run in
            evaluation mode. Where the sign-agnostic step has made an entry negative, it sees the logarithm of its
            magnitude.
        sde: The process that it was trained under.
        shape: The shape of one sample.
        steps: Steps; the error falls as 1/steps.
        mode: ``"sign_preserving"`` (Dale–Langevin) or ``"sign_agnostic"``.
        denoise: Whether the end is denoised.
        log_mean: Mean of the data's logarithm, which the start is drawn around: a number, or a tensor of one sample's
            shape (the mean log-image).
        log_variance: Its variance, likewise.
        t_min: Where the steps end.

    Raises:
        ValueError: ``mode`` is unknown, or a number is out of bounds.

    Cost: steps + 1 runs of the network for a batch, whose size is the number of samples.

    Source: arXiv 2510.02730, the sampling algorithms.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor], Tensor],
        sde: GeometricBrownianSDE,
        shape: tuple[int, ...],
        steps: int = 200,
        mode: Literal["sign_preserving", "sign_agnostic"] = "sign_preserving",
        denoise: bool = True,
        log_mean: Tensor | float = 0.0,
        log_variance: Tensor | float = 0.0,
        t_min: float = 1e-3,
    ) -> None:
        check_integer("steps", steps, at_least=1)
        check_choice("mode", mode, ("sign_preserving", "sign_agnostic"))
        check_number("t_min", t_min, above=0, below=sde.T)
        self.model, self.sde, self.shape, self.steps, self.mode = model, sde, tuple(shape), steps, mode
        self.denoise, self.log_mean, self.log_variance, self.t_min = denoise, log_mean, log_variance, t_min

    def sample(self, n: int, generator: torch.Generator | None = None) -> Float[Tensor, "n *shape"]:
        """Draw samples.

        Args:
            n: How many.
            generator: Draws; ``None``: torch's global generator.

        Returns:
            Samples of the network's type and device; all above 0 in the sign-preserving mode.

        Raises:
            ValueError: ``n`` < 0.
        """
        check_integer("n", n, at_least=0)
        if not isinstance(self.model, nn.Module):
            return self._sample(n, generator)
        with evaluating(self.model):
            return self._sample(n, generator)

    @torch.no_grad()
    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        weight = next(self.model.parameters(), None) if isinstance(self.model, nn.Module) else None
        dtype, device = (None, None) if weight is None else (weight.dtype, weight.device)
        size = (n, *self.shape)
        x = self.sde.prior(size, self.log_mean, self.log_variance, generator, dtype, device)
        dt = (self.sde.T - self.t_min) / self.steps
        for index in range(self.steps):
            t = self.sde.T - index * dt
            where = x.device if generator is None else generator.device
            noise = torch.randn(size, generator=generator, dtype=x.dtype, device=where).to(x.device)
            x = self.sde.reverse_step(x, t, dt, self._score(x, t), noise, self.mode)
        if self.denoise:
            mean, variance = self.sde.moments(torch.tensor(self.t_min, dtype=torch.float64))
            x = x * torch.exp(variance.item() * (1 + self._score(x, self.t_min)) - mean.item())
        return x

    def _score(self, x: Tensor, t: float) -> Tensor:
        logarithm = x.abs().clamp(min=torch.finfo(x.dtype).tiny).log()
        return self.model(logarithm, torch.full((len(x),), t, dtype=x.dtype, device=x.device))


def exponentiated_gradient_step(
    x: Float[Tensor, "*shape"], grad: Float[Tensor, "*shape"], lr: float
) -> Float[Tensor, "*shape"]:
    r"""Take one step of exponentiated gradient descent, x ∘ exp(−lr · grad).

    It is mirror descent under the negative entropy Σ x log x − x; the sign-preserving sampler is its Langevin version.
    Signs never change: synapses that excite or inhibit stay what they are (Dale's law).

    Args:
        x: Where the step starts, of any sign.
        grad: Gradient of what is minimised; at a negative entry that by its magnitude, for the step to descend.
        lr: Step size.

    Shape:
        ``x`` and ``grad`` alike, any.

    Returns:
        A new tensor of that shape.

    Raises:
        ValueError: ``lr`` < 0, or the shapes differ.

    Cost: O(entries).

    Source: Kivinen and Warmuth, Information and Computation 132 (1997); Cornford et al. (2024) for Dale's law;
    arXiv 2510.02730, the link to the sampler.
    """
    check_number("lr", lr, at_least=0)
    if x.shape != grad.shape:
        raise ValueError(f"grad must have the shape {tuple(x.shape)} of x, got {tuple(grad.shape)}")
    return x * torch.exp(-lr * grad)
