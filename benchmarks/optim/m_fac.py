"""M-FAC beside its authors' algorithms, its bytes against d and m, and its step beside torch's optimizers.

The authors' repository is no package, and its dynamic algorithm asks torch for an LU factorisation without pivoting,
which torch has on GPUs alone. Its algorithms are written here anew: the dynamic one with coefficients and forward
substitution row by row, the static one row by row, and the naive one with a dense inverse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import alternate, peak_memory
from provenn.optim import MFAC, DynamicInverseFisher, StaticInverseFisher

DIM, NUM_GRADS, DAMPING = 100_000, 128, 1e-5

Step = Callable[[], Any]


def measure() -> dict[str, Any]:
    """Compare products, then times by turns, then count bytes."""
    differences = _differences()
    times = alternate(_steps(), rounds=15)
    static = alternate(_builds(), rounds=3)
    longer = {str(dim): _product(dim, NUM_GRADS) for dim in (DIM, 4 * DIM)}
    wider = {str(m): _product(DIM, m) for m in (NUM_GRADS, 4 * NUM_GRADS)}
    in_dim, in_grads = alternate(longer, rounds=11), alternate(wider, rounds=7)
    ours = times["MFAC"]
    return {
        "peer": "IST-DASLab/M-FAC, re-derived (not a package)",
        "agrees": max(differences.values()) <= 1e-8,
        "largest_difference": max(differences.values()),
        "differences": differences,
        "speed_ratio": times["peer"] / times["update_mul"],
        "speed_ratio_with_our_factor": times["peer, factor by Cholesky"] / times["update_mul"],
        "speed_ratio_of_static_build": static["peer"] / static["StaticInverseFisher"],
        "step_over_sgd": ours / times["SGD"],
        "step_over_adam": ours / times["Adam"],
        "step_over_lbfgs_of_same_history": ours / times["LBFGS"],
        "bytes": _bytes(),
        "growth": {
            "d ×4, time ×": in_dim[str(4 * DIM)] / in_dim[str(DIM)],
            "m ×4, time ×": in_grads[str(4 * NUM_GRADS)] / in_grads[str(NUM_GRADS)],
        },
    }


# The authors' algorithms.


def eliminated(matrix: Tensor) -> Tensor:
    """Return the upper factor of Gaussian elimination without row exchanges."""
    upper = matrix.clone()
    for k in range(len(upper) - 1):
        upper[k + 1 :] -= torch.outer(upper[k + 1 :, k] / upper[k, k], upper[k])
    return upper.triu()


def by_cholesky(matrix: Tensor) -> Tensor:
    """Return the same upper factor by one call."""
    factor = torch.linalg.cholesky(matrix)
    return factor.diagonal()[:, None] * factor.T


class Window:
    """The authors' dynamic algorithm: D from elimination, B row by row, then forward substitution."""

    def __init__(self, m: int, dim: int, damping: float, dtype: torch.dtype, upper: Callable[[Tensor], Tensor]) -> None:
        self.grads, self.dots = torch.zeros(m, dim, dtype=dtype), torch.zeros(m, m, dtype=dtype)
        self.rate, self.upper, self.place = 1 / damping, upper, 0

    def update_mul(self, grad: Tensor) -> Tensor:
        """Take in a gradient and return its product."""
        m, row = len(self.grads), self.place
        self.grads[row] = grad
        dots = self.grads @ grad
        self.dots[row] = self.dots[:, row] = dots
        self.place = (row + 1) % m
        identity = torch.eye(m, dtype=grad.dtype)
        D = self.upper(self.rate * self.dots + m * identity)
        pivots = D.diagonal().clone()
        B = self.rate * identity
        for i in range(1, m):
            B[i, :i] = -(D[:i, i] / pivots[:i]) @ B[:i, :i]
        p = self.rate * dots
        for i in range(1, m):
            p[i:] -= D[i - 1, i:] * (p[i - 1] / pivots[i - 1])
        return self.rate * grad - ((p / pivots) @ B) @ self.grads


