"""GBW batch normalisation beside pyriemann (distance and barycentre) and the authors' layer, derived anew.

The authors' repository is no package. Its computation is derived anew: matrices are decomposed by SVD one at a time,
each function of eigenvalues has the Daleckii–Krein derivative by plain quotients that are 0 where they are not finite,
and the variance is about the identity. geoopt does not install here; the step on SPD matrices is compared with its
second-order retraction by the formula.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, no_type_check

import pyriemann
import torch
from pyriemann.geometry.distance import distance_wasserstein
from pyriemann.geometry.mean import mean_wasserstein
from torch import Tensor, nn

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import TensorMemory
from provenn.nn import GBWBatchNorm, RiemannianSGD, SPDBatchNorm, spd

STEPS = 8
SIZE = 20


def measure() -> dict[str, Any]:
    """Compare numbers with both peers, then times that take turns at n = 20, then growth with n and with the batch."""
    X = _matrices(200, SIZE)
    mean = (spd.barycenter(X[:, 0]) - _peer_mean(X, 60)).abs().max().item()
    pair = spd.dist(X[:-1, 0], X[1:, 0])
    distance = (pair - torch.as_tensor(distance_wasserstein(X[:-1, 0].numpy(), X[1:, 0].numpy()))).abs().max().item()
    layer = max(_layer_difference(theta) for theta in (1.0, 0.5))
    step = _step_difference()
    means = alternate(
        {"ours": lambda: spd.barycenter(X[:, 0], max_iters=STEPS, tol=0.0), "peer": lambda: _peer_mean(X, STEPS)},
        rounds=7,
    )
    batch = _matrices(30, SIZE)
    layers = alternate(
        {
            "ours": partial(_step, _ours(1.0), batch),
            "authors": partial(_step, Authors(_ours(1.0)), batch),
            "affine-invariant": partial(_step, SPDBatchNorm(SIZE, "aim"), batch),
            "log-Euclidean": partial(_step, SPDBatchNorm(SIZE, "lem"), batch),
        },
        rounds=7,
    )
    sizes = {str(n): partial(_step, GBWBatchNorm(n), _matrices(30, n)) for n in (10, 20, 40)}
    batches = {f"batch {count}": partial(_step, _ours(1.0), _matrices(count, SIZE)) for count in (30, 240)}
    growth = alternate({**sizes, **batches}, rounds=5)
    largest = max(mean, distance, layer, step)
    return {
        "peer": f"pyriemann {pyriemann.__version__}; the authors' layer, derived anew, torch {torch.__version__}",
        "agrees": largest <= 1e-8,
        "largest_difference": largest,
        "difference": {"barycentre": mean, "distance": distance, "layer and gradients": layer, "step": step},
        "speed_ratio": means["peer"] / means["ours"],
        "speed_ratio_over_the_authors_layer": layers["authors"] / layers["ours"],
        "time_over_rivals": {name: layers["ours"] / layers[name] for name in ("affine-invariant", "log-Euclidean")},
        "growth": {
            "n 10 → 20, time ×": growth["20"] / growth["10"],
            "n 20 → 40, time ×": growth["40"] / growth["20"],
            "batch ×8, time ×": growth["batch 240"] / growth["batch 30"],
            "n 20 → 40, memory ×": _memory(40) / _memory(20),
        },
    }


def _matrices(count: int, n: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    A = torch.randn(count, 1, n, n, generator=draws, dtype=torch.float64)
    return A @ A.mT / n + 0.1 * torch.eye(n, dtype=torch.float64)


def _peer_mean(X: Tensor, steps: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the number of steps was reached
        return torch.as_tensor(mean_wasserstein(X[:, 0].numpy(), tol=0.0, maxiter=steps))


def _ours(theta: float) -> GBWBatchNorm:
    layer = GBWBatchNorm(SIZE, theta=theta, var_about="identity")
    with torch.no_grad():  # apart from where it starts, where the authors' quotients of equal eigenvalues are lost
        layer.bias.copy_(_matrices(1, SIZE, 1)[0] + torch.eye(SIZE))
        assert layer.metric is not None
        layer.metric.copy_(_matrices(1, SIZE, 2)[0] + torch.eye(SIZE))
    return layer


@no_type_check
class _OneByOne(torch.autograd.Function):
    """A function of eigenvalues, by an SVD of each matrix and the plain quotients."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Tensor:
        found = [torch.linalg.svd(one) for one in A.flatten(0, -3)]
        U = torch.stack([one[0] for one in found]).reshape(A.shape)
        S = torch.stack([one[1] for one in found]).reshape(A.shape[:-1])
        ctx.save_for_backward(U, S)
        ctx.f, ctx.slope = f, slope
        return U @ torch.diag_embed(f(S)) @ U.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        U, S = ctx.saved_tensors
        values = ctx.f(S)
        quotients = (values[..., :, None] - values[..., None, :]) / (S[..., :, None] - S[..., None, :])
        quotients = torch.where(quotients.isfinite(), quotients, 0.0) + torch.diag_embed(ctx.slope(S))
        return U @ (quotients * (U.mT @ grad @ U)) @ U.mT, None, None


