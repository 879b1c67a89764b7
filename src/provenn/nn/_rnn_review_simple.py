"""The networks of Elman and of Jordan."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_number
from provenn.nn._rnn_review_base import (
    ACTIVATIONS,
    OUTPUTS,
    Function,
    State,
    SteppedModule,
    Weights,
    check_torch_layer,
    chosen,
    uniform_,
)

_KERNELS: dict[Function, Callable[..., tuple[Tensor, Tensor]]] = {
    torch.tanh: torch.rnn_tanh,
    torch.relu: torch.rnn_relu,
}


class ElmanRNN(SteppedModule):
    r"""Elman's simple recurrent network: the hidden units see themselves one step ago.

    .. math::
        h_t = \sigma(W x_t + U h_{t-1} + b), \qquad y_t = \mathrm{softmax}(V h_t + b_y)

    Args:
        input_size: Features of an input.
        hidden_size: Hidden units n.
        output_size: Features of an output; ``None`` for no V: the hidden units are the output.
        activation: σ of the hidden units: ``"sigmoid"``, ``"tanh"``, ``"relu"`` or ``"identity"``.
        output: ``"softmax"`` or ``"linear"``.
        identity_scale: U starts as so much of the identity, as goes with ReLU; ``None``: drawn from ±1/√n.

    Shape:
        ``x`` (B, T, input), ``mask`` (B, T), state (h (B, n),) → (B, T, output), and the state after the last step.

    Raises:
        ValueError: A size is below 1, a choice is unknown, ``output`` is given without ``output_size``; a sequence
            ``x`` is empty or of another size, or ``state`` or ``mask`` do not fit it.
        TypeError: A size is no integer, or ``mask`` is not boolean.

    Cost: O(n² + n · input) time a step and sample; inputs and outputs of all steps are one product each.

    Source: section 2.2 of the survey; Elman, Cognitive Science 14 (1990); identity start: Le et al., arXiv 1504.00941.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int | None = None,
        *,
        activation: str = "sigmoid",
        output: str = "linear",
        identity_scale: float | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, hidden_size if output_size is None else output_size)
        if output_size is None and output != "linear":
            raise ValueError(f"output {output!r} needs an output_size")
        self._activation = chosen("activation", activation, ACTIVATIONS)
        self._output = chosen("output", output, OUTPUTS)
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        uniform_(self, hidden_size)
        if identity_scale is not None:
            check_number("identity_scale", identity_scale)
            with torch.no_grad():
                nn.init.eye_(self.weight_hh).mul_(identity_scale)
                self.bias.zero_()
        self.out_proj = None if output_size is None else nn.Linear(hidden_size, output_size)

    @classmethod
    def from_torch(cls, rnn: nn.RNN) -> ElmanRNN:
        """Build the network that computes what a ``torch.nn.RNN`` of one layer does.

        Raises:
            TypeError: ``rnn`` is another layer.
            ValueError: It has several layers or directions, or no biases.
        """
        check_torch_layer("rnn", rnn, nn.RNN)
        made = cls(rnn.input_size, rnn.hidden_size, activation=rnn.nonlinearity).to(rnn.weight_ih_l0)
        with torch.no_grad():
            made.weight_ih.copy_(rnn.weight_ih_l0)
            made.weight_hh.copy_(rnn.weight_hh_l0)
            made.bias.copy_(rnn.bias_ih_l0 + rnn.bias_hh_l0)
        return made

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.hidden_size,),)

    def library_run(self, x: Tensor, state: State) -> tuple[Tensor, State] | None:
        kernel = _KERNELS.get(self._activation)
        if kernel is None:
            return None
        weights = [self.weight_ih, self.weight_hh, self.bias, torch.zeros_like(self.bias)]
        hidden, h = kernel(x, state[0].unsqueeze(0), weights, True, 1, 0.0, self.training, False, True)
        return hidden, (h.squeeze(0),)

    def loop_weights(self) -> Weights:
        return (self.weight_hh.t(),)

    def project(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight_ih, self.bias)

    def advance(self, projected: Tensor, state: State, weights: Weights) -> tuple[Tensor, State]:
        h = self._activation(torch.addmm(projected, state[0], weights[0]))
        return h, (h,)

    def readout(self, hidden: Tensor) -> Tensor:
        return hidden if self.out_proj is None else self._output(self.out_proj(hidden))

    def features(self, state: State) -> Tensor:
        return self.readout(state[0])

    def recurrent_matrices(self) -> dict[str, Tensor]:
        return {"U": self.weight_hh}


