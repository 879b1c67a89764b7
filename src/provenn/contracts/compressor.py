"""The suite of compressors. Every count is made here, from shapes, and by no counter that a compressor uses."""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from provenn.contracts._reports import expect_frozen, expect_json_round_trip
from provenn.contracts.case import CompressorCase, Inputs
from provenn.contracts.suite import check_part, expect
from provenn.contracts.watch import (
    differences,
    error_between,
    generator,
    model_state,
    plain_signatures,
    seeded,
    tensors_in,
    unsettle,
)


class _Products(TorchDispatchMode):
    """Counts the multiply-accumulates of matrix products, convolutions and attention from their shapes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name in ("mm", "bmm"):
            self.total += prod(args[0].shape) * args[1].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.total += prod(args[1].shape) * args[2].shape[-1]
        elif name == "convolution":
            transposed = args[6]
            per_element = prod(args[1].shape[1:])
            self.total += (prod(args[0].shape) if transposed else prod(out.shape)) * per_element
        elif name.startswith("_scaled_dot_product"):
            query, key, value = args[:3]
            self.total += prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        return out


def evaluate(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Return the outputs in eval mode, without gradients; the modes of the model's parts are put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            return tensors_in(model.eval()(*inputs))
    finally:
        for module, mode in modes.items():
            module.training = mode


def count(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Count a model's parameters, those that are not zero, multiply-accumulates of one call, and bytes."""
    with _Products() as products:
        evaluate(model, inputs)
    held = [*model.parameters(), *model.buffers()]
    return {
        "params": sum(prod(p.shape) for p in model.parameters()),
        "nonzero": sum(int((p != 0).sum()) for p in model.parameters()),
        "macs": products.total,
        "bytes": sum(prod(t.shape) * t.element_size() for t in held),
    }


def _model(case: CompressorCase) -> nn.Module:
    with seeded(0):
        return case.model()


def _compress(case: CompressorCase, model: nn.Module) -> tuple[nn.Module, Any]:
    with seeded(1):
        found = case.compress(case.make(), model)
    expect(isinstance(found, tuple) and len(found) == 2, f"it returned {type(found).__name__}, not model and report")
    expect(isinstance(found[0], nn.Module), f"the model returned is a {type(found[0]).__name__}")
    return found


def _inputs(case: CompressorCase) -> Inputs:
    return case.example_inputs(generator(2))


def exercise(case: CompressorCase) -> Callable[[], object]:
    """Return a call that compresses the case's model."""
    model = _model(case)
    return lambda: case.compress(case.make(), model)


def check_original_untouched(case: CompressorCase) -> None:
    """The original keeps its values, gradients, flags, modes and hooks, and shares no storage with the output."""
    model = unsettle(_model(case))
    before = model_state(model)
    smaller, _ = _compress(case, model)
    changed = differences(before, model_state(model))
    expect(not changed, f"{', '.join(changed)} changed")
    with torch.no_grad():
        for tensor in (*smaller.parameters(), *smaller.buffers()):
            tensor.zero_()
    changed = differences(before, model_state(model))
    expect(not changed, f"zeroing the output also changed the original's {', '.join(changed)}")


def check_budget_met(case: CompressorCase) -> None:
    """What is left of the original, counted here, is within the budget."""
    inputs, model = _inputs(case), _model(case)
    original = count(model, inputs)
    left = count(_compress(case, model)[0], inputs)
    expect(case.budget, "the case has no budget")
    for measure, share in case.budget.items():
        seen = left[measure] / original[measure]
        expect(
            seen <= share + 1e-12, f"{measure}: {left[measure]} of {original[measure]} left, the budget is {share:g}"
        )
        expect(seen < 1, f"{measure}: nothing was removed")


def check_report_counts(case: CompressorCase) -> None:
    """The report's params, multiply-accumulates and bytes equal those counted here."""
    inputs = _inputs(case)
    smaller, report = _compress(case, _model(case))
    left = count(smaller, inputs)
    for measure in {"params": 0, "macs": 0, "bytes": 0, **case.budget}:
        read = case.counts.get(measure)
        expect(read or hasattr(report, measure), f"the report has no {measure!r}, and the case's counts neither")
        claimed = read(report) if read else getattr(report, measure)
        expect(claimed == left[measure], f"the report says {measure} {claimed}, counted {left[measure]}")


