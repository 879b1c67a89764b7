"""Randomness that derives from names: the same keys give the same numbers, whatever else has run."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import SupportsIndex

import torch


def derive_seed(*keys: SupportsIndex | str) -> int:
    """Hash the keys into a seed of 63 bits; keys that differ anywhere give unrelated seeds.

    Args:
        keys: Integers, NumPy's included, and strings; ``1`` and ``"1"`` differ.

    Raises:
        TypeError: A key is neither an integer nor a string.
    """
    words = "\x1f".join(_word(key) for key in keys)
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1


def _word(key: SupportsIndex | str) -> str:
    if isinstance(key, str):
        return f"str:{key}".replace("\x1f", "\x1f\x1f")  # doubled, it cannot be read as the separator
    try:
        return f"int:{operator.index(key)}"
    except TypeError:
        raise TypeError(f"keys must be integers or strings, got {key!r}") from None


def generator(*keys: SupportsIndex | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator seeded by the keys, such as ``generator(seed, "batches", epoch)``.

    Args:
        keys: As in :func:`derive_seed`.
        device: Where it draws.
    """
    return torch.Generator(device=device).manual_seed(derive_seed(*keys))


@contextmanager
def seeded(*keys: SupportsIndex | str) -> Iterator[None]:
    """Seed torch's global generators inside the block, and put them back as they were after it.

    For code that takes no generator, such as the initialisation of torch's own layers.

    Args:
        keys: As in :func:`derive_seed`.
    """
    seed = derive_seed(*keys)
    started = torch.cuda.is_initialized()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if started else ()):
            torch.manual_seed(seed)
            yield
    finally:
        if not started:  # CUDA had no state to keep; it starts later, or started inside, as the CPU's seed has it
            torch.cuda.manual_seed_all(torch.initial_seed())
