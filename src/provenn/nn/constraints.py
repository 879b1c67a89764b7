"""Projections of weights onto constraint sets: parts whose public name is ``provenn.nn.constraints.<name>``."""

from provenn.catalog.namespace import lazy_parts

__getattr__, __dir__ = lazy_parts(__name__)
