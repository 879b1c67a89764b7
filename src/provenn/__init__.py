"""Published neural-network methods as tested PyTorch parts, each with its paper's claim as an experiment.

Importing :mod:`provenn` loads no torch: the areas (:mod:`provenn.optim`, :mod:`provenn.nn`, ...) load the
module of a part when the part is first asked for.
"""

__version__ = "0.1.0"