def static_rows(grads: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return V and d of the static algorithm, row by row."""
    m = len(grads)
    vectors, denominators = grads / damping, torch.empty(m, dtype=grads.dtype)
    for i, grad in enumerate(grads):
        if i:
            vectors[i] -= ((vectors[:i] @ grad) / denominators[:i]) @ vectors[:i]
        denominators[i] = m + grad @ vectors[i]
    return vectors, denominators


def naive(grads: Tensor, damping: float) -> Tensor:
    """Return the dense inverse by rank-one updates."""
    inverse = torch.eye(grads.shape[1], dtype=grads.dtype) / damping
    for grad in grads:
        vector = inverse @ grad
        inverse -= torch.outer(vector, vector) / (len(grads) + grad @ vector)
    return inverse


def _differences(m: int = 32, dim: int = 1000) -> dict[str, float]:
    """Return the largest differences in float64, relative to the largest entry of the product."""
    draws = torch.Generator().manual_seed(0)
    grads = torch.randn(2 * m + 5, dim, generator=draws, dtype=torch.float64)
    x = torch.randn(dim, generator=draws, dtype=torch.float64)
    ours = DynamicInverseFisher(m, dim, DAMPING, dtype=torch.float64)
    theirs = Window(m, dim, DAMPING, torch.float64, eliminated)
    steps = [_relative(ours.update_mul(grad), theirs.update_mul(grad)) for grad in grads]
    last = grads[-m:]
    dense = naive(last, DAMPING)
    static = StaticInverseFisher(last, DAMPING)
    vectors, denominators = static_rows(last, DAMPING)
    return {
        "update_mul, dynamic": max(steps),
        "mul, dynamic, naive": _relative(ours.mul(x), dense @ x),
        "mul, static": _relative(static.mul(x), x / DAMPING - ((vectors @ x) / denominators) @ vectors),
        "mul, static, naive": _relative(static.mul(x), dense @ x),
        "diag, static, naive": _relative(static.diag(), dense.diagonal()),
    }


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


# Times.


def _steps() -> Mapping[str, Step]:
    """Return what takes one step each, with full windows and histories."""
    grads = torch.randn(2 * NUM_GRADS, DIM, generator=torch.Generator().manual_seed(0)) / DIM**0.5
    ours = DynamicInverseFisher(NUM_GRADS, DIM, DAMPING)
    theirs = {
        name: Window(NUM_GRADS, DIM, DAMPING, torch.float32, upper)
        for name, upper in (("peer", eliminated), ("peer, factor by Cholesky", by_cholesky))
    }
    for grad in grads[:NUM_GRADS]:
        ours.update(grad)
    for window in theirs.values():
        window.grads.copy_(ours.grads)
        window.dots.copy_(ours.gram)
    steps: dict[str, Step] = {"update_mul": _feeding(ours.update_mul, grads)}
    for name, window in theirs.items():
        steps[name] = _feeding(window.update_mul, grads)
    makers = {
        "MFAC": lambda params: MFAC(params, lr=1e-6, num_grads=NUM_GRADS),
        "SGD": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9),
        "Adam": lambda params: torch.optim.Adam(params, lr=1e-3),
    }
    for name, make in makers.items():
        steps[name] = _stepping(make, grads)
    steps["LBFGS"] = _lbfgs()
    for name in ("MFAC", "LBFGS"):
        for _ in range(NUM_GRADS + 2):
            steps[name]()
    return steps


def _feeding(take: Callable[[Tensor], Tensor], grads: Tensor) -> Step:
    place = 0

    def step() -> None:
        nonlocal place
        take(grads[place])
        place = (place + 1) % len(grads)

    return step


def _stepping(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer], grads: Tensor) -> Step:
    params = [torch.nn.Parameter(torch.zeros(DIM // 10)) for _ in range(10)]
    optimizer = make(params)
    place = 0

    def step() -> None:
        nonlocal place
        for param, piece in zip(params, grads[place].split(DIM // 10), strict=True):
            param.grad = piece.clone()
        optimizer.step()
        place = (place + 1) % len(grads)

    return step


def _lbfgs() -> Step:
    """Return a step of torch's LBFGS with as many stored vectors: the nearest of torch's in memory and products."""
    param = torch.nn.Parameter(torch.ones(DIM))
    curvatures = torch.linspace(1, 100, DIM)
    optimizer = torch.optim.LBFGS(
        [param], lr=1e-3, max_iter=1, history_size=NUM_GRADS, tolerance_grad=0, tolerance_change=0
    )

    def closure() -> float:
        param.grad = curvatures * param.detach()
        return 0.0

    return partial(optimizer.step, closure)


def _builds() -> Mapping[str, Step]:
    grads = torch.randn(NUM_GRADS, DIM, generator=torch.Generator().manual_seed(0)) / DIM**0.5
    return {
        "StaticInverseFisher": partial(StaticInverseFisher, grads, DAMPING),
        "peer": partial(static_rows, grads, DAMPING),
    }


def _product(dim: int, m: int) -> Step:
    grads = torch.randn(8, dim, generator=torch.Generator().manual_seed(0)) / dim**0.5
    fisher = DynamicInverseFisher(m, dim, DAMPING)
    return _feeding(fisher.update_mul, grads)


# Bytes.


def _bytes() -> dict[str, float]:
    """Return the state's bytes less m·d numbers and an m × m matrix of float64, at several sizes, and the peak's."""
    rest = {
        f"state beyond 4 m d + 8 m², m {m}, d {dim}": state_bytes(m, dim) - 4 * m * dim - 8 * m * m
        for m, dim in ((1, 1000), (64, 1000), (64, 4000), (256, 1000))
    }
    few, many = (peak_memory(partial(_train, dim)) for dim in (DIM, 4 * DIM))
    return {
        **rest,
        "more per element of d with momentum": (state_bytes(8, 1000, 0.9) - state_bytes(8, 1000)) / 1000,
        "state per element of d and gradient": (state_bytes(64, 4000) - state_bytes(64, 1000)) / (64 * 3000),
        "peak of training per element of d and gradient": (many - few) / (3 * DIM * NUM_GRADS),
    }


def state_bytes(m: int, dim: int, momentum: float = 0.0) -> int:
    """Return the bytes of all tensors of the state after three steps."""
    param = torch.nn.Parameter(torch.zeros(dim))
    optimizer = MFAC([param], num_grads=m, momentum=momentum)
    for _ in range(3):
        param.grad = torch.ones(dim)
        optimizer.step()
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(value.numel() * value.element_size() for value in held)


def _train(dim: int) -> None:
    param = torch.nn.Parameter(torch.zeros(dim))
    optimizer = MFAC([param], num_grads=NUM_GRADS)
    for _ in range(NUM_GRADS + 1):
        param.grad = torch.ones(dim)
        optimizer.step()
