"""The suite of optimizers: what users of ``torch.optim`` rely on, whichever optimizer it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from provenn.contracts import _optimizer_state as kept
from provenn.contracts._optimizer_problem import Problem, Rosenbrock, default_step_size, take_steps
from provenn.contracts.case import OptimizerCase
from provenn.contracts.suite import ContractError, check_part, expect
from provenn.contracts.watch import error_between, same, seeded


def exercise(case: OptimizerCase) -> Callable[[], object]:
    """Return a call that builds the optimizer and takes three steps."""

    def act() -> None:
        problem = Problem()
        optimizer = case.make(problem.parameters)
        for _ in range(3):
            optimizer.step(problem.closure)

    return act


def check_is_optimizer(case: OptimizerCase) -> None:
    """It is a torch.optim.Optimizer over the parameters given, whose step needs no argument unless declared."""
    problem = Problem()
    optimizer = case.make(problem.parameters)
    expect(isinstance(optimizer, Optimizer), f"make gave a {type(optimizer).__name__}")
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    expect(
        len(held) == len(problem.parameters) and all(map(lambda a, b: a is b, held, problem.parameters)),
        "its groups do not hold the parameters given",
    )
    expect(repr(optimizer).startswith(type(optimizer).__name__), f"its repr is {optimizer!r}")
    take_steps(case, problem, case.make(iter(problem.parameters)), 1)


def _displacements(case: OptimizerCase, sizes: Sequence[float]) -> list[float]:
    """Step equal parameters in groups of different step sizes once; return how far each moved."""
    problem = Problem([(4, 3)] * len(sizes))
    for other in problem.parameters[1:]:
        other.data.copy_(problem.parameters[0].data)
    problem.targets = problem.targets[:1] * len(sizes)
    before = problem.values()
    groups = [{"params": [p], case.step_size: size} for p, size in zip(problem.parameters, sizes, strict=True)]
    take_steps(case, problem, case.make(groups), 1)
    return [float((p - b).norm()) for p, b in zip(problem.values(), before, strict=True)]


def check_parameter_groups(case: OptimizerCase) -> None:
    """Each parameter group steps by its own options."""
    size = default_step_size(case)
    large, small = _displacements(case, [size, size / 10])
    expect(large > 0, "a parameter with a gradient did not move")
    expect(
        small < 0.9 * large, f"a tenth of {case.step_size} in a group moved its parameter {small:.3g} to {large:.3g}"
    )


def check_add_param_group(case: OptimizerCase) -> None:
    """A group added after some steps is stepped with the others, by its own options."""
    problem = Problem([(4, 3), (4, 3)])
    first, second = problem.parameters
    optimizer = case.make([first])
    take_steps(case, problem, optimizer, 2)
    before = problem.values()
    optimizer.add_param_group({"params": [second]})
    missing = set(optimizer.param_groups[0]) - set(optimizer.param_groups[1])
    expect(not missing, f"the added group lacks the options {sorted(missing)}")
    take_steps(case, problem, optimizer, 2)
    moved = [not same(now, then) for now, then in zip(problem.values(), before, strict=True)]
    expect(moved == [True, True], f"moved after adding the second group: first {moved[0]}, second {moved[1]}")


def _constant(factor: float, epoch: int) -> float:
    return factor


def check_schedulers(case: OptimizerCase) -> None:
    """A scheduler's changes of the step size act on the next step."""
    default_step_size(case)
    moved = []
    for factor in (1.0, 0.1):
        problem = Problem()
        optimizer = case.make(problem.parameters)
        scheduler = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, partial(_constant, factor))
        take_steps(case, problem, optimizer, 1)
        scheduler.step()
        before = problem.values()
        take_steps(case, problem, optimizer, 1)
        moved.append(math.dist(*(torch.cat([t.flatten() for t in ts]).tolist() for ts in (problem.values(), before))))
    expect(moved[1] < 0.9 * moved[0], f"with the step size cut to a tenth it moved {moved[1]:.3g} to {moved[0]:.3g}")


def check_closure(case: OptimizerCase) -> None:
    """step(closure) evaluates the closure, with gradients enabled, and returns its first loss."""
    problem = Problem()
    optimizer = case.make(problem.parameters)
    losses: list[Tensor] = []
    enabled = []

    def closure() -> Any:
        enabled.append(torch.is_grad_enabled())
        losses.append(problem.closure())
        return losses[-1]

    with seeded(0):
        returned = optimizer.step(closure)
    expect(losses, "the closure was never called")
    expect(returned is not None, "step(closure) returned None")
    expect(
        math.isclose(float(torch.as_tensor(returned).detach()), float(losses[0].detach())),
        f"it returned {returned}, the loss was {losses[0]}",
    )
    if case.closure == "optional":
        expect(all(enabled), "the closure was called with gradients disabled")
        problem.closure()
        expect(optimizer.step() is None, "step() without a closure returned something")
        return
    try:
        optimizer.step()  # type: ignore[call-arg, unused-ignore]
    except (TypeError, ValueError, RuntimeError) as error:
        expect("closure" in str(error), f"step() without a closure raised {error}, which does not name the closure")
    else:
        raise ContractError("step() without the required closure did nothing, silently")


def check_none_gradients(case: OptimizerCase) -> None:
    """A parameter without a gradient is left alone, and the others step."""
    problem = Problem([(4, 3), (4, 3)])
    optimizer = case.make(problem.parameters)
    for before_it in ("at first", "after a step with one"):
        before = problem.values()
        problem.closure()
        problem.parameters[1].grad = None
        optimizer.step()
        expect(same(problem.values()[1], before[1]), f"{before_it}, a parameter without gradient moved")
        expect(not same(problem.values()[0], before[0]), "a parameter beside one without gradient did not move")
        problem.closure()
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    expect(all(p.grad is None for p in problem.parameters), "a gradient appeared")


