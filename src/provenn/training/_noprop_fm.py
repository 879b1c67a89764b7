"""NoProp by flow matching: a velocity that carries noise to class embeddings along straight lines."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_choice, check_number
from provenn.core.experiment.seeding import seeded
from provenn.training._noprop_blocks import VelocityBlock
from provenn.training._noprop_data import ClassEmbeddings, Embedding, Settings, normal_like
from provenn.training._noprop_paths import STEPS, Solver, integrate
from provenn.training._noprop_trainer import NoPropTrainer


class NoPropFM(NoPropTrainer):
    """Train v(z_t, x, t) to be z_1 − z_0, where z_0 is noise, z_1 = u_y and z_t ~ N(t z_1 + (1 − t) z_0, σ² I).

    With learned embeddings there is −log p̂(y | z̃_1) beside it, z̃_1 = z_t + (1 − t) v, which keeps the embeddings
    apart; p̂ is then the output head. With one-hot embeddings the class is that of the nearest embedding.

    Args:
        network: A :class:`VelocityBlock` with a time, trained in place.
        sigma: σ.
        solver: As in :class:`NoPropCT`; 40 steps of ``"heun"``, or 1000 of ``"euler"``, unless told.
        embedding: As in :class:`NoPropDT`.
        seed: As in :class:`NoPropCT`.
        epochs: Passes over the data.
        batch_size: As in :class:`NoPropDT`.
        lr: As in :class:`NoPropDT`.
        weight_decay: As in :class:`NoPropDT`.

    Attributes:
        model: Network and embeddings; and the head, where they are learned.
        num_classes: m.
        embed_dim: d.

    Raises:
        ValueError: The network takes no time, d does not fit, or an option is unknown or out of range.
        TypeError: The network is no velocity block.

    Cost: as :class:`NoPropCT`.

    Source: NoProp, section 2.3 and algorithm 3.
    """

    def __init__(
        self,
        network: VelocityBlock,
        sigma: float = 0.0,
        *,
        solver: Solver = "heun",
        embedding: Embedding = "onehot",
        seed: int = 0,
        epochs: int = 100,
        batch_size: int = 128,
        lr: float = 1e-3,
        weight_decay: float = 1e-3,
    ) -> None:
        super().__init__(Settings(epochs, batch_size, lr, weight_decay, seed))
        if not isinstance(network, VelocityBlock):
            raise TypeError(f"network must be a VelocityBlock, got {network!r}")
        if not network.timed:
            raise ValueError("network must take a time: give time_dim, got None")
        check_number("sigma", sigma, at_least=0)
        check_choice("solver", solver, ("euler", "heun"))
        self.sigma, self.solver = sigma, solver
        self.num_classes, self.embed_dim = network.num_classes, network.embed_dim
        like = next(network.parameters())
        with seeded(seed, "head"):
            self.embeddings = ClassEmbeddings(embedding, self.num_classes, self.embed_dim, like)
            head = nn.Linear(self.embed_dim, self.num_classes).to(like.device, like.dtype)
        self.model = nn.ModuleDict({"network": network, "embeddings": self.embeddings})
        if embedding != "onehot":
            self.model["head"] = head

    def loss(
        self, x: Float[Tensor, "batch *data"], y: Int[Tensor, " batch"], draws: torch.Generator
    ) -> Float[Tensor, ""]:
        """Return a batch's mean loss.

        Args:
            x: Samples.
            y: Their classes.
            draws: Draws z_0, the times and z_t.
        """
        end = self.embeddings.weight[y]
        start = normal_like(end, draws)
        t = torch.rand(len(end), generator=draws, dtype=end.dtype, device=draws.device).to(end.device)
        place = t[:, None]
        z = place * end + (1 - place) * start
        if self.sigma > 0:
            z = z + self.sigma * normal_like(z, draws)
        v = self.model["network"](z, x, t)
        matching = (v - (end - start)).square().sum(1).mean()
        if "head" not in self.model:
            return matching
        return matching + F.cross_entropy(self.model["head"](z + (1 - place) * v), y)

    def _loss(self, model: nn.Module, x: Tensor, y: Tensor, place: Tensor) -> Tensor:
        return self.loss(x, y, self._generator("noise", x, *place.tolist()))

    def _encode(self, x: Tensor) -> Tensor:
        return self.model["network"].encode(x)

    def _classify(self, encoded: Any, z: Tensor, steps: int | None, noise: torch.Generator) -> Tensor:
        network = self.model["network"]
        end = integrate(lambda z, t: network.joined(z, encoded, t), z, steps or STEPS[self.solver], self.solver)
        if "head" in self.model:
            return self.model["head"](end)
        return -0.5 * torch.cdist(end, self.embeddings.weight).square()
