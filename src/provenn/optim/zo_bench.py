"""Revisiting Zeroth-Order Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark.

Zhang, Li, Hong, Li, Zhang, Zheng, Chen, Lee, Yin, Hong, Wang, Liu, Chen, 2024. https://arxiv.org/abs/2402.11592

Fine-tuning without back-propagation: losses f of a batch at perturbed weights give a random gradient estimate,

    ĝ = (1/q) Σ cᵢ zᵢ,    zᵢ ~ N(0, I),    cᵢ = (f(θ + μzᵢ) − f(θ − μzᵢ)) / 2μ,

which one of several rules turns into a step. z is drawn again from its seed wherever it is needed, so that a step needs
the memory of a forward pass. E ĝ = ∇f up to O(μ²), and E‖ĝ‖² = (1 + (d + 1)/q) ‖∇f‖² for d parameters.

:class:`ZerothOrder` has the rules, block-wise estimates and sparse directions; :class:`ForwardGradient` takes the exact
derivative along z instead of c; :class:`HybridZO` back-propagates through the part near the output only.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.seeding import derive_seed
from provenn.core.numerics.gradient_free import Closure, Evaluations
from provenn.optim._zo_bench_blocks import parameter_blocks
from provenn.optim._zo_bench_estimate import estimate
from provenn.optim._zo_bench_forward import ForwardGradient
from provenn.optim._zo_bench_hybrid import HybridZO
from provenn.optim._zo_bench_memory import MemoryEstimate, estimate_memory
from provenn.optim._zo_bench_zeroth_order import ZerothOrder

__all__ = [
    "ForwardGradient",
    "HybridZO",
    "MemoryEstimate",
    "ZerothOrder",
    "estimate_memory",
    "parameter_blocks",
    "zo_gradient",
]


def zo_gradient(
    closure: Closure,
    params: Iterable[Tensor],
    eps: float = 1e-3,
    num_queries: int = 1,
    two_sided: bool = True,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """Return the random gradient estimate of a loss, as tensors.

    Args:
        closure: Evaluates the loss at the parameters as they stand.
        params: What is perturbed, and put back up to rounding.
        eps: μ, the length of a perturbation.
        num_queries: q, directions averaged.
        two_sided: Whether to difference f(θ ± μz), or f(θ + μz) and f(θ).
        generator: Draws the seed of the directions. ``None``: torch's global generator.

    Returns:
        ĝ, in the shapes of the parameters.

    Shape:
        Parameters of any shape; real, contiguous.

    Raises:
        ValueError: ``eps`` ≤ 0, ``num_queries`` < 1, or there is no parameter.
        ArithmeticError: A loss is NaN or infinite.

    Cost: 2q evaluations (1 + q one-sided), four draws of z each; memory of ĝ.

    Source: arXiv 2402.11592, equation of the randomized gradient estimator.
    """
    check_number("eps", eps, above=0)
    check_integer("num_queries", num_queries, at_least=1)
    tensors = list(params)
    if not tensors:
        raise ValueError("params must hold at least one parameter, got none")
    device = "cpu" if generator is None else generator.device
    seed = int(torch.randint(1 << 62, (), generator=generator, device=device))
    seeds = [derive_seed(seed, query) for query in range(num_queries)]
    found = estimate(Evaluations(closure), tensors, seeds, eps, two_sided)
    drawn = [torch.empty_like(tensor, requires_grad=False).view(-1) for tensor in tensors]
    for index, piece, gradient in found.pieces():
        drawn[index][piece] = gradient
    return [one.view(tensor.shape) for one, tensor in zip(drawn, tensors, strict=True)]
