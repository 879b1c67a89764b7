"""Each check of the suite of attacks catches an attack that is broken in that way."""

import contextlib
import math
from dataclasses import dataclass, replace

import pytest
import torch
from contracts.broken import DOCUMENTED_ELSEWHERE, assert_caught, broken_runs, good_runs, own_checks
from torch import Tensor, nn

from provenn.contracts import AttackCase, BadInput, ContractError, check_attack

RADIUS = 0.3


def network():
    """Tells three sectors around the centre of the unit square apart; its mode matters."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    angles = torch.arange(8) * math.pi / 4
    with torch.no_grad():
        model[0].running_mean.fill_(0.5)
        model[1].weight.copy_(torch.stack([angles.cos(), angles.sin()], dim=1))
        model[1].bias.zero_()
        model[4].weight.copy_(torch.stack([(angles - turn * 2 * math.pi / 3).cos() for turn in range(3)]))
        model[4].bias.zero_()
    return model


def inputs(generator, dtype, batch):
    points = torch.rand(batch, 2, generator=generator, dtype=dtype)
    sectors = (points - 0.5) @ torch.tensor([[1, -0.5, -0.5], [0, 0.75**0.5, -(0.75**0.5)]], dtype=dtype)
    return points, sectors.argmax(dim=1)


@dataclass(frozen=True)
class Result:
    adversarial: Tensor
    success: Tensor
    skipped: Tensor


@contextlib.contextmanager
def frozen(model):
    modes = {module: module.training for module in model.modules()}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield model.eval().requires_grad_(False)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


class SignedGradients:
    """A correct little attack, to be broken below: steps along the gradient's sign from a random start."""

    noise = 0.05
    steps = 6

    def __init__(self, radius=RADIUS):
        if radius < 0:
            raise ValueError(f"radius must be >= 0, got {radius}")
        self.radius = radius

    def attack(self, model, x, y, generator=None):
        with self.frozen(model):
            wrong = self.predict(model, x) != y
            start = self.noise * (2 * self.draw(x, generator) - 1)
            adversarial = self.project(x + start, x)
            for _ in range(self.steps):
                adversarial = self.project(adversarial + 0.05 * self.gradient(model, adversarial, y).sign(), x)
            adversarial = self.kept(adversarial, x, wrong)
            return Result(adversarial, self.flags(model, adversarial, y, wrong), wrong)

    def frozen(self, model):
        return frozen(model)

    def draw(self, x, generator):
        return torch.rand(x.shape, generator=generator, dtype=x.dtype)

    def predict(self, model, x):
        return model(x).argmax(dim=1)

    def gradient(self, model, x, y):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(nn.functional.cross_entropy(model(x), y, reduction="sum"), x)[0]

    def project(self, x, centre):
        return torch.minimum(torch.maximum(x, centre - self.radius), centre + self.radius).clamp(0, 1)

    def kept(self, adversarial, x, wrong):
        return torch.where(wrong[:, None], x, adversarial)

    def flags(self, model, adversarial, y, wrong):
        return (self.predict(model, adversarial) != y) & ~wrong


class Overshoots(SignedGradients):
    def project(self, x, centre):
        return (centre + (x - centre).clamp(-1.001 * self.radius, 1.001 * self.radius)).clamp(0, 1)


class ProjectsTheStepAlone(SignedGradients):
    def project(self, x, centre):
        return x.clamp(0, 1)


class OvershootsInFloat32(SignedGradients):
    def project(self, x, centre):
        return super().project(x, centre) if x.dtype == torch.float64 else Overshoots.project(self, x, centre)


class MakesNaN(SignedGradients):
    def kept(self, adversarial, x, wrong):
        return super().kept(adversarial * torch.nan, x, wrong)


class LeavesTheBox(SignedGradients):
    def project(self, x, centre):
        return centre + (x - centre).clamp(-self.radius, self.radius)


class FlagsTheLastIterate(SignedGradients):
    def kept(self, adversarial, x, wrong):
        return super().kept(x.clone(), x, wrong)

    def flags(self, model, adversarial, y, wrong):
        return ~wrong


class FlagsSkipped(SignedGradients):
    def flags(self, model, adversarial, y, wrong):
        return self.predict(model, adversarial) != y


class FlagsAreNumbers(SignedGradients):
    def flags(self, model, adversarial, y, wrong):
        return super().flags(model, adversarial, y, wrong).to(y)


class FlagsTheBatch(SignedGradients):
    def flags(self, model, adversarial, y, wrong):
        return super().flags(model, adversarial, y, wrong).all()


