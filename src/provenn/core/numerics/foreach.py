"""Lists of tensors for ``torch._foreach_*`` kernels, which want one device and one type a list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def foreach_pays(tensors: Sequence[Tensor]) -> bool:
    """Whether one kernel over many tensors beats a loop over them.

    On CUDA it does, since launches are what costs. On the CPU a loop keeps each tensor in cache from the first
    operation on it to the last, and a list-wide kernel does not.

    Args:
        tensors: The tensors of one call.

    Returns:
        True if there are some, all on CUDA and none of a subclass of Tensor other than Parameter.
    """
    return bool(tensors) and all(one.is_cuda and type(one) in (Tensor, torch.nn.Parameter) for one in tensors)


def same_kind(*lists: Sequence[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Split parallel lists into groups of one device and type each, going by the first list.

    Args:
        lists: Lists of equal length; entry ``i`` of each belongs together.

    Yields:
        The same lists, restricted to the entries of one device and type, in their order.
    """
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(lists[0]):
        places.setdefault((tensor.device, tensor.dtype), []).append(place)
    for picked in places.values():
        yield tuple([one[place] for place in picked] for one in lists)
