"""Adding Gradient Noise Improves Learning for Very Deep Networks.

Neelakantan, Vilnis, Le, Sutskever, Kaiser, Kurach, Martens, 2015. https://arxiv.org/abs/1511.06807

Annealed Gaussian noise on every gradient, after clipping and before the optimizer sees it:

    g_t ← g_t + N(0, σ_t² I),    σ_t² = η / (1 + t)^γ
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.numerics.foreach import same_kind
from provenn.optim._gradient_noise_generators import Generators

__all__ = ["GradientNoise", "noise_std", "sussillo_abbott_"]

_BUCKET = 1 << 18
"""Elements drawn at once: so many that small parameters share a draw, so few that it stays in cache."""


def noise_std(step: int, eta: float = 0.3, gamma: float = 0.55) -> float:
    """Return the standard deviation of the noise at a step, √η · (1 + t)^(−γ/2).

    Args:
        step: Steps taken before, t; 0 at the first.
        eta: η, the variance at the first step.
        gamma: γ, the exponent by which the variance decays; 0 keeps it constant.

    Returns:
        σ_t, in the unit of the gradient. Its square is η / (1 + t)^γ.

    Raises:
        ValueError: ``step``, ``eta`` or ``gamma`` < 0.
        TypeError: ``step`` is no integer, or ``eta`` or ``gamma`` no number.

    Source: the paper's section on the method, which gives the variance.
    """
    check_integer("step", step, at_least=0)
    check_number("eta", eta, at_least=0)
    check_number("gamma", gamma, at_least=0)
    return math.sqrt(eta) * math.pow(1 + step, -gamma / 2)


class GradientNoise(torch.optim.Optimizer):
    """Any optimizer, fed gradients with annealed Gaussian noise.

    A step clips the gradients by their global norm, adds noise, and lets the wrapped optimizer step; what that one
    accumulates (momentum, moments) is of noisy gradients. The wrapper is an optimizer: ``param_groups``, ``state`` and
    ``defaults`` are the wrapped one's own, schedulers work on it, and weight decay stays as it is there. Its
    ``state_dict`` is the wrapped one's with one more entry, ``"gradient_noise"``, of step count and random state::

        optimizer = GradientNoise(torch.optim.SGD(model.parameters(), lr=0.1), eta=0.01, clip_norm=10.0)

    Args:
        optimizer: The optimizer to wrap; it must step without a closure.
        eta: η, the variance of the noise at the first step. The paper tries 0.01, 0.3 and 1.
        gamma: γ, the exponent by which the variance decays.
        clip_norm: Scale the gradients down to this global norm where it is larger. ``None`` does not clip.
        noise_first: Add the noise before clipping, which then clips the noise too: for comparison, not the method.
        annealed: Whether the noise decays. ``False`` keeps its variance at η, the paper's comparison.
        generator: Draws the noise of parameters on its device; for parameters on other devices, generators are seeded
            from its seed. ``None`` seeds from torch's global generator, once, at construction. Replicas that step
            on averaged gradients must draw the same noise: give all of them a generator with the same seed.
        keep_grad: Whether ``param.grad`` after a step is the gradient as it came. ``False`` leaves the clipped and
            noisy one there, and saves a copy.

    Shape:
        Parameters of any shape; real or complex (a complex one counts as its real and imaginary parts).

    Raises:
        TypeError: ``optimizer`` is no optimizer or needs a closure, as LBFGS does, which would evaluate it again
            without noise; or ``generator`` is no generator.
        ValueError: ``eta`` or ``gamma`` < 0, or ``clip_norm`` ≤ 0.
        RuntimeError: A gradient is sparse.

    Cost: per step one normal draw and one addition an element, and one pass to clip. No state of a parameter's size;
    a step's own memory is the largest gradient or a quarter of a million elements, whichever is more, and with
    ``keep_grad`` one copy of all gradients.

    Source: the paper's section on the method; the order, clipping before noise, is that of its experiments.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        eta: float = 0.3,
        gamma: float = 0.55,
        clip_norm: float | None = None,
        noise_first: bool = False,
        annealed: bool = True,
        generator: torch.Generator | None = None,
        keep_grad: bool = False,
    ) -> None:
        _check_optimizer(optimizer)
        check_number("eta", eta, at_least=0)
        check_number("gamma", gamma, at_least=0)
        if clip_norm is not None:
            check_number("clip_norm", clip_norm, above=0)
        self.optimizer = optimizer
        self.eta = eta
        self.gamma = gamma
        self.clip_norm = clip_norm
        self.noise_first = noise_first
        self.annealed = annealed
        self.keep_grad = keep_grad
        self.steps = 0
        self._generators = Generators(generator)
        # Optimizer.__init__ would make parameter groups of its own; __setstate__ makes the rest, such as the hooks.
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _ATTRIBUTES}

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's parameter groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's default options."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters to the wrapped optimizer.

        Args:
            param_group: Parameters and their options.
        """
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, with the entry ``"gradient_noise"``: step count and random state."""
        noise = {"steps": self.steps, "generators": self._generators.state_dict()}
        return {**self.optimizer.state_dict(), "gradient_noise": noise}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another wrapper was, step count and noise included.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: ``state_dict`` is not of a wrapper.
        """
        inner = dict(state_dict)
        noise = inner.pop("gradient_noise", None)
        if noise is None:
            raise ValueError(
                "state_dict must have the entry 'gradient_noise', as GradientNoise.state_dict gives it; load a plain "
                f"optimizer's into the attribute optimizer, got the entries {sorted(inner)}"
            )
        self.optimizer.load_state_dict(inner)
        self.steps = noise["steps"]
        self._generators.load_state_dict(noise["generators"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None) -> Tensor | float | None:
        """Clip, add noise, and let the wrapped optimizer step.

        Args:
            closure: Re-evaluates the model and returns the loss; called once.

        Returns:
            The closure's loss, or ``None`` without one.

        Raises:
            RuntimeError: A gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        if any(param.grad.is_sparse for param in params):
            raise RuntimeError("GradientNoise does not support sparse gradients: the noise would make them dense")
        kept = [param.grad for param in params] if self.keep_grad else []
        try:
            if self.keep_grad:
                for param in params:
                    param.grad = param.grad.clone()
            self._disturb(params)
            self.optimizer.step()
        finally:
            for param, grad in zip(params, kept, strict=False):
                param.grad = grad
        self.steps += 1
        return loss

    def _disturb(self, params: list[Tensor]) -> None:
        if self.clip_norm is not None and not self.noise_first:
            nn.utils.clip_grad_norm_(params, self.clip_norm)
        std = noise_std(self.steps if self.annealed else 0, self.eta, self.gamma)
        if std > 0:
            _add_noise([param.grad for param in params if param.grad is not None], std, self._generators)
        if self.clip_norm is not None and self.noise_first:
            nn.utils.clip_grad_norm_(params, self.clip_norm)


