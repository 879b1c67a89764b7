"""The bidirectional network: one that reads forward, and one that reads backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from provenn.nn._rnn_review_base import OUTPUTS, RecurrentModule, State, check_mask, check_sequence, chosen


class BiRNN(RecurrentModule):
    r"""Bidirectional recurrent network: at each step it has read what comes before and what comes after.

    .. math::
        y_t = \mathrm{softmax}(W_h h_t + W_z z_t + b)

    where h is the forward network's output and z that of the backward network, which reads from the end. Two
    :class:`PeepholeLSTM` make a BLSTM.

    Args:
        forward_cell: Reads from the first step to the last.
        backward_cell: Reads from the last to the first; of the same input size. The same module twice shares weights.
        output_size: Features of y; ``None``: the output is (h_t, z_t) side by side.
        output: ``"softmax"`` or ``"linear"``; of the y that ``output_size`` asks for.

    Shape:
        ``x`` (B, T, input), ``mask`` (B, T), state (the forward network's tensors, then the backward one's) →
        (B, T, output), and both networks' states after their last steps: the backward one's has read the first input.

    Raises:
        ValueError: The cells' input sizes differ, a cell needs the future itself, ``output`` is unknown or given
            without ``output_size``; a sequence ``x`` is empty or of another size, or ``state`` or ``mask`` do not fit
            it. Also :meth:`step`: there is no output before the whole input is known.
        TypeError: A cell is no recurrent module, or ``mask`` is not boolean.

    Cost: both cells' together.

    Source: section 4.2 of the survey; Schuster & Paliwal (1997); BLSTM: Graves & Schmidhuber (2005).
    """

    streams = False

    def __init__(
        self,
        forward_cell: RecurrentModule,
        backward_cell: RecurrentModule,
        output_size: int | None = None,
        *,
        output: str = "linear",
    ) -> None:
        for name, cell in (("forward_cell", forward_cell), ("backward_cell", backward_cell)):
            if not isinstance(cell, RecurrentModule):
                raise TypeError(f"{name} must be a recurrent module of provenn.nn, got {type(cell).__name__}")
            if not cell.streams:
                raise ValueError(f"{name} must read in one direction, got a {type(cell).__name__}")
        if forward_cell.input_size != backward_cell.input_size:
            sizes = forward_cell.input_size, backward_cell.input_size
            raise ValueError(f"backward_cell must have the input size {sizes[0]} of the other, got {sizes[1]}")
        if output_size is None and output != "linear":
            raise ValueError(f"output {output!r} needs an output_size")
        width = forward_cell.output_size + backward_cell.output_size
        hidden = forward_cell.hidden_size + backward_cell.hidden_size
        super().__init__(forward_cell.input_size, hidden, width if output_size is None else output_size)
        self._output = chosen("output", output, OUTPUTS)
        self.forward_cell, self.backward_cell = forward_cell, backward_cell
        self.out_proj = None if output_size is None else nn.Linear(width, output_size)

    @property
    def state_names(self) -> tuple[str, ...]:  # type: ignore[override]
        forward, backward = self.forward_cell.state_names, self.backward_cell.state_names
        return (*forward, *(f"{name}, backward" for name in backward))

    def run(self, x: Tensor, state: State | None, mask: Tensor | None) -> tuple[Tensor, State]:
        check_sequence(x, self.input_size)
        check_mask(x, mask)
        ahead, back = self._halves(self.checked_state(x, state))
        h, ahead = self.forward_cell(x, ahead, mask)
        z, back = self.backward_cell(x.flip(1), back, None if mask is None else mask.flip(1))
        outputs = self.readout(torch.cat((h, z.flip(1)), dim=-1))
        if mask is not None:
            outputs = outputs.masked_fill(~mask.unsqueeze(-1), 0)
        return outputs, (*ahead, *back)

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Refuse: an output needs the inputs that are still to come.

        Args:
            x: The inputs of one step.
            state: The state.

        Returns:
            Nothing.

        Raises:
            ValueError: Always.
        """
        raise ValueError("x: a bidirectional network takes no single step, its output needs all later inputs")

    def _halves(self, state: State) -> tuple[State, State]:
        first = len(self.forward_cell.state_shapes())
        return state[:first], state[first:]

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.forward_cell.state_shapes() + self.backward_cell.state_shapes()

    def initial_state(self, batch: int, like: Tensor) -> State:
        return self.forward_cell.initial_state(batch, like) + self.backward_cell.initial_state(batch, like)

    def readout(self, hidden: Tensor) -> Tensor:
        return hidden if self.out_proj is None else self._output(self.out_proj(hidden))

    def features(self, state: State) -> Tensor:
        ahead, back = self._halves(state)
        return self.readout(torch.cat((self.forward_cell.features(ahead), self.backward_cell.features(back)), dim=-1))
