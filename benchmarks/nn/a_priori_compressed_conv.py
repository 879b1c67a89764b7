"""Factorised convolutions beside TensorLy-Torch's and beside dense ones, and the wave solver beside scikit-fem."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import scipy.sparse.linalg
import skfem
import tltorch
import torch
from skfem.helpers import dot, grad
from torch import Tensor, nn

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import model_size, saved_bytes
from provenn.nn import CPConv2d, OneWayConv2d, QuadMesh, Tucker2Conv2d, WaveFE2d

CHANNELS, KERNEL, SIDE, BATCH = 32, 5, 32, 8
STEPS = 100


def measure() -> dict[str, Any]:
    """Compare outputs and gradients with shared factors, then times by turns, then growth with rank and channels."""
    difference = max(_largest_difference(*_cp(torch.float64)), _largest_difference(*_tucker(torch.float64)))
    cp, tucker = _times(*_cp(torch.float32)), _times(*_tucker(torch.float32))
    wave = _wave()
    dense = partial(nn.Conv2d, CHANNELS, CHANNELS, KERNEL, padding=KERNEL // 2)
    one_way = partial(OneWayConv2d, CHANNELS, CHANNELS, KERNEL, padding=KERNEL // 2)
    x = _inputs(torch.float32)
    taken = alternate(
        {
            name: partial(_step, layer, x)
            for name, layer in {1: one_way(1), 2: one_way(2), 4: one_way(4), 0: dense()}.items()
        },
        rounds=15,
    )
    return {
        "peer": f"tensorly-torch {version('tensorly-torch')} (CP, Tucker); {wave.pop('peer')}",
        "agrees": difference <= 1e-10 and wave["agrees"],
        "largest_difference": difference,
        "speed_ratio": cp["theirs"] / cp["ours"],
        "speed_ratio_tucker": tucker["theirs"] / tucker["ours"],
        "wave_solver": wave,
        "forward_and_backward_over_dense": {f"R = {rank}": taken[rank] / taken[0] for rank in (1, 2, 4)},
        "parameters_over_dense": {
            f"R = {rank}": model_size(one_way(rank)).parameters / model_size(dense()).parameters for rank in (1, 2, 4)
        },
        "saved_memory_over_dense": {
            f"R = {rank}": saved_bytes(partial(one_way(rank), x)) / saved_bytes(partial(dense(), x))
            for rank in (1, 2, 4)
        },
        "growth": {
            "rank ×4, time ×": taken[4] / taken[1],
            "kernel 5 to 15, time ×, one-way and dense": _growth_with_kernel(),
        },
    }


def _inputs(dtype: torch.dtype) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randn(BATCH, CHANNELS, SIDE, SIDE, generator=draws, dtype=dtype).requires_grad_()


def _step(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    out = layer(x)
    return (out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))


def _cp(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Our layer and theirs with the same factors."""
    rank = 16
    ours = CPConv2d(CHANNELS, CHANNELS, KERNEL, rank, padding=KERNEL // 2, bias=False, dtype=dtype)
    theirs = tltorch.FactorizedConv(
        CHANNELS, CHANNELS, KERNEL, 2, padding=KERNEL // 2, rank=rank, factorization="cp", implementation="factorized"
    ).to(dtype)
    a, u, v, d = (factor.weight.detach().flatten(1) for factor in ours.factors)
    with torch.no_grad():
        theirs.weight.weights.fill_(1.0)
        for theirs_factor, factor in zip(theirs.weight.factors, (d, a.T, u.T, v.T), strict=True):
            theirs_factor.copy_(factor)
    return ours, theirs


def _tucker(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    rank = 16
    ours = Tucker2Conv2d(CHANNELS, CHANNELS, KERNEL, rank, padding=KERNEL // 2, bias=False, dtype=dtype)
    theirs = tltorch.FactorizedConv(
        CHANNELS, CHANNELS, KERNEL, 2, padding=KERNEL // 2, rank=(rank, rank, KERNEL, KERNEL),
        factorization="tucker", implementation="factorized",
    ).to(dtype)  # fmt: skip
    a, g, d = (factor.weight.detach() for factor in ours.factors)
    square = torch.eye(KERNEL, dtype=dtype)
    with torch.no_grad():
        theirs.weight.core.copy_(g)
        for theirs_factor, factor in zip(
            theirs.weight.factors, (d.flatten(1), a.flatten(1).T, square, square), strict=True
        ):
            theirs_factor.copy_(factor)
    return ours, theirs


def _largest_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Of the outputs and of the gradients by the inputs, relative to their largest entry."""
    x = _inputs(torch.float64)
    pairs = zip(_step(ours, x)[:2], _step(theirs, x)[:2], strict=True)
    return max(((one - other).abs().max() / other.abs().max()).item() for one, other in pairs)


def _times(ours: nn.Module, theirs: nn.Module) -> dict[str, float]:
    x = _inputs(torch.float32)
    return alternate({"ours": partial(_step, ours, x), "theirs": partial(_step, theirs, x)}, rounds=31)


def _growth_with_kernel() -> list[float]:
    x = _inputs(torch.float32)
    made: dict[str, Callable[[int], nn.Module]] = {
        "one-way": lambda k: OneWayConv2d(CHANNELS, CHANNELS, k, 1, padding=k // 2),
        "dense": lambda k: nn.Conv2d(CHANNELS, CHANNELS, k, padding=k // 2),
    }
    taken = alternate(
        {f"{name} {k}": partial(_step, make(k), x) for name, make in made.items() for k in (5, 15)}, rounds=7
    )
    return [taken[f"{name} 15"] / taken[f"{name} 5"] for name in made]


def _wave() -> dict[str, Any]:
    """The wave solver against Newmark's method on matrices that scikit-fem assembles: setup and steps, by turns."""
    difference, ratio, seconds = 0.0, {}, {}
    for side in (32, 64):
        scene = _scene(side)
        wanted = _scikit_fem(*scene)
        difference = max(difference, float(np.abs(_ours(*scene) - wanted).max() / np.abs(wanted).max()))
        taken = alternate({"ours": partial(_ours, *scene), "scikit-fem": partial(_scikit_fem, *scene)}, rounds=7)
        ratio[f"{side}²"] = taken["scikit-fem"] / taken["ours"]
        seconds[side] = taken["ours"]
    return {
        "peer": f"scikit-fem {version('scikit-fem')} with SciPy's factorisation (wave solver)",
        "agrees": difference <= 1e-9,
        "largest_difference": difference,
        "speed_ratio": ratio,
        "growth": {"unknowns ×4, time ×": seconds[64] / seconds[32]},
    }


def _scene(side: int) -> tuple[QuadMesh, Tensor, Tensor, float]:
    """A slightly sheared and bent square with a slow disc, a pulse beside it, and a step in time."""
    plain = QuadMesh.rectangle(1.0, 1.0, side, side)
    x, y = plain.nodes.T
    nodes = torch.stack([x + 0.2 * y + 0.05 * torch.sin(3 * y), y + 0.1 * x * y], dim=1)
    mesh = QuadMesh(nodes, plain.quads, plain.sides)
    centres = nodes[mesh.quads].mean(dim=1)
    c = torch.where((centres - 0.6).square().sum(1) < 0.04, 0.5, 1.0).double()
    return mesh, c, torch.exp(-100 * (nodes - 0.3).square().sum(1)), 0.5 / side


def _ours(mesh: QuadMesh, c: Tensor, start: Tensor, dt: float) -> np.ndarray:
    found: np.ndarray = WaveFE2d(mesh, c, "absorbing", dt).run(None, STEPS, start).displacement[-1].numpy()
    return found


def _scikit_fem(mesh: QuadMesh, c: Tensor, start: Tensor, dt: float) -> np.ndarray:
    """Newmark's method in accelerations: predict, solve for the acceleration, correct."""
    other = skfem.MeshQuad(np.ascontiguousarray(mesh.nodes.T), np.ascontiguousarray(mesh.quads.T))
    basis = skfem.CellBasis(other, skfem.ElementQuad1(), intorder=3)
    edge = skfem.FacetBasis(other, skfem.ElementQuad1(), intorder=3)
    inside, rim = c.numpy()[:, None], c.numpy()[other.f2t[0, edge.find]][:, None]
    M = skfem.BilinearForm(lambda u, v, w: u * v / w.c**2).assemble(basis, c=inside)
    C = skfem.BilinearForm(lambda u, v, w: u * v / w.c).assemble(edge, c=rim)
    K = skfem.BilinearForm(lambda u, v, _: dot(grad(u), grad(v))).assemble(basis)
    u, v = start.numpy(), np.zeros(len(start))
    a = scipy.sparse.linalg.spsolve(M.tocsc(), -K @ u)
    factor = scipy.sparse.linalg.splu((M + dt / 2 * C + dt**2 / 4 * K).tocsc())
    for _ in range(STEPS):
        u_guess, v_guess = u + dt * v + dt**2 / 4 * a, v + dt / 2 * a
        a = factor.solve(-C @ v_guess - K @ u_guess)
        u, v = u_guess + dt**2 / 4 * a, v_guess + dt / 2 * a
    return u
