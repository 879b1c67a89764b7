"""ZerothOrder beside MeZO's loop, written anew from its algorithm, and beside SGD: trajectories, times, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import TensorMemory
from provenn.core.experiment.seeding import derive_seed, generator, seeded
from provenn.optim import ForwardGradient, ZerothOrder, estimate_memory

WIDTH, LAYERS, BATCH = 1024, 16, 32
LR, EPS = 1e-6, 1e-3

Loss = Callable[[], Tensor]
Draw = Callable[[int], Sequence[Tensor]]


def measure() -> dict[str, Any]:
    """Compare trajectories over 30 steps, then times by turns, then bytes at the peak of a step."""
    difference = _largest_difference()
    steps = {
        "ZO-SGD": _stepper(lambda model: ZerothOrder(model.parameters(), LR)),
        "peer": _peer(),
        "SGD": _first_order(),
        "forward pass": _forward_pass(),
        "forward gradient": _stepper(lambda model: ForwardGradient(model, lr=LR)),
        "momentum": _stepper(lambda model: ZerothOrder(model.parameters(), LR, rule="momentum")),
        "adam": _stepper(lambda model: ZerothOrder(model.parameters(), LR, rule="adam")),
        "sparse": _stepper(lambda model: ZerothOrder(model.parameters(), LR, sparsity=0.5)),
    }
    times = alternate(steps, rounds=5)
    small = alternate({"ZO-SGD": _stepper(_zo, 128, 4), "peer": _peer(128, 4), "SGD": _first_order(128, 4)}, rounds=101)
    growth = alternate({str(layers): _stepper(_zo, 512, layers) for layers in (4, 32)}, rounds=7)
    peaks = _peaks()
    return {
        "peer": "MeZO's algorithm, the core of both authors' code, written anew in torch with whole-tensor draws; "
        "its repository needs transformers, which is not installed here",
        "agrees": difference <= 1e-9,
        "largest_difference": difference,
        "speed_ratio": times["peer"] / times["ZO-SGD"],
        "speed_ratio_small_network": small["peer"] / small["ZO-SGD"],
        "step_time_over_sgd": {
            "large weights, batch 32": times["ZO-SGD"] / times["SGD"],
            "small network": small["ZO-SGD"] / small["SGD"],
        },
        "step_time_over_forward_pass": {
            name: times[name] / times["forward pass"]
            for name in ("ZO-SGD", "peer", "SGD", "forward gradient", "momentum", "adam", "sparse")
        },
        "peak_bytes_over_forward_pass": peaks,
        "estimate_over_measured": _estimates(peaks),
        "growth": {"layers ×8, time ×": growth["32"] / growth["4"]},
    }


def _zo(model: nn.Sequential) -> ZerothOrder:
    return ZerothOrder(model.parameters(), LR)


def _network(width: int = WIDTH, layers: int = LAYERS) -> nn.Sequential:
    with seeded("zeroth-order benchmark"):
        return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)))


def _loss(model: nn.Sequential, width: int = WIDTH, batch: int = BATCH) -> Loss:
    x = torch.randn(batch, width, generator=generator("zeroth-order benchmark, batch"))
    return lambda: model(x).square().mean()


def _stepper(
    make: Callable[[nn.Sequential], ZerothOrder | ForwardGradient], width: int = WIDTH, layers: int = LAYERS
) -> Callable[[], Any]:
    model = _network(width, layers)
    return partial(make(model).step, _loss(model, width))


def _first_order(width: int = WIDTH, layers: int = LAYERS) -> Callable[[], Any]:
    model = _network(width, layers)
    return _gradient_step(torch.optim.SGD(model.parameters(), LR), _loss(model, width))


def _gradient_step(optimizer: torch.optim.Optimizer, loss: Loss) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _forward_pass() -> Callable[[], Any]:
    model = _network()
    return torch.no_grad()(_loss(model))


def _peer(width: int = WIDTH, layers: int = LAYERS) -> Callable[[], Any]:
    model = _network(width, layers)
    params = [one.data for one in model.parameters()]
    steps = iter(range(10**9))

    def step() -> None:
        seed = next(steps)
        mezo_step(params, _loss_values, lambda: _noise(params, seed), LR)

    _loss_values = torch.no_grad()(_loss(model, width))
    return step


def _noise(params: Sequence[Tensor], seed: int) -> Iterator[Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return (torch.randn(one.shape, generator=draws, dtype=one.dtype) for one in params)


def mezo_step(params: Sequence[Tensor], loss: Callable[[], Tensor], noise: Callable[[], Any], lr: float) -> None:
    """Take one step of MeZO: move by +ε, −2ε and +ε along one redrawn direction, then along it against the slope.

    Args:
        params: Changed in place.
        loss: Evaluates the loss without gradients.
        noise: Draws the direction anew, one tensor after the other.
        lr: Step size.
    """

    def move(scale: float) -> None:
        for one, z in zip(params, noise(), strict=True):
            one.add_(scale * z)

    move(EPS)
    ahead = loss()
    move(-2 * EPS)
    slope = float((ahead - loss()) / (2 * EPS))
    move(EPS)
    move(-lr * slope)


def _largest_difference() -> float:
    """Return the largest difference of parameters between ours and the peer's loop, fed the same directions."""
    ours, theirs = (_network(32, 3).double() for _ in range(2))
    optimizer = ZerothOrder(ours.parameters(), 1e-2, eps=EPS)
    x = torch.randn(8, 32, generator=generator("agreement"), dtype=torch.float64)
    params = [one.data for one in theirs.parameters()]
    with torch.no_grad():
        for _ in range(30):
            redrawn = partial(_redrawn, params, optimizer.draw_seed(0, 0))
            mezo_step(params, lambda: theirs(x).square().mean(), redrawn, 1e-2)
            optimizer.step(lambda: ours(x).square().mean())
    pairs = zip(ours.parameters(), params, strict=True)
    return max(float((one.detach() - other).abs().max()) for one, other in pairs)


