"""Sparse modular activation: route elements to modules, pack those that a module gets, and put its outputs back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.experiment.checks import check_integer, check_number
from provenn.core.sequences.attention import wide
from provenn.nn._seqboat_ssm import check_features, truncated_normal_


class Packed(NamedTuple):
    """Selected elements of sequences, side by side, in their order.

    Shape: ``values`` (batch, r, features); ``index`` (batch, time): each element's slot, from 1 on, or 0;
    ``positions`` and ``mask`` (batch, r): where a slot's element came from (0 for none), and whether it holds one.
    """

    values: Tensor
    index: Tensor
    positions: Tensor
    mask: Tensor


def compress(x: Shaped[Tensor, "batch time features"], active: Bool[Tensor, "batch time"]) -> Packed:
    """Pack the selected elements of every sequence into as few slots as the longest selection needs.

    Args:
        x: The sequences.
        active: Which elements are selected.

    Shape:
        x (batch, L, D) → values (batch, r, D), r being the largest number selected in a sequence of the batch, and at
        least 1. Slots without an element hold zeros.

    Returns:
        Values, slots, positions and mask.

    Raises:
        ValueError: ``active`` is not shaped as the elements, or there are none.

    Cost: O(L) on indices and O(r D) on values a sequence. r depends on the data: the size is read back from the device,
    ``torch.compile`` breaks its graph there (``fullgraph=True`` and ``torch.export`` refuse).

    Source: section 3.2 of the paper.
    """
    if active.shape != x.shape[:2] or x.ndim != 3 or x.shape[1] == 0:
        raise ValueError(
            f"active must have the shape (batch, time) of x, with a time of at least 1, got {tuple(active.shape)} and "
            f"{tuple(x.shape)}"
        )
    count = active.sum(1)
    slots = max(1, int(count.max())) if len(count) else 1
    index = active * active.cumsum(1)
    times = torch.arange(x.shape[1], device=x.device).expand_as(index)
    # Slot 0 collects what is not selected, and is dropped.
    positions = index.new_zeros(len(x), slots + 1).scatter(1, index, times)[:, 1:]
    mask = torch.arange(slots, device=x.device) < count[:, None]
    positions = positions * mask
    values = x.gather(1, positions[..., None].expand(-1, -1, x.shape[2])).masked_fill(~mask[..., None], 0)
    return Packed(values, index, positions, mask)


def extract(
    values: Shaped[Tensor, "batch slots features"], index: Int[Tensor, "batch time"]
) -> Shaped[Tensor, "batch time features"]:
    """Put packed values back to where their elements came from, and zeros elsewhere: the inverse of :func:`compress`.

    Args:
        values: One row a slot.
        index: Each element's slot, from 1 on; 0 for none.

    Shape:
        values (batch, r, E), index (batch, L) → (batch, L, E).

    Returns:
        The sequences.

    Raises:
        ValueError: The batches differ.

    Cost: O(L E) a sequence.

    Source: section 3.2 of the paper.
    """
    if len(index) != len(values):
        raise ValueError(f"index must be of {len(values)} sequences as values, got shape {tuple(index.shape)}")
    padded = F.pad(values, (0, 0, 1, 0))
    return padded.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


class SparseModularActivation(nn.Module):
    r"""Run modules on the elements that a learned router selects for them, and on no others.

    For each module the router compares two logits: a = [u₁ > u₀] is the decision, c = max softmax(u/e^t) its
    confidence, t a learned temperature. The module runs on the packed selection, and

    .. math::
        y = \sum_i c_i \odot a_i \odot \mathrm{extract}(f_i(\mathrm{compress}(x, a_i)))

    The number of selected elements is free. The router learns through the confidence alone.

    Args:
        module: f: called with packed values (batch, r, D), returns (batch, r, E). For several modules a sequence of
            them, of equal E; any subset of them may act on an element.
        dim: D, the features of an element; sets the temperature's start.
        num_modules: M.
        init_temp_scale: s₀: the temperature starts at log(s₀ √D).
        projection: Whether a linear map of x makes the logits; else they are given with each call.
        contextual: Whether modules want to know more: they are called ``f(values, positions, mask)``, and without
            packing ``f(x, positions, mask, slots)``; see :class:`GatedAttentionUnit`. Else unused slots hold zeros, and
            what is computed there is dropped.
        packing: Whether the selection is packed. Without it modules run on all elements, and their outputs are masked:
            the same result for elementwise and contextual modules, of static shape, with no work saved.

    Shape:
        x (batch, L, D), ``logits`` (batch, L, 2M): off and on of the first module, then of the second; ``padding_mask``
        (batch, L), True at padding, where nothing is ever selected → (batch, L, E).

    Returns:
        Calling it returns y. ``last_activation`` then holds the share of elements without padding that each module got:
        a scalar, or (M,).

    Raises:
        TypeError: A size is no integer.
        ValueError: ``num_modules`` is not the number of modules, ``init_temp_scale`` ≤ 0, or logits are missing or of
            another shape.

    Cost: that of the modules on r ≤ L elements, and O(L E) a module. With packing r depends on the data: see
    :func:`compress` on compilation; ``packing=False`` compiles and exports.

    Source: sections 3.1 and 3.2 of the paper; temperature and initialisation as in the authors' code.
    """

    last_activation: Tensor | None

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module],
        dim: int,
        num_modules: int = 1,
        init_temp_scale: float = 1.0,
        *,
        projection: bool = True,
        contextual: bool = False,
        packing: bool = True,
    ) -> None:
        super().__init__()
        check_integer("dim", dim, at_least=1)
        check_integer("num_modules", num_modules, at_least=1)
        check_number("init_temp_scale", init_temp_scale, above=0)
        inner = [module] if isinstance(module, nn.Module) else list(module)
        if len(inner) != num_modules:
            raise ValueError(f"num_modules must be the number of modules, {len(inner)}, got {num_modules}")
        self.inner = nn.ModuleList(inner)
        self.dim, self.num_modules, self.contextual, self.packing = dim, num_modules, contextual, packing
        self.log_temperature = nn.Parameter(torch.full((), math.log(init_temp_scale * math.sqrt(dim))))
        self.router = nn.Linear(dim, 2 * num_modules) if projection else None
        if self.router is not None:
            truncated_normal_(self.router.weight)
            nn.init.zeros_(self.router.bias)
        self.last_activation = None

    def route(
        self, logits: Float[Tensor, "*batch two_m"]
    ) -> tuple[Bool[Tensor, "*batch m"], Float[Tensor, "*batch m"]]:
        """Return decisions and confidences.

        Args:
            logits: Off and on of every module.

        Shape:
            logits (…, 2M) → twice (…, M).

        Returns:
            a, and c in [½, 1]; equal logits decide for off.
        """
        logits = logits.to(wide(logits.dtype))
        margin = logits[..., 1::2] - logits[..., 0::2]
        # The larger of two softmax values, written so that logits may be infinite.
        return margin > 0, torch.sigmoid(margin.abs() / self.log_temperature.to(margin.dtype).exp())

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        logits: Float[Tensor, "batch time two_m"] | None = None,
        padding_mask: Bool[Tensor, "batch time"] | None = None,
    ) -> Float[Tensor, "batch time out"]:
        """Return the modules' weighted outputs.

        Args:
            x: The sequences.
            logits: The router's, where it has no projection of its own (given ones take its place).
            padding_mask: True at padding.
        """
        check_features("x", x, self.dim, 3)
        if logits is None and self.router is not None:
            logits = self.router(x)
        wanted = (*x.shape[:2], 2 * self.num_modules)
        if logits is None or logits.shape != wanted:
            raise ValueError(f"logits must be of shape {wanted}, got {None if logits is None else tuple(logits.shape)}")
        active, confidence = self.route(logits)
        if padding_mask is not None:
            active = active & ~padding_mask[..., None]
        if not torch.compiler.is_compiling():
            self.last_activation = _rate(active, padding_mask)
        total: Tensor | None = None
        for module, decided, weight in zip(self.inner, active.unbind(-1), confidence.unbind(-1), strict=True):
            output = self._packed(module, x, decided) if self.packing else self._masked(module, x, decided)
            gated = output * (weight * decided).to(output.dtype)[..., None]
            total = gated if total is None else total + gated
        assert total is not None
        return total

    def _packed(self, module: nn.Module, x: Tensor, active: Tensor) -> Tensor:
        packed = compress(x, active)
        if self.contextual:
            return extract(module(packed.values, packed.positions, packed.mask), packed.index)
        return extract(module(packed.values), packed.index)

    def _masked(self, module: nn.Module, x: Tensor, active: Tensor) -> Tensor:
        context: tuple[Tensor, ...] = ()
        if self.contextual:
            times = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
            context = (times, active, active.cumsum(1) - 1)
        output: Tensor = module(x, *context)
        return output

    def extra_repr(self) -> str:
        """Return what distinguishes this layer when it is printed."""
        return f"{self.dim}, num_modules={self.num_modules}, packing={self.packing}"


def _rate(active: Tensor, padding_mask: Tensor | None) -> Tensor:
    count = active.detach().sum((0, 1)).float()
    real = active.shape[0] * active.shape[1] if padding_mask is None else (~padding_mask).sum().clamp(min=1)
    rate = count / real if not isinstance(real, int) or real else count
    return rate.squeeze(0) if len(rate) == 1 else rate
