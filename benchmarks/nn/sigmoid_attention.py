"""Sigmoid attention in blocks against plain torch: its own formula for numbers, softmax attention for speed."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import alternate, peak_memory
from provenn.core.experiment.accounting import TensorMemory
from provenn.nn.functional import sigmoid_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def measure() -> dict[str, Any]:
    """Compare numbers and gradients, then times that take turns at (8, 8, 512, 64), then time and memory as n grows."""
    difference = max(_largest_difference(causal) for causal in (False, True))
    operands = _operands(8, 8, 512, 64)
    ways: dict[str, Attend] = {"ours": sigmoid_attention, "math": _math, "fused": scaled_dot_product_attention}
    forward = alternate({name: partial(_forward, way, operands) for name, way in ways.items()}, rounds=9)
    both = alternate({name: partial(_forward_backward, way, operands) for name, way in ways.items()}, rounds=7)
    lengths = (1024, 2048, 4096, 8192)
    times = alternate({str(n): partial(_forward, sigmoid_attention, _operands(1, 1, n, 64)) for n in lengths}, rounds=5)
    return {
        "peer": f"torch {torch.__version__}: its operations one by one (numbers), scaled_dot_product_attention's math "
        "path (speed)",
        "agrees": difference <= 1e-5,
        "largest_difference": difference,
        "speed_ratio": forward["math"] / forward["ours"],
        "speed_ratio_forward_backward": both["math"] / both["ours"],
        "speed_ratio_over_fused_softmax": forward["fused"] / forward["ours"],
        "speed_ratio_over_fused_softmax_forward_backward": both["fused"] / both["ours"],
        "growth": {
            "n ×8, time ×": times["8192"] / times["1024"],
            "n 4096 → 8192, memory ×": _memory(8192) / _memory(4096),
        },
        "tensor_megabytes_at_8192": _memory(8192) / 2**20,
        "process_megabytes_at_8192": {
            "blocked": peak_memory(partial(_train_once, "blocked")) / 2**20,
            "reference": peak_memory(partial(_train_once, "reference")) / 2**20,
        },
    }


def _operands(*shape: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draws).requires_grad_() for _ in range(3)]


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v)


def _forward(attend: Attend, operands: list[Tensor]) -> None:
    with torch.no_grad():
        attend(*operands)


def _forward_backward(attend: Attend, operands: list[Tensor]) -> None:
    torch.autograd.grad(attend(*operands).sum(), operands)


def _plain(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1]) - math.log(k.shape[-2])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return torch.sigmoid(scores) @ v


def _largest_difference(causal: bool) -> float:
    """Of output and gradients, in blocks that the length is no multiple of."""
    operands = _operands(4, 4, 500, 64)
    outputs = (
        sigmoid_attention(*operands, backend="blocked", is_causal=causal),
        _plain(*operands, causal=causal),
    )
    results = [[output, *torch.autograd.grad(output.square().sum(), operands)] for output in outputs]
    return max((one - other).abs().max().item() for one, other in zip(*results, strict=True))


def _memory(length: int) -> int:
    """Return the most bytes of tensors alive in a forward and backward pass of 4 heads, beside the operands."""
    operands = _operands(1, 4, length, 64)
    with TensorMemory() as memory:
        _forward_backward(partial(sigmoid_attention, backend="blocked"), operands)
    return memory.peak


def _train_once(backend: str) -> None:
    _forward_backward(partial(sigmoid_attention, backend=backend), _operands(1, 4, 8192, 64))
