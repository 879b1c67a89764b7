"""Skip connections between layers of a sequence: stashed by one layer, popped by a later one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

_Layer = TypeVar("_Layer", bound=type[nn.Module])


class _Store(threading.local):
    """The skips under way in this thread."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}


_store = _Store()


class Skip(NamedTuple):
    """A skip connection that crosses stages."""

    name: str
    source: int
    target: int


def skippable(stash: Iterable[str] = (), pop: Iterable[str] = ()) -> Callable[[_Layer], _Layer]:
    """Declare that a class of layers stashes tensors for later layers of its sequence, or pops what they stashed.

    The ``forward`` of a class that pops gets the popped tensors as keyword arguments of their names; that of a class
    that stashes returns a pair: its output, and a dict of the stashed tensors by name. Such layers work in a plain
    ``nn.Sequential`` as well. In a pipeline, a tensor goes from its source's stage straight to its target's.

    ::

        @skippable(stash=["image"])
        class Encode(nn.Module):
            def forward(self, x):
                return self.layer(x), {"image": x}

        @skippable(pop=["image"])
        class Decode(nn.Module):
            def forward(self, x, image):
                return self.layer(x) + image

    Args:
        stash: Names of the tensors that the layer stashes.
        pop: Names of the tensors that it pops.

    Returns:
        A decorator of a module's class, which returns the class; its parameters keep their names.

    Raises:
        ValueError: Neither names are given, or a name is in both.
        TypeError: A name is not a string, or what is decorated is not a class of modules.

    Cost: none beside the tensors themselves, which live until they are popped.

    Source: Kim et al., "torchgpipe", 2020, section 3.2 (skip connections by portals).
    """
    stashes, pops = _names("stash", stash), _names("pop", pop)
    if not stashes and not pops:
        raise ValueError("stash or pop must name a tensor, got none")
    if set(stashes) & set(pops):
        raise ValueError(f"stash and pop must name different tensors, got {sorted(set(stashes) & set(pops))} in both")

    def decorate(kind: _Layer) -> _Layer:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"skippable decorates a class of modules, got {kind!r}")
        inner = kind.forward

        @wraps(inner)
        def forward(self: nn.Module, *inputs: Any) -> Any:
            result = inner(self, *inputs, **{name: _take(self, name) for name in pops})
            if not stashes:
                return result
            output, stashed = _pair(self, result)
            if set(stashed) != set(stashes):
                raise ValueError(f"{type(self).__name__} must stash {sorted(stashes)}, got {sorted(stashed)}")
            _store.tensors.update(stashed)
            return output

        for name, value in {"forward": forward, "_stashes": stashes, "_pops": pops}.items():
            setattr(kind, name, value)
        return kind

    return decorate


def _names(argument: str, names: Iterable[str]) -> tuple[str, ...]:
    found = (names,) if isinstance(names, str) else tuple(names)
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must hold strings, got {name!r}")
    return found


def _take(layer: nn.Module, name: str) -> Tensor:
    if name not in _store.tensors:
        raise RuntimeError(f"{type(layer).__name__} pops {name!r}, which no layer before it has stashed")
    return _store.tensors.pop(name)


def _pair(layer: nn.Module, result: Any) -> tuple[Any, dict[str, Tensor]]:
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):
        return result
    raise TypeError(f"{type(layer).__name__} stashes: its forward must return its output and a dict of tensors")


@contextmanager
def skips_under_way(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Give layers in the block a store of their own.

    Args:
        tensors: What was stashed before. What is left in it at the end was stashed inside, and not popped.
    """
    before, _store.tensors = _store.tensors, tensors
    try:
        yield tensors
    finally:
        _store.tensors = before


def skip_layout(stages: Sequence[nn.Module]) -> list[Skip]:
    """Return the skips that cross stages, by name.

    Args:
        stages: The stages.

    Raises:
        ValueError: A name is stashed twice, popped twice, popped before it is stashed, or never popped.
    """
    sources: dict[str, int] = {}
    found: dict[str, Skip] = {}
    for index, stage in enumerate(stages):
        for layer in stage.modules():
            for name in getattr(layer, "_pops", ()):
                if name not in sources:
                    raise ValueError(f"skip {name!r} is popped, but no layer before stashes it")
                if name in found:
                    raise ValueError(f"skip {name!r} is popped twice")
                found[name] = Skip(name, sources[name], index)
            for name in getattr(layer, "_stashes", ()):
                if name in sources:
                    raise ValueError(f"skip {name!r} is stashed twice")
                sources[name] = index
    lost = sorted(sources.keys() - found.keys())
    if lost:
        raise ValueError(f"skip {lost[0]!r} is stashed, but no later layer pops it")
    return sorted(skip for skip in found.values() if skip.source != skip.target)
