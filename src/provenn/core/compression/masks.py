"""Masks over a model's weight tensors, held at zero through training by any optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the tensors that unstructured pruning works on: weights of more than one dimension.

    Biases and the vectors of norm layers are left out, and so are weights under ``torch.nn.utils.parametrize``, whose
    zeros would not be those of the tensors that they are computed from. A tensor that two layers share appears once.

    Args:
        model: Any module.

    Returns:
        The parameters by name, in the model's order.

    Raises:
        ValueError: The model has no such tensor.
    """
    found = {
        name: param for name, param in model.named_parameters() if param.dim() > 1 and "weight" in name.split(".")[-1]
    }
    if not found:
        raise ValueError(f"model {type(model).__name__} has no weight tensor of more than one dimension to prune")
    return found


class Masks(Mapping[str, Tensor]):
    """One boolean tensor for every prunable weight: true where the weight is kept.

    Args:
        model: The model whose weights the masks fit. All weights are kept at first.
    """

    def __init__(self, model: nn.Module) -> None:
        self._masks = {
            name: torch.ones_like(weight, dtype=torch.bool) for name, weight in prunable_weights(model).items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def total(self) -> int:
        """Number of prunable weights."""
        return sum(mask.numel() for mask in self.values())

    @property
    def remaining(self) -> int:
        """Number of weights that are kept."""
        return sum(int(mask.sum()) for mask in self.values())

    @property
    def density(self) -> float:
        """Share of the prunable weights that are kept."""
        return self.remaining / self.total

    def remove(self, name: str, removed: Tensor) -> None:
        """Stop keeping the weights at which ``removed`` is true; what is gone stays gone.

        Args:
            name: The weight's name.
            removed: Booleans of the weight's shape.

        Raises:
            KeyError: The model has no such prunable weight.
            TypeError: ``removed`` is not boolean.
            ValueError: The shapes differ.
        """
        if removed.dtype != torch.bool:
            raise TypeError(f"removed must be a boolean tensor, got {removed.dtype}")
        if removed.shape != self[name].shape:
            raise ValueError(
                f"removed must have the shape {tuple(self[name].shape)} of {name}, got {tuple(removed.shape)}"
            )
        self._masks[name] = self[name] & ~removed

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Set the weights that are not kept to zero, in place.

        Args:
            model: The model that the masks were made for, or a copy of it, on any device.
        """
        for name, weight in prunable_weights(model).items():
            weight.masked_fill_(~self[name].to(weight.device), 0)

    @contextmanager
    def held(self, model: nn.Module) -> Iterator[None]:
        """Hold the masked weights at zero while the model is trained inside the block.

        Their gradients are zeroed as they arrive, so no optimizer's momentum builds up on them, and after every step
        of any optimizer that owns one of them they are set to zero again, so a forward pass never sees them.

        Args:
            model: As in :meth:`apply`. Copies of it that are made inside the block are not held.
        """
        weights = prunable_weights(model)
        owned = {id(weight) for weight in weights.values()}

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            params: Iterable[Tensor] = (param for group in optimizer.param_groups for param in group["params"])
            if any(id(param) in owned for param in params):
                self.apply(model)

        self.apply(model)
        hooks: list[Any] = [
            weight.register_hook(lambda gradient, mask=self[name]: gradient.masked_fill(~mask.to(gradient.device), 0))
            for name, weight in weights.items()
            if weight.requires_grad
        ]
        hooks.append(register_optimizer_step_post_hook(after_step))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.apply(model)
