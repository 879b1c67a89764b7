"""Optimistic mirror descent against moving comparators: learners on a grid of step sizes under optimistic Hedge."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.optimizer import ParamsT

from provenn.core.experiment.checks import check_integer, check_number
from provenn.optim._optimistic_omd_base import OnlineOptimizer
from provenn.optim._optimistic_omd_domains import Domain

_FIRST_HORIZON = 64


class DynamicOptimisticOMD(OnlineOptimizer):
    r"""A mixture of two-step learners of constant step sizes, for comparators that move.

    Learner i takes the two steps of :class:`OptimisticOMD` with η_i on the loss linearised at the mixture, and the
    mixture x_t = Σ p_{t,i} x_{t,i} is played, so that one gradient a round serves all:

    .. math::
        \eta_i = \min\{1/(8L),\ 2^{i-1}\sqrt{D^2/(8G^2T)}\}, \quad i = 1 \ldots N, \quad
        N = \lceil \tfrac12 \log_2 (G^2T / (8L^2D^2)) \rceil + 1

        p_{t+1,i} \propto \exp\bigl(-\varepsilon_t (\textstyle\sum_{s \le t} \ell_{s,i} + m_{t+1,i})\bigr), \quad
        \ell_{t,i} = \langle g_t, x_{t,i}\rangle + 2L \|x_{t,i} - x_{t-1,i}\|^2, \quad
        m_{t+1,i} = \langle g_t, x_{t+1,i}\rangle + 2L \|x_{t+1,i} - x_{t,i}\|^2

    with ε_t = min{1/(8D²L), √(log N / (D² (4G² + V_t)))} and V_t = Σ_{s≤t} ‖g_s − g_{s−1}‖². Against comparators of
    path length P_T the expected regret is O(√(1 + P_T) (√σ²_{1:T} + √Σ²_{1:T}) + P_T).

    Args:
        params: Parameters or groups of them, of one real floating-point type on one device.
        domain: 𝒳; ``None``: all of ℝ^d.
        horizon: T. ``None``: T = 64, and twice that whenever it is over: then the learners start anew from the
            mixture. Beyond a given horizon the grid stays as it is.
        diameter: D; ``None``: the domain's.
        lipschitz: G; needed, since the grid depends on it.
        smoothness: L. With 0 the grid ends where a step crosses the domain, at D/G.
        strict: Whether a gradient beyond ``lipschitz`` raises. Otherwise it warns, once, and counts as G in ε.

    Shape:
        Parameters of any shape; a simplex takes a single tensor.

    Raises:
        ValueError: An option out of bounds, no ``lipschitz``, no ``diameter`` where the domain has none, or a domain
            of another size.
        TypeError: An option of the wrong type, parameters that are complex or differ in type, or a simplex over
            several tensors.
        RuntimeError: A gradient is sparse.

    Cost: the learners are the rows of one tensor: a step is two projections of N = O(log T) rows and a few passes,
    O(Nd); state 2Nd numbers.

    Source: arXiv 2302.04552, the section on dynamic regret. The constants of ε are as they are known second-hand; 4G²
    is added to V there, so that ε is finite from the first round on.
    """

    points = ("carried", "bases")
    directions = ("guess",)
    attributes = (*OnlineOptimizer.attributes, "horizon", "smoothness")

    def __init__(
        self,
        params: ParamsT,
        domain: Domain | None = None,
        horizon: int | None = None,
        diameter: float | None = None,
        lipschitz: float | None = None,
        smoothness: float = 0.0,
        strict: bool = False,
    ) -> None:
        if horizon is not None:
            check_integer("horizon", horizon, at_least=1)
        check_number("smoothness", smoothness, at_least=0)
        if lipschitz is None:
            raise ValueError("lipschitz must be given: the grid of step sizes depends on it, got None")
        if domain is None and diameter is None:
            raise ValueError("diameter must be given where there is no domain, got None")
        self.horizon, self.smoothness = horizon, smoothness
        super().__init__(params, domain, diameter, lipschitz, strict)

    def _begin(self, start: Tensor) -> dict[str, Any]:
        return {"guess": torch.zeros_like(start), **self._epoch(start, self.horizon or _FIRST_HORIZON)}

    def _epoch(self, start: Tensor, length: int) -> dict[str, Any]:
        """Return the state of learners that start together for a number of rounds."""
        rates = torch.tensor(self._grid(length), dtype=start.dtype, device=start.device)
        rows = start.expand(len(rates), -1)
        return {
            "variation": 0.0,
            "length": length,
            "left": length,
            "rates": rates,
            "carried": rows.clone(),
            "bases": rows.clone(),
            "moved": torch.zeros_like(rates),
            "losses": torch.zeros_like(rates),
            "weights": torch.full_like(rates, 1 / len(rates)),
        }

    def _grid(self, length: int) -> list[float]:
        """Return the step sizes for a horizon."""
        D, G = float(self.diameter or 0.0), float(self.lipschitz or 0.0)
        least = D / math.sqrt(8 * G * G * length)
        largest = 1 / (8 * self.smoothness) if self.smoothness else D / G
        count = max(1, math.ceil(math.log2(largest / least) - 1e-9) + 1)
        return [min(largest, least * 2**place) for place in range(count)]

    @property
    def rates(self) -> Float[Tensor, " learners"]:
        """The learners' step sizes η_i."""
        rates: Tensor = self.held["rates"]
        return rates.clone()

    @property
    def weights(self) -> Float[Tensor, " learners"]:
        """The weights p of the point that is played now."""
        weights: Tensor = self.held["weights"]
        return weights.clone()

    def _projected(self, rows: Tensor) -> Tensor:
        return rows if self.domain is None else self.domain.project(rows)

    def _advance(self, gradient: Tensor) -> Tensor:
        held = self.held
        square, wrong = torch.stack([gradient, gradient - held["guess"]]).square().sum(-1).tolist()
        self._meet(math.sqrt(square))
        held["steps"] += 1
        held["variation"] += wrong
        held["guess"] = gradient
        played, penalty = held["bases"], 2 * self.smoothness
        held["losses"] = torch.add(held["losses"], played @ gradient).add_(held["moved"], alpha=penalty)
        step = held["rates"].unsqueeze(1) * gradient
        held["carried"] = self._projected(held["carried"] - step)
        held["bases"] = self._projected(held["carried"] - step)
        held["moved"] = (held["bases"] - played).square().sum(-1)
        guessed = torch.add(held["bases"] @ gradient, held["moved"], alpha=penalty)
        held["weights"] = torch.softmax(-self._epsilon() * (held["losses"] + guessed), dim=0)
        mixture: Tensor = held["weights"] @ held["bases"]
        held["left"] -= 1
        if held["left"] == 0 and self.horizon is None:
            held.update(self._epoch(mixture, 2 * held["length"]))
        return mixture

    def _epsilon(self) -> float:
        held, D = self.held, float(self.diameter or 0.0)
        adaptive = math.sqrt(math.log(len(held["rates"])) / (D * D * (4 * self._bound() ** 2 + held["variation"])))
        return min(adaptive, 1 / (8 * D * D * self.smoothness)) if self.smoothness else adaptive