def check_sparse_gradients(case: OptimizerCase) -> None:
    """Sparse gradients work as dense ones where supported, and else raise an error that says so."""
    results = []
    for layout in (torch.sparse_coo, torch.strided):
        problem = Problem([(4, 3)])
        parameter = problem.parameters[0]
        optimizer = case.make([parameter])
        problem.closure()
        assert parameter.grad is not None
        parameter.grad[[0, 2]] = 0
        if layout is torch.sparse_coo:
            parameter.grad = parameter.grad.to_sparse(1)
        try:
            optimizer.step()
        except (RuntimeError, TypeError, ValueError) as error:
            expect("sparse" in str(error).lower(), f"it raised {error}, which does not say sparse")
            expect(case.sparse == "raises", f"it raised {error}, though declared supported")
            return
        expect(case.sparse == "supported" or layout is torch.strided, "a sparse gradient was accepted")
        results.append(problem.values())
    difference = error_between(*results)
    expect(difference < 1e-9, f"after one step sparse and dense gradients differ by {difference:.3g}")


def check_foreach(case: OptimizerCase) -> None:
    """foreach=True and foreach=False give the same parameters over 50 steps (1e-6)."""
    offered = "foreach" in case.make(Problem().parameters).defaults
    expect(offered == case.foreach, f"the case says foreach={case.foreach}, the defaults say {offered}")
    if not case.foreach:
        return
    results = []
    for foreach in (True, False):
        problem = Problem()
        take_steps(case, problem, case.make(problem.parameters, foreach=foreach), 50)
        results.append(problem.values())
    error = error_between(*results)
    expect(error <= 1e-6, f"they differ by {error:.3g}")


def check_maximize(case: OptimizerCase) -> None:
    """maximize=True, where there is such an option, steps as on the negated loss."""
    if "maximize" not in case.make(Problem().parameters).defaults:
        return
    results = []
    for maximize in (True, False):
        problem = Problem()
        sign = -1 if maximize else 1
        loss = problem.loss
        problem.loss = lambda loss=loss, sign=sign: sign * loss()  # type: ignore[method-assign, misc]
        take_steps(case, problem, case.make(problem.parameters, maximize=maximize), 5)
        results.append(problem.values())
    error = error_between(*results)
    expect(error < 1e-9, f"they differ by {error:.3g}")


def check_quadratic(case: OptimizerCase) -> None:
    """It brings a convex quadratic down to 1 % of its first value."""
    problem = Problem()
    first = problem.value()
    take_steps(case, problem, case.make(problem.parameters, **case.quadratic), case.quadratic_steps)
    last = problem.value()
    expect(last <= 0.01 * first, f"it went from {first:.3g} to {last:.3g} in {case.quadratic_steps} steps")


def check_rosenbrock(case: OptimizerCase) -> None:
    """It brings Rosenbrock's function down to a fifth of its first value."""
    problem = Rosenbrock()
    first = problem.value()
    take_steps(case, problem, case.make(problem.parameters, **case.rosenbrock), case.rosenbrock_steps)
    last = problem.value()
    expect(last <= first / 5, f"it went from {first:.3g} to {last:.3g} in {case.rosenbrock_steps} steps")


def check_step_size(case: OptimizerCase) -> None:
    """A negative, infinite or NaN step size is refused by a ValueError, and a zero one too unless it keeps still."""
    default_step_size(case)
    for size in (-1.0, math.nan):
        problem = Problem()
        try:
            case.make(problem.parameters, **{case.step_size: size})
        except ValueError:
            continue
        raise ContractError(f"{case.step_size}={size} was accepted")
    problem = Problem()
    try:
        optimizer = case.make(problem.parameters, **{case.step_size: 0.0})
    except ValueError:
        return
    before = problem.values()
    take_steps(case, problem, optimizer, 2)
    expect(same(problem.values(), before), f"{case.step_size}=0 was accepted and moved the parameters")


CHECKS: dict[str, Callable[[OptimizerCase], None]] = {
    "is_optimizer": check_is_optimizer,
    "parameter_groups": check_parameter_groups,
    "add_param_group": check_add_param_group,
    "schedulers": check_schedulers,
    "closure": check_closure,
    "none_gradients": check_none_gradients,
    "sparse_gradients": check_sparse_gradients,
    "foreach": check_foreach,
    "maximize": check_maximize,
    "quadratic": check_quadratic,
    "rosenbrock": check_rosenbrock,
    "step_size": check_step_size,
    "resume": kept.check_resume,
    "resume_from_file": kept.check_resume_from_file,
    "copies": kept.check_copies,
    "state_dtype": kept.check_state_dtype,
    "device": kept.check_device,
    "scalar_parameters": kept.check_scalar_parameters,
    "empty_parameters": kept.check_empty_parameters,
    "complex_parameters": kept.check_complex_parameters,
    "in_place": kept.check_in_place,
    "memory": kept.check_memory,
}


def check_optimizer(case_or_make: OptimizerCase | Callable[..., Optimizer], **options: Any) -> None:
    """Hold an optimizer to the contract of its kind.

    Args:
        case_or_make: A case, or what builds the optimizer over parameters.
        **options: Fields of :class:`~provenn.contracts.OptimizerCase`; ``part`` defaults to the factory's own name.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(OptimizerCase, case_or_make, options)
