"""Each check of the suite of optimizers catches an optimizer that is broken in that way."""

import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from contracts.broken import DOCUMENTED_ELSEWHERE, assert_caught, broken_runs, good_runs, own_checks
from torch.optim import SGD, Adam, Optimizer

from provenn.contracts import BadInput, ContractError, OptimizerCase, check_optimizer, checks_of


class HeavyBall(Optimizer):
    """A correct little optimizer, to be broken below."""

    def __init__(self, params, lr=0.01, momentum=0.9):
        if not (math.isfinite(lr) and lr >= 0):
            raise ValueError(f"lr must be finite and ≥ 0, got {lr}")
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(group, parameter)
        return loss

    def update(self, group, parameter):
        grad = parameter.grad
        if grad.is_sparse or grad.is_complex():
            raise RuntimeError("HeavyBall supports neither sparse nor complex gradients")
        state = self.state[parameter]
        if not state:
            state["buffer"] = torch.zeros_like(parameter)
        state["buffer"].mul_(group["momentum"]).add_(grad)
        parameter.sub_(group["lr"] * state["buffer"])


class OneRateForAll(HeavyBall):
    def update(self, group, parameter):
        super().update(self.param_groups[0], parameter)


class DropsLaterGroups(HeavyBall):
    def step(self, closure=None):
        every, self.param_groups = self.param_groups, self.param_groups[:1]
        loss = super().step(closure)
        self.param_groups = every
        return loss


class ForgetsTheSchedule(HeavyBall):
    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.rates = [group["lr"] for group in self.param_groups]

    def step(self, closure=None):
        for group, rate in zip(self.param_groups, self.rates, strict=False):
            group["lr"] = rate
        return super().step(closure)


class ReturnsNothing(HeavyBall):
    def step(self, closure=None):
        super().step(closure)


class ReturnsALaterLoss(HeavyBall):
    def step(self, closure=None):
        super().step(closure)
        return None if closure is None else closure()


class ClosureWithoutGradients(HeavyBall):
    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        super().step()
        return loss


class NoneIsZero(HeavyBall):
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None and parameter in self.state:
                parameter.grad = torch.zeros_like(parameter)
        return super().step(closure)


class Densifies(HeavyBall):
    def update(self, group, parameter):
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
        super().update(group, parameter)


class SparseTwice(HeavyBall):
    def update(self, group, parameter):
        if parameter.grad.is_sparse:
            parameter.grad = 2 * parameter.grad.to_dense()
        super().update(group, parameter)


class SparseByAttribute(HeavyBall):
    def update(self, group, parameter):
        if parameter.grad.is_sparse:
            raise RuntimeError("bad layout")
        super().update(group, parameter)


class OtherEpsilonInForeach(Adam):
    def __init__(self, params, foreach=None, **options):
        super().__init__(params, foreach=foreach, eps=1e-4 if foreach else 1e-8, **options)


class IgnoresMaximize(Adam):
    def __init__(self, params, maximize=False, **options):
        super().__init__(params, **options)
        self.defaults["maximize"] = maximize


class Climbs(HeavyBall):
    def update(self, group, parameter):
        super().update({**group, "lr": -group["lr"]}, parameter)


class AcceptsAnyRate(HeavyBall):
    def __init__(self, params, lr=0.01):
        super().__init__(params, lr=0.01)
        for group in self.param_groups:
            group["lr"] = lr


class MovesAtRateZero(HeavyBall):
    def update(self, group, parameter):
        super().update({**group, "lr": group["lr"] + 1e-6}, parameter)


class ForgetsItsState(HeavyBall):
    def load_state_dict(self, state_dict):
        super().load_state_dict({**state_dict, "state": {}})


