"""Theory that can be run, one module a paper."""

from provenn.catalog.namespace import lazy_parts

__getattr__, __dir__ = lazy_parts(__name__)
