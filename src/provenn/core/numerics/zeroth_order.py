"""Derivatives without back-propagation: directions redrawn from seeds, differences of losses, forward-mode products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.experiment.parameters import flat_view, seeded_normal
from provenn.core.experiment.seeding import derive_seed

Mask = Callable[[int, slice], Tensor | None]
"""(index of a tensor, piece of its flattened entries) → factors of that piece's noise, or ``None`` for all ones."""


class SeededDirection:
    """A normal direction z ~ N(0, I) over tensors that is drawn again from its seed wherever it is needed.

    Every tensor draws from a seed of its own, so that any of them can be drawn alone, in any order.

    Args:
        tensors: Contiguous; their shapes, types and devices decide the noise.
        seed: The seed.
        mask: Factors that the noise is multiplied by; called at each draw.

    Raises:
        ValueError: There is no tensor, one is not contiguous, or ``seed`` is negative.

    Cost: O(entries) time a draw; memory of 2¹³ numbers on a CPU, 2²⁰ on a GPU, or a 64th of a larger tensor.

    Source: Malladi et al., arXiv 2305.17333, algorithm 1.
    """

    def __init__(self, tensors: Sequence[Tensor], seed: int, mask: Mask | None = None) -> None:
        check_integer("seed", seed, at_least=0)
        self.tensors, self.seed, self._mask = list(tensors), seed, mask
        if not self.tensors:
            raise ValueError("tensors must hold at least one tensor, got none")
        self._views = [flat_view(tensor) for tensor in self.tensors]

    def pieces(self, index: int | None = None) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield index of the tensor, piece of its flattened entries, and noise there, which the caller may change.

        Args:
            index: The one tensor to draw; ``None``: all, in order.
        """
        for one in range(len(self.tensors)) if index is None else (index,):
            for _, piece, noise in seeded_normal([self.tensors[one]], derive_seed(self.seed, one)):
                factors = None if self._mask is None else self._mask(one, piece)
                if factors is not None:
                    noise.mul_(factors)
                    del factors
                yield one, piece, noise
                del noise  # or it would outlive the draw of the next piece

    @torch.no_grad()
    def add_(self, scale: float) -> None:
        """Add ``scale`` · z to the tensors, in place."""
        for index, piece, noise in self.pieces():
            self._views[index][piece].add_(noise, alpha=scale)
            del noise

    def materialize(self) -> list[Tensor]:
        """Return z as new tensors in the shapes of the tensors."""
        drawn = [torch.empty_like(view) for view in self._views]
        for index, piece, noise in self.pieces():
            drawn[index][piece] = noise
            del noise
        return [noise.view(tensor.shape) for noise, tensor in zip(drawn, self.tensors, strict=True)]


class Difference(NamedTuple):
    """A difference quotient and the two losses that it is made of."""

    derivative: float
    ahead: float
    behind: float


@torch.no_grad()
def finite_difference(
    loss: Callable[[], Tensor | float],
    direction: SeededDirection,
    step: float,
    two_sided: bool = True,
    base: float | None = None,
) -> Difference:
    """Estimate the derivative of a loss along a direction from two evaluations, moving the tensors in place.

    (f(θ + step·z) − f(θ − step·z)) / (2 step), or (f(θ + step·z) − f(θ)) / step.

    Args:
        loss: Evaluates f at the tensors as they stand; called without gradients.
        direction: z; its mask must not depend on the tensors' values, which move between the draws.
        step: > 0, the length of the move in units of z.
        two_sided: Which of the two quotients.
        base: f(θ), for the one-sided quotient, where it is known already.

    Returns:
        The quotient, f ahead, and f behind (f(θ) if one-sided).

    Raises:
        ValueError: ``step`` ≤ 0, or ``base`` comes with ``two_sided``.

    The tensors return to where they were up to the rounding of two or three additions, also when ``loss`` raises.

    Cost: two evaluations (one, given ``base``), three draws of z (two if one-sided), no memory of the tensors' size.

    Source: Spall, IEEE Transactions on Automatic Control 37 (1992); Malladi et al., arXiv 2305.17333.
    """
    check_number("step", step, above=0)
    if base is not None and two_sided:
        raise ValueError(f"base serves the one-sided quotient only, got base={base} with two_sided=True")
    at = 0.0
    try:
        if two_sided:
            direction.add_(step)
            at = step
            ahead = float(loss())
            direction.add_(-2 * step)
            at = -step
            behind = float(loss())
        else:
            behind = float(loss()) if base is None else base
            direction.add_(step)
            at = step
            ahead = float(loss())
    finally:
        if at:
            direction.add_(-at)
    return Difference((ahead - behind) / (2 * step if two_sided else step), ahead, behind)


@contextmanager
def perturbed_layers(model: nn.Module, direction: SeededDirection, step: float) -> Iterator[None]:
    """Let every layer compute with θ + step·z inside the block, while θ itself stays as it is, bit for bit.

    A layer's perturbed weights are formed when its forward begins and dropped when it ends, so a copy of one layer
    exists at a time, and a mask may read the weights' values.

    Args:
        model: Its modules' own parameters are replaced during their forward.
        direction: z over some of the model's parameters.
        step: The length of the move in units of z, of either sign.

    Raises:
        RuntimeError: A tensor of the direction belongs to several modules or to none, or, at the end of a block that
            ran the model, was never reached by a forward of its own module (used by another, or not at all).

    Cost: one draw of z a forward pass; memory of the largest layer.

    Source: Liu et al., arXiv 2402.15751, section 3.3, in which masks are made in the forward pass.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owned = _owners(model, direction, names)
    clean: dict[int, Tensor] = {}
    reached: set[int] = set()

    def enter(module: nn.Module, _inputs: Any) -> None:
        for index, parameter in owned[module]:
            clean[index] = parameter.data
            moved = parameter.detach().clone()
            view = flat_view(moved)
            for _, piece, noise in direction.pieces(index):
                view[piece].add_(noise, alpha=step)
                del noise
            parameter.data = moved
            reached.add(index)

    def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
        for index, parameter in owned[module]:
            if index in clean:
                parameter.data = clean.pop(index)

    hooks = [module.register_forward_pre_hook(enter) for module in owned]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in owned]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in owned:
            leave(module, None, None)
    missed = [names[id(one)] for index, one in enumerate(direction.tensors) if index not in reached]
    if reached and missed:
        raise RuntimeError(
            f"parameters {', '.join(missed)} were not reached by the forward of their own module, so they were not"
            " perturbed: they are used by another module's code, or not at all"
        )


