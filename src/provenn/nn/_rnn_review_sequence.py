"""One model for the shapes that sequence learning takes: one or many in, one or many out, in step or after another."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.nn._rnn_review_base import OUTPUTS, RecurrentModule, State, check_mask, check_sequence, chosen

MODES = ("many_to_many", "many_to_one", "one_to_many", "encoder_decoder")


class SequenceModel(nn.Module):
    """A recurrent module between dropout and a readout, in one of four modes.

    - ``"many_to_many"``: an output at every step, in step with the input (tagging);
    - ``"many_to_one"``: an output after the last input (classification);
    - ``"one_to_many"``: one input at the first step, then its own outputs as inputs (image captions);
    - ``"encoder_decoder"``: the cell reads the source, and its final state starts the decoder, which writes the target
      (sequence to sequence).

    Where outputs come back as inputs they pass a linear map; with ``targets`` those come instead of the outputs
    (teacher forcing).

    Args:
        cell: The recurrent module; in the mode ``"encoder_decoder"`` the one that reads.
        mode: The mode.
        output_size: Features of an output; ``None`` for no readout: the output is the cell's own.
        decoder: The recurrent module that writes, with a state of the same shapes as the cell's.
        output: What follows the readout: ``"linear"`` or ``"softmax"``.
        reverse_source: Whether the encoder reads the source from its end, which brings its first words close to those
            of the target.
        dropout: Share of the cell's inputs and outputs that is dropped in training. Recurrent connections keep all.

    Shape:
        ``x`` (B, T, input), or (B, input) in the mode ``"one_to_many"``; ``mask`` (B, T); ``targets`` (B, length,
        output) → (B, T, output), (B, output) or (B, length, output), and the state after the last step.

    Raises:
        ValueError: ``mode`` or ``output`` is unknown, a size is below 1, ``dropout`` is not in [0, 1), ``decoder`` is
            missing, not asked for or of another state, ``reverse_source`` is not of the mode, or a mode that feeds
            outputs back has a ``cell`` that needs the future; a sequence ``x`` is empty or of another size, ``state``,
            ``mask`` or ``targets`` do not fit it, or ``length`` is missing where nothing else says it.
        TypeError: ``cell`` or ``decoder`` is no recurrent module.

    Cost: the cell's; with outputs that come back, every step is a call of its own.

    Source: sections 1 and 5 of the survey; sequence to sequence: Sutskever et al., arXiv 1409.3215; dropout: Zaremba
    et al., arXiv 1409.2329.
    """

    def __init__(
        self,
        cell: RecurrentModule,
        mode: Literal["many_to_many", "many_to_one", "one_to_many", "encoder_decoder"],
        output_size: int | None = None,
        *,
        decoder: RecurrentModule | None = None,
        output: str = "linear",
        reverse_source: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, MODES)
        if output_size is not None:
            check_integer("output_size", output_size, at_least=1)
        check_number("dropout", dropout, at_least=0, below=1)
        if not isinstance(cell, RecurrentModule):
            raise TypeError(f"cell must be a recurrent module of provenn.nn, got {type(cell).__name__}")
        if decoder is not None and not isinstance(decoder, RecurrentModule):
            raise TypeError(f"decoder must be a recurrent module of provenn.nn, got {type(decoder).__name__}")
        if (decoder is not None) != (mode == "encoder_decoder"):
            raise ValueError(f"decoder must be given in the mode 'encoder_decoder' alone, got {decoder} in {mode!r}")
        if decoder is not None and decoder.state_shapes() != cell.state_shapes():
            wanted, found = cell.state_shapes(), decoder.state_shapes()
            raise ValueError(f"decoder must have a state of the shapes {wanted}, got {found}")
        if reverse_source and mode != "encoder_decoder":
            raise ValueError(f"reverse_source is of the mode 'encoder_decoder', got {mode!r}")
        writer = cell if decoder is None else decoder
        feeds_back = mode in ("one_to_many", "encoder_decoder")
        if feeds_back and not writer.streams:
            raise ValueError(f"cell must run step by step to write in the mode {mode!r}, got a {type(writer).__name__}")
        self._output = chosen("output", output, {name: OUTPUTS[name] for name in ("linear", "softmax")})
        self.mode = mode
        self.output_size = writer.output_size if output_size is None else output_size
        self.reverse_source = reverse_source
        self.cell, self.decoder = cell, decoder
        self.dropout = nn.Dropout(dropout)
        self.feedback = nn.Linear(self.output_size, writer.input_size) if feeds_back else None
        self.out_proj = nn.Identity() if output_size is None else nn.Linear(writer.output_size, output_size)

    def forward(
        self,
        x: Float[Tensor, "batch ..."],
        state: State | None = None,
        mask: Bool[Tensor, "batch time"] | None = None,
        targets: Float[Tensor, "batch length output"] | None = None,
        length: int | None = None,
    ) -> tuple[Float[Tensor, "batch ..."], State]:
        """Run the model in its mode.

        Args:
            x: The inputs, or the one input.
            state: The cell's state before the first step.
            mask: False where there is no input.
            targets: Teacher forcing, in the modes that feed outputs back.
            length: Steps to write in these modes; ``None`` for those of ``targets``.

        Returns:
            The outputs, and the state after the last step.

        Raises:
            ValueError: As the class says.
        """
        if self.feedback is None:
            if targets is not None or length is not None:
                raise ValueError(f"targets and length are of modes that feed outputs back, got one in {self.mode!r}")
            hidden, state = self.cell(self.dropout(x), state, mask)
            read = hidden if self.mode == "many_to_many" else self.cell.features(state)
            return self._masked(self.readout(read), mask), state
        steps = self._steps(x.shape[0], targets, length)
        if self.mode == "one_to_many":
            if mask is not None:
                raise ValueError("mask has no place in the mode 'one_to_many', which has one input")
            return self._write(self.cell, x, state, targets, steps)
        check_sequence(x, self.cell.input_size)
        check_mask(x, mask)
        if self.reverse_source:
            x, mask = x.flip(1), None if mask is None else mask.flip(1)
        assert self.decoder is not None
        _, state = self.cell(self.dropout(x), state, mask)
        return self._write(self.decoder, x.new_zeros(x.shape[0], self.decoder.input_size), state, targets, steps)

    def step(self, x: Float[Tensor, "batch input"], state: State | None = None) -> tuple[Tensor, State]:
        """Take one step in the mode ``"many_to_many"``.

        Args:
            x: The inputs of one step.
            state: The cell's state.

        Returns:
            The outputs (batch, output), and the next state.

        Raises:
            ValueError: The mode is another, the cell needs the future, or ``x`` or ``state`` do not fit.
        """
        if self.mode != "many_to_many":
            raise ValueError(f"mode must be 'many_to_many' to go step by step, got {self.mode!r}")
        hidden, state = self.cell.step(self.dropout(x), state)
        return self.readout(hidden), state

    def initial_state(self, batch: int, like: Tensor) -> State:
        """Return the cell's state before the first step.

        Args:
            batch: Number of sequences.
            like: A tensor of the wanted type and device.
        """
        return self.cell.initial_state(batch, like)

    def readout(self, hidden: Tensor) -> Tensor:
        """Return the outputs that belong to the cell's (..., cell's output)."""
        return self._output(self.out_proj(self.dropout(hidden)))

    def _masked(self, outputs: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None or self.mode != "many_to_many":
            return outputs
        return outputs.masked_fill(~mask.unsqueeze(-1), 0)

    def _steps(self, batch: int, targets: Tensor | None, length: int | None) -> int:
        if targets is None and length is None:
            raise ValueError(f"length or targets must say how many steps to write in the mode {self.mode!r}")
        steps = length if length is not None else targets.shape[1] if targets is not None else 0
        check_integer("length", steps, at_least=1)
        if targets is not None and targets.shape != (batch, steps, self.output_size):
            wanted = (batch, steps, self.output_size)
            raise ValueError(f"targets must have the shape {wanted}, got {tuple(targets.shape)}")
        return steps

    def _write(
        self, writer: RecurrentModule, first: Tensor, state: State | None, targets: Tensor | None, steps: int
    ) -> tuple[Tensor, State]:
        """Write: the first input, then the outputs or targets one step ago."""
        assert self.feedback is not None
        if first.ndim != 2:
            raise ValueError(
                f"x must be (batch, {writer.input_size}) in the mode 'one_to_many', got {tuple(first.shape)}"
            )
        if targets is not None:  # all inputs are known: one run
            inputs = torch.cat((first.unsqueeze(1), self.feedback(targets[:, :-1])), dim=1)
            hidden, after = writer(self.dropout(inputs), state)
            return self.readout(hidden), after
        outputs = []
        for _ in range(steps):
            hidden, state = writer.step(self.dropout(first), state)
            outputs.append(self.readout(hidden))
            first = self.feedback(outputs[-1])
        assert state is not None
        return torch.stack(outputs, dim=1), state
