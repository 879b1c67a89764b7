"""Each check of the suite of losses catches a loss that is broken in that way."""

import math
from dataclasses import replace

import pytest
import torch
from contracts.broken import DOCUMENTED_ELSEWHERE, assert_caught, broken_runs, good_runs, own_checks
from torch import nn
from torch.nn.functional import softplus

from provenn.contracts import BadInput, ContractError, LossCase, Minimum, check_loss


def batch(generator, dtype):
    logits = torch.randn(5, generator=generator, dtype=dtype)
    return logits, torch.tensor([0, 1, 1, 0, 1], dtype=dtype)


def constant(value, target):
    return lambda: (torch.full((3,), value), torch.full((3,), target))


class LogisticLoss(nn.Module):
    """A correct little loss, to be broken below."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction
        self.prepare()

    def prepare(self):
        if self.reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction must be none, mean or sum, got {self.reduction!r}")

    def forward(self, logits, target):
        return self.reduce(self.each(logits, target))

    def each(self, logits, target):
        return softplus(logits) - logits * target

    def reduce(self, losses):
        return losses if self.reduction == "none" else getattr(losses, self.reduction)()


class Unreduced(LogisticLoss):
    def reduce(self, losses):
        return losses


class SinglePrecision(LogisticLoss):
    def reduce(self, losses):
        return super().reduce(losses).float()


class Detached(LogisticLoss):
    def each(self, logits, target):
        return super().each(logits.detach(), target)


class UnusedWeight(LogisticLoss):
    def prepare(self):
        self.weight = nn.Parameter(torch.ones(3))


class HalfTheGradient(LogisticLoss):
    def each(self, logits, target):
        return super().each((logits + logits.detach()) / 2, target)


class WeightWithoutGradient(LogisticLoss):
    def prepare(self):
        self.weight = nn.Parameter(torch.ones(()))

    def each(self, logits, target):
        return super().each(logits, target) * (self.weight.detach() ** 2 + 0 * self.weight)


class NaiveLogarithm(LogisticLoss):
    def each(self, logits, target):
        p = torch.sigmoid(logits)
        return -(target * p.log() + (1 - target) * (1 - p).log())


class MeanBySize(LogisticLoss):
    def reduce(self, losses):
        return losses.sum() / (len(losses) - 1) if self.reduction == "mean" else super().reduce(losses)


class SumByDefault(LogisticLoss):
    def __init__(self, reduction="sum"):
        super().__init__(reduction)


class AnyReduction(LogisticLoss):
    def prepare(self):
        if self.reduction == "median":
            self.reduction = "mean"


class RunningScale(LogisticLoss):
    def prepare(self):
        self.register_buffer("scale", torch.ones(()))

    def each(self, logits, target):
        self.scale += 0.1
        return super().each(logits, target) * self.scale


class Jitters(LogisticLoss):
    def each(self, logits, target):
        return super().each(logits + 1e-3 * torch.randn_like(logits), target)


class HalfInside(LogisticLoss):
    def each(self, logits, target):
        return super().each(logits.half().float() if logits.dtype == torch.float32 else logits, target)


class UnregisteredDraw(LogisticLoss):
    def prepare(self):
        self.scale = float(torch.rand(()) + 0.5)

    def each(self, logits, target):
        return super().each(logits, target) * self.scale


class HoldsAFunction(LogisticLoss):
    def prepare(self):
        self.function = lambda losses: losses

    def each(self, logits, target):
        return self.function(super().each(logits, target))


class ChangesTheTarget(LogisticLoss):
    def each(self, logits, target):
        return super().each(logits, target.mul_(0.9))


class ConstantOnTheCPU(LogisticLoss):
    def each(self, logits, target):
        return super().each(logits, target) * torch.ones(5, dtype=logits.dtype)


HALF = Minimum(lambda: (torch.zeros(2).double(), torch.full((2,), 0.5).double()), math.log(2))
GOOD = LossCase(
    "torch.nn.BCEWithLogitsLoss",
    nn.BCEWithLogitsLoss,
    batch,
    minimum=HALF,
    extremes=(constant(1e4, 0.0), constant(-1e4, 1.0), constant(0.0, 1.0)),
    bad_input=(
        BadInput("size", lambda: nn.BCEWithLogitsLoss()(torch.zeros(2), torch.zeros(3)), ValueError),
        BadInput("foo", lambda: nn.BCEWithLogitsLoss(foo=1), TypeError),
    ),
    excluded={**DOCUMENTED_ELSEWHERE, "reductions": "torch refuses an unknown reduction only when called, unnamed"},
)
SMALL = replace(
    GOOD,
    make=LogisticLoss,
    excluded=DOCUMENTED_ELSEWHERE,
    label="small",
    bad_input=(BadInput("reduction", lambda: LogisticLoss("median")),),
)


def broken(make, **options):
    return replace(SMALL, **{"make": make, "label": make.__name__, **options})


BROKEN = {
    "scalar": [broken(Unreduced), broken(SinglePrecision)],
    "gradients": [broken(Detached), broken(UnusedWeight)],
    "gradcheck": [broken(HalfTheGradient), broken(WeightWithoutGradient)],
    "minimum": [
        broken(LogisticLoss, minimum=replace(HALF, value=0.0)),
        broken(LogisticLoss, minimum=Minimum(lambda: (torch.ones(1).double(), torch.ones(1).double()), 0.31326168)),
    ],
    "extremes": [broken(NaiveLogarithm), broken(LogisticLoss, extremes=())],
    "reductions": [broken(MeanBySize), broken(SumByDefault), broken(AnyReduction), broken(Unreduced)],
    "deterministic": [broken(RunningScale), broken(Jitters)],
    "float32": [broken(HalfInside)],
    "state_dict": [broken(UnregisteredDraw)],
    "copies": [broken(HoldsAFunction)],
    "inputs_untouched": [broken(ChangesTheTarget)],
    "device": [broken(ConstantOnTheCPU)],
}


@pytest.mark.parametrize("check", good_runs(GOOD, SMALL))
def test_good_losses_pass(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_losses_are_caught(name, case):
    assert_caught(name, case)


def test_every_check_has_a_broken_loss():
    assert set(BROKEN) == own_checks("loss")


def test_check_loss_lists_failures():
    with pytest.raises(ContractError, match="'gradcheck'"):
        check_loss(broken(HalfTheGradient))
