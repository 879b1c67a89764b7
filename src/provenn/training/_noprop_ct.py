"""NoProp in continuous time: one network for all times, and a learned schedule of the noise."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_choice, check_number
from provenn.core.experiment.seeding import seeded
from provenn.training._noprop_blocks import DenoisingBlock
from provenn.training._noprop_data import ClassEmbeddings, Embedding, Settings
from provenn.training._noprop_paths import STEPS, Solver, integrate
from provenn.training._noprop_schedules import GammaSchedule
from provenn.training._noprop_trainer import NoPropTrainer, noised, prior_divergence


class NoPropCT(NoPropTrainer):
    """Train one network û(z_t, x, t) to denoise noised class embeddings at random times.

    The loss is −log p̂(y | z_1) + KL(q(z_0 | y) ‖ N(0, I)) + ½ η SNR′(t) ‖û(z_t, x, t) − u_y‖², t uniform in [0, 1];
    no gradient passes through a path. Inference integrates from noise at t = 0 to t = 1, with γ̇ = −γ′:

    - ``"drift"``: dz/dt = γ̇ (√ᾱ û − ½ (1 + ᾱ) z), the limit of the discrete blocks without their noise;
    - ``"sde"``: that, with the noise √(γ̇ (1 − ᾱ)) dW;
    - ``"flow"``: dz/dt = ½ γ̇ (√ᾱ û − ᾱ z), the probability flow, whose paths have the marginals of q.

    Args:
        network: A :class:`DenoisingBlock` with a time, trained in place. The paper's has no batch normalisation.
        eta: η.
        learn_schedule: Whether the schedule's parameters train too.
        inference: Which equation is integrated. Which of them the paper uses could not be checked.
        solver: ``"heun"`` or ``"euler"``; ``None`` for Heun, or Euler where there is noise. :meth:`predict` takes 40
            steps of Heun or 1000 of Euler, unless told.
        embedding: As in :class:`NoPropDT`.
        seed: As in :class:`NoPropDT`; the network's weights are the caller's.
        epochs: Passes over the data.
        batch_size: As in :class:`NoPropDT`.
        lr: As in :class:`NoPropDT`.
        weight_decay: As in :class:`NoPropDT`.

    Attributes:
        model: Network, schedule, embeddings and head.
        schedule: The :class:`GammaSchedule`.
        num_classes: m.
        embed_dim: d.

    Raises:
        ValueError: The network takes no time, d does not fit, or an option is unknown or out of range.
        TypeError: The network is no denoising block.

    Cost: an epoch is one pass over the data; a prediction encodes the data once, and runs the rest of the network once
    (Euler) or twice (Heun) a step.

    Source: NoProp, section 2.2 and algorithm 2; the limits of the discrete blocks were derived here.
    """

    def __init__(
        self,
        network: DenoisingBlock,
        eta: float = 1.0,
        learn_schedule: bool = True,
        inference: Literal["drift", "sde", "flow"] = "drift",
        *,
        solver: Solver | None = None,
        embedding: Embedding = "onehot",
        seed: int = 0,
        epochs: int = 100,
        batch_size: int = 128,
        lr: float = 1e-3,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__(Settings(epochs, batch_size, lr, weight_decay, seed))
        if not isinstance(network, DenoisingBlock):
            raise TypeError(f"network must be a DenoisingBlock, got {network!r}")
        if not network.timed:
            raise ValueError("network must take a time: give time_dim, got None")
        check_number("eta", eta, above=0)
        check_choice("inference", inference, ("drift", "sde", "flow"))
        check_choice("solver", solver, (None, "euler", "heun"))
        if inference == "sde" and solver == "heun":
            raise ValueError("solver must be 'euler' or None with inference='sde', got 'heun'")
        self.eta, self.inference = eta, inference
        self.solver: Solver = solver or ("euler" if inference == "sde" else "heun")
        self.num_classes, self.embed_dim = network.num_classes, network.embed_dim
        like = next(network.parameters())
        with seeded(seed, "head"):
            self.embeddings = ClassEmbeddings(embedding, self.num_classes, self.embed_dim, like)
            head = nn.Linear(self.embed_dim, self.num_classes).to(like.device, like.dtype)
        self.schedule = GammaSchedule().to(like.device, like.dtype).requires_grad_(learn_schedule)
        self.model = nn.ModuleDict(
            {"network": network, "schedule": self.schedule, "embeddings": self.embeddings, "head": head}
        )

    def velocity(
        self, z: Float[Tensor, "batch embed"], guess: Float[Tensor, "batch embed"], t: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch embed"]:
        """Return dz/dt (of ``"sde"`` the part without noise) where û is ``guess``."""
        alpha_bar, rate = self.schedule.alpha_bar(t)[:, None], self.schedule.rate(t)[:, None]
        if self.inference == "flow":
            return 0.5 * rate * (alpha_bar.sqrt() * guess - alpha_bar * z)
        return rate * (alpha_bar.sqrt() * guess - 0.5 * (1 + alpha_bar) * z)

    def diffusion(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return γ̇ (1 − ᾱ), the variance per unit of time of the noise of ``"sde"``."""
        return self.schedule.rate(t) * (1 - self.schedule.alpha_bar(t))

    def loss(
        self, x: Float[Tensor, "batch *data"], y: Int[Tensor, " batch"], draws: torch.Generator
    ) -> Float[Tensor, ""]:
        """Return a batch's mean loss.

        Args:
            x: Samples.
            y: Their classes.
            draws: Draws the times, z_t and z_1.
        """
        embeddings = self.embeddings.weight
        u = embeddings[y]
        t = _times(u, draws)
        guess = self.model["network"](noised(u, self.schedule.alpha_bar(t)[:, None], draws), x, embeddings, t)
        denoising = 0.5 * self.eta * (self.schedule.snr_rate(t) * (guess - u).square().sum(1)).mean()
        first, last = self.schedule.alpha_bar(t.new_tensor([0.0, 1.0]))
        logits = self.model["head"](noised(u, last, draws))
        return F.cross_entropy(logits, y) + prior_divergence(u, first) + denoising

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor, place: Tensor) -> Tensor:
        return self.loss(x, y, self._generator("noise", x, *place.tolist()))

    def _encode(self, x: Tensor) -> Tensor:
        return self.model["network"].encode(x)

    def _classify(self, encoded: Any, z: Tensor, steps: int | None, noise: torch.Generator) -> Tensor:
        network, embeddings = self.model["network"], self.embeddings.weight

        def field(z: Tensor, t: Tensor) -> Tensor:
            return self.velocity(z, network.step(z, encoded, embeddings, t), t)

        diffusion = self.diffusion if self.inference == "sde" else None
        end = integrate(field, z, steps or STEPS[self.solver], self.solver, diffusion, noise)
        return self.model["head"](end)


def _times(like: Tensor, draws: torch.Generator) -> Tensor:
    """Draw a time in [0, 1) for each sample."""
    return torch.rand(len(like), generator=draws, dtype=like.dtype, device=draws.device).to(like.device)