def _owners(
    model: nn.Module, direction: SeededDirection, names: Mapping[int, str]
) -> dict[nn.Module, list[tuple[int, nn.Parameter]]]:
    order = {id(tensor): index for index, tensor in enumerate(direction.tensors)}
    owned: dict[nn.Module, list[tuple[int, nn.Parameter]]] = {}
    owners = dict.fromkeys(order, 0)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) in order:
                owned.setdefault(module, []).append((order[id(parameter)], parameter))
                owners[id(parameter)] += 1
    strangers = [order[one] for one, count in owners.items() if count == 0]
    if strangers:
        raise RuntimeError(f"tensors {strangers} of the direction belong to no module of the model")
    tied = [names[one] for one, count in owners.items() if count > 1]
    if tied:
        raise RuntimeError(f"parameters {', '.join(tied)} are tied: several modules own each of them")
    return owned


def forward_derivative(
    loss: Callable[[Mapping[str, Tensor]], Tensor], parameters: Mapping[str, Tensor], tangents: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return a loss and its exact derivative along tangents, by forward-mode differentiation.

    Args:
        loss: A function of named parameters → scalar.
        parameters: Where.
        tangents: The direction, in the parameters' names and shapes.

    Raises:
        NotImplementedError: An operation of the loss has no forward-mode rule; torch's message names it.
        ValueError: The names differ, or the loss is no scalar.

    Cost: about two forward passes; no graph is kept, so activations are dropped as they go.

    Source: Baydin et al., arXiv 2202.08587.
    """
    if parameters.keys() != tangents.keys():
        raise ValueError(f"tangents must have the names {sorted(parameters)}, got {sorted(tangents)}")
    at = {name: one.detach() for name, one in parameters.items()}
    value: Tensor
    derivative: Tensor
    with torch.no_grad():
        value, derivative = torch.func.jvp(loss, (at,), (dict(tangents),))[:2]
    if value.ndim:
        raise ValueError(f"loss must return a scalar, got shape {tuple(value.shape)}")
    return value, derivative


class QueryCounter:
    """A loss that counts how often it is evaluated, in ``count``.

    Args:
        loss: Called with whatever the counter is called with.
    """

    def __init__(self, loss: Callable[..., Any]) -> None:
        self._loss, self.count = loss, 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Evaluate the loss; a call that raises counts too."""
        self.count += 1
        return self._loss(*arguments, **keywords)
