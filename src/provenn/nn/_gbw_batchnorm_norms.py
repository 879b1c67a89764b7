"""Batch normalisation of symmetric positive definite matrices: generalised Bures–Wasserstein, and its rivals."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.numerics.precision import full_precision
from provenn.core.numerics.spd import spd_log, spd_power, symmetric_exp
from provenn.nn._gbw_batchnorm_checks import check_channels, check_spd
from provenn.nn._gbw_batchnorm_geometry import check_theta
from provenn.nn._gbw_batchnorm_means import affine_geodesic, bures_geodesic, bures_mean, bures_variance, karcher_mean
from provenn.nn._gbw_batchnorm_spectral import (
    absolute,
    eigen_roots,
    kronecker_sum_power,
    semidefinite_power,
    symmetrized,
)

Batch = Float[Tensor, "batch channels n n"]


class _RiemannianBatchNorm(nn.Module, ABC):
    """What the normalisations share: parameters, running statistics and the checks of a call."""

    manifolds: ClassVar[dict[str, str]] = {"bias": "spd", "metric": "spd"}
    bias: Tensor
    scale: Tensor | None
    running_mean: Tensor
    running_var: Tensor | None

    def __init__(
        self,
        n: int,
        channels: int,
        momentum: float,
        eps: float,
        mean_iters: int,
        scaled: bool,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        check_integer("n", n, at_least=1)
        check_integer("channels", channels, at_least=1)
        check_number("momentum", momentum, at_least=0, at_most=1)
        check_number("eps", eps, above=0)
        check_integer("mean_iters", mean_iters, at_least=1)
        super().__init__()
        self.n, self.channels, self.momentum, self.eps, self.mean_iters = n, channels, momentum, eps, mean_iters
        identity = torch.eye(n, device=device, dtype=dtype).repeat(channels, 1, 1)
        ramp = 1e-7 * torch.arange(1, n + 1, device=device, dtype=dtype)
        self.bias = nn.Parameter(identity + torch.diag(ramp))
        self.register_buffer("running_mean", identity)
        ones = torch.ones(channels, device=device, dtype=dtype)
        self.scale = nn.Parameter(ones) if scaled else None
        self.register_buffer("running_var", ones.clone() if scaled else None)

    def forward(self, X: Batch) -> Batch:
        """Normalise a batch; in training by its own statistics, which also enter the running ones.

        Args:
            X: Symmetric positive definite matrices.

        Returns:
            Symmetric positive semidefinite matrices.
        """
        check_channels("X", X, self.channels, self.n, self.bias.dtype)
        check_spd("X", X)
        if self.training and X.shape[0] < 2:
            raise ValueError(f"X must hold at least two matrices a channel in training mode, got {X.shape[0]}")
        with full_precision(X.device):
            return symmetrized(self._normalized(X))

    @abstractmethod
    def _normalized(self, X: Tensor) -> Tensor:
        """Return the normalised batch; in training, record its statistics too."""

    def _factor(self, variance: Tensor) -> Tensor:
        """Return s / √(v + ε), one number a channel."""
        assert self.scale is not None
        return (self.scale / (variance + self.eps).sqrt())[:, None, None]

    @torch.no_grad()
    def _record(self, mean: Tensor, variance: Tensor | None) -> None:
        self.running_mean.copy_(mean)
        if variance is not None and self.running_var is not None:
            self.running_var.lerp_(variance, self.momentum)

    def _bures_wasserstein(self, X: Tensor, bias: Tensor, theta: float, var_about: str) -> Tensor:
        """Centre, scale and shift under the Bures–Wasserstein metric."""
        B = bures_mean(X.detach(), self.mean_iters) if self.training else self.running_mean
        root, inverse_root = eigen_roots(B)
        K = semidefinite_power(root @ X @ root, 0.5)
        if self.training:
            variance = bures_variance(X.detach(), B, K.detach(), var_about) / theta**2
            self._record(bures_geodesic(self.running_mean, B, self.momentum), variance)
        else:
            assert self.running_var is not None
            variance = self.running_var
        products = root @ K @ inverse_root
        eye = torch.eye(self.n, dtype=X.dtype, device=X.device)
        # log_I (I + V/2)² = 2 (|I + V/2| − I), and then the same of the scaled vector.
        centred = 0.5 * kronecker_sum_power(B, products + products.mT - 2 * B, -0.5)
        scaled = self._factor(variance) * (absolute(eye + centred) - eye)
        shift = absolute(eye + scaled) - eye
        # L of exp_G̃ is half the vector carried the other way: its factors are 1 / √(2 (λ_i + λ_j)) again.
        step = eye + kronecker_sum_power(bias, shift, -0.5)
        return step @ bias @ step

    def extra_repr(self) -> str:
        """Show the sizes and options."""
        return f"{self.n}, channels={self.channels}, momentum={self.momentum}, mean_iters={self.mean_iters}"


class GBWBatchNorm(_RiemannianBatchNorm):
    r"""Batch normalisation of SPD matrices under the generalised Bures–Wasserstein metric.

    With :math:`\tilde X = M^{-1/2} X^\theta M^{-1/2}`, :math:`\tilde G` likewise of the bias, :math:`B` the batch's
    barycentre, :math:`v` its Fréchet variance and :math:`\Gamma` the parallel transport:

    .. math::
        Y &= (I + V/2)^2, \quad V = \Gamma_{B \to I}(\log_B \tilde X) \\
        Z &= (I + W/2)^2, \quad W = \frac{s}{\sqrt{v + \epsilon}} \log_I Y, \quad \log_I Y = 2 (Y^{1/2} - I) \\
        \mathrm{out} &= \bigl(M^{1/2} \exp_{\tilde G}(\Gamma_{I \to \tilde G}(\log_I Z)) M^{1/2}\bigr)^{1/\theta}

    Mean and variance carry no gradient, as in the authors' code.

    Args:
        n: Size of the matrices.
        channels: Channels, each with statistics and parameters of its own.
        theta: θ ≠ 0, the power that deforms the metric.
        learn_metric: Whether M is a parameter; else it is I. With θ = 1 that is the plain Bures–Wasserstein metric.
        momentum: Weight of a batch in the running statistics; the mean moves along the geodesic.
        eps: ε, added to the variance.
        mean_iters: Steps of the barycentre's fixed point from the arithmetic mean. One, as in the authors' code, is
            not yet the barycentre unless the matrices commute.
        var_about: ``"mean"``: the variance is the mean squared distance from the barycentre; ``"identity"``: that of
            the batch, not centred, from I, as in the authors' code.
        device: Where the parameters are.
        dtype: Their type; float32 only for well-conditioned matrices.

    Shape:
        (N, channels, n, n) to the same. ``bias`` G and ``metric`` M (channels, n, n) are SPD matrices, which
        :class:`RiemannianSGD` keeps such; ``scale`` s and the buffer ``running_var`` (channels,), the buffer
        ``running_mean`` (channels, n, n), of the matrices after θ and M.

    Raises:
        TypeError: An argument is no number, or the input is not of the layer's dtype.
        ValueError: An argument is out of bounds, θ is 0, the input has another shape, is not symmetric or has an
            eigenvalue ≤ 0 (the message has the smallest), or a training batch has fewer than two matrices.

    Warns:
        UserWarning: The input is float32.

    Cost: 3 + ``mean_iters`` eigendecompositions a matrix in training and 3 in evaluation, O(n³) each; 2 more with
    θ ≠ 1, 1 more with ``var_about="identity"``. The gradient of the bias takes a table of n³ numbers a channel.

    Source: the paper's algorithm of GBW batch normalisation; github.com/jjscc/GBWBN for the defaults.
    """

    metric: Tensor | None

    def __init__(
        self,
        n: int,
        channels: int = 1,
        theta: float = 1.0,
        learn_metric: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
        mean_iters: int = 1,
        var_about: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        check_theta(theta)
        check_choice("var_about", var_about, ("mean", "identity"))
        super().__init__(n, channels, momentum, eps, mean_iters, True, device, dtype)
        self.theta, self.var_about = theta, var_about
        identity = torch.eye(n, device=device, dtype=dtype).repeat(channels, 1, 1)
        self.metric = nn.Parameter(identity) if learn_metric else None

    def _normalized(self, X: Tensor) -> Tensor:
        bias = self.bias
        if self.theta != 1:
            X, bias = spd_power(X, self.theta), spd_power(bias, self.theta)
        if self.metric is not None:
            inverse_root = spd_power(self.metric, -0.5)
            X, bias = (symmetrized(inverse_root @ one @ inverse_root) for one in (X, bias))
        out = self._bures_wasserstein(X, bias, self.theta, self.var_about)
        if self.metric is not None:
            root = spd_power(self.metric, 0.5)
            out = root @ out @ root
        return out if self.theta == 1 else semidefinite_power(symmetrized(out), 1 / self.theta)

    def extra_repr(self) -> str:
        """Show the sizes and options."""
        return f"{super().extra_repr()}, theta={self.theta}, var_about={self.var_about!r}"


class SPDBatchNorm(_RiemannianBatchNorm):
    """Batch normalisation of SPD matrices under one of three fixed metrics: the rivals of :class:`GBWBatchNorm`.

    - ``"aim"``, affine-invariant (SPDNetBN): G^½ B^{−½} X B^{−½} G^½ with B by Karcher's flow; no scaling.
    - ``"lem"``, log-Euclidean: exp(s / √(v + ε) · (log X − log B) + log G) with log B the mean of the logarithms.
    - ``"bw"``, Bures–Wasserstein: :class:`GBWBatchNorm` with θ = 1 and M = I.

    Mean and variance carry no gradient.

    Args:
        n: Size of the matrices.
        metric: ``"aim"``, ``"lem"`` or ``"bw"``.
        channels: As in :class:`GBWBatchNorm`, and so the arguments that follow.
        momentum: Weight of a batch in the running statistics; the mean moves along the metric's geodesic.
        eps: ε; ``"aim"`` has no use for it.
        mean_iters: Steps towards the barycentre from the arithmetic mean; ``"lem"`` knows it in closed form.
        device: Where the parameters are.
        dtype: Their type.

    Shape:
        (N, channels, n, n) to the same.

    Raises:
        TypeError: As :class:`GBWBatchNorm`.
        ValueError: As :class:`GBWBatchNorm`; or an unknown ``metric``.

    Warns:
        UserWarning: The input is float32.

    Cost: eigendecompositions a matrix in training, O(n³) each: 1 of ``mean_iters`` (``"aim"``), 2 (``"lem"``),
    3 + ``mean_iters`` (``"bw"``).

    Source: Brooks et al., "Riemannian batch normalization for SPD neural networks" (NeurIPS 2019); Chen et al., "A Lie
    Group Approach to Riemannian Batch Normalization" (ICLR 2024); the paper.
    """

    def __init__(
        self,
        n: int,
        metric: str = "aim",
        channels: int = 1,
        momentum: float = 0.1,
        eps: float = 1e-5,
        mean_iters: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        check_choice("metric", metric, ("aim", "lem", "bw"))
        super().__init__(n, channels, momentum, eps, mean_iters, metric != "aim", device, dtype)
        self.geometry = metric

    def _normalized(self, X: Tensor) -> Tensor:
        if self.geometry == "aim":
            return self._affine_invariant(X)
        if self.geometry == "lem":
            return self._log_euclidean(X)
        return self._bures_wasserstein(X, self.bias, 1.0, "mean")

    def _affine_invariant(self, X: Tensor) -> Tensor:
        B = self.running_mean
        if self.training:
            B = karcher_mean(X.detach(), self.mean_iters)
            self._record(affine_geodesic(self.running_mean, B, self.momentum), None)
        _, inverse_root = eigen_roots(B)
        move = spd_power(self.bias, 0.5) @ inverse_root
        return move @ X @ move.mT

    def _log_euclidean(self, X: Tensor) -> Tensor:
        logs = spd_log(X)
        if self.training:
            mean = logs.detach().mean(0)
            variance = (logs.detach() - mean).square().sum((-2, -1)).mean(0)
            running = spd_log(self.running_mean)
            self._record(symmetric_exp(torch.lerp(running, mean, self.momentum)), variance)
        else:
            assert self.running_var is not None
            mean, variance = spd_log(self.running_mean), self.running_var
        return symmetric_exp(self._factor(variance) * (logs - mean) + spd_log(self.bias))

    def extra_repr(self) -> str:
        """Show the sizes and the metric."""
        return f"{super().extra_repr()}, metric={self.geometry!r}"
