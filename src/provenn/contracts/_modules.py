"""Checks that the suites of modules and of losses share: both are ``nn.Module`` and are called with tensors."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck

from provenn.contracts.case import Inputs, LossCase, ModuleCase
from provenn.contracts.suite import ContractError, expect
from provenn.contracts.watch import (
    differences,
    error_between,
    generator,
    is_device_mismatch,
    mapped,
    same,
    seeded,
    tensors_in,
)

BATCH = 3
_COMPLEX = {torch.float64: torch.complex128}


def inputs_of(case: ModuleCase | LossCase, dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    """Return the arguments of one call."""
    source = generator(seed)
    return case.inputs(source, dtype, BATCH) if isinstance(case, ModuleCase) else case.inputs(source, dtype)


def build(case: ModuleCase | LossCase, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> nn.Module:
    """Build the part in eval mode and in one precision; complex numbers stay complex."""
    with seeded(seed):
        module = case.make()
    expect(isinstance(module, nn.Module), f"make gave a {type(module).__name__}, which is no nn.Module")
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
        elif tensor.is_complex():
            tensor.data = tensor.data.to(_COMPLEX.get(dtype, torch.complex64))
    return module.eval()


def call(module: Callable[..., Any], inputs: Inputs, seed: int = 0) -> Any:
    """Call the part with torch's generator seeded."""
    with seeded(seed):
        return module(*inputs)


