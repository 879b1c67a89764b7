"""Gradients through time by other means: forward in real time, and held at their norm by a penalty."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from provenn.nn._rnn_review_base import RecurrentModule, State, check_mask, check_sequence, held_where_masked
from provenn.nn._rnn_review_sequence import SequenceModel

Recurrent = RecurrentModule | SequenceModel


@dataclass(frozen=True)
class Unrolled:
    """A run step by step: the states before the first step and after each, and the output of each step."""

    states: list[State]
    outputs: list[Tensor]


def cell_of(model: Recurrent) -> tuple[RecurrentModule, Callable[[Tensor], Tensor]]:
    """Return the recurrent module that reads the input, and what turns its outputs into the model's.

    Raises:
        TypeError: The model is no recurrent module, nor a model of one.
        ValueError: It does not go step by step from inputs to outputs.
    """
    if isinstance(model, SequenceModel):
        if model.mode not in ("many_to_many", "many_to_one") or not model.cell.streams:
            raise ValueError(f"model must read step by step, got mode {model.mode!r} of {type(model.cell).__name__}")
        return model.cell, model.readout
    if not isinstance(model, RecurrentModule):
        raise TypeError(f"model must be a recurrent module or a SequenceModel, got {type(model).__name__}")
    if not model.streams:
        raise ValueError(f"model must read step by step, got a {type(model).__name__}")
    return model, nn.Identity()


def unrolled(model: Recurrent, x: Tensor, state: State | None = None, mask: Tensor | None = None) -> Unrolled:
    """Run a model step by step, keeping every state in the graph.

    The tensors of a state are nodes of their own, of which the outputs and the next state are functions: else the
    gradient by an LSTM's cells would hold that of its outputs too, which are computed from them.

    Raises:
        ValueError: ``x``, ``state`` or ``mask`` do not fit.
        TypeError: As :func:`cell_of`.
    """
    cell, readout = cell_of(model)
    check_sequence(x, cell.input_size)
    check_mask(x, mask)
    current = tuple(one.detach().requires_grad_() for one in cell.checked_state(x, state))
    states, outputs = [current], []
    for time in range(x.shape[1]):
        _, following = cell.step(x[:, time], current)
        if mask is not None:
            following = held_where_masked(mask[:, time, None], following, current)
        current = tuple(one.clone() for one in following)
        output = readout(cell.features(current))
        states.append(current)
        outputs.append(output if mask is None else output.masked_fill(~mask[:, time, None], 0))
    return Unrolled(states, outputs)


def state_gradients(loss: Tensor, states: list[State]) -> list[State]:
    """Return a loss's gradients by states, as tuples like the states; 0 where nothing leads to the loss."""
    flat = [one for state in states for one in state]
    found = torch.autograd.grad(loss, flat, allow_unused=True)
    filled = iter(torch.zeros_like(one) if g is None else g for one, g in zip(flat, found, strict=True))
    return [tuple(next(filled) for _ in state) for state in states]


def gradient_norm_penalty(
    model: Recurrent,
    x: Float[Tensor, "batch time input"],
    loss: Callable[[Tensor], Tensor],
    state: State | None = None,
    mask: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, ""]:
    r"""Compute how far from 1 a step back through time scales the error, as a penalty to be minimised.

    .. math::
        \Omega = \sum_t \Big( \frac{\lVert \frac{\partial L}{\partial h_{t+1}} \frac{\partial h_{t+1}}{\partial h_t}
        \rVert}{\lVert \frac{\partial L}{\partial h_{t+1}} \rVert} - 1 \Big)^2

    averaged over the samples, h the whole state. The errors ∂L/∂h and the states count as constants: the gradient of
    Ω goes to the weights of each step alone, as its authors compute it.

    Args:
        model: A recurrent module, or a :class:`SequenceModel` of one that goes step by step.
        x: The inputs.
        loss: Maps the outputs to L, a scalar.
        state: The state before the first step.
        mask: False where there is no input; such steps do not count.

    Shape: ``x`` (B, T, d); ``loss`` is called with (B, T, outputs).

    Returns:
        Ω, with a gradient; 0 for a single step.

    Raises:
        ValueError: ``x``, ``state`` or ``mask`` do not fit the model, or the model does not go step by step.
        TypeError: ``model`` is not recurrent.

    Cost: a run step by step with its way back, and one step and its way back of all T · B states at once.

    Source: Pascanu, Mikolov & Bengio, arXiv 1211.5063, equations 9 and 10.
    """
    cell, _ = cell_of(model)
    with torch.enable_grad():
        run = unrolled(model, x, state, mask)
        if x.shape[1] == 1:
            return x.new_zeros(())
        errors = state_gradients(loss(torch.stack(run.outputs, dim=1)), run.states[2:])
        before = tuple(torch.cat(parts).detach().requires_grad_() for parts in zip(*run.states[1:-1], strict=True))
        above = tuple(torch.cat(parts).detach() for parts in zip(*errors, strict=True))
        _, after = cell.step(x[:, 1:].transpose(0, 1).flatten(0, 1), before)
        below = torch.autograd.grad(after, before, above, create_graph=True, allow_unused=True)
    steps = x.shape[1] - 1
    squares = [b.square().flatten(1).sum(1) for b in below if b is not None]
    arriving = torch.stack(squares).sum(0).view(steps, -1)
    sent = torch.stack([a.square().flatten(1).sum(1) for a in above]).sum(0).view(steps, -1)
    counts = sent > 0 if mask is None else (sent > 0) & mask[:, 1:].t()
    # Where the root has no gradient, or the quotient no value, the entry is replaced before, not after.
    ratio = (arriving / sent.masked_fill(~counts, 1)).masked_fill(~counts | (arriving == 0), 1).sqrt()
    ratio = ratio.masked_fill(counts & (arriving == 0), 0)
    return ((ratio - 1).square() * counts).sum() / max(len(x), 1)


