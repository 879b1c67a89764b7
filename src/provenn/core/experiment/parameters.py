"""Parameters as one vector, without copies; and normal noise on them that is drawn again instead of stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.experiment.checks import check_number

_PIECE = 1 << 13
"""Entries of noise that exist at once on a CPU: 32 KiB in float32, which stay in its cache until they are used."""

_DEVICE_PIECE = 1 << 20
"""Entries elsewhere: small beside a network and large beside a kernel launch."""

_PIECES = 64
"""A tensor that needs more pieces than these is drawn in as many: larger ones, and still small beside the tensor."""


class FlatParameters:
    """Parameters laid end to end in one vector that shares their memory.

    The parameters keep their identity, shape and optimizer; only their storage moves, once. Whoever writes to
    ``vector`` in place writes to them, and the other way round.

    Args:
        parameters: Parameters of one type on one device; one that comes twice counts once.

    Raises:
        ValueError: There are none, or they differ in type or device.

    Cost: one copy of the parameters at construction; none after.
    """

    vector: Float[Tensor, " total"]

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(dict.fromkeys(parameters))
        if not self.parameters:
            raise ValueError("parameters must name at least one parameter, got none")
        kinds = {(one.device, one.dtype) for one in self.parameters}
        if len(kinds) > 1:
            named = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
            raise ValueError(f"parameters must share one type and device, got {named}")
        self._shapes = [one.shape for one in self.parameters]
        self._sizes = [one.numel() for one in self.parameters]
        self.vector = torch.cat([one.detach().flatten() for one in self.parameters])
        for one, piece in zip(self.parameters, self.split(self.vector), strict=True):
            one.data = piece

    def split(self, vector: Float[Tensor, " total"]) -> list[Tensor]:
        """Return a vector's pieces in the shapes of the parameters, as views of it.

        Raises:
            ValueError: It has another length.
        """
        if vector.shape != (sum(self._sizes),):
            raise ValueError(f"vector must have shape ({sum(self._sizes)},), got {tuple(vector.shape)}")
        return [piece.view(shape) for piece, shape in zip(vector.split(self._sizes), self._shapes, strict=True)]

    def gradient(self) -> Float[Tensor, " total"]:
        """Return the gradients as a new vector, 0 where a parameter has none."""
        return torch.cat(
            [torch.zeros_like(one).flatten() if one.grad is None else one.grad.flatten() for one in self.parameters]
        )


def seeded_normal(tensors: Sequence[Tensor], seed: int) -> Iterator[tuple[int, slice, Tensor]]:
    """Draw standard normal noise for tensors, piece by piece; the same seed draws the same noise again.

    Args:
        tensors: Their shapes, types and devices decide the noise; their values do not.
        seed: The seed. Tensors on the CPU and on CUDA draw from generators of their own.

    Yields:
        Index of the tensor, the piece of its flattened entries, and the piece's noise.

    Cost: O(entries) time; memory of one piece: 2¹³ entries on a CPU, 2²⁰ elsewhere, or a 64th of a larger tensor.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for index, tensor in enumerate(tensors):
        if tensor.device not in generators:
            generators[tensor.device] = torch.Generator(tensor.device).manual_seed(seed)
        size = max(_PIECE if tensor.device.type == "cpu" else _DEVICE_PIECE, -(-tensor.numel() // _PIECES))
        for start in range(0, tensor.numel(), size):
            piece = slice(start, min(start + size, tensor.numel()))
            noise = torch.empty(piece.stop - start, dtype=tensor.dtype, device=tensor.device)
            yield index, piece, noise.normal_(generator=generators[tensor.device])
            del noise  # or it would outlive the draw of the next piece


@torch.no_grad()
def add_noise_(tensors: Sequence[Tensor], scale: float, seed: int) -> None:
    """Add ``scale`` times the seed's standard normal noise to tensors, in place.

    Adding with +μ, −2μ and +μ returns to the start but for rounding.

    Args:
        tensors: Changed in place; contiguous.
        scale: Factor of the noise.
        seed: As in :func:`seeded_normal`.

    Raises:
        ValueError: ``scale`` is not finite, or a tensor is not contiguous.

    Cost: as :func:`seeded_normal`.

    Source: Malladi et al., arXiv 2305.17333, algorithm 1.
    """
    check_number("scale", scale)
    views = [flat_view(tensor) for tensor in tensors]
    for index, piece, noise in seeded_normal(tensors, seed):
        views[index][piece].add_(noise, alpha=scale)
        del noise


def flat_view(tensor: Tensor) -> Tensor:
    """Return a tensor's entries as a vector that shares its memory, without gradients.

    Raises:
        ValueError: It is not contiguous, so there is no such view.
    """
    if not tensor.is_contiguous():
        raise ValueError(f"tensors must be contiguous, got one of shape {tuple(tensor.shape)} that is not")
    return tensor.detach().view(-1)
