"""Checks of what a module promises of all inputs: convexity, a Lipschitz constant, and other forms of the same map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from provenn.contracts._modules import build, call, inputs_of, is_continuous, with_gradients
from provenn.contracts.case import Form, Inputs, ModuleCase
from provenn.contracts.suite import expect
from provenn.contracts.watch import error_between, generator, mapped, tensors_in

SCALES = (0.1, 1.0, 10.0)
"""Lengths of the segments and distances of the pairs that are tried, against the size of the case's inputs."""
ASCENT, POWER = 30, 15
"""Steps of each adversarial search, and of each power iteration."""
ROUNDING = 1e-9


def check_forms(case: ModuleCase) -> None:
    """The declared other forms give the module's output and gradients, in float64 and in float32."""
    for form in case.forms:
        for dtype, tolerance in (
            (torch.float64, form.float64_tolerance),
            (torch.float32, form.float32_tolerance),
        ):
            results = [_output_and_gradients(case, dtype, one) for one in (None, form)]
            error = error_between(results[1][0], results[0][0])
            expect(error <= tolerance, f"the {form.name} form in {dtype} differs by {error:.3g}")
            # A gradient sums many rounded terms.
            error = error_between(results[1][1], results[0][1])
            expect(error <= 10 * tolerance, f"the {form.name} form's gradients in {dtype} differ by {error:.3g}")


def _output_and_gradients(case: ModuleCase, dtype: torch.dtype, form: Form | None) -> tuple[list[Tensor], list[Tensor]]:
    module, inputs = build(case, dtype), with_gradients(inputs_of(case, dtype))
    output = tensors_in(call(module, inputs) if form is None else form.evaluate(module, inputs))
    leaves = [t for t in (*tensors_in(inputs), *module.parameters()) if t.requires_grad]
    weights = [torch.randn(t.shape, generator=generator(7), dtype=torch.float64).to(t) for t in output]
    total = torch.stack([(t * w).sum().real for t, w in zip(output, weights, strict=True) if t.requires_grad]).sum()
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    found = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]
    return [t.detach() for t in output], found


def check_convexity(case: ModuleCase) -> None:
    """Between any two inputs every output lies on or below the chord, also where a search by gradients looks."""
    if not case.convex:
        return
    module, inputs = build(case), inputs_of(case)
    for scale in SCALES:
        for seed in range(4):
            ends = [_disturbed(inputs, scale, 2 * seed + one) for one in (0, 1)]
            for share in (0.5, 0.1, 0.9):
                _expect_below(_gap(module, ends, share), f"at {share:g} of a random segment of scale {scale:g}")
            _expect_below(_searched(module, ends, scale), f"at the middle of a searched segment of scale {scale:g}")