_ATTRIBUTES = (
    "optimizer",
    "eta",
    "gamma",
    "clip_norm",
    "noise_first",
    "annealed",
    "keep_grad",
    "steps",
    "_generators",
)
"""What a copy or a pickle takes along: as with torch's optimizers, not the hooks."""


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"optimizer must step without a closure, got {type(optimizer).__name__}, which evaluates the closure "
            "again within a step, where no noise can be added"
        )


def _add_noise(grads: list[Tensor], std: float, generators: Generators) -> None:
    reals = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads if grad.numel()]
    for (alike,) in same_kind(reals):
        for bucket in _buckets(alike):
            noise = torch.empty(sum(grad.numel() for grad in bucket), dtype=bucket[0].dtype, device=bucket[0].device)
            noise.normal_(0.0, std, generator=generators.on(noise.device))
            torch._foreach_add_(bucket, torch._utils._unflatten_dense_tensors(noise, bucket))


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Split a list into runs that share one draw: of at most ``_BUCKET`` elements, or of a single tensor."""
    bucket: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        if bucket and elements + tensor.numel() > _BUCKET:
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        yield bucket


def sussillo_abbott_(
    module: nn.Module, width: int | None = None, generator: torch.Generator | None = None
) -> nn.Module:
    """Initialise the linear layers of a deep ReLU network so that gradients neither vanish nor explode on average.

    Weights are drawn from N(0, s²/n_in), with s = √2 · exp(1.2 / (max(n, 6) − 2.4)), and biases set to 0. The
    exponential makes up for a drift: the logarithm of a gradient's length takes a random step in every layer, and at
    s = √2 the mean of that step is below zero, the further the narrower the network.

    Args:
        module: Its :class:`torch.nn.Linear` layers are set in place; nothing else is touched.
        width: n, the width of the hidden layers. ``None`` takes each layer's own ``in_features``.
        generator: Draws the weights. ``None`` draws from torch's global generator.

    Returns:
        ``module``.

    Raises:
        ValueError: ``width`` < 1, or ``module`` has no linear layer.

    Cost: one pass over the weights.

    Source: Sussillo and Abbott, "Random walk initialization for training very deep feedforward networks", 2014,
    arXiv:1412.6558, which the paper calls its good initialisation.
    """
    if width is not None:
        check_integer("width", width, at_least=1)
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError(f"module must have a torch.nn.Linear layer, got {type(module).__name__} without one")
    with torch.no_grad():
        for layer in layers:
            fan_in = layer.in_features
            gain = math.sqrt(2) * math.exp(1.2 / (max(width or fan_in, 6) - 2.4))
            layer.weight.normal_(0.0, gain / math.sqrt(fan_in), generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()
    return module
