"""Functions behind the searches: parts whose public name is ``provenn.search.acquisition.<name>``."""

from provenn.catalog.namespace import lazy_parts

__getattr__, __dir__ = lazy_parts(__name__)
