"""Spectrograms as layers: parts whose public name is ``provenn.nn.audio.<name>``."""

from provenn.catalog.namespace import lazy_parts

__getattr__, __dir__ = lazy_parts(__name__)
