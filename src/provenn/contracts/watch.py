"""Watchers: what a part must leave as it found it, snapshots of it, and differences in words."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jaxtyping
import numpy as np
import torch
from torch import Tensor, nn

Snapshot = dict[str, Any]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators inside, and leave them as they were."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def generator(seed: int) -> torch.Generator:
    """Return a seeded generator on the CPU."""
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def plain_signatures() -> Iterator[None]:
    """Switch run-time checking of signatures off inside: the part runs as it does for a user."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@contextlib.contextmanager
def captured_output() -> Iterator[list[str]]:
    """Collect what is written inside to Python's streams and to file descriptors 1 and 2; warnings are dropped."""
    texts: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        saved = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield texts
        finally:
            file.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)
            file.seek(0)
            texts.append(file.read())


def random_state() -> Snapshot:
    """Return the state of every global random number generator."""
    return {
        "torch's random state": torch.random.get_rng_state(),
        "torch's CUDA random state": tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else (),
        **_other_random_state(),
    }


def _other_random_state() -> Snapshot:
    _, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global generator is what is watched
    return {"numpy's random state": (np.asarray(keys), tuple(rest)), "Python's random state": random.getstate()}


def global_state() -> Snapshot:
    """Return the process-wide state that no part may change; torch's random state may advance and is not in it."""
    return {
        **_other_random_state(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of threads": torch.get_num_threads(),
        "number of inter-op threads": torch.get_num_interop_threads(),
        "gradient mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic warnings": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn flags": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "matmul precision": torch.get_float32_matmul_precision(),
        "numpy's error handling": np.geterr(),
        "numpy's print options": {key: str(value) for key, value in np.get_printoptions().items()},
        "warning filters": tuple(warnings.filters),
        "environment variables": dict(os.environ),
        "working directory": os.getcwd(),
    }


_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def model_state(model: nn.Module) -> Snapshot:
    """Return everything that a model holds: values, gradients, flags, modes, hooks and attributes of every module."""
    state: Snapshot = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[f"parameter {name}"] = parameter.detach().clone()
        state[f"storage of parameter {name}"] = parameter.data_ptr()
        state[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.detach().clone()
        state[f"requires_grad of {name}"] = parameter.requires_grad
        state[f"hooks on {name}"] = tuple(parameter._backward_hooks or ())
    for name, buffer in model.named_buffers(remove_duplicate=False):
        state[f"buffer {name}"] = buffer.detach().clone()
    for name, module in model.named_modules(remove_duplicate=False):
        where = name or "the model"
        state[f"type of {where}"] = type(module)
        state[f"mode of {where}"] = module.training
        state[f"attributes of {where}"] = sorted(vars(module))
        for hooks in _HOOKS:
            state[f"{hooks[1:].replace('_', ' ')} of {where}"] = tuple(getattr(module, hooks))
    return state


def differences(before: Snapshot, after: Snapshot) -> list[str]:
    """Return in words the entries of two snapshots that differ."""
    return sorted(name for name in before.keys() | after.keys() if not same(before.get(name), after.get(name)))


def same(first: Any, second: Any) -> bool:
    """Return whether two values are equal bit by bit: tensors, arrays, containers, dataclasses, plain values."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return (
            isinstance(first, Tensor)
            and isinstance(second, Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and bool(torch.eq(first, second).logical_or(first.isnan() & second.isnan()).all())
        )
    if type(first) is not type(second):
        return False
    if isinstance(first, np.ndarray):
        return bool(np.array_equal(first, second, equal_nan=first.dtype.kind in "fc"))
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        return all(same(getattr(first, f.name), getattr(second, f.name)) for f in dataclasses.fields(first))
    return bool(first == second) or (first != first and second != second)


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in an output, in order: tuples, lists, dicts and dataclasses are opened."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [tensor for f in dataclasses.fields(value) for tensor in tensors_in(getattr(value, f.name))]
    return []


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the inputs with every tensor in them changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {key: mapped(item, change) for key, item in value.items()}
    return value


def error_between(first: Any, second: Any) -> float:
    """Return the largest error of one output against another, relative to ``max(1, largest magnitude)``.

    Infinity, if they differ in number, in shape, or in where they are not finite.
    """
    one, other = tensors_in(first), tensors_in(second)
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf")
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
        a, b = a.detach().cpu().to(wide), b.detach().cpu().to(wide)
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite) or not same(a[~finite], b[~finite]):
            return float("inf")
        if finite.any():
            a, b = a[finite], b[finite]
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1.0)))
    return worst


def is_device_mismatch(error: Exception) -> bool:
    """Return whether torch complains of tensors on different devices."""
    return "expected device" in str(error) or "same device" in str(error)


def unsettle(model: nn.Module) -> nn.Module:
    """Bring a model into a state that careless code does not restore: mixed modes, a gradient, a frozen parameter."""
    model.train()
    leaves = [module for module in model.modules() if not any(module.children())]
    leaves[-1].eval()
    parameters = list(model.parameters())
    for parameter in parameters[:1]:
        parameter.grad = torch.full_like(parameter, 0.5)
    if len(parameters) > 2:
        parameters[-1].requires_grad_(False)
    return model


class InterruptionError(Exception):
    """Raised inside a model, midway through what a part does with it."""


def interrupt(model: nn.Module, calls: int) -> None:
    """Make the model's last layer raise after so many calls."""
    last = [module for module in model.modules() if not any(module.children())][-1]
    forward, left = last.forward, [calls]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if left[0] == 0:
            raise InterruptionError
        left[0] -= 1
        return forward(*args, **kwargs)

    last.forward = failing
