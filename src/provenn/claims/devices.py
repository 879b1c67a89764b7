"""Where cells can run."""

from __future__ import annotations

from provenn.claims.errors import UsageError


def check_device(device: str) -> None:
    """Check that a device is one of this machine's, before anything runs there.

    Raises:
        UsageError: It is no ``cpu``, ``cuda`` or ``cuda:N``, or torch does not see it.
    """
    import torch

    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices")
