"""What every test runs with: checked signatures, one thread, no screen, the same examples each time."""

import sys

import matplotlib
import signatures
import threadpoolctl
import torch
from hypothesis import settings

if any(name == "provenn" or name.startswith("provenn.") for name in sys.modules):
    raise RuntimeError("provenn was imported before its signatures could be checked")
signatures.install("provenn")

torch.set_num_threads(1)
threadpoolctl.threadpool_limits(1)  # NumPy's threads, which would spin on small arrays
matplotlib.use("Agg")
settings.register_profile("provenn", derandomize=True, deadline=None, database=None)
settings.load_profile("provenn")
