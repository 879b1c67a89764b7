"""Each check of the suite of samplers catches a sampler that is broken in that way."""

from dataclasses import replace

import pytest
import torch
from contracts.broken import DOCUMENTED_ELSEWHERE, assert_caught, broken_runs, good_runs, own_checks
from torch import nn

from provenn.contracts import BadInput, ContractError, Expectation, SamplerCase, check_sampler

MIXING = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
CENTRE = torch.tensor([1.0, -2.0])


class Gaussian:
    """A correct little sampler, to be broken below: a network with dropout maps noise to correlated normal numbers."""

    def __init__(self, scale=1.0):
        if scale <= 0:
            raise ValueError(f"scale must be > 0, got {scale}")
        self.network = nn.Sequential(nn.BatchNorm1d(2, eps=1e-12, affine=False), nn.Dropout(0.5), nn.Linear(2, 2))
        with torch.no_grad():
            self.network[2].weight.copy_(scale * MIXING)
            self.network[2].bias.copy_(CENTRE)

    def sample(self, n, generator=None):
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        modes = {module: module.training for module in self.network.modules()}
        try:
            with torch.no_grad():
                return self.map(self.noise(n, generator))
        finally:
            for module, mode in modes.items():
                module.training = mode

    def noise(self, n, generator):
        return torch.randn(n, 2, generator=generator)

    def map(self, noise):
        return self.network.eval()(noise)


class DropsTheLast(Gaussian):
    def map(self, noise):
        return super().map(noise)[: max(len(noise) - 1, 1)]


class SqueezesOne(Gaussian):
    def map(self, noise):
        return super().map(noise).squeeze(0)


class ReturnsAList(Gaussian):
    def map(self, noise):
        return super().map(noise).tolist()


class DividesByZero(Gaussian):
    def map(self, noise):
        return super().map(noise) / (noise > -2)


class KeepsTheGraph(Gaussian):
    def map(self, noise):
        with torch.enable_grad():
            return super().map(noise)


class StacksRows(Gaussian):
    def map(self, noise):
        return torch.stack([super(StacksRows, self).map(row[None])[0] for row in noise])


class EmptyIsFlat(Gaussian):
    def map(self, noise):
        return super().map(noise) if len(noise) else torch.empty(0)


class EmptyIsDouble(Gaussian):
    def map(self, noise):
        return super().map(noise) if len(noise) else noise.double()


class IgnoresTheGenerator(Gaussian):
    def noise(self, n, generator):
        return super().noise(n, None)


class MixesInGlobalNoise(Gaussian):
    def noise(self, n, generator):
        return super().noise(n, generator) + 1e-6 * torch.rand(n, 1)


class AlwaysTheSame(Gaussian):
    def noise(self, n, generator):
        return super().noise(n, torch.Generator().manual_seed(0))


class CopiesTheGenerator(Gaussian):
    def noise(self, n, generator):
        copied = None if generator is None else torch.Generator().set_state(generator.get_state())
        return super().noise(n, copied)


class WastesAGlobalDraw(Gaussian):
    def noise(self, n, generator):
        torch.rand(1)
        return super().noise(n, generator)


class KeepsASpare(Gaussian):
    """Half of what it draws is kept for the next call."""

    spare = None

    def noise(self, n, generator):
        fresh = super().noise(n, generator)
        found, self.spare = (fresh if self.spare is None or len(self.spare) != n else self.spare), fresh
        return found


class SeedsWithoutAGenerator(Gaussian):
    def noise(self, n, generator):
        return super().noise(n, generator or torch.Generator().manual_seed(0))


class DrawsFromTheSystem(Gaussian):
    def noise(self, n, generator):
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        return super().noise(n, generator)


class RepeatsTheGlobalDraw(Gaussian):
    def noise(self, n, generator):
        if generator is not None:
            return super().noise(n, generator)
        with torch.random.fork_rng(devices=[]):
            return super().noise(n, None)