class FlagsInTrainingMode(SignedGradients):
    def flags(self, model, adversarial, y, wrong):
        with torch.random.fork_rng(devices=[]):
            return super().flags(model.train(), adversarial, y, wrong)


class DoesNothing(SignedGradients):
    noise = 0.0
    steps = 0


class AttacksTheWrong(SignedGradients):
    def kept(self, adversarial, x, wrong):
        return adversarial


class SkipsNothing(SignedGradients):
    def attack(self, model, x, y, generator=None):
        result = super().attack(model, x, y, generator)
        return replace(result, skipped=torch.zeros_like(result.skipped))


class SkipsSuccesses(SignedGradients):
    def attack(self, model, x, y, generator=None):
        result = super().attack(model, x, y, generator)
        return replace(result, skipped=result.skipped | result.success)


class LeavesEvalMode(SignedGradients):
    @contextlib.contextmanager
    def frozen(self, model):
        with frozen(model):
            yield
        model.eval()


class LeavesFrozen(SignedGradients):
    @contextlib.contextmanager
    def frozen(self, model):
        with frozen(model):
            yield
        model.requires_grad_(False)


class Unfreezes(SignedGradients):
    @contextlib.contextmanager
    def frozen(self, model):
        with frozen(model):
            yield
        model.requires_grad_(True)


class AccumulatesGradients(SignedGradients):
    @contextlib.contextmanager
    def frozen(self, model):
        with frozen(model):
            model.requires_grad_(True)
            yield

    def gradient(self, model, x, y):
        x = x.detach().requires_grad_()
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
        return x.grad


class ClearsGradients(SignedGradients):
    def gradient(self, model, x, y):
        model.zero_grad()
        return super().gradient(model, x, y)


class StaysInTrainingMode(SignedGradients):
    @contextlib.contextmanager
    def frozen(self, model):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield


class RestoresOnlyAfterSuccess(SignedGradients):
    @contextlib.contextmanager
    def frozen(self, model):
        modes = {module: module.training for module in model.modules()}
        yield model.eval()
        for module, mode in modes.items():
            module.training = mode


class LeavesAHookAfterErrors(SignedGradients):
    def gradient(self, model, x, y):
        hook = model[1].register_forward_hook(lambda *_: None)
        found = super().gradient(model, x, y)
        hook.remove()
        return found


class NeverCallsTheModel(SignedGradients):
    def attack(self, model, x, y, generator=None):
        nothing = torch.zeros(len(x), dtype=torch.bool)
        return Result(x.clone(), nothing, nothing)


class HasDropoutOn(SignedGradients):
    def gradient(self, model, x, y):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for module in model.modules():
                module.training = self.modes[module] if isinstance(module, nn.Dropout) else False
            return super().gradient(model, x, y)

    def frozen(self, model):
        self.modes = {module: module.training for module in model.modules()}
        return super().frozen(model)


class ChangesInPlace(SignedGradients):
    def attack(self, model, x, y, generator=None):
        result = super().attack(model, x, y, generator)
        return replace(result, adversarial=x.copy_(result.adversarial))


class WantsGradients(SignedGradients):
    def attack(self, model, x, y, generator=None):
        x.requires_grad_()
        result = super().attack(model, x, y, generator)
        return replace(result, adversarial=result.adversarial.detach())


class ReturnsTheInput(SignedGradients):
    def attack(self, model, x, y, generator=None):
        result = super().attack(model, x, y, generator)
        return replace(result, adversarial=x) if result.skipped.all() else result


class ReturnsFloat32(SignedGradients):
    def kept(self, adversarial, x, wrong):
        return super().kept(adversarial, x, wrong).float().clamp(0, 1)

    def predict(self, model, x):
        return super().predict(model, x.to(model[1].weight.dtype))


class ReturnsRows(SignedGradients):
    def attack(self, model, x, y, generator=None):
        result = super().attack(model, x, y, generator)
        return replace(result, adversarial=result.adversarial[:, :, None])


class ReturnsAGraph(SignedGradients):
    def kept(self, adversarial, x, wrong):
        return super().kept(adversarial, x, wrong).requires_grad_()


class OneFlagForAll(SignedGradients):
    def attack(self, model, x, y, generator=None):
        result = super().attack(model, x, y, generator)
        return replace(result, skipped=result.skipped.any())


class DrawsGlobally(SignedGradients):
    def draw(self, x, generator):
        return torch.rand(x.shape, dtype=x.dtype)


