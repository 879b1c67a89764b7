"""The six experiments of the survey's claim: each trains or measures one arm with one seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from provenn.claims.claim import Event, Metric, Point, Progress, Trial
from provenn.core.experiment.recording import evaluating
from provenn.core.experiment.seeding import derive_seed, generator, seeded
from provenn.nn import (
    TBPTT,
    BiRNN,
    ElmanRNN,
    NTMCell,
    PeepholeLSTM,
    SequenceModel,
    SequenceTask,
    adding,
    copy,
    delayed_xor,
    gradient_flow,
    temporal_order,
)

RADII = (0.5, 0.9, 1.1)
LINEAR, DRIVEN = 1e-10, 1.0
"""Sizes of inputs: small enough that units stay linear even after 1.1²⁰⁰, and usual."""
CARRIED = "LSTM, f ≡ 1"
WORST = 1e30
"""Stands for a validation loss that is no number any more."""
Draw = Callable[[int, torch.Generator], SequenceTask]


def run_flow(trial: Trial) -> Iterator[Event]:
    """Measure how an error changes with the lag in random networks that nothing has trained."""
    nets, hidden, features, steps = (int(trial.budget[name]) for name in ("nets", "hidden", "features", "steps"))
    cases = (
        [("", DRIVEN)] if trial.arm != "Elman" else [(f", ρ = {r}", scale) for r in RADII for scale in (LINEAR, DRIVEN)]
    )
    done, total = 0, len(cases) * nets
    for name, scale in cases:
        slopes, norms = [], []
        for net in range(nets):
            draws = generator(trial.seed, "inputs", net)
            x = scale * torch.randn(4, steps, features, generator=draws, dtype=torch.float64)
            with seeded(trial.seed, "weights", net):
                cell = _random_cell(trial.arm, name, features, hidden)
            flow = gradient_flow(cell, x)
            slopes.append(math.log(flow.rate))
            norms.append(flow.norms)
            done += 1
            yield Progress(done, total)
        inputs = "" if trial.arm == "Elman" and scale == LINEAR else ", unit inputs"
        yield Metric(f"slope{name}{inputs}", sum(slopes) / nets)
        for lag in range(0, steps, max(1, steps // 20)):
            logs = [math.log10(max(one[-1 - lag], 1e-300)) for one in norms]
            yield Point(f"log10 of the error{name}{inputs}", lag, sum(logs) / nets)


def _random_cell(arm: str, name: str, features: int, hidden: int) -> Any:
    if arm != "Elman":
        return PeepholeLSTM(features, hidden, peepholes=False, forget_gate=arm != CARRIED)
    cell = ElmanRNN(features, hidden, activation="tanh").double()
    with torch.no_grad():
        cell.bias.zero_()
        cell.weight_hh.normal_()
        set_radius(cell.weight_hh, float(name.rpartition(" ")[2]))
    return cell


def set_radius(matrix: Tensor, radius: float) -> None:
    """Scale a square matrix in place to a spectral radius."""
    matrix.mul_(radius / torch.linalg.eigvals(matrix).abs().max())


def run_order(trial: Trial) -> Iterator[Event]:
    """Train an LSTM or an Elman network on temporal order."""
    cell = {"LSTM": _lstm, "Elman": _elman}[trial.arm]
    length = int(trial.budget["length"])
    model = _model(trial, lambda hidden: cell(8, hidden), 4)
    yield from _classify(trial, model, lambda n, g: temporal_order(n, length, g), length, length)


def run_truncation(trial: Trial) -> Iterator[Event]:
    """Train an LSTM on the delayed exclusive or, with errors that go back so far."""
    length = int(trial.budget["lag"]) + 2
    back = int(trial.arm.rpartition(" ")[2])
    model = _model(trial, lambda hidden: _lstm(2, hidden), 2)
    yield from _classify(trial, model, lambda n, g: delayed_xor(n, length, g), min(10, back), back)


def run_tagging(trial: Trial) -> Iterator[Event]:
    """Train a network to name the symbol three steps ahead."""
    length, symbols, ahead = (int(trial.budget[name]) for name in ("length", "symbols", "ahead"))

    def draw(n: int, draws: torch.Generator) -> SequenceTask:
        x = torch.randint(symbols, (n, length), generator=draws)
        there = torch.ones(n, length, dtype=torch.bool)
        asked = there.clone()
        asked[:, -ahead:] = False
        return SequenceTask(nn.functional.one_hot(x, symbols).float(), x.roll(-ahead, 1), there, asked)

    def cell(hidden: int) -> Any:
        one = _elman(symbols, hidden)
        return one if trial.arm == "Elman" else BiRNN(one, _elman(symbols, hidden))

    model = _model(trial, cell, symbols)
    rounds = int(trial.budget["steps"]) // (int(trial.budget["tuning_divisor"]) if trial.tuning else 1)
    lr = _lr(trial)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    size = int(trial.budget["batch_size"])
    for step in range(rounds):  # a bidirectional network has no state to carry from window to window: plain training
        task = draw(size, generator(trial.seed, "train", step))
        outputs, _ = model(task.inputs.to(trial.device))
        loss = nn.functional.cross_entropy(
            outputs[task.target_mask.to(trial.device)], task.targets[task.target_mask].to(trial.device)
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if step % 50 == 0:
            yield Progress(step, rounds)
            yield Point("training loss", step, loss.item())
    yield from _accuracy(trial, model, draw)


def run_clipping(trial: Trial) -> Iterator[Event]:
    """Train ReLU networks whose recurrent weights start from 1.2 of the identity, and count those that fail."""
    length, hidden, runs = (int(trial.budget[name]) for name in ("length", "hidden", "runs"))
    failures, finals = [], []
    for one in range(1 if trial.tuning else runs):
        with seeded(trial.seed, "weights", one):
            cell = ElmanRNN(2, hidden, activation="relu", identity_scale=1.2)
            model = SequenceModel(cell, "many_to_many", 1).to(trial.device)
        held = _to(trial, adding(int(trial.budget["test"]), length, generator(trial.seed, "held", one)))
        start = _squared_error(model, held)
        task = _to(trial, adding(int(trial.budget["train"]), length, generator(trial.seed, "train", one)))
        trainer = TBPTT(
            model, length, length, 5.0 if trial.arm == "clipped" else None, loss="mse", lr=_lr(trial),
            epochs=int(trial.budget["epochs"]), batch_size=int(trial.budget["batch_size"]),
            seed=derive_seed(trial.seed, "order", one),
        )  # fmt: skip
        try:
            for epoch in trainer.train(task.inputs, task.targets, task.target_mask):
                yield Progress(one * trainer.epochs + epoch.index + 1, runs * trainer.epochs)
            final = _squared_error(model, held)
        except FloatingPointError:
            final = math.inf
        failures.append(float(not final <= start))
        finals.append(min(final, WORST) if math.isfinite(final) else WORST)
    if trial.tuning:
        yield Metric("validation_loss", finals[0])
        return
    yield Metric("failed", sum(failures) / runs)
    yield Metric("median_loss", sorted(finals)[runs // 2])


def _squared_error(model: nn.Module, task: SequenceTask) -> float:
    with evaluating(model):
        outputs, _ = model(task.inputs)
    return float((outputs - task.targets)[task.target_mask].square().mean())


def run_copy(trial: Trial) -> Iterator[Event]:
    """Train on short sequences to copy, and count wrong bits on longer ones."""
    bits, hidden, longest = (int(trial.budget[name]) for name in ("bits", "hidden", "longest"))

    def cell() -> Any:
        if trial.arm == "LSTM":
            return SequenceModel(_lstm(bits + 1, hidden), "many_to_many", bits)
        return NTMCell(bits + 1, bits, hidden, int(trial.budget["slots"]), int(trial.budget["width"]))

    with seeded(trial.seed, "weights"):
        model = cell().to(trial.device)
    data = _mixed_copies(int(trial.budget["train"]), longest, bits, generator(trial.seed, "train"))
    steps = data.inputs.shape[1]
    yield from _train(trial, model, data, steps, steps, "binary_cross_entropy")
    lengths = (longest,) if trial.tuning else (longest, int(trial.budget["tested"]))
    for length in lengths:
        held = copy(int(trial.budget["test"]), length, generator(trial.seed, "held", length), bits=bits)
        wrong = _wrong_bits(model, _to(trial, held))
        yield Metric(
            "validation_wrong" if trial.tuning else f"wrong at {'longer' if length > longest else 'trained'}", wrong
        )


def _mixed_copies(n: int, longest: int, bits: int, draws: torch.Generator) -> SequenceTask:
    """Draw sequences of 1 to so many items, padded with silence."""
    lengths = torch.randint(1, longest + 1, (n,), generator=draws)
    whole = copy(n, longest, draws, bits=bits)
    parts: list[SequenceTask] = []
    for length in range(1, longest + 1):
        some = copy(int((lengths == length).sum()), length, draws, bits=bits)
        missing = whole.inputs.shape[1] - some.inputs.shape[1]
        parts.append(
            SequenceTask(*(nn.functional.pad(t, (0, 0, 0, missing) if t.ndim == 3 else (0, missing)) for t in some))
        )
    return SequenceTask(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _wrong_bits(model: nn.Module, task: SequenceTask) -> float:
    with evaluating(model):
        outputs, _ = model(task.inputs)
    wrong = (outputs > 0) != (task.targets > 0.5)
    return float(wrong[task.target_mask].double().mean())


def _elman(features: int, hidden: int) -> ElmanRNN:
    return ElmanRNN(features, hidden, activation="tanh")


def _lstm(features: int, hidden: int) -> PeepholeLSTM:
    return PeepholeLSTM(features, hidden, peepholes=False)


def _model(trial: Trial, cell: Callable[[int], Any], classes: int) -> SequenceModel:
    with seeded(trial.seed, "weights"):
        model: SequenceModel = SequenceModel(cell(int(trial.budget["hidden"])), "many_to_many", classes).to(
            trial.device
        )
    return model


def _lr(trial: Trial) -> float:
    return float(trial.settings.get("lr", 3e-3))


def _classify(trial: Trial, model: SequenceModel, draw: Draw, k1: int, k2: int) -> Iterator[Event]:
    data = draw(int(trial.budget["train"]), generator(trial.seed, "train"))
    yield from _train(trial, model, data, k1, k2, "cross_entropy")
    yield from _accuracy(trial, model, draw)


def _train(trial: Trial, model: Any, data: SequenceTask, k1: int, k2: int, loss: str) -> Iterator[Event]:
    """Train by Adam on clipped gradients; the budget says what part of the epochs serves to pick the step size."""
    epochs = max(1, int(trial.budget["epochs"]) // (int(trial.budget["tuning_divisor"]) if trial.tuning else 1))
    trainer = TBPTT(
        model, k1, k2, 5.0, loss=loss, optimizer=torch.optim.Adam, lr=_lr(trial), epochs=epochs,
        batch_size=int(trial.budget["batch_size"]), seed=trial.seed,
    )  # fmt: skip
    task = _to(trial, data)
    for epoch in trainer.train(task.inputs, task.targets, task.target_mask):
        yield Progress(epoch.index + 1, epochs)
        yield Point("training loss", epoch.step, epoch.loss)


def _accuracy(trial: Trial, model: nn.Module, draw: Draw) -> Iterator[Event]:
    part = "validation" if trial.tuning else "test"
    held = _to(trial, draw(int(trial.budget["test"]), generator(trial.seed, part)))
    with evaluating(model):
        outputs, _ = model(held.inputs)
    right = (outputs.argmax(-1) == held.targets)[held.target_mask]
    yield Metric(f"{part}_accuracy", float(right.double().mean()))


def _to(trial: Trial, task: SequenceTask) -> SequenceTask:
    return SequenceTask(*(one.to(trial.device) for one in task))
