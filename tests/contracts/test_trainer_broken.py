"""Each check of the suite of trainers catches a trainer that is broken in that way."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from contracts.broken import DOCUMENTED_ELSEWHERE, assert_caught, broken_runs, good_runs, own_checks
from torch import nn

from provenn.contracts import BadInput, ContractError, TrainerCase, check_trainer, checks_of

ROUNDS = 4


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))


def data(generator):
    inputs = torch.randn(16, 3, generator=generator)
    return inputs, inputs.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Result:
    model: nn.Module
    history: tuple


class Trainer:
    """A correct little trainer, to be broken below: momentum, dropout, a random batch a round, gradients with noise."""

    def __init__(self, model, seed=0, rounds=ROUNDS, lr=0.1):
        if lr <= 0:
            raise ValueError(f"lr must be > 0, got {lr}")
        self.model, self.seed, self.rounds = model, seed, rounds
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def fit(self, inputs, targets, checkpoint=None, progress=None):
        history = self.load(checkpoint) if checkpoint is not None and checkpoint.exists() else []
        while len(history) < self.rounds:
            history.append(self.round(len(history), inputs, targets))
            if checkpoint is not None:
                self.save(checkpoint, history)
            if progress is not None:
                self.report(progress, history)
        return Result(self.model, tuple(history))

    def round(self, index, inputs, targets):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * self.seed + index)
            batch = torch.randperm(len(inputs))[:8]
            return self.step(inputs[batch], targets[batch])

    def step(self, inputs, targets):
        self.optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}

    def report(self, progress, history):
        progress(history[-1])

    def save(self, checkpoint, history):
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "history": history}
        torch.save(states, checkpoint)

    def load(self, checkpoint):
        states = torch.load(checkpoint)
        self.model.load_state_dict(states["model"])
        self.optimizer.load_state_dict(states["optimizer"])
        return states["history"]


class LosesARecord(Trainer):
    def fit(self, inputs, targets, checkpoint=None, progress=None):
        result = super().fit(inputs, targets, checkpoint, progress)
        return replace(result, history=result.history[:-1])


class SaysHowOften(Trainer):
    def fit(self, inputs, targets, checkpoint=None, progress=None):
        return replace(super().fit(inputs, targets, checkpoint, progress), history=self.rounds)


class TrainsNothing(Trainer):
    def fit(self, inputs, targets, checkpoint=None, progress=None):
        return replace(super().fit(inputs, targets, checkpoint, progress), model=nn.Sequential())


class Diverges(Trainer):
    def step(self, inputs, targets):
        found = super().step(inputs, targets)
        with torch.no_grad():
            self.model[0].weight[0, 0] = torch.nan
        return found


class UsesTheGlobalSeed(Trainer):
    def round(self, index, inputs, targets):
        batch = torch.randperm(len(inputs))[:8]
        return self.step(inputs[batch], targets[batch])


class UsesTheGlobalSeedForDropout(Trainer):
    def round(self, index, inputs, targets):
        source = torch.Generator().manual_seed(1000 * self.seed + index)
        batch = torch.randperm(len(inputs), generator=source)[:8]
        return self.step(inputs[batch], targets[batch])


class DiffersEveryTime(Trainer):
    calls = 0

    def round(self, index, inputs, targets):
        DiffersEveryTime.calls += 1
        return super().round(index, inputs, targets) | {"calls": DiffersEveryTime.calls}


class NoiseAfterwards(Trainer):
    def fit(self, inputs, targets, checkpoint=None, progress=None):
        result = super().fit(inputs, targets, checkpoint, progress)
        with torch.no_grad():
            self.model[0].weight += 1e-7 * torch.randn(4, 3)
        return result


class IgnoresItsSeed(Trainer):
    def round(self, index, inputs, targets):
        self.seed = 0
        return super().round(index, inputs, targets)


class SaysNothing(Trainer):
    def report(self, progress, history):
        pass


class ReportsTwice(Trainer):
    def report(self, progress, history):
        progress(history[-1])
        progress(history[-1])


class ReportsAfterwards(Trainer):
    def report(self, progress, history):
        for record in history if len(history) == self.rounds else ():
            progress(record)


class ReportsNothing(Trainer):
    def report(self, progress, history):
        progress(None)


class SwallowsErrors(Trainer):
    def report(self, progress, history):
        try:
            progress(history[-1])
        except Exception:
            return


class SavesNothing(Trainer):
    def save(self, checkpoint, history):
        pass


class StartsAgain(Trainer):
    def load(self, checkpoint):
        return []


class SavesAfterReporting(Trainer):
    def fit(self, inputs, targets, checkpoint=None, progress=None):
        def report_first(record):
            progress(record)
            Trainer.save(self, checkpoint, [*self.history, record])
            self.history.append(record)

        self.history = Trainer.load(self, checkpoint) if checkpoint is not None and checkpoint.exists() else []
        return super().fit(inputs, targets, checkpoint, report_first if checkpoint is not None else progress)

    def save(self, checkpoint, history):
        checkpoint.parent.joinpath("started").touch()


class ForgetsMomentum(Trainer):
    def load(self, checkpoint):
        states = torch.load(checkpoint)
        self.model.load_state_dict(states["model"])
        return states["history"]


class ForgetsHistory(Trainer):
    def load(self, checkpoint):
        self.rounds -= len(super().load(checkpoint))
        return []


class ForgetsTheModel(Trainer):
    def load(self, checkpoint):
        untrained = copy.deepcopy(self.model.state_dict())
        history = super().load(checkpoint)
        self.model.load_state_dict(untrained)
        return history


class DrawsOneStream(Trainer):
    """Seeded, but where its stream of numbers stood is not in the checkpoint."""

    def round(self, index, inputs, targets):
        if not hasattr(self, "stream"):
            self.stream = torch.Generator().manual_seed(self.seed)
        batch = torch.randperm(len(inputs), generator=self.stream)[:8]
        self.model.eval()
        return self.step(inputs[batch], targets[batch])


class RoundsInTheCheckpoint(Trainer):
    def save(self, checkpoint, history):
        super().save(checkpoint, history)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(parameter.bfloat16())


class CentersTheData(Trainer):
    def fit(self, inputs, targets, checkpoint=None, progress=None):
        inputs -= inputs.mean(dim=0)
        return super().fit(inputs, targets, checkpoint, progress)


class WantsGradientsOfData(Trainer):
    def fit(self, inputs, targets, checkpoint=None, progress=None):
        inputs.requires_grad_()
        return super().fit(inputs, targets, checkpoint, progress)


class TrainsInFloat32(Trainer):
    def fit(self, inputs, targets, checkpoint=None, progress=None):
        self.model.float()
        return super().fit(inputs.float(), targets.float(), checkpoint, progress)


class ReturnsFloat32(Trainer):
    def fit(self, inputs, targets, checkpoint=None, progress=None):
        result = super().fit(inputs, targets, checkpoint, progress)
        return replace(result, model=copy.deepcopy(result.model).float())


class ReturnsAnotherDevice(Trainer):
    def fit(self, inputs, targets, checkpoint=None, progress=None):
        result = super().fit(inputs, targets, checkpoint, progress)
        return replace(result, model=copy.deepcopy(result.model).to("meta"))


GOOD = TrainerCase(
    "contracts.broken.own_checks",
    Trainer,
    data,
    ROUNDS,
    network,
    bad_input=(BadInput("lr", lambda: Trainer(network(), lr=0)),),
    excluded={**DOCUMENTED_ELSEWHERE, "public_name": "the part is a test's own"},
    label="good",
)


def broken(make, **options):
    return replace(GOOD, **{"make": make, "label": make.__name__, **options})


BROKEN = {
    "history": [broken(LosesARecord), broken(SaysHowOften), broken(TrainsNothing), broken(Diverges)],
    "seed": [
        broken(UsesTheGlobalSeed),
        broken(UsesTheGlobalSeedForDropout),
        broken(DiffersEveryTime),
        broken(NoiseAfterwards),
    ],
    "random": [broken(IgnoresItsSeed)],
    "progress": [broken(SaysNothing), broken(ReportsTwice), broken(ReportsAfterwards), broken(ReportsNothing)],
    "resume": [
        broken(SwallowsErrors),
        broken(SavesNothing),
        broken(StartsAgain),
        broken(SavesAfterReporting),
        broken(ForgetsMomentum),
        broken(ForgetsHistory),
        broken(ForgetsTheModel),
        broken(DrawsOneStream),
        broken(Trainer, rounds=2, label="too few rounds"),
    ],
    "checkpoint_alone": [broken(RoundsInTheCheckpoint)],
    "data_untouched": [broken(CentersTheData), broken(WantsGradientsOfData)],
    "device_and_dtype": [
        broken(TrainsInFloat32),
        broken(ReturnsFloat32),
        broken(ReturnsAnotherDevice),
        broken(Trainer, model=None, label="no model"),
    ],
}


class LeastSquares:
    """A trainer that makes its own weights, by numpy, and whose ``fit`` is an iterator."""

    def __init__(self, seed=0, rounds=3):
        self.start, self.rounds = np.random.default_rng(seed).normal(size=(3, 1)), rounds

    def iterate(self, inputs, targets, held):
        weights, history = held if held else (torch.from_numpy(self.start).to(inputs), [])
        for _ in range(len(history), self.rounds):
            weights = weights - 0.1 * inputs.T @ (inputs @ weights - targets) / len(inputs)
            history = [*history, weights.norm().item()]
            yield weights, history


def iterate(trainer, given, checkpoint, progress):
    held = torch.load(checkpoint) if checkpoint is not None and checkpoint.exists() else None
    for held in trainer.iterate(*given, held):  # noqa: B020 - the last one is the result
        if checkpoint is not None:
            torch.save(held, checkpoint)
        progress(held[1][-1])
    return held


ITERATING = TrainerCase(
    "contracts.broken.own_checks",
    lambda model, seed: LeastSquares(seed),
    data,
    3,
    fit=iterate,
    history=lambda result: result[1],
    trained=lambda trainer, result: result[0],
    bad_input_reason="it has no options",
    excluded={**GOOD.excluded, "device_and_dtype": "it makes its own weights"},
    label="iterating",
)


@pytest.mark.parametrize("check", good_runs(GOOD, ITERATING))
def test_good_trainer_passes(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_trainers_are_caught(name, case):
    assert_caught(name, case)


def test_every_check_has_a_broken_trainer():
    assert set(BROKEN) == own_checks("trainer")


def test_check_trainer_lists_failures():
    with pytest.raises(ContractError, match="'progress'"):
        check_trainer(broken(SaysNothing))


def test_where_histories_part_is_said():
    with pytest.raises(ContractError, match=r"from round 3: \{'loss'"):
        checks_of(broken(ForgetsMomentum))["resume"]()