class JordanRNN(SteppedModule):
    r"""Jordan's network: special units c collect its own outputs, and let them decay.

    .. math::
        c_t = \mu c_{t-1} + y_{t-1}, \qquad h_t = \sigma(W x_t + U c_t + b), \qquad y_t = g(V h_t + b_y)

    Args:
        input_size: Features of an input.
        hidden_size: Hidden units n.
        output_size: Features m of an output, and number of special units.
        decay: μ, the self-recurrent weight of the special units; 0 for plain feedback of the last output.
        activation: σ of the hidden units: ``"sigmoid"``, ``"tanh"``, ``"relu"`` or ``"identity"``.
        output: g: ``"linear"``, ``"softmax"``, ``"sigmoid"`` or ``"tanh"``.

    Shape:
        ``x`` (B, T, input), ``mask`` (B, T), ``targets`` (B, T, m), state (c (B, m), y (B, m)) → (B, T, m), and the
        state after the last step.

    Raises:
        ValueError: A size is below 1, ``decay`` is not in [0, 1], a choice is unknown; a sequence ``x`` is empty or of
            another size, or ``state``, ``mask`` or ``targets`` do not fit it.
        TypeError: A size is no integer, or ``mask`` is not boolean.

    Cost: O(n · (m + input)) time a step and sample.

    Source: section 2.2 of the survey; Jordan, "Serial order", ICS report 8604 (1986).
    """

    state_names: ClassVar[tuple[str, ...]] = ("c", "y")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        *,
        decay: float = 0.5,
        activation: str = "sigmoid",
        output: str = "linear",
    ) -> None:
        super().__init__(input_size, hidden_size, output_size)
        check_number("decay", decay, at_least=0, at_most=1)
        self.decay = decay
        self._activation = chosen("activation", activation, ACTIVATIONS)
        self._output = chosen("output", output, OUTPUTS)
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size))
        self.weight_ch = nn.Parameter(torch.empty(hidden_size, output_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.weight_ho = nn.Parameter(torch.empty(output_size, hidden_size))
        self.bias_o = nn.Parameter(torch.empty(output_size))
        uniform_(self, hidden_size)

    def forward(
        self,
        x: Float[Tensor, "batch time input"],
        state: State | None = None,
        mask: Bool[Tensor, "batch time"] | None = None,
        targets: Float[Tensor, "batch time output"] | None = None,
    ) -> tuple[Float[Tensor, "batch time output"], State]:
        """Run over whole sequences.

        Args:
            x: The inputs.
            state: The state before the first step; ``None`` for zeros.
            mask: False where there is no input: the state stays, and the output is 0.
            targets: Teacher forcing: the special units collect these instead of the outputs.

        Returns:
            The outputs, and the state after the last step.
        """
        if targets is not None and targets.shape != (*x.shape[:2], self.output_size):
            wanted = (*x.shape[:2], self.output_size)
            raise ValueError(f"targets must have the shape {tuple(wanted)}, got {tuple(targets.shape)}")
        return self.run(x, state, mask, targets)

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.output_size,), (self.output_size,))

    def loop_weights(self) -> Weights:
        return self.weight_ch.t(), self.weight_ho.t()

    def project(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight_ih, self.bias)

    def advance(self, projected: Tensor, state: State, weights: Weights) -> tuple[Tensor, State]:
        c, y = state
        c = self.decay * c + y
        h = self._activation(torch.addmm(projected, c, weights[0]))
        y = self._output(torch.addmm(self.bias_o, h, weights[1]))
        return y, (c, y)

    def with_output(self, state: State, output: Tensor) -> State:
        return state[0], output

    def features(self, state: State) -> Tensor:
        return state[1]

    def recurrent_matrices(self) -> dict[str, Tensor]:
        return {"V U": self.weight_ho @ self.weight_ch}