def _power(A: Tensor, p: float) -> Tensor:
    lead = A if A.dim() > 2 else A[None]
    out: Tensor = _OneByOne.apply(lead, lambda s: s**p, lambda s: p * s ** (p - 1))  # type: ignore[no-untyped-call]
    return out.reshape(A.shape)


def _factored(P: Tensor, V: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiply V in P's eigenbasis, by plain autograd through the decomposition."""
    eigenvalues, U = torch.linalg.eigh(P)
    return U @ (factor(eigenvalues[:, None] + eigenvalues[None, :]) * (U.mT @ V @ U)) @ U.mT


class Authors(nn.Module):
    """The layer derived anew, of one channel, with another's parameters."""

    def __init__(self, layer: GBWBatchNorm) -> None:
        super().__init__()
        self.bias, self.metric, self.scale, self.theta = layer.bias, layer.metric, layer.scale, layer.theta

    def forward(self, X: Tensor) -> Tensor:
        """Normalise a batch by its own statistics."""
        eye = torch.eye(X.shape[-1], dtype=X.dtype)
        assert self.metric is not None
        assert self.scale is not None
        M, theta = self.metric[0], self.theta
        white = _power(M, -0.5) @ _power(X, theta) @ _power(M, -0.5)
        bias = _power(M, -0.5) @ _power(self.bias[0], theta) @ _power(M, -0.5)
        with torch.no_grad():
            B = white.mean((0, 1))
            root, inverse = _power(B, 0.5), _power(B, -0.5)
            inner = _power(root @ white @ root, 0.5).mean((0, 1))
            B = inverse @ inner @ inner @ inverse
            roots = _power(white, 0.5)
            traces = (white + eye - 2 * roots).diagonal(dim1=-2, dim2=-1).sum(-1)
            variance = traces.mean() / theta**2
        root, inverse = _power(B, 0.5), _power(B, -0.5)
        product = root @ _power(root @ white @ root, 0.5) @ inverse
        V = _factored(B, product + product.mT - 2 * B, lambda sums: (2 / sums).sqrt())
        Y = eye + V + 0.25 * V @ V
        W = self.scale / (variance + 1e-5).sqrt() * 2 * (_power(Y, 0.5) - eye)
        Z = eye + W + 0.25 * W @ W
        T = _factored(bias, 2 * (_power(Z, 0.5) - eye), lambda sums: (sums / 2).sqrt())
        L = _factored(bias, T, lambda sums: 1 / sums)
        out = _power(M, 0.5) @ (bias + T + L @ bias @ L) @ _power(M, 0.5)
        return _power(out, 1 / theta)


def _step(layer: nn.Module, X: Tensor) -> None:
    given = X.clone().requires_grad_()
    torch.autograd.grad(layer(given).square().sum(), [given, *layer.parameters()])


def _layer_difference(theta: float) -> float:
    """Of output and gradients, relative to the largest element of each."""
    layer = _ours(theta)
    results = []
    for one in (layer, Authors(layer)):
        given = _matrices(30, SIZE).requires_grad_()
        output = one(given)
        weights = torch.linspace(-1, 1, SIZE, dtype=torch.float64).outer(torch.ones(SIZE, dtype=torch.float64))
        wanted = [given, layer.bias, layer.metric, layer.scale]
        gradients = torch.autograd.grad((output * (weights + weights.T)).sum(), wanted)
        results.append([output, *(g if g.dim() == 1 else 0.5 * (g + g.mT) for g in gradients)])
    pairs = zip(*results, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _step_difference() -> float:
    """Of a step on an SPD matrix from P + U + ½ U P⁻¹ U with U = −α P sym(∇) P."""
    P, gradient = _matrices(1, SIZE)[0, 0], _matrices(1, SIZE, 3)[0, 0].sin()
    param = nn.Parameter(P.clone())
    param.grad = gradient
    RiemannianSGD([param], lr=math.e / 10, manifold="spd").step()
    U = -math.e / 10 * P @ gradient @ P
    return (param.detach() - (P + U + 0.5 * U @ torch.linalg.solve(P, U))).abs().max().item()


def _memory(n: int) -> int:
    """Return the most bytes of tensors alive in a forward and backward pass of 30 matrices."""
    layer, X = GBWBatchNorm(n), _matrices(30, n)
    with TensorMemory() as memory:
        _step(layer, X)
    return memory.peak
