"""The reactor's data, the five networks, and what is measured of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from provenn.core.experiment.seeding import generator, seeded
from provenn.core.experiment.training import predict
from provenn.nn import CSTR, ICLRNN, ICRNN, LipschitzRNN

METHOD, CONVEX, LIPSCHITZ, PLAIN, GATED = "ICLRNN", "ICRNN", "LRNN", "RNN", "LSTM"
ARMS = (METHOD, PLAIN, GATED, LIPSCHITZ, CONVEX)
EXPANDED = (METHOD, CONVEX)
STATES, CHANNELS, OUTPUTS = 2, 4, 2
PERTURBATIONS, SIZE = 1024, 1e-4
Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Reactor:
    """Scaled trajectories: inputs (n, T, 4), repeated at every step, and states (n, T, 2), noisy but for the test."""

    train: Split
    validation: Split
    test: Split


@cache
def _trajectories() -> Split:
    found: Split = CSTR().trajectories()
    return found


def reactor(seed: int, noise: float, every: int, train: int, validation: int, test: int) -> Reactor:
    """Draw trajectories, scale them to [0, 1] by the training part, and add noise to training and validation states.

    Args:
        seed: Of the draw and the noise.
        noise: Standard deviation, in scaled units.
        every: Which of the 10 states of a trajectory are kept: every one, every second, ...
        train: Trajectories to train on.
        validation: Trajectories to choose by.
        test: Trajectories to test on.
    """
    inputs, states = _trajectories()
    order = torch.randperm(len(inputs), generator=generator(seed, "split"))[: train + validation + test]
    x, y = inputs[order], states[order, every - 1 :: every]
    x = _scaled(x, x[:train])
    y = _scaled(y, y[:train].flatten(0, 1))
    kept = train + validation
    y[:kept] += noise * torch.randn(y[:kept].shape, generator=generator(seed, "noise"), dtype=y.dtype)
    sequences = x[:, None].expand(-1, y.shape[1], -1).contiguous().float()
    parts = [slice(0, train), slice(train, kept), slice(kept, None)]
    return Reactor(*((sequences[part], y[part].float()) for part in parts))


def _scaled(values: Tensor, by: Tensor) -> Tensor:
    low, high = by.amin(0), by.amax(0)
    return (values - low) / (high - low)


class Network(nn.Module):
    """One of the five networks, from scaled inputs in [0, 1] to scaled states.

    Args:
        arm: Which one.
        hidden: Units of each of its two layers.
        seed: Of its weights.
    """

    def __init__(self, arm: str, hidden: int, seed: int) -> None:
        super().__init__()
        self.expanded = arm in EXPANDED
        with seeded(seed, "weights"):
            self.body, self.head = _built(arm, hidden)

    def project_(self, source: torch.Generator) -> None:
        """Restore the constraint of the arms that have one.

        Args:
            source: Draws the starts of power iterations.
        """
        if isinstance(self.body, ICLRNN):
            self.body.project_(source)
        elif isinstance(self.body, ICRNN):
            self.body.project_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the states of all steps.

        Args:
            x: Inputs (batch, time, 4).
        """
        # The authors append −x before they scale, so that the network receives 1 − x beside x.
        y = self.body(torch.cat((x, 1 - x), -1) if self.expanded else x)
        found: Tensor = self.head(y[0] if isinstance(y, tuple) else y)
        return found


def _built(arm: str, hidden: int) -> tuple[nn.Module, nn.Module]:
    if arm == METHOD:
        return ICLRNN(2 * CHANNELS, hidden, output_size=OUTPUTS, expand_input=False), nn.Identity()
    if arm == CONVEX:
        return ICRNN(2 * CHANNELS, hidden, output_size=OUTPUTS, expand_input=False), nn.Identity()
    if arm == LIPSCHITZ:
        return LipschitzRNN(CHANNELS, hidden, output_size=OUTPUTS), nn.Identity()
    kind = nn.RNN if arm == PLAIN else nn.LSTM
    return kind(CHANNELS, hidden, num_layers=2, batch_first=True), nn.Linear(hidden, OUTPUTS)


class Controlled(nn.Module):
    """A network as a controller's model: scaled states and inputs in [−1, 1] to scaled states.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Return the states of all steps.

        Args:
            x: States in [0, 1] beside inputs in [−1, 1].
        """
        found: Tensor = self.network(torch.cat((x[..., :STATES], 0.5 + 0.5 * x[..., STATES:]), -1))
        return found


def error(network: nn.Module, held: Split) -> float:
    """Return the mean squared error.

    Args:
        network: The network.
        held: Inputs and states.
    """
    x, y = held
    return (predict(network, x, 2048) - y).square().mean().item()


def gain(network: nn.Module, x: Tensor, seed: int) -> float:
    """Return the largest ratio of changes, in float64, of 1024 inputs raised by up to 1e-4.

    Args:
        network: The network.
        x: Inputs; the first 1024 are raised, every entry by a uniform share in [¼, 1] of 1e-4.
        seed: Of the shares.
    """
    wide = copy.deepcopy(network).double()
    here = x[:PERTURBATIONS].double()
    shares = 0.25 + 0.75 * torch.rand(here.shape, generator=generator(seed, "perturbations"), dtype=here.dtype)
    moved = here + SIZE * shares.to(here.device)
    change = predict(wide, moved, 2048) - predict(wide, here, 2048)
    ratios = change.flatten(1).norm(dim=1) / (moved - here).flatten(1).norm(dim=1)
    return float(ratios.max())
