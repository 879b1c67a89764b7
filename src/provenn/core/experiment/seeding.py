"""Randomness that derives from names: the same keys give the same numbers, whatever else has run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*keys: int | str) -> int:
    """Hash the keys into a seed of 63 bits; keys that differ anywhere give unrelated seeds."""
    words = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1


def generator(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator seeded by the keys, such as ``generator(seed, "batches", epoch)``."""
    return torch.Generator(device=device).manual_seed(derive_seed(*keys))


@contextmanager
def seeded(*keys: int | str) -> Iterator[None]:
    """Seed torch's global generators inside the block, and put them back as they were after it.

    For code that takes no generator, such as the initialisation of torch's own layers.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(*keys))
        yield
