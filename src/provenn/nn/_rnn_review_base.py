"""What all recurrent modules share: one interface, the checks of its arguments, and the loop over time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer

State = tuple[Tensor, ...]
Weights = tuple[Tensor, ...]

Function = Callable[[Tensor], Tensor]


def _same(values: Tensor) -> Tensor:
    return values


def _softmax(values: Tensor) -> Tensor:
    return values.softmax(dim=-1)


OUTPUTS: dict[str, Function] = {"linear": _same, "softmax": _softmax, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
ACTIVATIONS: dict[str, Function] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": _same,
}


def chosen(name: str, value: str, among: dict[str, Function]) -> Function:
    """Return the function that an argument names."""
    check_choice(name, value, among)
    return among[value]


class RecurrentModule(nn.Module, ABC):
    """Base of the recurrent modules: sequences in, outputs and the state after the last step out.

    Args:
        input_size: Features of an input.
        hidden_size: Hidden units.
        output_size: Features of an output.
    """

    state_names: ClassVar[tuple[str, ...]] = ("h",)
    streams: ClassVar[bool] = True
    """Whether an output needs no later input, so that the network runs step by step."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("output_size", output_size)):
            check_integer(name, size, at_least=1)
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.output_size = output_size

    @abstractmethod
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Return the shape of every tensor of the state, without the batch."""

    @abstractmethod
    def features(self, state: State) -> Tensor:
        """Return the output that belongs to a state: that of the step that led to it."""

    def recurrent_matrices(self) -> dict[str, Tensor]:
        """Return the square matrices by which a state enters the next step, by name."""
        return {}

    def initial_state(self, batch: int, like: Tensor) -> State:
        """Return the state before the first step: zeros.

        Args:
            batch: Number of sequences.
            like: A tensor of the wanted type and device.
        """
        return tuple(like.new_zeros(batch, *shape) for shape in self.state_shapes())

    def forward(
        self,
        x: Float[Tensor, "batch time input"],
        state: State | None = None,
        mask: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time output"], State]:
        """Run over whole sequences.

        Args:
            x: The inputs.
            state: The state before the first step; ``None`` for :meth:`initial_state`.
            mask: False where there is no input: the state stays, and the output is 0.

        Shape: ``x`` (B, T, d), ``mask`` (B, T), every tensor of the state (B, ...) → (B, T, outputs).

        Where torch has a kernel for the same network it is used, unless there is a mask; on a GPU that kernel cannot be
        differentiated twice, :meth:`step` can.

        Returns:
            The outputs, and the state after the last step.

        Raises:
            ValueError: ``x`` has another rank or size or no steps, or ``state`` or ``mask`` do not fit it.
            TypeError: ``mask`` is not boolean.
        """
        return self.run(x, state, mask)

    @abstractmethod
    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Take one step, or refuse to."""

    @abstractmethod
    def run(self, x: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, State]:
        """Check the arguments and run over time."""

    def checked_state(self, x: Tensor, state: State | None) -> State:
        """Return the state to start from.

        Raises:
            ValueError: It does not fit the inputs.
        """
        if x.shape[-1] != self.input_size:
            raise ValueError(f"x must have {self.input_size} features, got shape {tuple(x.shape)}")
        if state is None:
            return self.initial_state(x.shape[0], x)
        wanted = [(x.shape[0], *shape) for shape in self.state_shapes()]
        found = [tuple(one.shape) for one in state]
        if found != wanted:
            raise ValueError(f"state must have the shapes {wanted}, got {found}")
        return state


