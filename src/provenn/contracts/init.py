"""The suite of initialisations: functions that set tensors of a module in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from provenn.contracts._statistics import Estimate, expect_means
from provenn.contracts.cases_training import InitCase, Moment
from provenn.contracts.suite import check_part, expect
from provenn.contracts.watch import (
    differences,
    generator,
    is_device_mismatch,
    model_state,
    plain_signatures,
    same,
    seeded,
    tensors_in,
    unsettle,
)

DRAWS = 256
"""Initialisations that the moments are estimated from."""


def _module(case: InitCase, old: int = 11) -> nn.Module:
    """Build the module with other numbers in it than any initialisation would put there."""
    with seeded(0):
        module = case.make()
    source = generator(old)
    with torch.no_grad():
        for tensor in _tensors(module).values():
            if tensor.is_floating_point():
                tensor.copy_(0.25 + torch.rand(tensor.shape, generator=source, dtype=torch.float64))
    return module


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def _values(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(module).items()}


def _initialize(case: InitCase, module: nn.Module, seed: int = 1, outside: int | None = None) -> Any:
    """Initialise with a seeded generator, and torch's global one seeded alike unless ``outside`` says otherwise."""
    with seeded(seed if outside is None else outside):
        return case.initialize(module, generator(seed))


def _initialized(case: InitCase, seed: int = 1, *, outside: int | None = None, old: int = 11) -> dict[str, Tensor]:
    module = _module(case, old)
    _initialize(case, module, seed, outside)
    return _values(module)


def exercise(case: InitCase) -> Callable[[], object]:
    """Return a call that initialises the case's module."""
    module = _module(case)
    source = generator(1)
    return lambda: case.initialize(module, source)


def check_returns_module(case: InitCase) -> None:
    """The module that was given is returned."""
    module = _module(case)
    found = _initialize(case, module)
    expect(found is module, f"it returned a {type(found).__name__}{' (a copy)' if type(found) is type(module) else ''}")


def check_in_place(case: InitCase) -> None:
    """Parameters and buffers stay the same objects, with the same storage, shape and strides."""
    module = _module(case)
    before = {name: (id(t), t.data_ptr(), tuple(t.shape), t.stride()) for name, t in _tensors(module).items()}
    _initialize(case, module)
    after = {name: (id(t), t.data_ptr(), tuple(t.shape), t.stride()) for name, t in _tensors(module).items()}
    changed = differences(before, after)
    expect(not changed, f"{', '.join(changed)} came, went, or was replaced")


def check_promised_tensors(case: InitCase) -> None:
    """The tensors that the case names are set, and no other one is."""
    module = _module(case)
    before = _values(module)
    unknown = sorted(set(case.changes) - before.keys())
    expect(case.changes and not unknown, f"the case's changes {unknown or case.changes} are no tensors of the module")
    _initialize(case, module)
    changed = set(differences(before, _values(module)))
    expect(changed <= set(case.changes), f"{', '.join(sorted(changed - set(case.changes)))} changed")
    expect(changed >= set(case.changes), f"{', '.join(sorted(set(case.changes) - changed))} did not change")


def check_seed(case: InitCase) -> None:
    """The same seed gives the same values bit by bit."""
    changed = differences(_initialized(case), _initialized(case))
    expect(not changed, f"a second time {', '.join(changed)} differ")


def check_random(case: InitCase) -> None:
    """Another seed gives other values."""
    expect(differences(_initialized(case, 1), _initialized(case, 2)), "two seeds gave the same values")


def check_generator(case: InitCase) -> None:
    """Given a generator, the part draws from that one, and does not touch torch's global one."""
    changed = differences(_initialized(case, outside=5), _initialized(case, outside=6))
    expect(not changed, f"{', '.join(changed)} depend on torch's global generator")
    module, source = _module(case), generator(1)
    with seeded(0):
        before = torch.random.get_rng_state()
        case.initialize(module, source)
        expect(same(before, torch.random.get_rng_state()), "torch's global generator was drawn from")
    moved = not same(source.get_state(), generator(1).get_state())
    expect(moved or not case.random, "the generator's state did not move on: a second tensor would get equal values")


def check_forgets(case: InitCase) -> None:
    """What was in the tensors before has no effect on what is in those set."""
    one, other = _initialized(case, old=11), _initialized(case, old=12)
    changed = set(differences(one, other)) & set(case.changes)
    expect(not changed, f"from other old values {', '.join(sorted(changed))} got other new ones")


