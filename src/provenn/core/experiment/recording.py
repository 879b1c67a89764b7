"""Record what goes into modules while a model runs, and leave the model as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def recorded_inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Keep the first input of the latest call of each module, by name; the hooks are gone after the block.

    Args:
        modules: The modules to watch. Each is called with its first input by position.

    Yields:
        Copies of the inputs, filled in as the modules are called: later in-place operations do not reach them.
    """
    held: dict[str, Tensor] = {}

    def keep(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            held[name] = inputs[0].detach().clone()

        return modules[name].register_forward_pre_hook(hook)

    handles = [keep(name) for name in modules]
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model and all its parts in evaluation mode, without gradients, and put each part's mode back.

    Args:
        model: The model.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