class SteppedModule(RecurrentModule):
    """A recurrent module that runs forward, step by step.

    A kind of network says how inputs are projected (for all steps at once, before the loop), what one step does with
    a projected input and the state, and what is read out of it (for all steps at once, after the loop).
    """

    @abstractmethod
    def project(self, x: Tensor) -> Tensor:
        """Return what the inputs (..., input) contribute to each step."""

    @abstractmethod
    def advance(self, projected: Tensor, state: State, weights: Weights) -> tuple[Tensor, State]:
        """Take one step: from a projected input (batch, ...) and a state to what is read out, and the next state."""

    def library_run(self, x: Tensor, state: State) -> tuple[Tensor, State] | None:
        """Run all steps by torch's own kernel, where there is one that computes the same; else ``None``."""
        return None

    def loop_weights(self) -> Weights:
        """Return the weights that every step uses, prepared once a sequence."""
        return ()

    def readout(self, hidden: Tensor) -> Tensor:
        """Return the outputs of what :meth:`advance` left to read out, for any leading dimensions."""
        return hidden

    def step(self, x: Float[Tensor, "batch input"], state: State | None = None) -> tuple[Tensor, State]:
        """Take one step.

        Args:
            x: The inputs of one step.
            state: As in :meth:`forward`.

        Returns:
            The outputs (batch, outputs), and the next state.

        Raises:
            ValueError: ``x`` or ``state`` has another shape.
        """
        if x.ndim != 2:
            raise ValueError(f"x must be (batch, {self.input_size}) in a step, got {tuple(x.shape)}")
        start = self.checked_state(x.unsqueeze(1), state)
        hidden, after = self.advance(self.project(x), start, self.loop_weights())
        return self.readout(hidden), after

    def run(
        self, x: Tensor, state: State | None, mask: Tensor | None, forced: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Check the arguments and loop over time; ``forced`` (B, T, outputs) takes the outputs' place in the state."""
        check_sequence(x, self.input_size)
        check_mask(x, mask)
        current = self.checked_state(x, state)
        # A compiler sees through our loop, and not into the library's.
        if mask is None and forced is None and not torch.compiler.is_compiling():
            whole = self.library_run(x, current)
            if whole is not None:
                return self.readout(whole[0]), whole[1]
        weights = self.loop_weights()
        hidden = []
        kept = None if mask is None else mask.transpose(0, 1).unsqueeze(-1).unbind(0)
        for time, projected in enumerate(self.project(x.transpose(0, 1)).unbind(0)):
            read, following = self.advance(projected, current, weights)
            if forced is not None:
                following = self.with_output(following, forced[:, time])
            current = following if kept is None else held_where_masked(kept[time], following, current)
            hidden.append(read)
        outputs = self.readout(torch.stack(hidden, dim=1))
        return (outputs if mask is None else outputs.masked_fill(~mask.unsqueeze(-1), 0)), current

    def with_output(self, state: State, output: Tensor) -> State:
        """Return the state with another output in it; the state itself where it holds no output."""
        return state


def held_where_masked(mask: Tensor, following: State, current: State) -> State:
    """Return the following state where the mask (batch, 1) is true, the current one elsewhere."""
    return tuple(
        torch.where(mask.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        for new, old in zip(following, current, strict=True)
    )


def check_sequence(x: Tensor, features: int) -> None:
    """Check that inputs are (batch, time, features) with at least one step."""
    if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != features:
        raise ValueError(f"x must be (batch, time, {features}) with at least one step, got shape {tuple(x.shape)}")


def check_mask(x: Tensor, mask: Tensor | None) -> None:
    """Check that a mask is boolean and of the batch and time of the inputs."""
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, got {mask.dtype}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"mask must have the shape {tuple(x.shape[:2])}, got {tuple(mask.shape)}")


def uniform_(module: nn.Module, hidden_size: int) -> None:
    """Draw all parameters of a module uniformly from ±1/√hidden, as torch's recurrent layers do."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -(hidden_size**-0.5), hidden_size**-0.5)


def check_torch_layer(name: str, layer: Any, kind: type[nn.RNNBase]) -> None:
    """Check that a layer of torch's is one that can be taken over: one layer, one direction, with biases."""
    if not isinstance(layer, kind):
        raise TypeError(f"{name} must be a torch.nn.{kind.__name__}, got {type(layer).__name__}")
    if layer.num_layers != 1 or layer.bidirectional or not layer.bias or layer.proj_size:
        raise ValueError(f"{name} must have one layer, one direction, biases and no projection, got {layer}")
