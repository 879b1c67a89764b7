"""NoProp-CT's equations beside the community's formulas, and what discrete time's updates cost and keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import saved_bytes
from provenn.training import DenoisingBlock, NoPropCT, NoPropDT

BATCH = 64


def measure() -> dict[str, Any]:
    """Compare the drift's and the loss's values; then time an update of CT, of one block, and of all end to end."""
    drift, loss = _largest_differences()
    ours = _continuous()
    x, y = _batch()
    times = alternate(
        {
            "ours": lambda: _descend(lambda: ours.loss(x, y, torch.Generator().manual_seed(0))),
            "formula": lambda: _descend(lambda: _formula_loss(ours, x, y, torch.Generator().manual_seed(0))),
        },
        rounds=41,
    )
    discrete = {blocks: _discrete(blocks) for blocks in (2, 4, 8)}
    steps = alternate({f"{name} {blocks}": one for blocks, pair in discrete.items() for name, one in pair.items()}, 15)
    kept = {f"{name} {blocks}": saved_bytes(one) for blocks, pair in discrete.items() for name, one in pair.items()}
    return {
        "peer": "the formulas of github.com/bayesianempirimancer/jax-noprop (drift) and github.com/yhgon/NoProp (loss, "
        "its z_t put right to √ᾱ), written anew in float64",
        "agrees": max(drift, loss) <= 1e-9,
        "largest_difference": max(drift, loss),
        "speed_ratio": times["formula"] / times["ours"],
        "growth": {
            f"T = {blocks}, end-to-end update over one block's": {
                "time": steps[f"end to end {blocks}"] / steps[f"block {blocks}"],
                "saved bytes": kept[f"end to end {blocks}"] / kept[f"block {blocks}"],
            }
            for blocks in discrete
        },
    }


def _batch() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 64, generator=draws, dtype=torch.float64), torch.arange(BATCH) % 10


def _continuous() -> NoPropCT:
    torch.manual_seed(0)
    network = DenoisingBlock.for_vectors(64, 10, 10, hidden=64, batch_norm=False, time_dim=16)
    return NoPropCT(network.double(), eta=1.0)


def _formula_loss(trainer: NoPropCT, x: Tensor, y: Tensor, draws: torch.Generator) -> Tensor:
    """Return the loss with SNR′ by autograd, and the prior's divergence by torch's distributions."""
    u, schedule = torch.eye(10, dtype=x.dtype)[y], trainer.schedule
    t = torch.rand(len(y), generator=draws, dtype=x.dtype).requires_grad_()
    alpha_bar = torch.sigmoid(-schedule(t))
    snr = alpha_bar / (1 - alpha_bar)
    (rate,) = torch.autograd.grad(snr.sum(), t, create_graph=True)
    alpha_bar = alpha_bar[:, None]
    z = alpha_bar.sqrt() * u + (1 - alpha_bar).sqrt() * torch.randn(u.shape, generator=draws, dtype=x.dtype)
    guess = trainer.model["network"](z, x, torch.eye(10, dtype=x.dtype), t)
    first, last = torch.sigmoid(-schedule(torch.tensor([0.0, 1.0], dtype=x.dtype)))
    end = last.sqrt() * u + (1 - last).sqrt() * torch.randn(u.shape, generator=draws, dtype=x.dtype)
    ours = torch.distributions.Normal(first.sqrt() * u, (1 - first).sqrt().expand_as(u))
    prior = torch.distributions.Normal(torch.zeros_like(u), torch.ones_like(u))
    divergence = torch.distributions.kl_divergence(ours, prior).sum(1).mean()
    matching = 0.5 * (rate * (guess - u).square().sum(1)).mean()
    return F.cross_entropy(trainer.model["head"](end), y) + divergence + matching


def _formula_drift(trainer: NoPropCT, z: Tensor, guess: Tensor, t: Tensor) -> Tensor:
    """Return γ′ (√ᾱ û − ½ (1 + ᾱ) z), where that package's γ rises: our γ with the sign turned."""
    t = t.clone().requires_grad_()
    gamma = -trainer.schedule(t)
    (rate,) = torch.autograd.grad(gamma.sum(), t)
    alpha_bar = torch.sigmoid(gamma)[:, None]
    return rate[:, None] * (alpha_bar.sqrt() * guess - 0.5 * (1 + alpha_bar) * z)


def _largest_differences() -> tuple[float, float]:
    trainer = _continuous()
    x, y = _batch()
    drifts, losses = [], []
    for seed in range(10):
        draws = torch.Generator().manual_seed(seed)
        z, guess = (torch.randn(BATCH, 10, generator=draws, dtype=x.dtype) for _ in range(2))
        t = torch.rand(BATCH, generator=draws, dtype=x.dtype)
        drifts.append((trainer.velocity(z, guess, t) - _formula_drift(trainer, z, guess, t)).abs().max().item())
        ours, theirs = (
            one(torch.Generator().manual_seed(seed))
            for one in (lambda d: trainer.loss(x, y, d), lambda d: _formula_loss(trainer, x, y, d))
        )
        losses.append(abs(ours.item() - theirs.item()) / abs(theirs.item()))
    return max(drifts), max(losses)


def _descend(loss: Callable[[], Tensor]) -> None:
    loss().backward()


def _discrete(num_blocks: int) -> dict[str, Callable[[], None]]:
    """Return an update of one block with the head, and one of the network of all blocks by back-propagation."""
    torch.manual_seed(0)
    shape = (1, 28, 28)
    trainer = NoPropDT(
        lambda: DenoisingBlock.for_images(shape, 10, 10, channels=(8, 16), hidden=64, dropout=0.0), num_blocks
    )
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(BATCH, *shape, generator=draws), torch.arange(BATCH) % 10
    start, weight = torch.randn(BATCH, 10, generator=draws), trainer.embeddings.weight

    def block() -> None:
        (trainer.block_loss(1, x, y, weight, draws) + trainer.head_loss(y, weight, draws)).backward()

    return {"block": block, "end to end": lambda: F.cross_entropy(trainer.model(x, start), y).backward()}