class OffCentre(Gaussian):
    def map(self, noise):
        return super().map(noise) + 0.1


class TooWide(Gaussian):
    def noise(self, n, generator):
        return 1.05 * super().noise(n, generator)


class Uncorrelated(Gaussian):
    def map(self, noise):
        return CENTRE + noise


class RepeatsOne(Gaussian):
    def noise(self, n, generator):
        return super().noise(1, generator).expand(n, 2)


class RepeatsEight(Gaussian):
    def noise(self, n, generator):
        return super().noise(8, generator).repeat(n // 8 + 1, 1)[:n]


class Antithetic(Gaussian):
    def noise(self, n, generator):
        half = super().noise((n + 1) // 2, generator)
        return torch.cat([half, -half])[:n]


class StaysInTrainingMode(Gaussian):
    def map(self, noise):
        self.network[0].train()
        return super().map(noise) + 0 * self.network[0].train()(noise) if len(noise) > 1 else super().map(noise)


class LeavesEvalMode(Gaussian):
    def sample(self, n, generator=None):
        found = super().sample(n, generator)
        self.network.eval()
        return found


class IsAModuleInEvalMode(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def sample(self, n, generator=None):
        return self.eval().linear(torch.randn(n, 2, generator=generator)).detach()


GOOD = SamplerCase(
    "contracts.broken.own_checks",
    Gaussian,
    (2,),
    (
        Expectation("mean", lambda samples: samples, lambda: CENTRE),
        Expectation(
            "covariance",
            lambda samples: (samples - CENTRE)[:, :, None] * (samples - CENTRE)[:, None, :],
            lambda: MIXING @ MIXING.T,
        ),
    ),
    bad_input=(BadInput("scale", lambda: Gaussian(0)), BadInput("n", lambda: Gaussian().sample(-1))),
    excluded={**DOCUMENTED_ELSEWHERE, "public_name": "the part is a test's own"},
    label="good",
)


def broken(make, **options):
    return replace(GOOD, **{"make": make, "label": make.__name__, **options})


BROKEN = {
    "shape": [broken(DropsTheLast), broken(SqueezesOne), broken(ReturnsAList)],
    "finite": [broken(DividesByZero)],
    "detached": [broken(KeepsTheGraph)],
    "empty": [broken(StacksRows), broken(EmptyIsFlat), broken(EmptyIsDouble)],
    "seed": [broken(IgnoresTheGenerator), broken(MixesInGlobalNoise), broken(AlwaysTheSame)],
    "generator": [broken(CopiesTheGenerator), broken(WastesAGlobalDraw), broken(KeepsASpare)],
    "default_generator": [
        broken(SeedsWithoutAGenerator),
        broken(DrawsFromTheSystem),
        broken(RepeatsTheGlobalDraw),
    ],
    "expectations": [
        broken(OffCentre),
        broken(TooWide),
        broken(Uncorrelated),
        broken(Gaussian, expectations=(), label="nothing known"),
        broken(
            Gaussian,
            expectations=(Expectation("mean", lambda samples: samples, lambda: CENTRE[:1]),),
            label="of another shape",
        ),
    ],
    "independent": [broken(RepeatsOne), broken(RepeatsEight), broken(Antithetic)],
    "networks_untouched": [broken(StaysInTrainingMode), broken(LeavesEvalMode), broken(IsAModuleInEvalMode)],
}


@pytest.mark.parametrize("check", good_runs(GOOD))
def test_good_sampler_passes(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_samplers_are_caught(name, case):
    assert_caught(name, case)


def test_every_check_has_a_broken_sampler():
    assert set(BROKEN) == own_checks("sampler")


def test_check_sampler_lists_failures():
    with pytest.raises(ContractError, match="'expectations'"):
        check_sampler(broken(TooWide))


def test_a_stated_bias_is_allowed():
    shifted = broken(OffCentre)
    known = replace(GOOD.expectations[0], bias=0.11)
    check_sampler(replace(shifted, expectations=(known,)))
