"""Log-likelihood of the APGW regression, with gradient and Hessian in closed form.

A row's contribution depends on the covariates only through four numbers: a = log φ, b = log λ, c = log γ and
ν = log(κ+1). With w = γ(a + log t), s = log(1 + e^{w−ν}) and κ = e^ν − 1,

    H = e^b G,   G = e^ν (e^{κs} − 1)/κ,   log h = b + c − log t + q,   q = log ∂G/∂w = w + (κ − 1)s,

so the derivatives by (a, b, c, ν) are elementwise in the rows, and products with the design matrix give those by the
coefficients.

Source: arXiv 1901.03212, section 3; the derivatives are worked out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.stats._flexible_survival_distribution import exponential_quotients

NAMES = ("phi", "lam", "gamma", "kappa")
"""The distribution's parameters, in the order of the coefficients."""


class Rows(NamedTuple):
    """What the likelihood sums over.

    An entry time E > 0 is a row of its own, at time E without event and with sign −1: it gives H(E) back.

    Args:
        design: (rows, 1 + features): a column of ones, then the covariates.
        log_time: (rows,).
        event: (rows,), 1 or 0.
        sign: (rows,), 1 or −1.
    """

    design: Tensor
    log_time: Tensor
    event: Tensor
    sign: Tensor


class Likelihood:
    """The log-likelihood as a function of all free coefficients θ.

    Args:
        rows: The data.
        widths: For each parameter how many columns of the design its linear predictor has: 0 if it is fixed, 1 for an
            intercept, all with covariates.
        fixed: The value of the linear predictor of each fixed parameter; default 0.
        l2: Strength of a penalty ½·l2·‖·‖² on all coefficients but intercepts.

    Cost: O(rows · k) time for value and gradient, O(rows · k²) with the Hessian, for k coefficients.
    """

    def __init__(
        self, rows: Rows, widths: Mapping[str, int], fixed: Mapping[str, float] | None = None, l2: float = 0.0
    ) -> None:
        self.rows = rows
        self.widths = [widths[name] for name in NAMES]
        self.fixed = [(fixed or {}).get(name, 0.0) for name in NAMES]
        columns = [(place, column) for place, width in enumerate(self.widths) for column in range(width)]
        self._place = torch.tensor([place for place, _ in columns])
        self._column = torch.tensor([column for _, column in columns])
        self._free = [place for place, width in enumerate(self.widths) if width]
        self.penalty = l2 * (self._column > 0).to(rows.design.dtype)

    @property
    def size(self) -> int:
        """The number of free coefficients."""
        return len(self._place)

    def predictors(self, theta: Float[Tensor, " size"]) -> list[Tensor]:
        """Return a, b, c, ν: each (rows,), or a scalar where no covariate has an effect on it."""
        found = []
        for width, value, own in zip(self.widths, self.fixed, theta.split(self.widths), strict=True):
            if width > 1:
                found.append(self.rows.design[:, :width] @ own)
            else:
                found.append(own[0] if width else theta.new_tensor(value))
        return found

    def value(self, theta: Float[Tensor, " size"]) -> Tensor:
        """Return the penalised log-likelihood alone; autograd can differentiate it."""
        a, b, c, nu = self.predictors(theta)
        w = c.exp() * (a + self.rows.log_time)
        kappa = torch.expm1(nu)
        s = torch.logaddexp(w - nu, torch.zeros_like(w))
        cumulative = (b + nu).exp() * s * exponential_quotients(kappa * s).value
        log_hazard = b + c - self.rows.log_time + w + (kappa - 1) * s
        total = self.rows.event @ log_hazard - self.rows.sign @ cumulative
        return total - (self.penalty * theta**2).sum() / 2

    def derivatives(
        self, theta: Float[Tensor, " size"], hessian: bool = True
    ) -> tuple[Tensor, Float[Tensor, " size"], Float[Tensor, "size size"] | None]:
        """Return the penalised log-likelihood, its gradient, and its Hessian if asked for."""
        a, b, c, nu = self.predictors(theta)
        value, first, second = _row_derivatives(self.rows, a, b, c, nu, hessian)
        design = self.rows.design
        gradient = (torch.stack(first) @ design)[self._place, self._column] - self.penalty * theta
        value = value - (self.penalty * theta**2).sum() / 2
        if second is None:
            return value, gradient, None
        matrix = theta.new_zeros(self.size, self.size)
        for one in self._free:
            for other in self._free:
                weight = second[min(one, other), max(one, other)]
                left, right = self.widths[one], self.widths[other]
                block = (design[:, :left] * weight[:, None]).T @ design[:, :right]
                at, to = sum(self.widths[:one]), sum(self.widths[:other])
                matrix[at : at + left, to : to + right] = block
        return value, gradient, matrix - torch.diag(self.penalty)


Second = dict[tuple[int, int], Tensor]


def _row_derivatives(
    rows: Rows, a: Tensor, b: Tensor, c: Tensor, nu: Tensor, hessian: bool
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor], Second | None]:
    """Return the sum of the rows' log-likelihoods, and each row's derivatives by a, b, c and ν."""
    event, sign = rows.event, rows.sign
    gamma, grown = c.exp(), nu.exp()  # grown = κ + 1
    kappa = torch.expm1(nu)
    w = gamma * (a + rows.log_time)
    x = w - nu
    s, p = torch.logaddexp(x, torch.zeros_like(x)), x.sigmoid()
    quotient = exponential_quotients(kappa * s)
    signed_scale = sign * (b + nu).exp()
    power = quotient.exponential
    # E(κ, s) = (e^{κs} − 1)/κ; G = e^ν E.
    e, e_k = s * quotient.value, s * s * quotient.first
    hazard_total = signed_scale * e
    hazard_w = signed_scale * p * power
    hazard_nu = signed_scale * (e + grown * e_k - p * power)
    value = event @ (b + c - rows.log_time + w + (kappa - 1) * s) - hazard_total.sum()
    q_w, q_nu = 1 + (kappa - 1) * p, grown * s - (kappa - 1) * p
    of_w, of_nu = event * q_w - hazard_w, event * q_nu - hazard_nu
    first = (gamma * of_w, event - hazard_total, event + w * of_w, of_nu)
    if not hessian:
        return value, first, None
    r = p * (1 - p)
    of_ww = event * (kappa - 1) * r - hazard_w * q_w
    of_wn = event * (grown * p - (kappa - 1) * r) - hazard_w * q_nu
    e_kk = s * s * s * quotient.second
    drift = 2 * grown * e_k - p * power + grown * (grown * e_kk - p * s * power)
    drift = drift + power * (r - p * (grown * s - kappa * p))
    of_nn = event * (grown * (s - 2 * p) + (kappa - 1) * r) - hazard_nu - signed_scale * drift
    second = {
        (0, 0): gamma * gamma * of_ww,
        (0, 1): -gamma * hazard_w,
        (0, 2): gamma * (of_w + w * of_ww),
        (0, 3): gamma * of_wn,
        (1, 1): -hazard_total,
        (1, 2): -w * hazard_w,
        (1, 3): -hazard_nu,
        (2, 2): w * (of_w + w * of_ww),
        (2, 3): w * of_wn,
        (3, 3): of_nn,
    }
    return value, first, second
