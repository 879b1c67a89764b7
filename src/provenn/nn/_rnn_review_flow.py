"""How an error fades or grows on its way back through time.

Source: the survey, arXiv 1506.00019, and what the parts name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from provenn.core.experiment.reports import Report
from provenn.nn._rnn_review_gradients import Recurrent, cell_of, state_gradients, unrolled


@dataclass(frozen=True)
class GradientFlow(Report):
    """The size of an error at every step, and how it changes with the lag.

    Args:
        norms: ‖∂L_T/∂h_t‖ for t = 1 … T, h the whole state; the mean over the samples.
        components: The same of each tensor of the state, by name.
        spectral_radius: Of each square recurrent matrix, by name: U of an Elman network, those of an LSTM's gates.
        rate: By what factor the norm changes a step back, fitted to all steps with a norm that is not 0.
    """

    norms: tuple[float, ...]
    components: dict[str, tuple[float, ...]]
    spectral_radius: dict[str, float]
    rate: float

    def plot(self) -> Figure:
        """Draw the norms against the lag, on a logarithmic scale."""
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes = figure.subplots()
        lags = range(len(self.norms) - 1, -1, -1)
        axes.semilogy(lags, self.norms, label="state")
        if len(self.components) > 1:
            for name, norms in self.components.items():
                axes.semilogy(lags, norms, "--", label=name)
        axes.set(xlabel="steps back", ylabel="‖∂L/∂h‖", title=f"× {self.rate:.3g} a step")
        axes.legend()
        return figure


@torch.enable_grad()
def gradient_flow(
    model: Recurrent,
    x: Float[Tensor, "batch time input"],
    loss: Callable[[Tensor], Tensor] | None = None,
) -> GradientFlow:
    """Measure how large the gradient of a loss at the last step is at every step before.

    A copy of the model is run in evaluation mode and in float64, where 200 factors of a half do not underflow.

    Args:
        model: A recurrent module, or a :class:`SequenceModel` of one that goes step by step.
        x: The inputs.
        loss: Maps the outputs of the last step to L_T, a scalar; ``None``: their sum.

    Shape: ``x`` (B, T, d); ``loss`` is called with (B, outputs).

    Returns:
        The norms at every step, the spectral radii of the recurrent matrices, and the fitted rate a step.

    Raises:
        ValueError: ``x`` does not fit the model, or the model does not go step by step.
        TypeError: ``model`` is not recurrent.

    Cost: one run step by step with its way back, in float64; O(n³) for the radii.

    Source: section 2.4 of the survey, on vanishing and exploding gradients.
    """
    cell_of(model)
    twin = copy.deepcopy(model).double().eval()
    run = unrolled(twin, x.detach().double())
    last = run.outputs[-1]
    gradients = state_gradients(last.sum() if loss is None else loss(last), run.states[1:])
    cell, _ = cell_of(twin)
    parts = zip(cell.state_names, zip(*gradients, strict=True), strict=True)
    squares = {name: torch.stack(steps).flatten(2).square().sum(-1) for name, steps in parts}
    norms = _means(torch.stack(list(squares.values())).sum(0))
    return GradientFlow(
        norms,
        {name: _means(one) for name, one in squares.items()},
        {name: _radius(matrix) for name, matrix in cell.recurrent_matrices().items()},
        _rate(norms),
    )


def _means(squares: Tensor) -> tuple[float, ...]:
    return tuple(squares.detach().sqrt().mean(dim=1).tolist())


def _radius(matrix: Tensor) -> float:
    return torch.linalg.eigvals(matrix.detach()).abs().max().item()


def _rate(norms: tuple[float, ...]) -> float:
    lags = np.arange(len(norms))[::-1]
    sizes = np.array(norms)
    seen = np.isfinite(sizes) & (sizes > 0)
    if seen.sum() < 2:
        return math.nan
    return float(np.exp(np.polyfit(lags[seen], np.log(sizes[seen]), 1)[0]))
