"""The survey's networks against torch's layers, for numbers and speed, and its BLEU against sacrebleu."""

from __future__ import annotations

from functools import partial
from typing import Any

import sacrebleu
import torch
from torch import Tensor, nn

from benchmarks.timing import alternate
from provenn.nn import GRU, ElmanRNN, PeepholeLSTM, bleu

TWINS: dict[str, tuple[Any, Any]] = {
    "LSTM": (nn.LSTM, PeepholeLSTM),
    "GRU": (nn.GRU, GRU),
    "RNN": (nn.RNN, ElmanRNN),
}


def measure() -> dict[str, Any]:
    """Compare outputs and gradients in float32 by kernel and by our loop; then times at (32, 100, 64) → 128."""
    twins = {name: _twin(*kinds, features=64, hidden=128) for name, kinds in TWINS.items()}
    x = torch.randn(32, 100, 64, generator=torch.Generator().manual_seed(0))
    difference = max(_difference(theirs, ours, x[:, :30], mask) for theirs, ours in twins.values() for mask in (0, 1))
    scores = _bleu_difference()
    theirs, ours = twins["LSTM"]
    both = alternate(
        {
            "torch": partial(_train, theirs, x),
            "ours": partial(_train, ours, x),
            "loop": partial(_train, ours, x, _everywhere(x)),
            "peepholes": partial(_train, PeepholeLSTM(64, 128), x),
            "torch, cells": partial(_train_by_cells, _cell(theirs), x),
        },
        rounds=7,
    )
    forward = alternate(
        {
            "torch": partial(_run, theirs, x),
            "ours": partial(_run, ours, x),
            "loop": partial(_run, ours, x, _everywhere(x)),
            "torch, cells": partial(_run_by_cells, _cell(theirs), x),
        },
        rounds=7,
    )
    others = {
        name: alternate({"torch": partial(_train, twins[name][0], x), "ours": partial(_train, twins[name][1], x)}, 5)
        for name in ("GRU", "RNN")
    }
    longer = alternate({str(n): partial(_train, ours, x[:, :n], _everywhere(x[:, :n])) for n in (25, 100)}, rounds=5)
    return {
        "peer": f"torch {torch.__version__} (LSTM, GRU, RNN), sacrebleu {sacrebleu.__version__}",
        "agrees": difference <= 1e-4 and scores <= 1e-9,
        "largest_difference": difference,
        "largest_difference_of_bleu": scores,
        "speed_ratio": both["torch"] / both["ours"],
        "speed_ratio_forward": forward["torch"] / forward["ours"],
        "speed_ratio_gru": others["GRU"]["torch"] / others["GRU"]["ours"],
        "speed_ratio_rnn": others["RNN"]["torch"] / others["RNN"]["ours"],
        "speed_ratio_loop_with_a_mask": both["torch"] / both["loop"],
        "speed_ratio_loop_with_peepholes": both["torch"] / both["peepholes"],
        "speed_ratio_loop_forward": forward["torch"] / forward["loop"],
        "speed_ratio_loop_over_torch_cells": both["torch, cells"] / both["loop"],
        "speed_ratio_loop_over_torch_cells_forward": forward["torch, cells"] / forward["loop"],
        "growth": {"loop, steps ×4, time ×": longer["100"] / longer["25"]},
    }


def _twin(theirs: Any, ours: Any, features: int, hidden: int) -> tuple[nn.RNNBase, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = theirs(features, hidden, batch_first=True)
    return layer, ours.from_torch(layer)


def _everywhere(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


def _difference(theirs: nn.RNNBase, ours: nn.Module, x: Tensor, masked: int) -> float:
    """Of outputs and of the gradient by the inputs; with a mask ours runs its own loop."""
    found = []
    for module, more in ((theirs, ()), (ours, (None, _everywhere(x)) if masked else ())):
        inputs = x.clone().requires_grad_()
        outputs = module(inputs, *more)[0]
        found.append((outputs, torch.autograd.grad(outputs.square().mean() * 100, inputs)[0]))
    return max((one - other).abs().max().item() for one, other in zip(*found, strict=True))


def _train(module: nn.Module, x: Tensor, mask: Tensor | None = None) -> None:
    outputs = module(x)[0] if mask is None else module(x, None, mask)[0]
    torch.autograd.grad(outputs.square().sum(), list(module.parameters()))


@torch.no_grad()
def _run(module: nn.Module, x: Tensor, mask: Tensor | None = None) -> None:
    if mask is None:
        module(x)
    else:
        module(x, None, mask)


def _cell(layer: nn.RNNBase) -> nn.LSTMCell:
    cell = nn.LSTMCell(layer.input_size, layer.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    return cell


def _by_cells(cell: nn.LSTMCell, x: Tensor) -> Tensor:
    state = None
    outputs = []
    for one in x.unbind(1):
        state = cell(one, state)
        outputs.append(state[0])
    return torch.stack(outputs, dim=1)


def _train_by_cells(cell: nn.LSTMCell, x: Tensor) -> None:
    torch.autograd.grad(_by_cells(cell, x).square().sum(), list(cell.parameters()))


@torch.no_grad()
def _run_by_cells(cell: nn.LSTMCell, x: Tensor) -> None:
    _by_cells(cell, x)


def _bleu_difference() -> float:
    draws = torch.Generator().manual_seed(0)

    def sentence() -> list[str]:
        length = int(torch.randint(5, 20, (), generator=draws))
        return [f"w{token}" for token in torch.randint(4, (length,), generator=draws).tolist()]

    largest = 0.0
    for _ in range(20):
        candidates = [sentence() for _ in range(10)]
        references = [[sentence(), sentence()] for _ in candidates]
        streams = [[" ".join(row[place]) for row in references] for place in (0, 1)]
        theirs = sacrebleu.corpus_bleu(
            [" ".join(one) for one in candidates], streams, smooth_method="none", tokenize="none", force=True
        ).score
        largest = max(largest, abs(bleu(candidates, references) - theirs / 100))
    return largest
