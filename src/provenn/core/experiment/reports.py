"""Frozen reports: plain data that a probe or a compressor returns, with a lossless JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Report:
    """Base of every report: a frozen dataclass of numbers, strings, tuples and string-keyed dicts.

    Subclasses are ``@dataclass(frozen=True)`` and overwrite :meth:`plot`. Nested reports are declared in
    ``nested``, which maps a field's name to the class of its entries.
    """

    nested: ClassVar[dict[str, type[Report]]] = {}

    def to_json(self) -> str:
        """Return the report as JSON; NaN and infinities survive as tagged strings, since JSON has no word for them."""
        return json.dumps(_plain(dataclasses.asdict(self)), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Rebuild a report from :meth:`to_json`'s text.

        Raises:
            ValueError: The text is not JSON, or its fields are not this report's.
        """
        return cls._from_plain(_restored(json.loads(text)))

    @classmethod
    def _from_plain(cls, table: dict[str, Any]) -> Self:
        known = {field.name for field in dataclasses.fields(cls)}
        if set(table) != known:
            raise ValueError(f"{cls.__name__} has the fields {sorted(known)}, got {sorted(table)}")
        for name, entry in cls.nested.items():
            value = table[name]
            if isinstance(value, tuple):
                table[name] = tuple(entry._from_plain(item) for item in value)
            elif isinstance(value, dict) and set(value) != {field.name for field in dataclasses.fields(entry)}:
                table[name] = {key: entry._from_plain(item) for key, item in value.items()}
            elif isinstance(value, dict):
                table[name] = entry._from_plain(value)
        return cls(**table)

    def plot(self) -> Figure:
        """Draw the report as a matplotlib figure."""
        raise TypeError(f"{type(self).__name__} has no plot")


_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": json.dumps(value)}
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"float"} and value["float"] in _SPECIAL:
            return _SPECIAL[value["float"]]
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_restored(item) for item in value)
    return value
