"""LSSL against scipy's discretisation and simulation, and against the authors' way to the kernel, derived anew."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import scipy
import torch
from scipy import signal
from torch import Tensor

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import TensorMemory
from provenn.nn import LSSL, hippo

MEASURES = ("legs", "legt", "lagt")


def measure() -> dict[str, Any]:
    """Compare with scipy (Ā, B̄, outputs) and with the authors' way (kernels); time passes at (8, 1024, 64), N = 64."""
    discretised = max(_discretisation(measure, alpha) for measure in MEASURES for alpha in (0.0, 0.5, 1.0))
    simulated = max(_simulation(measure) for measure in MEASURES)
    kernels = {measure: _kernel_errors(measure, 64, 1024) for measure in MEASURES}
    large = _kernel_errors("legs", 256, 2048, features=2)
    layer = LSSL(64, 64, learn="shared")
    u = torch.randn(8, 1024, 64, generator=torch.Generator().manual_seed(0))
    both = alternate({"ours": partial(_train, layer, u), "authors' way": partial(_train_krylov, layer, u)}, rounds=7)
    frozen = LSSL(64, 64)
    walk = alternate({"convolution": partial(_forward, frozen, u), "steps": partial(_walk, frozen, u)}, rounds=5)
    longer = alternate({str(n): partial(_kernel, layer, n) for n in (1024, 8192)}, rounds=5)
    return {
        "peer": f"scipy {scipy.__version__} (cont2discrete, dlsim); state-spaces/s4's kernel by its formula, as "
        "the package does not install here",
        "agrees": max(discretised, simulated) <= 1e-10 and max(ours for ours, _ in kernels.values()) <= 1e-5,
        "largest_difference": max(ours for ours, _ in kernels.values()),
        "largest_difference_of_discretisation": discretised,
        "largest_difference_of_response": simulated,
        "speed_ratio": both["authors' way"] / both["ours"],
        "speed_ratio_convolution_over_steps": walk["steps"] / walk["convolution"],
        "memory_ratio_of_the_kernel": _memory(_train_krylov_kernel, layer) / _memory(_train_kernel, layer),
        "float32_kernel_error": {
            "legs, N = 256, L = 2048, ours": large[0],
            "legs, N = 256, L = 2048, all in float32": large[1],
        },
        "growth": {"L ×8, time of the kernel ×": longer["8192"] / longer["1024"]},
    }


def _discretisation(measure: Any, alpha: float) -> float:
    A, B = hippo(measure, 32, dtype=torch.float64)
    layer = LSSL(4, 32, measure=measure, alpha=alpha)
    transition = layer.system.transition.double()
    A, B = (one.detach().numpy() for one in transition.dense())
    dt = layer.system.log_dt.double().exp()
    moving, entering = transition.discretize(dt, alpha)
    worst = 0.0
    for h, step in enumerate(dt.tolist()):
        theirs = signal.cont2discrete((A, B[:, None], np.ones((1, 32)), np.zeros((1, 1))), step, "gbt", alpha)
        worst = max(worst, float(np.abs(moving[h].numpy() - theirs[0]).max()))
        worst = max(worst, float(np.abs(entering[h].numpy() - theirs[1][:, 0]).max()))
    return worst


def _simulation(measure: Any) -> float:
    """Of the whole output, by scipy's loop over time; its outputs are one step late."""
    system = LSSL(3, 16, channels=2, measure=measure).double().system
    u = torch.randn(1, 200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = system(u).detach().numpy()
    A, B = (one.detach().numpy() for one in system.transition.dense())
    C, D = system.C.detach().numpy(), system.D.detach().numpy()
    worst = 0.0
    for h, step in enumerate(system.log_dt.exp().tolist()):
        moving, entering, *_ = signal.cont2discrete((A, B[:, None], C[h], D[h][:, None]), step, "gbt", 0.5)
        inputs = np.append(u[0, :, h].numpy(), 0.0)
        _, late, _ = signal.dlsim((moving, entering, C[h], np.zeros((2, 1)), 1.0), inputs)
        worst = max(worst, float(np.abs(y[0, :, h] - late[1:] - inputs[:-1, None] * D[h]).max()))
    return worst


def _krylov_kernel(layer: LSSL, length: int, dtype: torch.dtype) -> Tensor:
    """The authors' way: dense Ā for every feature, all L columns by doubling, then C times them."""
    system = layer.system
    A, B = (one.to(dtype) for one in system.transition.dense())  # type: ignore[operator, union-attr]
    half = system.log_dt.to(dtype).exp()[:, None, None] / 2
    eye = torch.eye(len(A), dtype=dtype)
    right = torch.cat((eye + half * A, (2 * half * B[:, None])), -1)
    solved = torch.linalg.solve(eye - half * A, right)
    power, columns = solved[..., :-1], solved[..., -1:]
    while columns.shape[-1] < length:
        columns = torch.cat((columns, power @ columns), -1)
        power = power @ power
    return system.C.to(dtype) @ columns[..., :length]


def _kernel_errors(measure: str, order: int, length: int, features: int = 8) -> tuple[float, float]:
    """Return the errors of our kernel and of one in float32 alone, against float64, relative to the largest entry."""
    torch_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    layer = LSSL(features, order, measure=measure)
    torch.random.set_rng_state(torch_state)
    with torch.no_grad():
        exact = _krylov_kernel(layer, length, torch.float64)
        scale = exact.abs().amax()
        ours, plain = layer.kernel(length).double(), _krylov_kernel(layer, length, torch.float32).double()
    return float((ours - exact).abs().max() / scale), float((plain - exact).abs().max() / scale)


def _train(layer: LSSL, u: Tensor) -> None:
    layer.system(u).square().sum().backward()


def _train_krylov(layer: LSSL, u: Tensor) -> None:
    length = u.shape[1]
    kernel = _krylov_kernel(layer, length, torch.float32).transpose(0, 1)
    spectrum = torch.fft.rfft(kernel, 2 * length) * torch.fft.rfft(u.transpose(1, 2)[:, None], 2 * length)
    y = torch.fft.irfft(spectrum, 2 * length)[..., :length].permute(0, 3, 2, 1) + u[..., None] * layer.system.D
    y.square().sum().backward()


def _train_kernel(layer: LSSL) -> None:
    layer.kernel(4096).square().sum().backward()


def _train_krylov_kernel(layer: LSSL) -> None:
    _krylov_kernel(layer, 4096, torch.float32).square().sum().backward()


def _memory(function: Any, layer: LSSL) -> int:
    """Return the most bytes of tensors alive in a call."""
    with TensorMemory() as memory:
        function(layer)
    return memory.peak


def _forward(layer: LSSL, u: Tensor) -> None:
    with torch.no_grad():
        layer.system(u)


def _walk(layer: LSSL, u: Tensor) -> None:
    with torch.no_grad():
        layer.system.recurrent(u, torch.zeros(len(u), 64, 64))


def _kernel(layer: LSSL, length: int) -> None:
    layer.system.reset_cache()
    with torch.no_grad():
        layer.kernel(length)