def _redrawn(params: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return a direction as ``SeededDirection`` documents it: a generator a tensor, seeded by seed and index."""
    return [
        torch.empty_like(one).normal_(generator=torch.Generator().manual_seed(derive_seed(seed, index)))
        for index, one in enumerate(params)
    ]


def _peaks() -> dict[str, float]:
    """Return the bytes at the peak of a step, weights included, over those of a forward pass."""
    methods: dict[str, Callable[[nn.Sequential, Loss], Callable[[], Any]]] = {
        "zo-sgd": lambda model, loss: partial(ZerothOrder(model.parameters(), LR).step, loss),
        "zo-momentum": lambda model, loss: partial(ZerothOrder(model.parameters(), LR, rule="momentum").step, loss),
        "zo-adam": lambda model, loss: partial(ZerothOrder(model.parameters(), LR, rule="adam").step, loss),
        "forward-gradient": lambda model, loss: partial(ForwardGradient(model, lr=LR).step, loss),
        "fo-sgd": lambda model, loss: _gradient_step(torch.optim.SGD(model.parameters(), LR), loss),
        "fo-adam": lambda model, loss: _gradient_step(torch.optim.Adam(model.parameters(), LR, foreach=False), loss),
    }
    ahead = _peak(lambda model, loss: torch.no_grad()(loss))
    found = {name: _peak(make) / ahead for name, make in methods.items()}
    found["peer"] = _peak(_peer_step) / ahead
    return found


def _peer_step(model: nn.Sequential, loss: Loss) -> Callable[[], Any]:
    params = [one.data for one in model.parameters()]
    return torch.no_grad()(partial(mezo_step, params, loss, lambda: _noise(params, 0), LR))


def _peak(make: Callable[[nn.Sequential, Loss], Callable[[], Any]]) -> int:
    model = _network()
    weights = sum(one.numel() * one.element_size() for one in model.parameters())
    with TensorMemory() as memory:
        step = make(model, _loss(model))
        for _ in range(2):
            step()
    peak: int = weights + memory.peak
    return peak


def _estimates(peaks: dict[str, float]) -> dict[str, float]:
    model = _network()
    batch = (torch.zeros(BATCH, WIDTH),)
    ahead = _peak(lambda model, loss: torch.no_grad()(loss))
    return {name: estimate_memory(model, batch, name).total / (peaks[name] * ahead) for name in peaks if name != "peer"}
