"""Subsampled attention against torch's scaled dot product: as dense attention, and with its windows as a mask."""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import TensorMemory, multiply_accumulates
from provenn.nn import SubsampledAttention

SPARSITIES = (1, 4, 8)


def measure() -> dict[str, Any]:
    """Compare numbers and gradients, then times that take turns at (4, 4, 1024, 16), then work and memory by s."""
    difference = max(_largest_difference(s, causal) for s in (1, 4) for causal in (False, True))
    operands = _operands(4, 4, 1024, 16)
    ways = {f"s = {s}": partial(_forward_backward, _layer(s), operands) for s in SPARSITIES}
    ways |= {"math": partial(_peer_step, operands, SDPBackend.MATH), "fused": partial(_peer_step, operands, None)}
    times = alternate(ways, rounds=5)
    work, memory = ({s: cost(s) for s in SPARSITIES} for cost in (_work, _memory))
    lengths = alternate(
        {str(n): partial(_forward_backward, _layer(4), _operands(1, 4, n, 16)) for n in (512, 1024, 2048)}, rounds=5
    )
    return {
        "peer": f"torch {torch.__version__}: scaled_dot_product_attention, dense (s = 1) or with the drawn windows as "
        "a mask (numbers), its math path (speed); the authors' code is not public",
        "agrees": difference <= 1e-5,
        "largest_difference": difference,
        "speed_ratio": times["math"] / times["s = 4"],
        "speed_ratio_8": times["math"] / times["s = 8"],
        "speed_ratio_over_own_dense": {str(s): times["s = 1"] / times[f"s = {s}"] for s in (4, 8)},
        "speed_ratio_over_fused_dense": {str(s): times["fused"] / times[f"s = {s}"] for s in (4, 8)},
        "attention_macs_reduction": {str(s): work[1] / work[s] for s in (4, 8)},
        "attention_tensor_memory_reduction": {str(s): memory[1] / memory[s] for s in (4, 8)},
        "attention_tensor_megabytes": {str(s): memory[s] / 2**20 for s in SPARSITIES},
        "growth": {"n ×4, time ×": lengths["2048"] / lengths["512"]},
    }


def _operands(*shape: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draws).requires_grad_() for _ in range(3)]


def _layer(sparsity: int, causal: bool = True) -> SubsampledAttention:
    layer = SubsampledAttention(64, 4, sparsity, causal=causal)
    layer.pathway_seed = 0
    return layer


def _attend(layer: SubsampledAttention, operands: list[Tensor]) -> Tensor:
    return layer.attend(*operands, None, layer.causal, False)[0]


def _forward_backward(layer: SubsampledAttention, operands: list[Tensor]) -> None:
    torch.autograd.grad(_attend(layer, operands).sum(), operands)


def _peer_step(operands: list[Tensor], backend: SDPBackend | None) -> None:
    with nullcontext() if backend is None else sdpa_kernel(backend):
        torch.autograd.grad(scaled_dot_product_attention(*operands, is_causal=True).sum(), operands)


def _largest_difference(sparsity: int, causal: bool) -> float:
    """Of output and gradients, relative to the larger of 1 and their magnitude; 4 does not divide the length."""
    operands, length = _operands(2, 4, 250, 16), 250
    layer = _layer(sparsity, causal)
    queries, sources = layer.draw(length, torch.Generator().manual_seed(0))
    seen = torch.eye(4 * math.ceil(length / 4), dtype=torch.bool)
    for block, some in zip(queries.tolist(), sources.tolist(), strict=True):
        for i in block:
            seen[i, some] = True
    seen = seen[:length, :length].tril() if causal else seen[:length, :length]
    outputs = _attend(layer, operands), scaled_dot_product_attention(*operands, attn_mask=seen)
    results = [[output, *torch.autograd.grad(output.square().sum(), operands)] for output in outputs]
    return max(
        (one - other).abs().max().item() / max(1.0, other.abs().max().item())
        for one, other in zip(*results, strict=True)
    )


def _work(sparsity: int) -> int:
    return multiply_accumulates(lambda: _attend(_layer(sparsity), _operands(1, 4, 1024, 16)))


def _memory(sparsity: int) -> int:
    """Return the most bytes of tensors alive in a forward and backward pass of attention, beside the operands."""
    operands, layer = _operands(1, 4, 1024, 16), _layer(sparsity)
    with TensorMemory() as memory:
        _forward_backward(layer, operands)
    return memory.peak