def check_moments(case: InitCase) -> None:
    """Mean, standard deviation and bound of every tensor are those stated, within sampling error."""
    stated = case.moments()
    unknown = sorted(set(stated) - set(case.changes))
    expect(stated and not unknown, f"the case states moments of {unknown or 'nothing'}, which is not in its changes")
    module = _module(case)
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in stated}
    for draw in range(DRAWS):
        _initialize(case, module, 100 + draw)
        held = _tensors(module)
        for name, moment in stated.items():
            found[name].append(_summary(held[name], moment))
    estimates = {}
    for name, moment in stated.items():
        means, squares, largest = (torch.stack(column) for column in zip(*found[name], strict=True))
        estimates[f"mean of {name}"] = Estimate(means[:, None], torch.tensor([moment.mean]))
        variance = torch.tensor([moment.std], dtype=torch.float64) ** 2
        estimates[f"variance of {name}"] = Estimate(squares[:, None], variance)
        bound = moment.largest
        within = bound is None or float(largest.max()) <= bound * (1 + 1e-6)
        expect(within, f"{name} holds a {float(largest.max()):.6g}, the bound stated is {bound}")
    expect_means(estimates)


def _summary(tensor: Tensor, moment: Moment) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean, the mean square around the stated mean, and the largest magnitude."""
    values = tensor.detach().double()
    return values.mean(), (values - moment.mean).square().mean(), values.abs().max()


def check_dtype(case: InitCase) -> None:
    """Every tensor keeps its dtype: in double precision and in bfloat16."""
    for dtype in (torch.float64, torch.bfloat16):
        module = _module(case).to(dtype)
        before = {name: tensor.dtype for name, tensor in _tensors(module).items()}
        _initialize(case, module)
        changed = differences(before, {name: tensor.dtype for name, tensor in _tensors(module).items()})
        expect(not changed, f"in {dtype} {', '.join(changed)} changed dtype")
        bad = [name for name, tensor in _tensors(module).items() if not tensor.isfinite().all()]
        expect(not bad, f"in {dtype} {', '.join(bad)} are not finite")


def check_device(case: InitCase) -> None:
    """Every tensor stays on its device: a GPU, or torch's meta device where there is none."""
    device = "cuda" if torch.cuda.is_available() else "meta"
    module = _module(case).to(device)
    source = torch.Generator("cuda" if device == "cuda" else "cpu").manual_seed(0)
    try:
        with seeded(0):
            case.initialize(module, source)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        # values cannot be read on the meta device: a part that reads them is only checked on a GPU
        expect(device == "meta" and not is_device_mismatch(error), f"on {device}: {error}")
        return
    away = [name for name, tensor in _tensors(module).items() if tensor.device.type != device]
    expect(not away, f"{', '.join(away)} left {device}")


def check_autograd(case: InitCase) -> None:
    """No graph is recorded, with gradients enabled or not; flags, gradients, modes and hooks stay as they were."""
    module = unsettle(_module(case))
    values = ("parameter ", "buffer ", "storage of ")
    before = {name: value for name, value in model_state(module).items() if not name.startswith(values)}
    returned = _initialize(case, module)
    changed = differences(before, {n: value for n, value in model_state(module).items() if not n.startswith(values)})
    expect(not changed, f"{', '.join(changed)} changed")
    held = {**_tensors(module), **{f"returned tensor {i}": t for i, t in enumerate(tensors_in(returned))}}
    recorded = [name for name, tensor in held.items() if tensor.grad_fn is not None]
    expect(not recorded, f"{', '.join(recorded)} carry an autograd graph")
    with plain_signatures(), torch.no_grad():
        case.initialize(module, generator(1))


CHECKS: dict[str, Callable[[InitCase], None]] = {
    "returns_module": check_returns_module,
    "in_place": check_in_place,
    "promised_tensors": check_promised_tensors,
    "seed": check_seed,
    "random": check_random,
    "generator": check_generator,
    "forgets": check_forgets,
    "moments": check_moments,
    "dtype": check_dtype,
    "device": check_device,
    "autograd": check_autograd,
}


def check_init(case_or_initialize: InitCase | Callable[[nn.Module, torch.Generator], Any], **options: Any) -> None:
    """Hold an initialisation to the contract of its kind.

    Args:
        case_or_initialize: A case, or what initialises a module by a generator; then ``make``, ``changes`` and
            ``moments`` come with the options.
        **options: Fields of :class:`~provenn.contracts.InitCase`; ``part`` defaults to the function's own name.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(InitCase, case_or_initialize, options)
