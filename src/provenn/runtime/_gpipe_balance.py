"""Where to cut a sequence of layers: by measured time or by measured memory."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from provenn.core.experiment.accounting import TensorMemory
from provenn.core.experiment.checks import check_choice, check_integer, check_number
from provenn.core.pipelines.partition import even_blocks, optimal_blocks
from provenn.runtime._gpipe_skips import skips_under_way

Sample = Tensor | tuple[Tensor, ...]


def optimal_partition(costs: Sequence[float], k: int, method: Literal["exact", "blocks"] = "exact") -> list[int]:
    """Cut layers into k consecutive stages of even cost.

    Args:
        costs: The cost of each layer, ≥ 0.
        k: Number of stages; none is empty.
        method: ``"exact"``, the smallest possible maximum over stages by dynamic programming; or ``"blocks"``, the
            heuristic of torchgpipe, whose stages differ by at most the spread of the costs.

    Returns:
        The number of layers of each stage.

    Raises:
        ValueError: ``k`` < 1, fewer layers than stages, a cost that is negative or not finite, an unknown method.

    Cost: O(k n²) time and O(k n) memory; the heuristic O(k n³) and O(n).

    Source: GPipe, section 2.2; Bárány and Grinberg, "Block partitions of sequences", Israel J. Math. 206 (2015).
    """
    check_choice("method", method, ("exact", "blocks"))
    return optimal_blocks(costs, k) if method == "exact" else even_blocks(costs, k)


def balance_by_time(k: int, module: nn.Sequential, sample: Sample, *, rounds: int = 5) -> list[int]:
    """Cut layers into stages of even time: two forward passes and a backward pass, as checkpointing has them.

    Args:
        k: Number of stages.
        module: The layers; copies of them are timed, one by one, where they are.
        sample: An input of the first layer; best of a micro-batch's size.
        rounds: Times that each layer is timed; the median counts.

    Returns:
        The number of layers of each stage.

    Raises:
        TypeError: ``module`` is not an ``nn.Sequential``.
        ValueError: ``rounds`` < 1, ``k`` < 1, or fewer layers than stages.

    Cost: 3 · rounds passes of the sample; memory of one layer's copy.

    Source: Kim et al., "torchgpipe", 2020; profiled with the recomputation that its profiler leaves out.
    """
    _check_layers(k, module)
    check_integer("rounds", rounds, at_least=1)

    def seconds(layer: nn.Module, inputs: Sample, stored: dict[str, Tensor]) -> float:
        return statistics.median(_seconds(layer, inputs, stored) for _ in range(rounds))

    return optimal_partition(_profile(module, sample, seconds), k)


def balance_by_size(
    k: int, module: nn.Sequential, sample: Sample, *, chunks: int = 1, param_scale: float = 2.0
) -> list[int]:
    """Cut layers into stages of even memory: parameters, and what a micro-batch keeps for the backward pass.

    Args:
        k: Number of stages.
        module: The layers; copies of them are measured, one by one, where they are.
        sample: A mini-batch for the first layer.
        chunks: Micro-batches that it will be cut into; a micro-batch's share of the memory counts.
        param_scale: How often a parameter is held: 2 with its gradient, 3 with momentum, 4 with Adam.

    Returns:
        The number of layers of each stage.

    Raises:
        TypeError: ``module`` is not an ``nn.Sequential``.
        ValueError: ``chunks`` < 1, ``param_scale`` < 0, ``k`` < 1, or fewer layers than stages.

    Cost: one forward pass of the sample; memory of one layer's copy and its activations.

    Source: Kim et al., "torchgpipe", 2020, balance by size.
    """
    _check_layers(k, module)
    check_integer("chunks", chunks, at_least=1)
    check_number("param_scale", param_scale, at_least=0)

    def size(layer: nn.Module, inputs: Sample, stored: dict[str, Tensor]) -> float:
        with TensorMemory() as memory:
            outputs = _call(layer, inputs, _fresh(stored))
            latent: int = memory.current
        del outputs
        parameters = sum(one.numel() * one.element_size() for one in layer.parameters())
        return latent / chunks + param_scale * parameters

    return optimal_partition(_profile(module, sample, size), k)


def _check_layers(k: int, module: nn.Sequential) -> None:
    if not isinstance(module, nn.Sequential):
        raise TypeError(f"module must be an nn.Sequential, got {type(module).__name__}")
    check_integer("k", k, at_least=1, at_most=len(module))


def _profile(
    module: nn.Sequential, sample: Sample, measure: Callable[[nn.Module, Sample, dict[str, Tensor]], float]
) -> list[float]:
    with torch.random.fork_rng(devices=_cuda_devices(module)), torch.enable_grad():
        return list(_layer_by_layer(module, sample, measure))


def _layer_by_layer(
    module: nn.Sequential, inputs: Any, measure: Callable[[nn.Module, Sample, dict[str, Tensor]], float]
) -> Iterator[float]:
    stored: dict[str, Tensor] = {}
    for layer in module:
        layer = copy.deepcopy(layer).train()
        inputs = tree_map(_detached, inputs)
        yield measure(layer, inputs, stored)
        inputs = _call(layer, inputs, stored)


def _detached(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    # a copy, and no leaf, so that layers may change it in place
    plain = tensor.detach().clone()
    return plain.requires_grad_().clone() if plain.is_floating_point() else plain


def _fresh(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: _detached(one) for name, one in stored.items()}


def _call(layer: nn.Module, inputs: Sample, stored: dict[str, Tensor]) -> Any:
    with skips_under_way(stored):
        return layer(inputs)


def _seconds(layer: nn.Module, inputs: Sample, stored: dict[str, Tensor]) -> float:
    devices = _cuda_devices(layer)
    first, second = tree_map(_detached, inputs), tree_map(_detached, inputs)
    forward_skips, backward_skips = _fresh(stored), _fresh(stored)
    start = _now(devices)
    with torch.no_grad():
        _call(layer, first, forward_skips)
    outputs = _call(layer, second, backward_skips)
    ends = [one for one in (outputs if isinstance(outputs, tuple) else (outputs,)) if one.requires_grad]
    torch.autograd.backward(ends, [torch.ones_like(one) for one in ends])
    return _now(devices) - start


def _now(devices: Sequence[torch.device]) -> float:
    for device in devices:
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _cuda_devices(module: nn.Module) -> list[torch.device]:
    return sorted({one.device for one in module.parameters() if one.device.type == "cuda"}, key=str)