class IgnoresTheGenerator(SignedGradients):
    def draw(self, x, generator):
        return super().draw(x, torch.Generator().manual_seed(0))


class CopiesTheGenerator(SignedGradients):
    def draw(self, x, generator):
        return super().draw(x, torch.Generator().set_state(generator.get_state()))


class Quiet(SignedGradients):
    """Without noise: a sample's result does not depend on the others."""

    noise = 0.0


class NormalizesOverTheBatch(Quiet):
    def gradient(self, model, x, y):
        gradient = super().gradient(model, x, y)
        return torch.where(gradient.abs() > gradient.abs().mean() / 2, gradient, 0)


class StopsAllWithTheFirst(Quiet):
    def gradient(self, model, x, y):
        return super().gradient(model, x, y) * (self.predict(model, x) == y).all()


class NeedsASample(SignedGradients):
    def draw(self, x, generator):
        x.max()
        return super().draw(x, generator)


class InventsASample(SignedGradients):
    def attack(self, model, x, y, generator=None):
        result = super().attack(model, x, y, generator)
        return result if len(x) else replace(result, success=torch.zeros(1, dtype=torch.bool))


GOOD = AttackCase(
    "contracts.broken.own_checks",
    SignedGradients,
    network,
    inputs,
    RADIUS,
    bad_input=(BadInput("radius", lambda: SignedGradients(-1)),),
    independent_samples=False,
    independent_samples_reason="the noise of a sample depends on its place in the batch",
    excluded={**DOCUMENTED_ELSEWHERE, "public_name": "the part is a test's own"},
    label="good",
)
QUIET = replace(
    GOOD,
    make=Quiet,
    independent_samples=True,
    random=False,
    random_reason="it draws nothing",
    label="quiet",
)


def broken(make, case=GOOD, **options):
    return replace(case, **{"make": make, "label": make.__name__, **options})


BROKEN = {
    "budget": [
        broken(Overshoots),
        broken(ProjectsTheStepAlone),
        broken(OvershootsInFloat32),
        broken(MakesNaN),
        broken(SignedGradients, distance="l2", label="another norm"),
        broken(SignedGradients, distance="l1", label="sum of magnitudes"),
        broken(SignedGradients, distance="l0", budget=1, label="number of changes"),
        broken(
            SignedGradients, distance=lambda model, inputs, x: (x - inputs[0]).norm(dim=1) + 1, label="own distance"
        ),
    ],
    "box": [broken(LeavesTheBox)],
    "success_flag": [
        broken(FlagsTheLastIterate),
        broken(FlagsSkipped),
        broken(FlagsAreNumbers),
        broken(FlagsTheBatch),
        broken(FlagsInTrainingMode),
    ],
    "succeeds": [broken(DoesNothing)],
    "misclassified": [broken(AttacksTheWrong), broken(SkipsNothing), broken(SkipsSuccesses)],
    "model_untouched": [
        broken(LeavesEvalMode),
        broken(LeavesFrozen),
        broken(Unfreezes),
        broken(AccumulatesGradients),
        broken(ClearsGradients),
        broken(StaysInTrainingMode),
    ],
    "model_restored_after_error": [
        broken(RestoresOnlyAfterSuccess),
        broken(LeavesAHookAfterErrors),
        broken(NeverCallsTheModel),
    ],
    "evaluation_mode": [broken(HasDropoutOn), broken(StaysInTrainingMode)],
    "inputs_untouched": [broken(ChangesInPlace), broken(WantsGradients), broken(ReturnsTheInput)],
    "result": [broken(ReturnsFloat32), broken(ReturnsRows), broken(ReturnsAGraph), broken(OneFlagForAll)],
    "seed": [broken(DrawsGlobally)],
    "random": [broken(IgnoresTheGenerator), broken(CopiesTheGenerator)],
    "independent_samples": [broken(NormalizesOverTheBatch, QUIET), broken(StopsAllWithTheFirst, QUIET)],
    "empty_batch": [broken(NeedsASample), broken(InventsASample)],
}


@pytest.mark.parametrize("check", good_runs(GOOD, QUIET))
def test_good_attack_passes(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_attacks_are_caught(name, case):
    assert_caught(name, case)


def test_every_check_has_a_broken_attack():
    assert set(BROKEN) == own_checks("attack")


def test_check_attack_lists_failures():
    with pytest.raises(ContractError, match="'budget'"):
        check_attack(broken(Overshoots))
