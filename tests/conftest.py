"""What every test runs with: checked signatures, one thread, no screen, the same examples and draws each time."""

import os
import random
import sys

for _threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")  # before NumPy and SciPy load: threads that spin on small arrays cost minutes

import matplotlib
import numpy as np
import pytest
import signatures
import torch
from hypothesis import settings

if any(name == "provenn" or name.startswith("provenn.") for name in sys.modules):
    raise RuntimeError("provenn was imported before its signatures could be checked")
signatures.install("provenn")

torch.set_num_threads(1)
matplotlib.use("Agg")
settings.register_profile("provenn", derandomize=True, deadline=None, database=None)
settings.load_profile("provenn")


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """Seed what draws from global generators, so that no test depends on what ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the global generator is what scikit-learn and SciPy draw from
    torch.manual_seed(0)
