"""A module that does not import."""

raise_it = 1 / 0