class _Step(nn.Module):
    """One step of one sample, as a function of the flat state."""

    def __init__(self, model: Recurrent) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        cell, readout = cell_of(self.model)
        shapes = cell.state_shapes()
        pieces = flat.split([prod(shape) for shape in shapes])
        state = tuple(piece.view(1, *shape) for piece, shape in zip(pieces, shapes, strict=True))
        hidden, after = cell.step(x.unsqueeze(0), state)
        return torch.cat([one.flatten() for one in after]), readout(hidden).squeeze(0)


def rtrl_gradient(
    model: Recurrent,
    loss: Callable[[Tensor, int], Tensor],
    x: Float[Tensor, "batch time input"],
    state: State | None = None,
) -> dict[str, Tensor]:
    r"""Compute the gradient of a loss by real-time recurrent learning: forward in time, without going back.

    With s the state and θ the weights, carry J = ∂s_t/∂θ along:

    .. math::
        J_t = \frac{\partial s_t}{\partial s_{t-1}} J_{t-1} + \frac{\partial s_t}{\partial \theta}, \qquad
        \frac{dL}{d\theta} = \sum_t \frac{\partial \ell_t}{\partial y_t} \Big(
        \frac{\partial y_t}{\partial s_{t-1}} J_{t-1} + \frac{\partial y_t}{\partial \theta} \Big)

    Args:
        model: A recurrent module, or a :class:`SequenceModel` of one that goes step by step.
        loss: ``loss(output, t)`` maps the outputs of step t = 0, 1, … to ℓ_t, a scalar; L is their sum.
        x: The inputs.
        state: The state before the first step.

    Shape: ``x`` (B, T, d); ``loss`` is called with (B, outputs).

    Returns:
        The gradient by every parameter, by name.

    Raises:
        ValueError: ``x`` or ``state`` do not fit the model, or the model does not go step by step or drops units at
            random.
        TypeError: ``model`` is not recurrent.

    Cost: O(|s|² |θ|) time a step and sample, which is O(n⁴) for an Elman network of n units, and O(|s| |θ|) memory a
    sample, whatever the number of steps.

    Source: section 2.3 of the survey; Williams & Zipser (1989).
    """
    cell, _ = cell_of(model)
    check_sequence(x, cell.input_size)
    if any(isinstance(one, nn.Dropout) and one.p and one.training for one in model.modules()):
        raise ValueError("model drops units at random, call its eval() first")
    start = cell.checked_state(x, state)
    stepper = _Step(model)
    weights = {name: one.detach() for name, one in model.named_parameters()}
    buffers = dict(stepper.named_buffers())

    def one_step(theta: dict[str, Tensor], inputs: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        named = {f"model.{name}": value for name, value in theta.items()}
        return functional_call(stepper, {**named, **buffers}, (inputs, flat))  # type: ignore[no-any-return]

    step = vmap(one_step, (None, 0, 0))
    slopes = vmap(jacrev(one_step, (0, 2)), (None, 0, 0))
    flat = torch.cat([one.detach().flatten(1) for one in start], dim=1)
    carried = {name: one.new_zeros(*flat.shape, *one.shape) for name, one in weights.items()}
    gradient = {name: torch.zeros_like(one) for name, one in weights.items()}
    for time in range(x.shape[1]):
        inputs = x[:, time].detach()
        (by_weights, by_state), (out_by_weights, out_by_state) = slopes(weights, inputs, flat)
        flat, output = step(weights, inputs, flat)
        with torch.enable_grad():
            leaf = output.detach().requires_grad_()
            value = loss(leaf, time)
            error = torch.autograd.grad(value, leaf)[0] if value.requires_grad else torch.zeros_like(leaf)
        for name, J in carried.items():
            total = torch.einsum("boi,bi...->bo...", out_by_state, J) + out_by_weights[name]
            gradient[name] += torch.einsum("bo,bo...->...", error, total)
            carried[name] = torch.einsum("bji,bi...->bj...", by_state, J) + by_weights[name]
    return gradient
