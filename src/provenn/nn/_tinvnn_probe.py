"""How much a network's output changes when its points are moved, turned, mirrored, scaled or put in another order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.reports import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Move = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class InvarianceReport(Report):
    """What moving the points changes.

    Args:
        changes: For each group of moves the largest change of an output over draws and clouds.
        size: The largest output of the points as they are.
        draws: Moves drawn of each group.
    """

    changes: dict[str, float]
    size: float
    draws: int

    def plot(self) -> Figure:
        """Return a bar for each group, on a logarithmic axis."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        axes.bar(list(self.changes), [max(change, 1e-16) for change in self.changes.values()])
        axes.axhline(max(self.size, 1e-16), color="0.5", linestyle="--", label="largest output")
        axes.set(yscale="log", ylabel="largest change of an output")
        axes.legend()
        return figure


def random_rotations(count: int, dim: int, draws: torch.Generator, proper: bool = True) -> Float[Tensor, "count d d"]:
    """Draw orthogonal matrices uniformly, of determinant 1 if ``proper``, else −1, in float64, where ``draws`` is.

    Source: Mezzadri, "How to generate random matrices from the classical compact groups", Notices AMS 54 (2007).
    """
    Q, R = torch.linalg.qr(torch.randn(count, dim, dim, generator=draws, device=draws.device, dtype=torch.float64))
    Q = Q * R.diagonal(dim1=1, dim2=2).sign()[:, None]
    wrong = torch.linalg.det(Q) * (1 if proper else -1) < 0
    Q[wrong, :, 0] *= -1
    return Q


def _spread(X: Tensor) -> Tensor:
    return (X - X.mean(1, keepdim=True)).square().sum(2).mean(1).sqrt()[:, None, None]


def _translate(X: Tensor, draws: torch.Generator) -> Tensor:
    shift = torch.randn(len(X), 1, X.shape[2], generator=draws, device=draws.device, dtype=torch.float64)
    return X + 2 * _spread(X) * shift.to(X)


def _rotate(X: Tensor, draws: torch.Generator) -> Tensor:
    return X @ random_rotations(len(X), X.shape[2], draws).to(X)


def _reflect(X: Tensor, draws: torch.Generator) -> Tensor:
    return X @ random_rotations(len(X), X.shape[2], draws, proper=False).to(X)


def _scale(X: Tensor, draws: torch.Generator) -> Tensor:
    factor = 0.5 * 4 ** torch.rand(len(X), 1, 1, generator=draws, device=draws.device, dtype=torch.float64)
    return X * factor.to(X)


def _permute(X: Tensor, draws: torch.Generator) -> Tensor:
    places = torch.rand(X.shape[:2], generator=draws, device=draws.device, dtype=torch.float64)
    order = places.argsort(1).to(X.device)
    return X.gather(1, order[..., None].expand_as(X))


GROUPS: Mapping[str, Move] = {
    "translate": _translate,
    "rotate": _rotate,
    "reflect": _reflect,
    "scale": _scale,
    "permute": _permute,
}


def probe_invariance(
    model: nn.Module,
    X: Float[Tensor, "batch points dim"],
    groups: Sequence[str] = ("translate", "rotate", "reflect", "scale", "permute"),
    draws: int = 8,
    generator: torch.Generator | None = None,
) -> InvarianceReport:
    """Measure how much a network's output changes under moves that leave the shape of its points as it is.

    Args:
        model: Points (batch, N, D) → tensor; it is called in eval mode, and left in the mode it was in.
        X: Point clouds.
        groups: Which moves: ``"translate"`` by some two radii, ``"rotate"``, ``"reflect"`` (a rotation with a mirror),
            ``"scale"`` by ½ to 2, ``"permute"``.
        draws: Moves drawn of each.
        generator: Draws them, where it is; without it the moves are always the same.

    Shape:
        X (batch, N, D).

    Returns:
        The largest changes.

    Raises:
        TypeError: A number is of the wrong type, or ``model`` is no module.
        ValueError: Unknown ``groups``, ``draws`` < 1.

    Cost: 1 + draws · groups calls of the model.

    Source: Zhang, Wang, Zhang & Zhu (2021), section 3: what the theorem promises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    check_integer("draws", draws, at_least=1)
    for name in groups:
        check_choice("groups", name, tuple(GROUPS))
    source = generator or torch.Generator().manual_seed(0)
    with evaluating(model), torch.no_grad():
        expected = model(X)
        changes = {
            name: max((model(GROUPS[name](X, source)) - expected).abs().max().item() for _ in range(draws))
            for name in groups
        }
    return InvarianceReport(changes, expected.abs().max().item(), draws)
