"""Long short-term memory in its historical forms, and the gated recurrent unit."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from provenn.core.experiment.checks import check_number
from provenn.nn._rnn_review_base import State, SteppedModule, Weights, check_torch_layer, uniform_


class PeepholeLSTM(SteppedModule):
    r"""Long short-term memory: gated units around a state that carries its error without loss.

    .. math::
        g_t &= \tanh(W_g x_t + U_g h_{t-1} + b_g) \\
        i_t &= \sigma(W_i x_t + U_i h_{t-1} + p_i \odot s_{t-1} + b_i) \\
        f_t &= \sigma(W_f x_t + U_f h_{t-1} + p_f \odot s_{t-1} + b_f) \\
        s_t &= g_t \odot i_t + s_{t-1} \odot f_t \\
        o_t &= \sigma(W_o x_t + U_o h_{t-1} + p_o \odot s_t + b_o) \\
        h_t &= \tanh(s_t) \odot o_t

    Weights and biases are stacked in the order i, f, o, g.

    Args:
        input_size: Features of an input.
        hidden_size: Memory cells n.
        forget_gate: Whether there is f; without, f ≡ 1, as in 1997.
        peepholes: Whether the gates see the state: i and f the one before, o the new one.
        truncated_gradient: Whether errors that leave a cell through a gate or its input are cut there, as in 1997:
            they change the weights, and go no further back.
        forget_bias: What f's bias starts from.

    Shape:
        ``x`` (B, T, input), ``mask`` (B, T), state (h (B, n), s (B, n)) → (B, T, n), and the state after the last step.

    Raises:
        ValueError: A size is below 1, ``forget_bias`` is not finite; a sequence ``x`` is empty or of another size, or
            ``state`` or ``mask`` do not fit it.
        TypeError: A size or ``forget_bias`` is no number, or ``mask`` is not boolean.

    Cost: O(4n (n + input)) time a step and sample; the inputs of all steps are one product, and the gates of a step
    another.

    Source: section 4.1 of the survey; Hochreiter & Schmidhuber (1997); forget gate: Gers et al. (2000); peepholes:
    Gers & Schmidhuber (2000); its bias: Jozefowicz et al. (2015).
    """

    state_names: ClassVar[tuple[str, ...]] = ("h", "s")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        forget_gate: bool = True,
        peepholes: bool = True,
        truncated_gradient: bool = False,
        forget_bias: float = 1.0,
    ) -> None:
        check_number("forget_bias", forget_bias)
        super().__init__(input_size, hidden_size, hidden_size)
        self.forget_gate = forget_gate
        self.truncated_gradient = truncated_gradient
        self.gates = "ifog" if forget_gate else "iog"
        rows = len(self.gates) * hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.weight_hh = nn.Parameter(torch.empty(rows, hidden_size))
        self.bias = nn.Parameter(torch.empty(rows))
        self.peephole = nn.Parameter(torch.empty(len(self.gates) - 1, hidden_size)) if peepholes else None
        uniform_(self, hidden_size)
        if forget_gate:
            with torch.no_grad():
                self.bias[hidden_size : 2 * hidden_size].fill_(forget_bias)

    @classmethod
    def from_torch(cls, lstm: nn.LSTM) -> PeepholeLSTM:
        """Build the network, without peepholes, that computes what a ``torch.nn.LSTM`` of one layer does.

        Raises:
            TypeError: ``lstm`` is another layer.
            ValueError: It has several layers or directions, a projection, or no biases.
        """
        check_torch_layer("lstm", lstm, nn.LSTM)
        made = cls(lstm.input_size, lstm.hidden_size, peepholes=False).to(lstm.weight_ih_l0)
        with torch.no_grad():
            for own, *theirs in (
                (made.weight_ih, lstm.weight_ih_l0),
                (made.weight_hh, lstm.weight_hh_l0),
                (made.bias, lstm.bias_ih_l0, lstm.bias_hh_l0),
            ):
                i, f, g, o = torch.stack(theirs).sum(dim=0).chunk(4)
                own.copy_(torch.cat((i, f, o, g)))
        return made

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.hidden_size,), (self.hidden_size,))

    def library_run(self, x: Tensor, state: State) -> tuple[Tensor, State] | None:
        if self.peephole is not None or not self.forget_gate or self.truncated_gradient:
            return None
        weights = [self._in_torch_order(one) for one in (self.weight_ih, self.weight_hh, self.bias)]
        start = [one.unsqueeze(0) for one in state]
        none = torch.zeros_like(self.bias)
        hidden, h, s = torch.lstm(x, start, [*weights, none], True, 1, 0.0, self.training, False, True)
        return hidden, (h.squeeze(0), s.squeeze(0))

    def _in_torch_order(self, stacked: Tensor) -> Tensor:
        i, f, o, g = stacked.split(self.hidden_size)
        return torch.cat((i, f, g, o))

    def loop_weights(self) -> Weights:
        if self.peephole is None:
            return (self.weight_hh.t(),)
        return self.weight_hh.t(), self.peephole[:-1], self.peephole[-1]

    def project(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight_ih, self.bias)

    def advance(self, projected: Tensor, state: State, weights: Weights) -> tuple[Tensor, State]:
        h, s = state
        if self.truncated_gradient:
            h = h.detach()
        n = self.hidden_size
        before = torch.addmm(projected, h, weights[0])
        if self.peephole is None:
            gates, g = before.split(((len(self.gates) - 1) * n, n), dim=1)
            *early, o = torch.sigmoid(gates).split(n, dim=1)
            s = self._next(early, s, torch.tanh(g))
        else:
            gates, out, g = before.split(((len(self.gates) - 2) * n, n, n), dim=1)
            early = torch.sigmoid(gates + (self._seen(s).unsqueeze(1) * weights[1]).flatten(1)).split(n, dim=1)
            s = self._next(early, s, torch.tanh(g))
            o = torch.sigmoid(out + self._seen(s) * weights[2])
        h = torch.tanh(s) * o
        return h, (h, s)

    def _seen(self, s: Tensor) -> Tensor:
        return s.detach() if self.truncated_gradient else s

    def _next(self, gates: list[Tensor] | tuple[Tensor, ...], s: Tensor, g: Tensor) -> Tensor:
        carried = s * gates[1] if self.forget_gate else s
        return torch.addcmul(carried, g, gates[0])

    def features(self, state: State) -> Tensor:
        return state[0]

    def recurrent_matrices(self) -> dict[str, Tensor]:
        return dict(zip(self.gates, self.weight_hh.split(self.hidden_size), strict=True))


class GRU(SteppedModule):
    r"""The gated recurrent unit, for comparison: two gates and no state beside the hidden units.

    .. math::
        r_t &= \sigma(W_r x_t + U_r h_{t-1} + b_r), \qquad z_t = \sigma(W_z x_t + U_z h_{t-1} + b_z) \\
        n_t &= \tanh(W_n x_t + b_n + r_t \odot (U_n h_{t-1} + c_n)) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Args:
        input_size: Features of an input.
        hidden_size: Hidden units n.

    Shape:
        ``x`` (B, T, input), ``mask`` (B, T), state (h (B, n),) → (B, T, n), and the state after the last step.

    Raises:
        ValueError: A size is below 1; a sequence ``x`` is empty or of another size, or ``state`` or ``mask`` do not
            fit it.
        TypeError: A size is no integer, or ``mask`` is not boolean.

    Cost: O(3n (n + input)) time a step and sample.

    Source: Cho et al., arXiv 1406.1078, with the reset gate after the product, as in torch.
    """

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__(input_size, hidden_size, hidden_size)
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(3 * hidden_size))
        self.bias_n = nn.Parameter(torch.empty(hidden_size))
        uniform_(self, hidden_size)

    @classmethod
    def from_torch(cls, gru: nn.GRU) -> GRU:
        """Build the network that computes what a ``torch.nn.GRU`` of one layer does.

        Raises:
            TypeError: ``gru`` is another layer.
            ValueError: It has several layers or directions, or no biases.
        """
        check_torch_layer("gru", gru, nn.GRU)
        n = gru.hidden_size
        made = cls(gru.input_size, n).to(gru.weight_ih_l0)
        with torch.no_grad():
            made.weight_ih.copy_(gru.weight_ih_l0)
            made.weight_hh.copy_(gru.weight_hh_l0)
            made.bias.copy_(gru.bias_ih_l0)
            made.bias[: 2 * n] += gru.bias_hh_l0[: 2 * n]
            made.bias_n.copy_(gru.bias_hh_l0[2 * n :])
        return made

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.hidden_size,),)

    def library_run(self, x: Tensor, state: State) -> tuple[Tensor, State] | None:
        weights = [self.weight_ih, self.weight_hh, self.bias, self._inner_bias()]
        hidden, h = torch.gru(x, state[0].unsqueeze(0), weights, True, 1, 0.0, self.training, False, True)
        return hidden, (h.squeeze(0),)

    def _inner_bias(self) -> Tensor:
        return torch.cat((self.bias_n.new_zeros(2 * self.hidden_size), self.bias_n))

    def loop_weights(self) -> Weights:
        return self.weight_hh.t(), self._inner_bias()

    def project(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight_ih, self.bias)

    def advance(self, projected: Tensor, state: State, weights: Weights) -> tuple[Tensor, State]:
        n = self.hidden_size
        h = state[0]
        gates, new = projected.split((2 * n, n), dim=1)
        seen_by_gates, seen = torch.addmm(weights[1], h, weights[0]).split((2 * n, n), dim=1)
        r, z = torch.sigmoid(gates + seen_by_gates).split(n, dim=1)
        candidate = torch.tanh(torch.addcmul(new, r, seen))
        h = candidate + z * (h - candidate)
        return h, (h,)

    def features(self, state: State) -> Tensor:
        return state[0]

    def recurrent_matrices(self) -> dict[str, Tensor]:
        return dict(zip("rzn", self.weight_hh.split(self.hidden_size), strict=True))
