"""The suite of losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from provenn.contracts import _modules as shared
from provenn.contracts._modules import build, call, inputs_of
from provenn.contracts.case import Inputs, LossCase
from provenn.contracts.suite import ContractError, check_part, expect
from provenn.contracts.watch import error_between, generator, mapped, same, seeded


def exercise(case: LossCase) -> Callable[[], object]:
    """Return a call that builds the loss, evaluates it and goes backward."""
    inputs = _free(inputs_of(case, torch.float32))

    def act() -> None:
        shared.projection(case.make()(*inputs)).backward()

    return act


def _free(inputs: Inputs) -> Inputs:
    """Return the inputs with a first one that requires a gradient."""
    return (inputs[0].detach().clone().requires_grad_(), *inputs[1:])


def check_scalar(case: LossCase) -> None:
    """The loss is one finite number in the precision of its first input, with and without gradients."""
    for dtype in (torch.float32, torch.float64):
        loss, inputs = build(case, dtype), inputs_of(case, dtype)
        expect(isinstance(inputs[0], Tensor) and inputs[0].dtype == dtype, f"the case's first input is no {dtype}")
        for value in (call(loss, inputs), call(loss, _free(inputs)), call(torch.no_grad()(loss), inputs)):
            expect(isinstance(value, Tensor) and value.dim() == 0, f"it returned {value!r}")
            expect(value.dtype == dtype, f"for {dtype} inputs it returned {value.dtype}")
            expect(value.isfinite(), f"it returned {value}")


def check_gradients(case: LossCase) -> None:
    """The first input and every trainable parameter get a finite gradient."""
    loss, inputs = build(case), _free(inputs_of(case))
    shared.expect_gradients(loss, call(loss, inputs), inputs[:1], "on the case's inputs")
    expect(inputs[0].grad is not None, "the first input gets no gradient")


def check_gradcheck(case: LossCase) -> None:
    """Gradients by the first input and the parameters agree with finite differences in float64."""
    inputs = _free(inputs_of(case))
    shared.expect_gradcheck(build(case), inputs, inputs[:1])


def check_minimum(case: LossCase) -> None:
    """The loss has the declared value at the declared minimum, and nowhere less."""
    if case.minimum is None:
        return
    loss, inputs = build(case), case.minimum.inputs()
    value, tolerance = case.minimum.value, case.minimum.tolerance
    found = float(call(loss, inputs).detach())
    expect(abs(found - value) <= tolerance, f"at the minimum it is {found:.6g}, declared {value:.6g}")
    source = generator(0)
    for scale in (1e-3, 1e-2, 0.1, 1.0, 10.0):
        for _ in range(5):
            noise = torch.randn(inputs[0].shape, generator=source, dtype=inputs[0].dtype)
            found = float(call(loss, (inputs[0] + scale * noise, *inputs[1:])).detach())
            expect(found >= value - tolerance, f"away from the minimum by {scale:g} it is {found:.6g} < {value:.6g}")


def check_extremes(case: LossCase) -> None:
    """Value and gradients stay finite at extreme inputs."""
    expect(case.extremes, "the case has no extremes; exclude this check with a reason if nothing is extreme")
    for position, extreme in enumerate(case.extremes):
        inputs = _free(extreme())
        loss = build(case, inputs[0].dtype)
        shared.expect_gradients(loss, call(loss, inputs), inputs[:1], f"at extreme {position}")


def check_reductions(case: LossCase) -> None:
    """reduction="mean" and "sum" are the mean and the sum of "none", "mean" is the default, others are refused."""
    inputs = inputs_of(case)
    values: dict[str, Tensor] = {}
    for reduction in ("none", "mean", "sum"):
        with seeded(0):
            loss = case.make(reduction=reduction).double().eval()
        values[reduction] = call(loss, inputs).detach()
    expect(values["none"].dim() > 0, 'reduction="none" gives a scalar')
    pairs = {"mean": values["none"].mean(), "sum": values["none"].sum()}
    for reduction, expected in pairs.items():
        error = error_between(values[reduction], expected)
        expect(error < 1e-10, f'"{reduction}" is {values[reduction]}, of "none" it is {expected}')
    default = call(build(case), inputs).detach()
    expect(error_between(default, values["mean"]) < 1e-10, f'the default is {default}, "mean" is {values["mean"]}')
    try:
        call(case.make(reduction="median").double(), inputs)
    except ValueError as error_found:
        expect("median" in str(error_found), f'reduction="median" raised {error_found}, which does not name it')
    else:
        raise ContractError('reduction="median" was accepted')


def check_deterministic(case: LossCase) -> None:
    """In eval mode the same inputs give the same loss bit by bit, whatever came before."""
    loss, inputs = build(case), inputs_of(case)
    first = call(loss, inputs, seed=1).detach()
    call(loss, inputs_of(case, seed=1))
    again = call(loss, inputs, seed=2).detach()
    expect(same(first, again), f"first {first}, then {again}")


def check_float32(case: LossCase) -> None:
    """The loss in float32 agrees with that in float64 to the case's tolerance."""
    inputs = inputs_of(case)
    expected = call(build(case), inputs)
    narrow = mapped(inputs, lambda t: t.float() if t.is_floating_point() else t)
    error = error_between(call(build(case, torch.float32), tuple(narrow)), expected)
    expect(error <= case.float32_tolerance, f"they differ by {error:.3g}, the case allows {case.float32_tolerance:g}")


CHECKS: dict[str, Callable[[LossCase], None]] = {
    "scalar": check_scalar,
    "gradients": check_gradients,
    "gradcheck": check_gradcheck,
    "minimum": check_minimum,
    "extremes": check_extremes,
    "reductions": check_reductions,
    "deterministic": check_deterministic,
    "float32": check_float32,
    "state_dict": shared.check_state_dict,
    "copies": shared.check_copies,
    "inputs_untouched": shared.check_inputs_untouched,
    "device": shared.check_device,
}


def check_loss(case_or_make: LossCase | Callable[..., nn.Module], **options: Any) -> None:
    """Hold a loss to the contract of its kind.

    Args:
        case_or_make: A case, or what builds the loss; then ``inputs`` comes with the options.
        **options: Fields of :class:`~provenn.contracts.LossCase`; ``part`` defaults to the factory's own name.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(LossCase, case_or_make, options)
