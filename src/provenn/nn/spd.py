"""Geometry of symmetric positive definite matrices: parts whose public name is ``provenn.nn.spd.<name>``."""

from provenn.catalog.namespace import lazy_parts

__getattr__, __dir__ = lazy_parts(__name__)
