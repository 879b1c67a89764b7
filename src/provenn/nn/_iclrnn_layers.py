"""The input convex Lipschitz cell, and layers of it over sequences."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.numerics.constraints import spectral_norm
from provenn.nn._iclrnn_base import (
    check_activation,
    check_features,
    check_sizes,
    expand,
    readout,
    relu_recurrence,
)
from provenn.nn._iclrnn_constraint import project_matrices_


class ICLRNNCell(nn.Module):
    """One step h_t = ReLU(W x_t + U h_{t−1} + b), with W and U non-negative and of spectral norm ``lip``.

    Each element of h_t is convex and non-decreasing in x_t and h_{t−1}. The weights satisfy the constraint from the
    start; after each step of an optimizer :meth:`project_` restores it::

        optimizer.register_step_post_hook(lambda *_: cell.project_())

    Args:
        input_size: Features of an input.
        hidden_size: Hidden units.
        lip: Spectral norm of both matrices.
        activation: ``"relu"``; any other is refused with what it would lose.

    Shape:
        x (batch, input_size), h (batch, hidden_size).

    Raises:
        TypeError: A size is no integer, or ``lip`` no number.
        ValueError: A size < 1, ``lip`` ≤ 0, or another activation.

    Cost: two matrix products a step.

    Source: Wang, Pravin & Wu, arXiv 2401.07494, equation of the cell; W ~ N(0, 0.01²), U orthogonal times 0.1 before
    the first projection, as in the authors' code.
    """

    def __init__(self, input_size: int, hidden_size: int, lip: float = 1.0, activation: str = "relu") -> None:
        check_sizes(input_size, hidden_size, 1, None)
        check_number("lip", lip, above=0)
        check_activation(activation)
        super().__init__()
        self.input_size, self.hidden_size, self.lip = input_size, hidden_size, lip
        self.W = nn.Parameter(torch.empty(hidden_size, input_size))
        self.U = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.b = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, and project them."""
        nn.init.normal_(self.W, std=0.01)
        nn.init.orthogonal_(self.U, gain=0.1)
        nn.init.zeros_(self.b)
        self.project_()

    def extra_repr(self) -> str:
        """Return the sizes and the norm."""
        return f"{self.input_size}, {self.hidden_size}, lip={self.lip}"

    def project_(self, generator: torch.Generator | None = None) -> None:
        """Put W and U back on the constraint; the bias is free.

        Args:
            generator: Draws the starts of the power iterations; ``None`` is torch's global one.
        """
        project_matrices_([self.W, self.U], self.lip, generator)

    def forward(
        self, x: Float[Tensor, "batch features"], h: Float[Tensor, "batch hidden"] | None = None
    ) -> Float[Tensor, "batch hidden"]:
        """Take one step.

        Args:
            x: The input.
            h: The state before; ``None`` is 0.

        Returns:
            The state after it.

        Raises:
            TypeError: No floating-point input.
            ValueError: An input of another size.
        """
        check_features("x", x, self.input_size, 2)
        projected = F.linear(x, self.W, self.b)
        if h is None:
            return projected.relu()
        check_features("h", h, self.hidden_size, 2)
        return (projected + F.linear(h, self.U)).relu()

    def unroll(self, x: Float[Tensor, "batch time features"]) -> Float[Tensor, "batch time hidden"]:
        """Return the states of all steps from the state 0, the inputs of all steps projected at once.

        Args:
            x: The inputs.

        Raises:
            TypeError: No floating-point input.
            ValueError: Inputs of another size.
        """
        check_features("x", x, self.input_size, 3)
        return relu_recurrence(F.linear(x, self.W, self.b), self.U)

    def sequence_gain(self, length: int) -> float:
        """Return a bound of ‖change of the states‖ / ‖change of the inputs‖, both norms over a sequence of this length.

        Args:
            length: Steps.

        Raises:
            ValueError: ``length`` < 1.

        Cost: an eigendecomposition of either weight and of a matrix (length, length).
        """
        return _norm(self.W) * _accumulation(length, _norm(self.U))


def _norm(weight: Tensor) -> float:
    return float(spectral_norm(weight.detach()))