class ForgetsItsCounter(HeavyBall):
    """The rate decays with a count that is no part of the state."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.count = 0

    def step(self, closure=None):
        self.count += 1
        return super().step(closure)

    def update(self, group, parameter):
        super().update({**group, "lr": group["lr"] / self.count}, parameter)


class KeepsFractions(HeavyBall):
    def update(self, group, parameter):
        super().update(group, parameter)
        self.state[parameter]["share"] = Fraction(1, 3)


class SinglePrecisionState(HeavyBall):
    def update(self, group, parameter):
        state = self.state[parameter]
        if not state:
            state["buffer"] = torch.zeros(parameter.shape, device=parameter.device)
        state["buffer"].mul_(group["momentum"]).add_(parameter.grad)
        parameter.sub_(group["lr"] * state["buffer"].to(parameter.dtype))


class WidensParameters(HeavyBall):
    def update(self, group, parameter):
        super().update(group, parameter)
        parameter.data = parameter.data.float() if parameter.dtype == torch.bfloat16 else parameter.data


class StateOnTheCPU(HeavyBall):
    def update(self, group, parameter):
        self.state[parameter].setdefault("buffer", torch.zeros(parameter.shape, dtype=parameter.dtype))
        super().update(group, parameter)


class IdleStateOnTheCPU(HeavyBall):
    def update(self, group, parameter):
        super().update(group, parameter)
        self.state[parameter]["spare"] = torch.zeros(parameter.shape, dtype=parameter.dtype)


class SkipsScalars(HeavyBall):
    def update(self, group, parameter):
        if parameter.dim():
            super().update(group, parameter)


class NormalisesByTheLargest(HeavyBall):
    def update(self, group, parameter):
        super().update({**group, "lr": group["lr"] / float(parameter.grad.abs().max())}, parameter)


class RealPartsOnly(HeavyBall):
    def update(self, group, parameter):
        if parameter.is_complex():
            parameter.sub_(group["lr"] * parameter.grad.real)
        else:
            super().update(group, parameter)


class NewStorage(HeavyBall):
    def update(self, group, parameter):
        super().update(group, parameter)
        parameter.data = parameter.data.clone()


class KeepsTheLoss(HeavyBall):
    def step(self, closure=None):
        self.loss = super().step(closure)
        return self.loss


class StateWithGraph(HeavyBall):
    def update(self, group, parameter):
        super().update(group, parameter)
        with torch.enable_grad():
            self.state[parameter]["norm"] = parameter.norm()


class RemembersNumbers(HeavyBall):
    def step(self, closure=None):
        self.__dict__.setdefault("history", []).append(self.param_groups[0]["params"][0].detach().norm().item())
        return super().step(closure)


class RemembersTensors(HeavyBall):
    def update(self, group, parameter):
        super().update(group, parameter)
        self.__dict__.setdefault("history", []).append(parameter.clone())


BAD_RATE = (BadInput("lr", lambda: HeavyBall([torch.zeros(1)], lr=-1.0)),)
GOOD = OptimizerCase(
    "torch.optim.Adam",
    Adam,
    foreach=True,
    quadratic={"lr": 0.1},
    rosenbrock={"lr": 0.02},
    bad_input=(BadInput("learning rate", lambda: Adam([torch.zeros(1)], lr=-1.0)),),
    excluded=DOCUMENTED_ELSEWHERE,
)
SMALL = replace(GOOD, make=HeavyBall, foreach=False, rosenbrock={"lr": 3e-4}, quadratic={}, bad_input=BAD_RATE)
SPARSE = OptimizerCase(
    "torch.optim.SGD",
    SGD,
    foreach=True,
    sparse="supported",
    quadratic={"lr": 0.1},
    rosenbrock={"lr": 1e-3},
    bad_input=(BadInput("learning rate", lambda: SGD([torch.zeros(1)], lr=-1.0)),),
    excluded={**DOCUMENTED_ELSEWHERE, "step_size": "takes NaN for a learning rate"},
)


def broken(make, **options):
    return replace(SMALL, **{"make": make, "label": make.__name__.strip("<>"), **options})


BROKEN = {
    "is_optimizer": [
        broken(lambda params: SimpleNamespace(param_groups=[{"params": list(params)}])),
        broken(lambda params: HeavyBall(list(params)[::-1]), label="reversed"),
    ],
    "parameter_groups": [broken(OneRateForAll)],
    "add_param_group": [broken(DropsLaterGroups)],
    "schedulers": [broken(ForgetsTheSchedule)],
    "closure": [
        broken(ReturnsNothing),
        broken(ReturnsALaterLoss),
        broken(ClosureWithoutGradients),
        broken(HeavyBall, closure="required"),
    ],
    "none_gradients": [broken(NoneIsZero)],
    "sparse_gradients": [
        broken(Densifies),
        broken(SparseByAttribute),
        broken(SparseTwice, sparse="supported"),
        broken(HeavyBall, sparse="supported"),
    ],
    "foreach": [broken(OtherEpsilonInForeach, foreach=True), broken(HeavyBall, foreach=True), broken(Adam)],
    "maximize": [broken(IgnoresMaximize)],
    "quadratic": [broken(Climbs)],
    "rosenbrock": [broken(Climbs)],
    "step_size": [broken(AcceptsAnyRate), broken(MovesAtRateZero), broken(HeavyBall, step_size="rate")],
    "resume": [broken(ForgetsItsState), broken(ForgetsItsCounter)],
    "resume_from_file": [broken(KeepsFractions)],
    "copies": [broken(ForgetsItsCounter)],
    "state_dtype": [broken(SinglePrecisionState), broken(WidensParameters)],
    "device": [broken(StateOnTheCPU), broken(IdleStateOnTheCPU)],
    "scalar_parameters": [broken(SkipsScalars)],
    "empty_parameters": [broken(NormalisesByTheLargest)],
    "complex_parameters": [broken(RealPartsOnly)],
    "in_place": [broken(NewStorage), broken(KeepsTheLoss), broken(StateWithGraph)],
    "memory": [broken(RemembersNumbers), broken(RemembersTensors)],
}


@pytest.mark.parametrize("check", good_runs(GOOD, replace(SMALL, label="small"), SPARSE))
def test_good_optimizers_pass(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_optimizers_are_caught(name, case):
    assert_caught(name, case)


def test_every_check_has_a_broken_optimizer():
    assert set(BROKEN) == own_checks("optimizer")


@pytest.mark.parametrize("case", [broken(OneRateForAll), broken(SkipsScalars), broken(KeepsFractions)])
def test_checks_are_apart(case):
    """One mistake fails one check."""
    failing = []
    for name, check in checks_of(case).items():
        try:
            check()
        except ContractError:
            failing.append(name)
    assert len(failing) == 1


def test_check_optimizer_lists_every_failure():
    with pytest.raises(ContractError) as caught:
        check_optimizer(broken(Climbs))
    message = str(caught.value)
    assert "2 of the checks" in message
    assert "'quadratic'" in message
    assert "'rosenbrock'" in message


def test_check_optimizer_takes_a_factory_and_options():
    options = {"bad_input": BAD_RATE, "excluded": {"docstring": "a test's own"}, "rosenbrock": {"lr": 3e-4}}
    check_optimizer(HeavyBall, **options)
    with pytest.raises(ContractError, match=r"test_optimizer_broken\.Climbs"):
        check_optimizer(Climbs, **options)
