"""Tensor attention against plain torch: softmax attention for order 2, all tuples at once for order 3; and growth."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.timing import alternate
from provenn.core.experiment.accounting import TensorMemory
from provenn.nn.functional import tensor_attention, tensor_attention_poly

Attend = Callable[[Tensor, list[Tensor], list[Tensor]], Tensor]


def measure() -> dict[str, Any]:
    """Compare numbers and gradients, then times that take turns, then fit how time grows over four sizes each."""
    second = _largest_difference(tensor_attention, _softmax, order=2)
    third = _largest_difference(partial(tensor_attention, block=5000), _dense, order=3)
    ordinary = _operands(1024, 64, 2, 8)
    times = alternate(
        {name: partial(_forward, way, ordinary) for name, way in (("ours", tensor_attention), ("peer", _math))}, 9
    )
    triples = _operands(96, 8, 3, 4)
    both = alternate(
        {name: partial(_train, way, triples) for name, way in (("ours", tensor_attention), ("dense", _dense))}, 7
    )
    exponents = {
        "exact, n = 64…512": _exponent(tensor_attention, (64, 128, 256, 512), 3),
        "polynomial, n = 16384…131072": _exponent(_polynomial, (16_384, 32_768, 65_536, 131_072), 9),
        "polynomial, causal, n = 2048…16384": _exponent(_causal_polynomial, (2048, 4096, 8192, 16_384), 5),
        "polynomial, forward and backward, n = 16384…131072": _exponent(
            _polynomial, (16_384, 32_768, 65_536, 131_072), 5, train=True
        ),
    }
    return {
        "peer": f"torch {torch.__version__}: scaled_dot_product_attention with scale 1/d for order 2 (speed: its math "
        "path at n = 1024, d = 64); for order 3, which has no maintained peer, the definition by einsum and softmax",
        "agrees": max(second, third) <= 1e-10,
        "largest_difference": max(second, third),
        "speed_ratio": times["peer"] / times["ours"],
        "speed_ratio_over_all_tuples_at_once_forward_backward": both["dense"] / both["ours"],
        "exponents": exponents,
        "growth": {"n ×8, time ×": 8 ** exponents["polynomial, n = 16384…131072"]},
        "training_megabytes_at_192": {
            "blocks": _memory(tensor_attention) / 2**20,
            "all tuples at once": _memory(_dense) / 2**20,
            "polynomial": _memory(_polynomial) / 2**20,
        },
    }


def _operands(
    length: int, dim: int, order: int, heads: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Draw entries uniform in [−½, ½]."""
    draws = torch.Generator().manual_seed(0)
    q, *rest = (
        (torch.rand(heads, length, dim, generator=draws, dtype=dtype) - 0.5).requires_grad_()
        for _ in range(2 * order - 1)
    )
    return q, rest[: order - 1], rest[order - 1 :]


def _softmax(q: Tensor, ks: list[Tensor], vs: list[Tensor]) -> Tensor:
    return scaled_dot_product_attention(q, ks[0], vs[0], scale=1 / q.shape[-1])


def _math(q: Tensor, ks: list[Tensor], vs: list[Tensor]) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _softmax(q, ks, vs)


def _dense(q: Tensor, ks: list[Tensor], vs: list[Tensor]) -> Tensor:
    scores = torch.einsum("hid,hjd,hkd->hijk", q, *ks) / q.shape[-1]
    weights = scores.flatten(2).softmax(-1).unflatten(2, scores.shape[2:])
    return torch.einsum("hijk,hje,hke->hie", weights, *vs)


def _polynomial(q: Tensor, ks: list[Tensor], vs: list[Tensor]) -> Tensor:
    return tensor_attention_poly(q, ks, vs, bound=0.5)[0]


def _causal_polynomial(q: Tensor, ks: list[Tensor], vs: list[Tensor]) -> Tensor:
    return tensor_attention_poly(q, ks, vs, bound=0.5, causal=True)[0]


def _forward(attend: Attend, operands: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
    with torch.no_grad():
        attend(*operands)


def _train(attend: Attend, operands: tuple[Tensor, list[Tensor], list[Tensor]]) -> None:
    q, ks, vs = operands
    torch.autograd.grad(attend(q, ks, vs).sum(), [q, *ks, *vs])


def _largest_difference(ours: Attend, other: Attend, order: int) -> float:
    """Of output and gradients, in float64, with scores large enough to matter."""
    q, ks, vs = _operands(40, 6, order, 3, torch.float64)
    results = []
    for attend in (ours, other):
        output = attend(8 * q, [4 * k for k in ks], vs)
        results.append([output, *torch.autograd.grad(output.square().sum(), [q, *ks, *vs])])
    return max((one - wanted).abs().max().item() for one, wanted in zip(*results, strict=True))


def _exponent(attend: Attend, sizes: tuple[int, ...], rounds: int, train: bool = False) -> float:
    """Fit s of time ∝ nˢ, at four features, over sizes that take turns."""
    call = _train if train else _forward
    times = alternate({str(n): partial(call, attend, _operands(n, 4, 3)) for n in sizes}, rounds)
    return float(np.polyfit(np.log(sizes), np.log([times[str(n)] for n in sizes]), 1)[0])


def _memory(attend: Attend) -> int:
    """Return the most bytes of tensors alive in a forward and backward pass at n = 192, beside the operands."""
    operands = _operands(192, 4, 3)
    with TensorMemory() as memory:
        _train(attend, operands)
    return memory.peak
