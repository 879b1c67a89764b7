"""Adversarial examples by projected gradient ascent, for adversarial training and for measuring its effect."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.recording import evaluating


def pgd(
    model: nn.Module,
    x: Float[Tensor, "batch *image"],
    y: Int[Tensor, " batch"],
    *,
    eps: float,
    steps: int,
    step_size: float | None = None,
    box: tuple[float, float] | None = (0.0, 1.0),
    random_start: bool = True,
    generator: torch.Generator | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
) -> Float[Tensor, "batch *image"]:
    r"""Raise the loss of every sample within a box of half-width ε around it.

    From a random point of the box, each step adds ``step_size`` · sign(gradient) and clips to the box again.

    Args:
        model: Maps inputs to scores. It runs in evaluation mode; modes and gradients are left as they are.
        x: Inputs.
        y: Their classes.
        eps: ε, the largest change of an entry.
        steps: Steps; 0 returns the start.
        step_size: The change of an entry in a step; ``None`` for 2.5 ε / steps, with which any point of the box can
            be reached from any other.
        box: Bounds of every entry of an input; ``None`` for none.
        random_start: Whether to start at a uniform point of the box, or at ``x``.
        generator: Draws the start; ``None`` for torch's global generator.
        loss: ``loss(scores, y)`` → scalar.

    Returns:
        The changed inputs, with no graph.

    Shape:
        ``x`` (batch, ...), ``y`` (batch,); returns the shape of ``x``.

    Raises:
        ValueError: ``eps`` < 0, ``steps`` < 0, or ``step_size`` ≤ 0.

    Cost: ``steps`` forward and backward passes; the memory of one.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, §2.1.
    """
    check_number("eps", eps, at_least=0)
    check_integer("steps", steps, at_least=0)
    if step_size is not None:
        check_number("step_size", step_size, above=0)
    stride = 2.5 * eps / max(steps, 1) if step_size is None else step_size
    x = x.detach()
    low, high = x - eps, x + eps
    if box is not None:
        low, high = low.clamp(min=box[0]), high.clamp(max=box[1])
    moved = x.clone()
    if random_start:
        device = x.device if generator is None else generator.device
        uniform = torch.rand(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)
        moved = (x + eps * (2 * uniform - 1)).clamp(low, high)
    with evaluating(model):
        for _ in range(steps if len(x) else 0):
            with torch.enable_grad():
                moved.requires_grad_()
                (slope,) = torch.autograd.grad(loss(model(moved), y), moved)
            moved = (moved.detach() + stride * slope.sign()).clamp(low, high)
    return moved.detach()
