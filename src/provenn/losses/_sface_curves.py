"""Any head as a gradient re-scaler: its pull and push by angle, as numbers and as a plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from provenn.core.experiment.checks import check_number
from provenn.core.experiment.reports import Report
from provenn.losses._sface_heads import SphereHead


@dataclass(frozen=True)
class GradientCurves(Report):
    """A head's pull r_intra and push r_inter at angles.

    Args:
        head: The head's name.
        theta: Angles in radians.
        intra: r_intra there; the gradient on the sphere is r_intra sin θ, towards the own centre.
        inter: r_inter there; the gradient on the sphere is r_inter sin θ, away from the other centre.
    """

    head: str
    theta: tuple[float, ...]
    intra: tuple[float, ...]
    inter: tuple[float, ...]

    def plot(self) -> Figure:
        """Draw the two curves, and the gradients on the sphere that they give."""
        figure = Figure(figsize=(8, 3.5), layout="constrained")
        for axes, name, values in zip(
            figure.subplots(1, 2), ("own centre", "another centre"), (self.intra, self.inter), strict=True
        ):
            axes.plot(self.theta, values, label="r")
            axes.plot(self.theta, [r * math.sin(t) for r, t in zip(values, self.theta, strict=True)], label="r sin θ")
            axes.set(xlabel=f"angle θ to the {name} (radians)", title=self.head)
            axes.legend()
        return figure


def gradient_curves(
    head: SphereHead,
    theta: Float[Tensor, " angles"] | Sequence[float],
    *,
    own: float = math.pi / 4,
    others: float = math.pi / 2,
) -> GradientCurves:
    """Return how strongly a head pulls to the own centre and pushes from another one, by the angle to it.

    Args:
        head: Any of this module's heads.
        theta: Angles in radians, in [0, π].
        own: Angle to the own centre while that to another one varies. SFace's push does not depend on it; softmax's
            does.
        others: Angle to all centres that do not vary.

    Shape:
        ``theta`` (angles,).

    Returns:
        The curves, a report.

    Raises:
        ValueError: An angle outside [0, π], or none.
        TypeError: ``head`` is none of this module's.

    Cost: O(angles C) time and memory.

    Source: arXiv 2205.12010, the figure of gradients by angle of the heads.
    """
    if not isinstance(head, SphereHead):
        raise TypeError(f"head must be a loss on the sphere, got {type(head).__name__}")
    check_number("own", own, at_least=0, at_most=math.pi)
    check_number("others", others, at_least=0, at_most=math.pi)
    angles = torch.as_tensor(theta, dtype=torch.float64, device="cpu").detach()
    if angles.dim() != 1 or len(angles) == 0 or not bool(((angles >= 0) & (angles <= math.pi)).all()):
        raise ValueError(f"theta must hold angles in [0, π], got {theta}")
    rows = torch.full((2, len(angles), head.num_classes), math.cos(others), dtype=torch.float64)
    rows[0, :, 0] = angles.cos()
    rows[1, :, 0], rows[1, :, 1] = math.cos(own), angles.cos()
    device = head.weight.device
    pull, push = head.rescale(
        rows.flatten(0, 1).to(device), torch.zeros(2 * len(angles), dtype=torch.long, device=device)
    )
    return GradientCurves(
        head=type(head).__name__,
        theta=tuple(angles.tolist()),
        intra=tuple(pull[: len(angles)].tolist()),
        inter=tuple(push[len(angles) :, 1].tolist()),
    )