def _accumulation(length: int, decay: float) -> float:
    """Return the norm of the lower triangular matrix of decay^(i−j): what a recurrence of that gain adds up to.

    For decay 1 it is 1 / (2 sin(π / (4 length + 2))).
    """
    check_integer("length", length, at_least=1)
    if decay == 1:
        return 1 / (2 * math.sin(math.pi / (4 * length + 2)))
    steps = torch.arange(length, dtype=torch.float64)
    powers = (torch.tensor(decay, dtype=torch.float64) ** (steps[:, None] - steps).clamp(min=0)).tril()
    return float(torch.linalg.matrix_norm(powers, ord=2))


class ICLRNN(nn.Module):
    """Recurrent layers whose outputs are convex in the whole sequence of inputs and of bounded gain.

    The input is expanded to [x; −x], without which the outputs could only increase with it; cells follow, and a readout
    y_t = ReLU(V h_t + c) if ``output_size`` is given. All matrices are non-negative and of spectral norm ``lip``, from
    the start and after each :meth:`project_`, which belongs behind every step of the optimizer::

        optimizer.register_step_post_hook(lambda *_: model.project_())

    ``lip=1`` bounds the gain of a step, not of a sequence: a recurrence of gain 1 adds up what it was given, see
    :meth:`sequence_gain`.

    Args:
        input_size: Features of an input, before the expansion.
        hidden_size: Hidden units of each layer; ``None`` is ``input_size``.
        num_layers: Cells on top of one another.
        output_size: Features of an output; ``None`` returns the last layer's states.
        lip: Spectral norm of every matrix.
        expand_input: Whether to append −x; ``False`` for inputs that are expanded already, or to keep the outputs
            non-decreasing in x.
        activation: ``"relu"``; any other is refused with what it would lose.

    Shape:
        x (batch, time, input_size) to (batch, time, output_size or hidden_size).

    Raises:
        TypeError: A size is no integer, ``lip`` no number.
        ValueError: A size < 1, ``lip`` ≤ 0, or another activation.

    Cost: the products of a ReLU network of the same sizes with twice the inputs; a projection is at most 20
    matrix-vector products for every matrix.

    Source: Wang, Pravin & Wu, arXiv 2401.07494, section on the architecture; two layers and a constrained readout with
    ReLU as in the authors' code.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int | None = None,
        num_layers: int = 2,
        output_size: int | None = None,
        lip: float = 1.0,
        expand_input: bool = True,
        activation: str = "relu",
    ) -> None:
        hidden_size = input_size if hidden_size is None else hidden_size
        check_sizes(input_size, hidden_size, num_layers, output_size)
        super().__init__()
        self.input_size, self.hidden_size, self.lip = input_size, hidden_size, lip
        self.expand_input = expand_input
        wide = 2 * input_size if expand_input else input_size
        sizes = [wide, *[hidden_size] * num_layers]
        self.cells = nn.ModuleList(ICLRNNCell(a, b, lip, activation) for a, b in pairwise(sizes))
        self.readout = readout(hidden_size, output_size)
        if self.readout is not None:
            project_matrices_([self.readout.weight], lip, None)

    def project_(self, generator: torch.Generator | None = None) -> None:
        """Put every matrix back on the constraint; biases are free.

        Args:
            generator: Draws the starts of the power iterations; ``None`` is torch's global one.
        """
        project_matrices_([weight for weight in self.parameters() if weight.ndim == 2], self.lip, generator)

    def forward(self, x: Float[Tensor, "batch time features"]) -> Float[Tensor, "batch time outputs"]:
        """Run over whole sequences.

        Args:
            x: The inputs.

        Returns:
            The outputs of all steps.

        Raises:
            TypeError: No floating-point input.
            ValueError: Inputs of another size.
        """
        check_features("x", x, self.input_size, 3)
        h = expand(x) if self.expand_input else x
        for cell in self.cells:
            h = cell.unroll(h)  # type: ignore[operator]
        return h if self.readout is None else self.readout(h).relu()

    def sequence_gain(self, length: int) -> float:
        """Return a bound of ‖change of the outputs‖ / ‖change of x‖, both norms over a sequence of this length.

        The layers' bounds multiply; the expansion adds the factor √2. With all norms 1 a layer's is
        1 / (2 sin(π / (4 length + 2))), about 0.64 length + 0.32.

        Args:
            length: Steps.

        Raises:
            ValueError: ``length`` < 1.

        Cost: an eigendecomposition of every weight and, a layer, of a matrix (length, length).
        """
        gain = math.sqrt(2) if self.expand_input else 1.0
        for cell in self.cells:
            gain *= cell.sequence_gain(length)  # type: ignore[operator]
        return gain if self.readout is None else gain * _norm(self.readout.weight)