def check_report_frozen(case: CompressorCase) -> None:
    """The report is frozen, and survives JSON."""
    _, report = _compress(case, _model(case))
    expect_frozen(report)
    expect_json_round_trip(report)


def check_output_works(case: CompressorCase) -> None:
    """The output takes the original's inputs, and gives finite outputs of the same shape and dtype."""
    inputs, model = _inputs(case), _model(case)
    smaller, _ = _compress(case, model)
    found, usual = evaluate(smaller, inputs), evaluate(model, inputs)
    kinds = [[(tuple(t.shape), t.dtype) for t in outputs] for outputs in (found, usual)]
    expect(kinds[0] == kinds[1], f"the outputs are {kinds[0]}, the original's {kinds[1]}")
    expect(all(t.isfinite().all() for t in found), "an output is not finite")


_LOADER = """
import pickle, sys
sys.modules["provenn"] = None
import torch
with open("model.pickle", "rb") as file:
    model, inputs = pickle.load(file)
with torch.no_grad():
    torch.save(model(*inputs), "output.pt")
"""


def check_plain_output(case: CompressorCase) -> None:
    """The output is made of torch's modules alone, and its pickle loads and runs where provenn is not installed."""
    smaller, _ = _compress(case, _model(case))
    smaller.eval()
    own = sorted({type(m).__qualname__ for m in smaller.modules() if not type(m).__module__.startswith("torch.")})
    expect(not own, f"it holds modules that are not torch's: {', '.join(own)}")
    inputs = _inputs(case)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "model.pickle").write_bytes(pickle.dumps((smaller, inputs)))
        command = [sys.executable, "-c", _LOADER]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        expect(done.returncode == 0, f"loading it without provenn failed: {done.stderr.strip()[-300:]}")
        output = torch.load(Path(folder, "output.pt"))
    error = error_between(output, evaluate(smaller, inputs))
    expect(error < 1e-5, f"the loaded output differs by {error:.3g}")


def check_export(case: CompressorCase) -> None:
    """The output goes through torch.export, and gives the same numbers there."""
    smaller, _ = _compress(case, _model(case))
    smaller.eval()
    inputs = _inputs(case)
    with plain_signatures(), torch.no_grad():
        program = torch.export.export(smaller, inputs).module()
        error = error_between(program(*inputs), smaller(*inputs))
    expect(error < 1e-5, f"the exported program's output differs by {error:.3g}")


def check_compress_again(case: CompressorCase) -> None:
    """A compressed model can be compressed again: it works, does not grow, and its first form is left alone."""
    inputs = _inputs(case)
    once, _ = _compress(case, _model(case))
    before, size = model_state(once), count(once, inputs)
    twice, _ = _compress(case, once)
    changed = differences(before, model_state(once))
    expect(not changed, f"compressing again changed {', '.join(changed)} of the first output")
    grown = [name for name in case.budget if count(twice, inputs)[name] > size[name]]
    expect(not grown, f"the second time {', '.join(grown)} grew")
    finite = all(t.isfinite().all() for t in evaluate(twice, inputs))
    expect(finite, "the output of the twice compressed model is not finite")


CHECKS: dict[str, Callable[[CompressorCase], None]] = {
    "original_untouched": check_original_untouched,
    "budget_met": check_budget_met,
    "report_counts": check_report_counts,
    "report_frozen": check_report_frozen,
    "output_works": check_output_works,
    "plain_output": check_plain_output,
    "export": check_export,
    "compress_again": check_compress_again,
}


def check_compressor(case_or_make: CompressorCase | Callable[..., Any], **options: Any) -> None:
    """Hold a compressor to the contract of its kind.

    Args:
        case_or_make: A case, or what builds the compressor; then ``model``, ``example_inputs`` and ``budget`` come
            with the options.
        **options: Fields of :class:`~provenn.contracts.CompressorCase`; ``part`` defaults to the factory's own name.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(CompressorCase, case_or_make, options)
