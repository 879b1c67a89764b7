"""Whether the Triton kernel can run, and its late import: triton comes with CUDA builds of torch alone."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from provenn.core.sequences.attention import ScoreTerms

TRITON_TYPES = (torch.float16, torch.bfloat16, torch.float32)
TRITON_LARGEST_HEAD = 128


def why_not_triton(q: Tensor, v: Tensor, terms: ScoreTerms) -> str | None:
    """Return in words why the Triton kernel cannot take these operands, or ``None`` if it can."""
    if not q.is_cuda:
        return f"the tensors are on {q.device.type}, not on a CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if q.dtype not in TRITON_TYPES:
        return f"{q.dtype} is not one of its types, {', '.join(map(str, TRITON_TYPES))}"
    if max(q.shape[-1], v.shape[-1]) > TRITON_LARGEST_HEAD:
        return f"a head has more than {TRITON_LARGEST_HEAD} features"
    if terms.mask is not None and terms.mask.requires_grad:
        return "it has no gradient by the mask"
    return None


def load_triton() -> str:
    """Make the Triton kernel known to streaming attention, and return its name."""
    from provenn.nn import _sigmoid_attention_triton  # noqa: F401 - registers itself

    return "triton"
