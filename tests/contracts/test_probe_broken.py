"""Each check of the suite of probes catches a probe that is broken in that way."""

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from contracts.broken import DOCUMENTED_ELSEWHERE, assert_caught, broken_runs, good_runs, own_checks
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import nn

from provenn.contracts import BadInput, ContractError, ProbeCase, check_probe
from provenn.core.experiment.reports import Report


@dataclass(frozen=True)
class Activity(Report):
    """The mean absolute output of every layer."""

    means: dict[str, float]
    largest: str
    samples: int

    def plot(self):
        figure = Figure()
        figure.subplots().bar(list(self.means), list(self.means.values()))
        return figure


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2))


def points(generator):
    return torch.randn(7, 4, generator=generator)


class Probe:
    """A correct little probe, to be broken below."""

    report = Activity

    def __call__(self, model, data):
        if data.dim() != 2:
            raise ValueError(f"data must be a matrix, got shape {tuple(data.shape)}")
        seen = {}
        modes = {module: module.training for module in model.modules()}
        hooks = [
            layer.register_forward_hook(lambda _, __, output, name=name: seen.update({name: self.mean(output)}))
            for name, layer in model.named_children()
        ]
        try:
            model.eval()
            with torch.no_grad():
                self.run(model, data)
        finally:
            self.restore(model, modes, hooks)
        return self.report(means=seen, largest=max(seen, key=seen.get), samples=len(data))

    def run(self, model, data):
        model(data)

    def mean(self, output):
        return float(output.abs().mean())

    def restore(self, model, modes, hooks):
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode


def by_hand(model, data):
    first, _, _, last = model
    hidden = first.weight @ data.T + first.bias[:, None]
    squashed = 1 - 2 / (torch.exp(2 * hidden) + 1)
    output = last.weight @ squashed + last.bias[:, None]
    means = [float((t.abs().sum() / t.numel()).detach()) for t in (hidden, squashed, squashed, output)]
    names = [str(i) for i in range(4)]
    return {"means": dict(zip(names, means, strict=True)), "largest": names[int(np.argmax(means))], "samples": 7}


class LeavesHooks(Probe):
    def restore(self, model, modes, hooks):
        super().restore(model, modes, hooks[:-1])


class LeavesEvalMode(Probe):
    def restore(self, model, modes, hooks):
        super().restore(model, {}, hooks)


class TrainsEveryModule(Probe):
    def restore(self, model, modes, hooks):
        super().restore(model, modes, hooks)
        model.train()


class ClearsGradients(Probe):
    def run(self, model, data):
        super().run(model, data)
        model.zero_grad()


class FreezesParameters(Probe):
    def run(self, model, data):
        super().run(model, data)
        model.requires_grad_(False)


class NudgesWeights(Probe):
    def run(self, model, data):
        super().run(model, data)
        model[0].weight.add_(1e-7)


class LeavesAnAttribute(Probe):
    def run(self, model, data):
        super().run(model, data)
        model.probed = True


class RestoresOnSuccessOnly(Probe):
    def __call__(self, model, data):
        self.failed = True
        return super().__call__(model, data)

    def run(self, model, data):
        super().run(model, data)
        self.failed = False

    def restore(self, model, modes, hooks):
        if not self.failed:
            super().restore(model, modes, hooks)


class FailsInTheSecondCall(RestoresOnSuccessOnly):
    def run(self, model, data):
        self.failed = False
        Probe.run(self, model, data)
        self.failed = True
        super().run(model, data)


class HidesErrors(Probe):
    def run(self, model, data):
        try:
            super().run(model, data)
        except Exception:
            return


class DrawsNoise(Probe):
    def run(self, model, data):
        super().run(model, data + 0 * torch.randn_like(data))


class ShufflesByNumpy(Probe):
    def run(self, model, data):
        np.random.permutation(len(data))  # noqa: NPY002 - the fault to catch
        super().run(model, data)


class ShufflesByPython(Probe):
    def run(self, model, data):
        random.random()
        super().run(model, data)


class CentresTheData(Probe):
    def run(self, model, data):
        data -= data.mean(0)
        super().run(model, data)


class RequiresInputGradients(Probe):
    def run(self, model, data):
        super().run(model, data.requires_grad_())


class SquaresInstead(Probe):
    def mean(self, output):
        return float(output.square().mean())


class OpenActivity(Activity):
    """Frozen no more."""

    def __setattr__(self, name, value):
        self.__dict__[name] = value


@dataclass(frozen=True)
class NamesTheSmallest(Activity):
    def __post_init__(self):
        object.__setattr__(self, "largest", min(self.means, key=self.means.get))


@dataclass(frozen=True)
class TensorCounts(Activity):
    def __post_init__(self):
        object.__setattr__(self, "samples", torch.tensor(self.samples))


@dataclass(frozen=True)
class ListOfCounts(Activity):
    def __post_init__(self):
        object.__setattr__(self, "samples", [self.samples])


class PlotsAxes(Activity):
    def plot(self):
        return super().plot().axes[0]


class PlotsNothing(Activity):
    def plot(self):
        return Figure()


class LeavesAFigure(Activity):
    def plot(self):
        figure, axes = pyplot.subplots()
        axes.plot([0, 1])
        return figure


def reporting(kind):
    probe = Probe()
    probe.report = kind
    probe.__name__ = kind.__name__
    return probe


GOOD = ProbeCase(
    "contracts.broken.own_checks",
    Probe(),
    network,
    points,
    by_hand,
    bad_input=(BadInput("data", lambda: Probe()(network(), torch.zeros(4))),),
    excluded={**DOCUMENTED_ELSEWHERE, "public_name": "the part is a test's own"},
    label="good",
)


def broken(run, **options):
    run = run() if isinstance(run, type) else run
    label = getattr(run, "__name__", type(run).__name__)
    return replace(GOOD, **{"run": run, "label": label, **options})


BROKEN = {
    "model_restored": [
        broken(LeavesHooks),
        broken(LeavesEvalMode),
        broken(TrainsEveryModule),
        broken(ClearsGradients),
        broken(FreezesParameters),
        broken(NudgesWeights),
        broken(LeavesAnAttribute),
    ],
    "model_restored_after_error": [
        broken(RestoresOnSuccessOnly),
        broken(FailsInTheSecondCall),
        broken(HidesErrors),
    ],
    "random_state": [broken(DrawsNoise), broken(ShufflesByNumpy), broken(ShufflesByPython)],
    "data_untouched": [broken(CentresTheData), broken(RequiresInputGradients)],
    "report_frozen": [broken(reporting(OpenActivity)), broken(reporting(dict))],
    "brute_force": [
        broken(SquaresInstead),
        broken(reporting(NamesTheSmallest)),
        broken(Probe, brute_force=lambda model, data: {}),
        broken(Probe, brute_force=lambda model, data: {"spread": 0.0}),
    ],
    "json": [broken(reporting(TensorCounts)), broken(reporting(ListOfCounts))],
    "plot": [broken(reporting(PlotsAxes)), broken(reporting(PlotsNothing)), broken(reporting(LeavesAFigure))],
}


@pytest.mark.parametrize("check", good_runs(GOOD))
def test_good_probe_passes(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_probes_are_caught(name, case):
    assert_caught(name, case)


def test_every_check_has_a_broken_probe():
    assert set(BROKEN) == own_checks("probe")


def test_check_probe_lists_failures():
    with pytest.raises(ContractError, match="'random_state'"):
        check_probe(broken(DrawsNoise))
