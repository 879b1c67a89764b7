"""The neural Turing machine: a controller with a memory that it addresses by content and by place."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer
from provenn.nn._rnn_review_base import State, SteppedModule, Weights
from provenn.nn._rnn_review_gated import PeepholeLSTM

START = 1e-6
"""What memory holds before anything is written."""

_TINY = 1e-12


def address(
    memory: Float[Tensor, "batch slots width"],
    previous: Float[Tensor, "batch heads slots"],
    key: Float[Tensor, "batch heads width"],
    strength: Float[Tensor, "batch heads 1"],
    gate: Float[Tensor, "batch heads 1"],
    shift: Float[Tensor, "batch heads 3"],
    sharpening: Float[Tensor, "batch heads 1"],
) -> Float[Tensor, "batch heads slots"]:
    r"""Compute where heads look: by content, then by place.

    .. math::
        w^c = \mathrm{softmax}(\beta \cos(k, M_i)), \quad w^g = g w^c + (1 - g) w_{t-1}, \quad
        \tilde w_i = \textstyle\sum_j w^g_{i-j} s_j, \quad w \propto \tilde w^\gamma

    Args:
        memory: M.
        previous: The weights one step ago.
        key: k.
        strength: β ≥ 0.
        gate: g in [0, 1]: 1 for content alone, 0 for the place of the step before.
        shift: s over shifts by −1, 0 and 1; it sums to 1.
        sharpening: γ ≥ 1.

    Returns:
        The weights: non-negative, and 1 together.

    Source: Graves et al., arXiv 1410.5401, equations 5 to 9.
    """
    norms = key.norm(dim=-1, keepdim=True) * memory.norm(dim=-1).unsqueeze(1)
    content = torch.softmax(strength * (key @ memory.mT) / (norms + _TINY), dim=-1)
    gated = previous + gate * (content - previous)
    back, stay, ahead = shift.split(1, dim=-1)
    moved = back * gated.roll(-1, -1) + stay * gated + ahead * gated.roll(1, -1)
    # Powers of the ratio to the largest weight: w^γ itself underflows where γ is large.
    sharp = (moved / moved.amax(dim=-1, keepdim=True)).clamp(min=_TINY) ** sharpening
    return sharp / sharp.sum(dim=-1, keepdim=True)


def write(
    memory: Float[Tensor, "batch slots width"],
    weights: Float[Tensor, "batch heads slots"],
    erase: Float[Tensor, "batch heads width"],
    add: Float[Tensor, "batch heads width"],
) -> Float[Tensor, "batch slots width"]:
    """Return M ⊙ ∏(1 − w eᵀ) + Σ w aᵀ: all heads erase, then all add.

    Args:
        memory: M.
        weights: w of each write head.
        erase: e in [0, 1].
        add: a.

    Returns:
        The next memory.

    Source: Graves et al., arXiv 1410.5401, equations 3 and 4.
    """
    kept = 1 - weights.unsqueeze(-1) * erase.unsqueeze(-2)
    kept = kept.squeeze(1) if kept.shape[1] == 1 else kept.prod(dim=1)
    return torch.baddbmm(memory * kept, weights.mT, add)


class NTMCell(SteppedModule):
    r"""Neural Turing machine: a controller that reads and writes a memory matrix through attention.

    At each step the controller sees the input and what was read one step ago; its heads address the memory
    (:func:`~provenn.nn._rnn_review_ntm.address`); write heads erase and add, read heads then return :math:`w^\top M`;
    the output is linear in controller and reads. Controller and reads start from zeros, all heads at slot 0, and every
    entry of memory from 10⁻⁶.

    Args:
        input_size: Features of an input.
        output_size: Features of an output.
        hidden_size: Units of the controller.
        slots: N, rows of memory.
        width: Features of a row.
        read_heads: Heads that read.
        write_heads: Heads that write.
        controller: ``"feedforward"`` (one layer of tanh) or ``"lstm"``.

    Shape:
        ``x`` (B, T, input), ``mask`` (B, T) → (B, T, output), and the state: memory (B, N, width), weights
        (B, read + write heads, N), reads (B, read heads · width), then the controller's (B, hidden): its output, and
        with an LSTM its cells.

    Raises:
        ValueError: A size is below 1, ``slots`` below 3, ``controller`` is unknown; a sequence ``x`` is empty or of
            another size, or ``state`` or ``mask`` do not fit it.
        TypeError: A size is no integer, or ``mask`` is not boolean.

    Cost: O(heads · N · width) time a step and sample beside the controller's; training keeps every step's memory.

    Source: section 4.3 of the survey; Graves et al., arXiv 1410.5401. The start of memory: Collier & Beel, arXiv
    1807.08518.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        hidden_size: int = 64,
        slots: int = 32,
        width: int = 16,
        *,
        read_heads: int = 1,
        write_heads: int = 1,
        controller: Literal["feedforward", "lstm"] = "feedforward",
    ) -> None:
        check_choice("controller", controller, ("feedforward", "lstm"))
        super().__init__(input_size, hidden_size, output_size)
        check_integer("slots", slots, at_least=3)
        for name, value in (("width", width), ("read_heads", read_heads), ("write_heads", write_heads)):
            check_integer(name, value, at_least=1)
        self.slots, self.width = slots, width
        self.read_heads, self.write_heads, self.heads = read_heads, write_heads, read_heads + write_heads
        self.input_proj = nn.Linear(input_size, hidden_size) if controller == "feedforward" else None
        self.read_proj = nn.Linear(read_heads * width, hidden_size, bias=False) if controller == "feedforward" else None
        self.lstm = (
            PeepholeLSTM(input_size + read_heads * width, hidden_size, peepholes=False)
            if controller == "lstm"
            else None
        )
        # Of every head: key, strength, gate, shift, sharpening; of the write heads also erase and add.
        self.addressing = width + 6
        self.head_proj = nn.Linear(hidden_size, self.heads * self.addressing + write_heads * 2 * width)
        self.out_proj = nn.Linear(hidden_size + read_heads * width, output_size)
        nn.init.xavier_uniform_(self.head_proj.weight)
        nn.init.normal_(self.head_proj.bias, std=0.01)

    @property
    def state_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("memory", "weights", "reads", "h", *(("s",) if self.lstm is not None else ()))

    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        shapes: tuple[tuple[int, ...], ...] = (
            (self.slots, self.width),
            (self.heads, self.slots),
            (self.read_heads * self.width,),
            (self.hidden_size,),
        )
        return shapes if self.lstm is None else (*shapes, (self.hidden_size,))

    def initial_state(self, batch: int, like: Tensor) -> State:
        memory, weights, *others = super().initial_state(batch, like)
        at_first = torch.arange(self.slots, device=like.device) == 0
        return memory + START, weights + at_first.to(weights), *others

    def loop_weights(self) -> Weights:
        return () if self.lstm is None else self.lstm.loop_weights()

    def project(self, x: Tensor) -> Tensor:
        if self.lstm is None:
            assert self.input_proj is not None
            return self.input_proj(x)  # type: ignore[no-any-return]
        return nn.functional.linear(x, self.lstm.weight_ih[:, : self.input_size], self.lstm.bias)

    def advance(self, projected: Tensor, state: State, weights: Weights) -> tuple[Tensor, State]:
        memory, previous, reads, *controller = state
        after = self._control(projected, reads, tuple(controller), weights)
        looking, erase, add = self._heads(after[0], memory, previous)
        memory = write(memory, looking[:, self.read_heads :], erase, add)
        reads = (looking[:, : self.read_heads] @ memory).flatten(1)
        return torch.cat((after[0], reads), dim=1), (memory, looking, reads, *after)

    def _control(self, projected: Tensor, reads: Tensor, controller: State, weights: Weights) -> State:
        if self.lstm is None:
            assert self.read_proj is not None
            return (torch.tanh(projected + self.read_proj(reads)),)
        seen = torch.addmm(projected, reads, self.lstm.weight_ih[:, self.input_size :].t())
        return self.lstm.advance(seen, controller, weights)[1]

    def _heads(self, h: Tensor, memory: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raw = self.head_proj(h)
        places, changes = raw.split((self.heads * self.addressing, 2 * self.write_heads * self.width), dim=1)
        key, scales, gate, shift = places.unflatten(1, (self.heads, -1)).split((self.width, 2, 1, 3), dim=-1)
        strength, sharpening = nn.functional.softplus(scales).split(1, dim=-1)
        weights = address(
            memory, previous, torch.tanh(key), strength, torch.sigmoid(gate), shift.softmax(-1), 1 + sharpening
        )
        erase, add = changes.unflatten(1, (self.write_heads, -1)).split(self.width, dim=-1)
        return weights, torch.sigmoid(erase), add

    def readout(self, hidden: Tensor) -> Tensor:
        return self.out_proj(hidden)  # type: ignore[no-any-return]

    def features(self, state: State) -> Tensor:
        return self.readout(torch.cat((state[3], state[2]), dim=1))

    def recurrent_matrices(self) -> dict[str, Tensor]:
        return {} if self.lstm is None else self.lstm.recurrent_matrices()
