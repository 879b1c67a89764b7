"""Networks that the tests of pipelines share; in a module of their own, so that worker processes can load them."""

import threading
import time

import torch
from torch import nn

from provenn.core.experiment.seeding import seeded
from provenn.runtime import skippable


def network():
    with seeded(0):
        layers = nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)
    return nn.Sequential(*layers).double()


def inputs(generator):
    return (torch.randn(7, 3, generator=generator, dtype=torch.float64),)


def random_network(draws):
    """A random perceptron with layers of random widths and kinds, and the sizes of its input."""
    width = int(torch.randint(1, 6, (), generator=draws))
    layers, wide = [], width
    for _ in range(int(torch.randint(4, 9, (), generator=draws))):
        kind = int(torch.randint(0, 4, (), generator=draws))
        narrow = int(torch.randint(1, 6, (), generator=draws))
        made = [
            lambda a, b: nn.Linear(a, b),
            lambda a, b: nn.Tanh(),
            lambda a, b: nn.LayerNorm(a),
            lambda a, b: Both(a),
        ]
        layers.append(made[kind](wide, narrow))
        wide = narrow if kind == 0 else wide
    layers.append(nn.Linear(wide, 2))
    return nn.Sequential(*layers).double(), width


class Both(nn.Module):
    """A layer with two parameters of which one is of no use."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.idle = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.scale * x + x.sin()


class Fork(nn.Module):
    """One tensor to two."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return self.layer(x), x.tanh()


class Join(nn.Module):
    """Two tensors to one."""

    def forward(self, pair):
        left, right = pair
        return left * right


@skippable(stash=["image"])
class Stash(nn.Module):
    """Stashes its input."""

    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        return self.layer(x), {"image": x.sin()}


@skippable(pop=["image"])
class Pop(nn.Module):
    """Adds what was stashed."""

    def forward(self, x, image):
        return x * 2 + image


class Count(nn.Module):
    """Counts its forward calls in a buffer that recomputations may not touch, and in one list that they may."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x):
        self.calls.append(torch.is_grad_enabled())
        return x * 1


RELEASED = threading.Event()
"""Ends what hangs in this process."""


class _Hang(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, where):
        ctx.where = where
        if where == "forward":
            RELEASED.wait(HANG)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if ctx.where == "backward":
            RELEASED.wait(HANG)
        return gradient, None


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward, backward):
        ctx.backward_seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward_seconds)
        return gradient, None, None


class Sleep(nn.Module):
    """A layer of a fixed cost."""

    def __init__(self, forward, backward):
        super().__init__()
        self.seconds = forward, backward
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return _Sleep.apply(x * self.weight, *self.seconds)


class Raise(nn.Module):
    """Raises in the forward or the backward pass."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def forward(self, x):
        if self.where == "forward":
            return self.breaks()
        return _Raise.apply(x)

    def breaks(self):
        raise ValueError("broken on purpose")


class _Raise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("broken on purpose")


HANG = 30.0
"""Seconds: longer than any test waits."""


class Hang(nn.Module):
    """Hangs in the forward or the backward pass."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def forward(self, x):
        return _Hang.apply(x, self.where)
