"""The suite of probes: they look, and touch nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from provenn.contracts._reports import expect_close, expect_frozen, expect_json_round_trip, expect_plot
from provenn.contracts.case import ProbeCase
from provenn.contracts.suite import check_part, expect
from provenn.contracts.watch import (
    differences,
    generator,
    interrupt,
    model_state,
    plain_signatures,
    random_state,
    same,
    seeded,
    tensors_in,
    unsettle,
)


def _model(case: ProbeCase) -> nn.Module:
    with seeded(0):
        return case.model()


def _report(case: ProbeCase, model: nn.Module | None = None) -> Any:
    with seeded(1):
        return case.run(_model(case) if model is None else model, case.data(generator(0)))


def exercise(case: ProbeCase) -> Callable[[], object]:
    """Return a call that runs the probe."""
    model, data = _model(case), case.data(generator(0))
    return lambda: case.run(model, data)


def check_model_restored(case: ProbeCase) -> None:
    """The model's values, gradients, flags, modes, hooks and attributes are left as they were found."""
    model = unsettle(_model(case))
    before = model_state(model)
    _report(case, model)
    changed = differences(before, model_state(model))
    expect(not changed, f"{', '.join(changed)} changed")


def check_model_restored_after_error(case: ProbeCase) -> None:
    """The model is left as it was found also when it raises midway: in its first or in its second call."""
    for calls in (0, 1):
        model = unsettle(_model(case))
        interrupt(model, calls)
        before = model_state(model)
        try:
            _report(case, model)
        except Exception:
            changed = differences(before, model_state(model))
            expect(not changed, f"after an error in call {calls + 1} of the last layer {', '.join(changed)} changed")
        else:
            expect(calls, "the probe never calls the model's last layer, or hides its errors")


def check_random_state(case: ProbeCase) -> None:
    """The random number generators of torch, numpy and Python are left as they were found."""
    model, data = _model(case), case.data(generator(0))
    with plain_signatures(), seeded(1):
        before = random_state()
        case.run(model, data)
        changed = differences(before, random_state())
    expect(not changed, f"{', '.join(changed)} changed")


def check_data_untouched(case: ProbeCase) -> None:
    """The data are left as they were given."""
    model, data = _model(case), case.data(generator(0))

    def seen() -> list[tuple[Tensor, bool, bool]]:
        return [(t.detach().clone(), t.requires_grad, t.is_leaf and t.grad is not None) for t in tensors_in(data)]

    before = seen()
    with seeded(1):
        case.run(model, data)
    expect(same(before, seen()), "a tensor of the data changed")


def check_report_frozen(case: ProbeCase) -> None:
    """The report is a frozen Report."""
    expect_frozen(_report(case))


def check_json(case: ProbeCase) -> None:
    """The report comes back from its JSON as it was."""
    expect_json_round_trip(_report(case))


def check_plot(case: ProbeCase) -> None:
    """plot() returns a matplotlib figure, and leaves none open in pyplot."""
    expect_plot(_report(case))


def check_brute_force(case: ProbeCase) -> None:
    """The report equals what the case computes by brute force."""
    report = _report(case)
    with seeded(1):
        expected = case.brute_force(_model(case), case.data(generator(0)))
    expect(expected, "the case's brute_force gives no field")
    for name, value in expected.items():
        expect(hasattr(report, name), f"the report has no field {name!r}")
        expect_close(name, getattr(report, name), value, case.tolerance)


CHECKS: dict[str, Callable[[ProbeCase], None]] = {
    "model_restored": check_model_restored,
    "model_restored_after_error": check_model_restored_after_error,
    "random_state": check_random_state,
    "data_untouched": check_data_untouched,
    "report_frozen": check_report_frozen,
    "brute_force": check_brute_force,
    "json": check_json,
    "plot": check_plot,
}


def check_probe(case_or_run: ProbeCase | Callable[[nn.Module, Any], Any], **options: Any) -> None:
    """Hold a probe to the contract of its kind.

    Args:
        case_or_run: A case, or what runs the probe; then ``model``, ``data`` and ``brute_force`` come with the options.
        **options: Fields of :class:`~provenn.contracts.ProbeCase`; ``part`` defaults to the function's own name.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(ProbeCase, case_or_run, options)
