"""Frozen reports: plain data that a probe or a compressor returns, with a lossless JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
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
        """Return the report as JSON; NaN and infinities survive as tagged strings, since JSON has no word for them.

        Raises:
            TypeError: A field holds what JSON has no word for: a tensor, or a dict whose keys are not strings.
        """
        return json.dumps(_plain(dataclasses.asdict(self)), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Rebuild a report from :meth:`to_json`'s text.

        Args:
            text: The text.

        Returns:
            The report; lists come back as tuples, and NumPy's numbers as Python's.

        Raises:
            ValueError: The text is not JSON, or its fields are not this report's.
        """
        return cls._from_plain(_restored(json.loads(text)))

    @classmethod
    def _from_plain(cls, table: Any) -> Self:
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(table, dict):
            raise ValueError(f"{cls.__name__} has the fields {sorted(known)}, got {table!r}")
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
        """Draw the report as a matplotlib figure.

        Raises:
            TypeError: This kind of report has no plot.
        """
        raise TypeError(f"{type(self).__name__} has no plot")


_TAG = "float"
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_escaped(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else {_TAG: json.dumps(float(value))}
    return value


def _escaped(key: Any) -> str:
    """Put a backslash before a key that could be read as the tag of a special number."""
    if not isinstance(key, str):
        raise TypeError(f"keys of a report's dicts must be strings, got {key!r}")
    return f"\\{key}" if key.lstrip("\\") == _TAG else key


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TAG} and isinstance(value[_TAG], str) and value[_TAG] in _SPECIAL:
            return _SPECIAL[value[_TAG]]
        return {
            key[1:] if key.lstrip("\\") == _TAG and key != _TAG else key: _restored(item) for key, item in value.items()
        }
    if isinstance(value, list):
        return tuple(_restored(item) for item in value)
    return value
