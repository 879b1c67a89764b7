"""The networks that the method combines: input convex ones without a bound of gain, and Lipschitz ones."""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_number
from provenn.nn._iclrnn_base import check_features, check_sizes, expand, readout, relu_recurrence


class _ConvexLayer(nn.Module):
    """One layer of :class:`ICRNN`."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.W, self.D2, self.D3 = (nn.Parameter(torch.empty(hidden_size, input_size)) for _ in range(3))
        self.U, self.D1, self.V = (nn.Parameter(torch.empty(hidden_size, hidden_size)) for _ in range(3))
        for weight in self.parameters():
            nn.init.uniform_(weight, -0.05, 0.05)

    def forward(self, x: Float[Tensor, "batch time features"]) -> Float[Tensor, "batch time hidden"]:
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        h = relu_recurrence(F.linear(x, self.W) + F.linear(before, self.D2), self.U)
        h_before = F.pad(h, (0, 0, 1, 0))[:, :-1]
        return (F.linear(h, self.V) + F.linear(h_before, self.D1) + F.linear(x, self.D3)).relu()


class ICRNN(nn.Module):
    """Input convex recurrent layers: non-negative weights with shortcuts, and no bound of the gain.

    A layer is h_t = ReLU(W x̂_t + U h_{t−1} + D₂ x̂_{t−1}), y_t = ReLU(V h_t + D₁ h_{t−1} + D₃ x̂_t), all matrices ≥ 0,
    and nothing before the first step. The readout, if any, is ReLU(V h + c) with V ≥ 0. As in
    :class:`~provenn.nn.ICLRNN`, :meth:`project_` belongs behind every step of the optimizer.

    Args:
        input_size: Features of an input, before the expansion.
        hidden_size: Hidden units, and outputs, of each layer; ``None`` is ``input_size``.
        num_layers: Layers on top of one another.
        output_size: Features of an output; ``None`` returns the last layer's outputs.
        expand_input: Whether to append −x.

    Shape:
        x (batch, time, input_size) to (batch, time, output_size or hidden_size).

    Raises:
        TypeError: A size is no integer.
        ValueError: A size < 1.

    Cost: six matrix products a layer, one of them step by step.

    Source: Chen, Shi & Zhang, "Optimal control via neural networks: a convex approach", ICLR 2019, in the form of the
    baseline of arXiv 2401.07494; weights start uniform in ±0.05, without biases in the layers, as in its code.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int | None = None,
        num_layers: int = 2,
        output_size: int | None = None,
        expand_input: bool = True,
    ) -> None:
        hidden_size = input_size if hidden_size is None else hidden_size
        check_sizes(input_size, hidden_size, num_layers, output_size)
        super().__init__()
        self.input_size, self.hidden_size, self.expand_input = input_size, hidden_size, expand_input
        sizes = [2 * input_size if expand_input else input_size, *[hidden_size] * num_layers]
        self.layers = nn.ModuleList(_ConvexLayer(a, b) for a, b in pairwise(sizes))
        self.readout = readout(hidden_size, output_size)
        self.project_()

    @torch.no_grad()
    def project_(self) -> None:
        """Set negative weights to zero; the readout's bias is free."""
        for weight in (*self.layers.parameters(), *([] if self.readout is None else [self.readout.weight])):
            weight.clamp_(min=0)

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
        for layer in self.layers:
            h = layer(h)
        return h if self.readout is None else self.readout(h).relu()


class _LipschitzLayer(nn.Module):
    """One layer of :class:`LipschitzRNN`."""

    def __init__(self, input_size: int, hidden_size: int, beta: float, gamma: float, step: float) -> None:
        super().__init__()
        self.beta, self.gamma, self.step = beta, gamma, step
        self.M_A, self.M_W = (nn.Parameter(torch.empty(hidden_size, hidden_size)) for _ in range(2))
        self.U, self.b = nn.Parameter(torch.empty(hidden_size, input_size)), nn.Parameter(torch.zeros(hidden_size))
        for weight in (self.M_A, self.M_W, self.U):
            nn.init.normal_(weight, std=0.05)

    def symmetric_skew(self, M: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        eye = torch.eye(len(M), dtype=M.dtype, device=M.device)
        return self.beta * (M - M.mT) + (1 - self.beta) * (M + M.mT) - self.gamma * eye

    def forward(self, x: Float[Tensor, "batch time features"]) -> Float[Tensor, "batch time hidden"]:
        both = torch.cat((self.symmetric_skew(self.M_A), self.symmetric_skew(self.M_W)))
        first, *rest = F.linear(x, self.U, self.b).unbind(1)
        h = self.step * first.tanh()
        states = [h]
        for p in rest:
            linear, inside = F.linear(h, both).chunk(2, -1)
            h = h + self.step * (linear + (inside + p).tanh())
            states.append(h)
        return torch.stack(states, 1)


class LipschitzRNN(nn.Module):
    """Recurrent layers that step an equation h' = A h + tanh(W h + U x + b), whose A and W bound its growth.

    h_t = h_{t−1} + ε (A h_{t−1} + tanh(W h_{t−1} + U x_t + b)), with A and W each β (M − Mᵀ) + (1 − β)(M + Mᵀ) − γ I of
    a free matrix M. The readout, if any, is linear.

    Args:
        input_size: Features of an input.
        hidden_size: Hidden units of each layer; ``None`` is ``input_size``.
        num_layers: Layers on top of one another.
        output_size: Features of an output; ``None`` returns the last layer's states.
        beta: Share of the skew part, in [0, 1].
        gamma: Damping, ≥ 0.
        step: Length ε > 0 of an Euler step.

    Shape:
        x (batch, time, input_size) to (batch, time, output_size or hidden_size).

    Raises:
        TypeError: A size is no integer, another argument no number.
        ValueError: A size < 1, or another argument out of its range.

    Cost: two products (batch, hidden) by (hidden, hidden) a step, in one.

    Source: Erichson, Azencot, Queiruga, Hodgkinson & Mahoney, "Lipschitz recurrent neural networks", ICLR 2021; β, γ, ε
    and weights from N(0, 0.05²) as in the baseline of arXiv 2401.07494.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int | None = None,
        num_layers: int = 2,
        output_size: int | None = None,
        beta: float = 0.8,
        gamma: float = 0.01,
        step: float = 0.01,
    ) -> None:
        hidden_size = input_size if hidden_size is None else hidden_size
        check_sizes(input_size, hidden_size, num_layers, output_size)
        check_number("beta", beta, at_least=0, at_most=1)
        check_number("gamma", gamma, at_least=0)
        check_number("step", step, above=0)
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        sizes = [input_size, *[hidden_size] * num_layers]
        self.layers = nn.ModuleList(_LipschitzLayer(a, b, beta, gamma, step) for a, b in pairwise(sizes))
        self.readout = readout(hidden_size, output_size)

    def project_(self) -> None:
        """Do nothing: A and W keep their form by construction. Here for loops that project every model."""

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
        h = x
        for layer in self.layers:
            h = layer(h)
        return h if self.readout is None else self.readout(h)
