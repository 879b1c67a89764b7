"""One random generator a device, and their states as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from provenn.core.experiment.seeding import generator as seeded_generator


class Generators:
    """Generators by device, made when first asked for.

    Args:
        generator: Used on its own device, and its seed seeds those on other devices. ``None`` draws a seed from
            torch's global generator.

    Raises:
        TypeError: ``generator`` is neither a generator nor ``None``.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        if not isinstance(generator, torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator or None, got {generator!r}")
        self._generators: dict[str, torch.Generator] = {}
        self._states: dict[str, Tensor] = {}
        if generator is None:
            self._seed = int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))
        else:
            self._seed = generator.initial_seed()
            self._generators[str(generator.device)] = generator

    def on(self, device: torch.device) -> torch.Generator:
        """Return the generator of a device.

        Args:
            device: Where to draw.
        """
        name = "cpu" if device.type == "meta" else str(device)  # nothing is drawn on meta, but an argument is wanted
        if name not in self._generators:
            self._generators[name] = seeded_generator(self._seed, "gradient noise", name, device=name)
            if name in self._states:
                self._generators[name].set_state(self._states.pop(name))
        return self._generators[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the seed, and the state of every generator by the name of its device."""
        made = {name: generator.get_state() for name, generator in self._generators.items()}
        return {"seed": self._seed, "states": {**self._states, **made}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where others were. The state of a device that is not drawn on yet waits until it is.

        Args:
            state_dict: What :meth:`state_dict` returned, with tensors on any device.
        """
        self._seed = state_dict["seed"]
        self._states = {name: state.cpu() for name, state in state_dict["states"].items()}
        self._generators = {name: made for name, made in self._generators.items() if name in self._states}
        for name, made in self._generators.items():
            made.set_state(self._states.pop(name))