def is_continuous(tensor: Tensor) -> bool:
    """Return whether a tensor can have a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


def with_gradients(inputs: Inputs) -> Inputs:
    """Return copies of the inputs of which the continuous ones require a gradient."""
    return tuple(mapped(inputs, lambda t: t.detach().clone().requires_grad_(is_continuous(t))))


def projection(output: Any) -> Tensor:
    """Return a number that every differentiable element of an output enters with a weight of its own."""
    parts = [t for t in tensors_in(output) if t.requires_grad]
    expect(parts, "no output depends on a parameter or an input by a gradient")
    source = generator(7)
    weights = [torch.rand(t.shape, generator=source, dtype=torch.float64).to(t) + 0.5 for t in parts]
    terms = [(t * w).sum() for t, w in zip(parts, weights, strict=True)]
    return torch.stack([term.real if term.is_complex() else term for term in terms]).sum()


def expect_gradients(module: nn.Module, output: Any, inputs: Sequence[Tensor], where: str) -> None:
    """Expect finite outputs, and finite gradients in every trainable parameter and in the inputs that got one."""
    expect(all(t.isfinite().all() for t in tensors_in(output)), f"{where}: an output is not finite")
    projection(output).backward()  # type: ignore[no-untyped-call, unused-ignore]
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    none = [name for name, p in trainable.items() if p.grad is None]
    expect(not none, f"{where}: no gradient for {', '.join(none)}")
    bad = [name for name, p in trainable.items() if p.grad is not None and not p.grad.isfinite().all()]
    expect(not bad, f"{where}: gradients not finite for {', '.join(bad)}")
    for position, tensor in enumerate(inputs):
        finite = tensor.grad is None or bool(tensor.grad.isfinite().all())
        expect(finite, f"{where}: the gradient of input {position} is not finite")


def expect_gradcheck(module: nn.Module, inputs: Inputs, free: Sequence[Tensor]) -> None:
    """Expect that gradients agree with finite differences, for the parameters and for the ``free`` inputs."""
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    values = [dict(module.named_parameters())[name].detach().clone().requires_grad_() for name in names]

    def evaluate(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors[len(names) :])
        arguments = mapped(inputs, lambda t: next(given) if any(t is one for one in free) else t)
        with seeded(0):
            output = torch.func.functional_call(module, dict(zip(names, tensors, strict=False)), tuple(arguments))
        return tuple(t for t in tensors_in(output) if t.requires_grad)

    points = (*values, *free)
    expect(evaluate(*points), "no output depends on a parameter or an input by a gradient")
    try:
        gradcheck(evaluate, points, fast_mode=True)
    except GradcheckError as error:
        raise ContractError(str(error).strip().split("\n\n")[0]) from error


def check_state_dict(case: ModuleCase | LossCase) -> None:
    """A fresh part that loads the state_dict, also from a file, gives the same output bit by bit."""
    module, inputs = build(case), inputs_of(case)
    expected = call(module, inputs)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    for state, what in ((module.state_dict(), "state_dict"), (torch.load(file, weights_only=True), "saved state_dict")):
        other = build(case, seed=1)
        other.load_state_dict(state)
        expect(_equal(call(other, inputs), expected), f"after loading the {what} the output differs")


def check_copies(case: ModuleCase | LossCase) -> None:
    """A deep copy and a pickled copy give the same output, and share no storage with the original."""
    module, inputs = build(case), inputs_of(case)
    expected = call(module, inputs)
    own = {t.data_ptr() for t in (*module.parameters(), *module.buffers()) if t.numel()}
    for other, what in ((copy.deepcopy(module), "deep"), (pickle.loads(pickle.dumps(module)), "pickled")):
        expect(_equal(call(other, inputs), expected), f"the output of the {what} copy differs")
        shared = own & {t.data_ptr() for t in (*other.parameters(), *other.buffers()) if t.numel()}
        expect(not shared, f"the {what} copy shares storage with the original")


def _equal(first: Any, second: Any) -> bool:
    return same([t.detach() for t in tensors_in(first)], [t.detach() for t in tensors_in(second)])


def check_inputs_untouched(case: ModuleCase | LossCase) -> None:
    """A call with its backward pass changes neither its inputs nor any requires_grad flag."""
    module, inputs = build(case), inputs_of(case)
    flags = {name: p.requires_grad for name, p in module.named_parameters()}
    given = tensors_in(inputs)
    before = {f"input {i}": (t.detach().clone(), t.requires_grad) for i, t in enumerate(given)}
    output = call(module, inputs)
    if any(t.requires_grad for t in tensors_in(output)):
        projection(output).backward()  # type: ignore[no-untyped-call, unused-ignore]
    after = {f"input {i}": (t.detach(), t.requires_grad) for i, t in enumerate(given)}
    changed = differences(before, after)
    expect(not changed, f"{', '.join(changed)} changed")
    expect(flags == {name: p.requires_grad for name, p in module.named_parameters()}, "a requires_grad flag changed")


def _expect_no_default_device(module: nn.Module, inputs: Inputs, expected: Any) -> None:
    # What is made without a device goes to the meta device here, where it has no values to compute with.
    with torch.device("meta"):
        try:
            output = call(module, inputs)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            raise ContractError(f"something is made on torch's default device, not the inputs': {error}") from error
    away = [t for t in tensors_in(output) if t.is_meta]
    expect(not away, "an output is made on torch's default device, not the inputs'")
    difference = error_between(output, expected)
    expect(difference < 1e-8, f"with another default device the output is off by {difference:.3g}")


def check_device(case: ModuleCase | LossCase) -> None:
    """It runs on the device of its inputs, not the default one: on a GPU, or on torch's meta device without one."""
    device = "cuda" if torch.cuda.is_available() else "meta"
    module, inputs = build(case), inputs_of(case)
    expected = call(module, inputs)
    _expect_no_default_device(module, inputs, expected)
    moved = tuple(mapped(with_gradients(inputs), lambda t: t.detach().to(device).requires_grad_(t.requires_grad)))
    try:
        output = call(module.to(device), moved)
        if any(t.requires_grad for t in tensors_in(output)):
            torch.stack([t.abs().sum() for t in tensors_in(output) if t.requires_grad]).sum().backward()
    except (RuntimeError, NotImplementedError, ValueError) as error:
        # values cannot be read on the meta device: a part that reads them is only checked on a GPU
        expect(device == "meta" and not is_device_mismatch(error), f"on {device}: {error}")
        return
    away = [str(t.device) for t in tensors_in(output) if t.device.type != device]
    expect(not away, f"for inputs on {device} an output is on {', '.join(away)}")
    if device == "cuda":
        difference = error_between(output, expected)
        expect(difference < 1e-8, f"the output on the GPU is off by {difference:.3g}")