def _disturbed(inputs: Inputs, scale: float, seed: int) -> Inputs:
    source = generator(100 + seed)

    def move(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        size = max(1.0, float(tensor.abs().max())) if tensor.numel() else 1.0
        return tensor + scale * size * torch.randn(tensor.shape, generator=source, dtype=tensor.dtype)

    return tuple(mapped(inputs, move))


def _mixed(ends: Sequence[Inputs], share: float) -> Inputs:
    second = iter(tensors_in(ends[1]))

    def mix(tensor: Tensor) -> Tensor:
        other = next(second)
        return torch.lerp(tensor, other, share) if tensor.is_floating_point() else tensor

    return tuple(mapped(ends[0], mix))


def _gap(module: Any, ends: Sequence[Inputs], share: float) -> tuple[Tensor, float]:
    """Return by how much each output exceeds the chord, and the size of the outputs."""
    between = tensors_in(call(module, _mixed(ends, share)))
    first, second = (tensors_in(call(module, end)) for end in ends)
    gaps = [b - torch.lerp(f, s, share) for b, f, s in zip(between, first, second, strict=True)]
    size = max(float(t.detach().abs().max()) for t in (*first, *second) if t.numel())
    return torch.cat([gap.flatten() for gap in gaps]), max(1.0, size)


def _searched(module: Any, ends: Sequence[Inputs], scale: float) -> tuple[Tensor, float]:
    """Move the ends uphill on the largest gap, by steps of a tenth of the segment's scale."""
    free = [with_gradients(end) for end in ends]
    leaves = [t for end in free for t in tensors_in(end) if t.is_floating_point()]
    worst, size = _gap(module, free, 0.5)
    for _ in range(ASCENT):
        gap, size = _gap(module, free, 0.5)
        worst = torch.maximum(worst, gap)
        gradients = torch.autograd.grad(torch.logsumexp(gap / size, 0), leaves, allow_unused=True)
        with torch.no_grad():
            for leaf, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None and float(gradient.norm()) > 0:
                    leaf += 0.1 * scale * leaf.numel() ** 0.5 * gradient / gradient.norm()
    return worst, size


def _expect_below(found: tuple[Tensor, float], where: str) -> None:
    gap, size = found
    worst = float(gap.detach().max())
    expect(worst <= ROUNDING * size, f"{where} an output exceeds the chord by {worst:.3g}")


def check_lipschitz(case: ModuleCase) -> None:
    """No pair of inputs, and no direction that power iteration finds, changes the output by more than the bound."""
    if case.lipschitz is None:
        return
    module, inputs = build(case), inputs_of(case)
    bound, largest = float(case.lipschitz(module, inputs)), 0.0
    for scale in (1e-4, *SCALES):
        for seed in range(6):
            here = _disturbed(inputs, 1.0 if seed else 0.0, seed)
            there = _disturbed(here, scale, 50 + seed)
            moved = _distance(tensors_in(here), tensors_in(there))
            change = _distance(tensors_in(call(module, here)), tensors_in(call(module, there)))
            largest = max(largest, change / moved)
            expect(
                change <= bound * moved * (1 + 1e-6), f"a pair has the ratio {change / moved:.6g}, above {bound:.6g}"
            )
    for scale in (0.0, *SCALES):
        norm = _jacobian_norm(module, _disturbed(inputs, scale, 7))
        largest = max(largest, norm)
        expect(norm <= bound * (1 + 1e-6), f"a Jacobian has the norm {norm:.6g}, above {bound:.6g}")
    expect(largest > 0, "no input changes the output")


def _distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    squares = [(a - b).detach().abs().square().sum() for a, b in zip(first, second, strict=True) if is_continuous(a)]
    return float(torch.stack(squares).sum().sqrt())


def _jacobian_norm(module: Any, inputs: Inputs) -> float:
    """Return the norm of the derivative by power iteration, of its products from both sides."""
    given = with_gradients(inputs)
    leaves = [t for t in tensors_in(given) if t.is_floating_point()]
    outputs = [t for t in tensors_in(call(module, given)) if t.requires_grad]
    dual = [torch.zeros_like(t, requires_grad=True) for t in outputs]
    pulled = torch.autograd.grad(outputs, leaves, dual, create_graph=True, allow_unused=True)
    used = [(p, leaf) for p, leaf in zip(pulled, leaves, strict=True) if p is not None and p.requires_grad]
    source = generator(11)
    v = [torch.randn(leaf.shape, generator=source, dtype=leaf.dtype) for _, leaf in used]
    norm = 0.0
    for _ in range(POWER):
        length = float(torch.stack([t.square().sum() for t in v]).sum().sqrt())
        if not (used and length > 0):
            return 0.0
        v = [t / length for t in v]
        # The derivative of u ↦ Jᵀu along v is Jv; twice backward gives products with J from products with Jᵀ.
        pushed = torch.autograd.grad([p for p, _ in used], dual, v, retain_graph=True, allow_unused=True)
        Jv = [torch.zeros_like(u) if p is None else p for p, u in zip(pushed, dual, strict=True)]
        norm = float(torch.stack([t.square().sum() for t in Jv]).sum().sqrt())
        back = torch.autograd.grad(outputs, [leaf for _, leaf in used], Jv, retain_graph=True, allow_unused=True)
        v = [torch.zeros_like(leaf) if b is None else b for b, (_, leaf) in zip(back, used, strict=True)]
    return norm
