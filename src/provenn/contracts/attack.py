"""The suite of attacks. Distances, scores and successes are recomputed here, and by nothing that an attack uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from provenn.contracts.case import Inputs
from provenn.contracts.cases_results import AttackCase
from provenn.contracts.suite import check_part, expect
from provenn.contracts.watch import (
    differences,
    error_between,
    generator,
    interrupt,
    mapped,
    model_state,
    same,
    seeded,
    tensors_in,
    unsettle,
)

PRECISIONS = (torch.float32, torch.float64)
_NORMS = {"linf": torch.inf, "l2": 2.0, "l1": 1.0, "l0": 0.0}


@dataclass(frozen=True)
class _Outcome:
    """What an attack gave, and what it was given."""

    model: nn.Module
    inputs: Inputs
    adversarial: Tensor
    success: Tensor
    skipped: Tensor
    state: Tensor


def _model(case: AttackCase, dtype: torch.dtype = torch.float64) -> nn.Module:
    with seeded(0):
        return case.model().to(dtype)


def _inputs(case: AttackCase, dtype: torch.dtype = torch.float64, batch: int | None = None, seed: int = 1) -> Inputs:
    return case.inputs(generator(seed), dtype, case.batch if batch is None else batch)


def _attack(case: AttackCase, model: nn.Module, inputs: Inputs, *, seed: int = 2, outside: int = 0) -> _Outcome:
    """Attack with a seeded generator, and torch's global one seeded by ``outside``."""
    source = generator(seed)
    with seeded(outside):
        result = case.attack(case.make(), model, inputs, source)
    read = (case.adversarial(result), case.succeeded(result), case.skipped(result))
    for name, tensor in zip(("adversarial", "success", "skipped"), read, strict=True):
        expect(isinstance(tensor, Tensor), f"{name} is a {type(tensor).__name__}, which is no tensor")
    return _Outcome(model, inputs, *read, source.get_state())


def _scores(case: AttackCase, model: nn.Module, inputs: Inputs) -> Tensor:
    """Return the scores in eval mode; the modes of the model's parts are put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), seeded(0):
            return case.scores(model.eval(), inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _distances(case: AttackCase, outcome: _Outcome) -> Tensor:
    if not isinstance(case.distance, str):
        return case.distance(outcome.model, outcome.inputs, outcome.adversarial)
    change = (outcome.adversarial.double() - outcome.inputs[0].double()).detach().flatten(1)
    distances: Tensor = torch.linalg.vector_norm(change, _NORMS[case.distance], dim=1)
    return distances


def _mislabelled(case: AttackCase, model: nn.Module, inputs: Inputs, every: int) -> Inputs:
    """Return the inputs with wrong labels: at every sample, or at every other one."""
    scores = _scores(case, model, inputs)
    labels = inputs[1].clone()
    labels[::every] = (scores.argmax(dim=-1)[::every] + 1) % scores.shape[-1]
    return (inputs[0], labels, *inputs[2:])


def _wrong(case: AttackCase, model: nn.Module, inputs: Inputs) -> Tensor:
    """Return for every sample whether the model gets it wrong."""
    wrong: Tensor = _scores(case, model, inputs).argmax(dim=-1) != inputs[1]
    return wrong


def exercise(case: AttackCase) -> Callable[[], object]:
    """Return a call that attacks the case's model."""
    model, inputs, source = _model(case, torch.float32), _inputs(case, torch.float32), generator(2)
    return lambda: case.attack(case.make(), model, inputs, source)


def check_budget(case: AttackCase) -> None:
    """No sample is changed by more than the budget: measured here, in float32 and float64, with three seeds."""
    for dtype in PRECISIONS:
        model = _model(case, dtype)
        for seed in range(3):
            outcome = _attack(case, model, _inputs(case, dtype, seed=seed), seed=seed)
            expect(outcome.adversarial.isfinite().all(), f"in {dtype} it is not finite")
            largest = float(_distances(case, outcome).max())
            rounding = 16 * torch.finfo(dtype).eps * max(1.0, case.budget)
            expect(largest <= case.budget + rounding, f"in {dtype} {largest:.9g} of {case.budget:.9g} was used")


def check_box(case: AttackCase) -> None:
    """Every entry stays within the bounds of the inputs."""
    if case.box is None:
        return
    for dtype in PRECISIONS:
        outcome = _attack(case, _model(case, dtype), _inputs(case, dtype))
        low, high = float(outcome.adversarial.min()), float(outcome.adversarial.max())
        expect(case.box[0] <= low and high <= case.box[1], f"in {dtype} entries from {low:.9g} to {high:.9g}")


def check_success_flag(case: AttackCase) -> None:
    """The flags say what is so: success as recomputed here, one a sample, and never for a skipped sample."""
    model = _model(case)
    plain = _inputs(case)
    for inputs in (plain, _mislabelled(case, model, plain, 2), _inputs(case, seed=5)):
        outcome = _attack(case, model, inputs)
        attacked = (outcome.adversarial, *inputs[1:])
        wanted = case.success(_scores(case, model, attacked), inputs) & ~_wrong(case, model, inputs)
        expect(outcome.success.dtype == torch.bool, f"success is of {outcome.success.dtype}, not of booleans")
        expect(same(outcome.success, wanted), f"success is {outcome.success.tolist()}, recomputed {wanted.tolist()}")


def check_succeeds(case: AttackCase) -> None:
    """On the case's model at least one sample is attacked with success."""
    outcome = _attack(case, _model(case), _inputs(case))
    expect(outcome.success.any(), "no sample was; nothing here can tell a wrong flag from a right one")


def check_misclassified(case: AttackCase) -> None:
    """Samples that the model gets wrong before are flagged as skipped and returned as they are; no others are."""
    model = _model(case)
    plain = _inputs(case)
    for inputs in (plain, _mislabelled(case, model, plain, 2), _mislabelled(case, model, plain, 1)):
        outcome = _attack(case, model, inputs)
        wrong = _wrong(case, model, inputs)
        expect(same(outcome.skipped, wrong), f"skipped is {outcome.skipped.tolist()}, misclassified {wrong.tolist()}")
        expect(same(outcome.adversarial[wrong], inputs[0][wrong]), "a skipped sample was changed")


def check_model_untouched(case: AttackCase) -> None:
    """The model's values, buffers, gradients, flags, modes, hooks and attributes are left as they were found."""
    model = unsettle(_model(case))
    before = model_state(model)
    _attack(case, model, _inputs(case))
    changed = differences(before, model_state(model))
    expect(not changed, f"{', '.join(changed)} changed")


def check_model_restored_after_error(case: AttackCase) -> None:
    """The model is left as it was found also when it raises midway: in its first or in its second call."""
    inputs = _inputs(case)
    for calls in (0, 1):
        model = unsettle(_model(case))
        interrupt(model, calls)
        before = model_state(model)
        try:
            _attack(case, model, inputs)
        except Exception:
            changed = differences(before, model_state(model))
            expect(not changed, f"after an error in call {calls + 1} of the last layer {', '.join(changed)} changed")
        else:
            expect(calls, "the attack never calls the model's last layer, or hides its errors")


def check_evaluation_mode(case: AttackCase) -> None:
    """A model in training mode is attacked as it is in eval mode: the same result bit by bit."""
    found = [_attack(case, _model(case).train(mode), _inputs(case)).adversarial for mode in (True, False)]
    expect(same(*found), f"the results differ by up to {error_between(*found):.3g}")


def check_inputs_untouched(case: AttackCase) -> None:
    """The inputs are left as they were given, and the result shares no storage with them."""
    model = _model(case)
    inputs = _mislabelled(case, model, _inputs(case), 1)
    for given in (_inputs(case), inputs):
        before = [(t.detach().clone(), t.requires_grad) for t in tensors_in(given)]
        outcome = _attack(case, model, given)
        expect(same(before, [(t, t.requires_grad) for t in tensors_in(given)]), "a tensor of the inputs changed")
        outcome.adversarial.fill_(7)
        expect(same(before, [(t, t.requires_grad) for t in tensors_in(given)]), "the result shares storage with them")


def check_result(case: AttackCase) -> None:
    """The result has the inputs' shape, dtype and device, carries no graph, and has one flag a sample."""
    for dtype in PRECISIONS:
        inputs = _inputs(case, dtype)
        outcome = _attack(case, _model(case, dtype), inputs)
        wanted, found = ((t.shape, t.dtype, t.device) for t in (inputs[0], outcome.adversarial))
        expect(found == wanted, f"it is {found}, the inputs are {wanted}")
        expect(not outcome.adversarial.requires_grad, "it requires a gradient")
        for name, flags in (("success", outcome.success), ("skipped", outcome.skipped)):
            expect(flags.shape == inputs[1].shape[:1], f"{name} is of shape {tuple(flags.shape)}")


def check_seed(case: AttackCase) -> None:
    """The same generator gives the same result bit by bit, whatever torch's global seed."""
    model, inputs = _model(case), _inputs(case)
    first = _attack(case, model, inputs, outside=1).adversarial
    for outside in (1, 2):
        again = _attack(case, model, inputs, outside=outside).adversarial
        expect(same(first, again), f"two results differ (torch's global seeds 1 and {outside})")


def check_random(case: AttackCase) -> None:
    """Another generator gives another result, and the generator that was given has moved on."""
    model, inputs = _model(case), _inputs(case)
    one, other = (_attack(case, model, inputs, seed=seed) for seed in (2, 3))
    expect(not same(one.adversarial, other.adversarial), "two seeds gave the same result")
    expect(not same(one.state, generator(2).get_state()), "the generator's state did not move on")


def check_independent_samples(case: AttackCase) -> None:
    """Every sample's result is the same in a batch as alone."""
    model, inputs = _model(case), _inputs(case)
    together = _attack(case, model, inputs)
    for index in range(case.batch):
        alone = _attack(case, model, _row(inputs, index, case.batch))
        error = error_between(alone.adversarial[0], together.adversarial[index])
        expect(error < 1e-6, f"sample {index} alone differs by {error:.3g} from the same sample in the batch")
        expect(alone.success[0] == together.success[index], f"sample {index}'s success differs alone")


def _row(inputs: Inputs, index: int, batch: int) -> Inputs:
    """Return the inputs of one sample; what is not of the batch's size is shared by all."""
    row: Inputs = mapped(inputs, lambda t: t[index : index + 1] if t.dim() and len(t) == batch else t)
    return row


def check_empty_batch(case: AttackCase) -> None:
    """A batch of no samples gives a result of no samples."""
    outcome = _attack(case, _model(case), _inputs(case, batch=0))
    sizes = [len(t) for t in (outcome.adversarial, outcome.success, outcome.skipped)]
    expect(sizes == [0, 0, 0], f"adversarial, success and skipped have {sizes} samples")


CHECKS: dict[str, Callable[[AttackCase], None]] = {
    "budget": check_budget,
    "box": check_box,
    "success_flag": check_success_flag,
    "succeeds": check_succeeds,
    "misclassified": check_misclassified,
    "model_untouched": check_model_untouched,
    "model_restored_after_error": check_model_restored_after_error,
    "evaluation_mode": check_evaluation_mode,
    "inputs_untouched": check_inputs_untouched,
    "result": check_result,
    "seed": check_seed,
    "random": check_random,
    "independent_samples": check_independent_samples,
    "empty_batch": check_empty_batch,
}


def check_attack(case_or_make: AttackCase | Callable[..., Any], **options: Any) -> None:
    """Hold an attack to the contract of its kind.

    Args:
        case_or_make: A case, or what builds the attack; then ``model``, ``inputs`` and ``budget`` come with the
            options.
        **options: Fields of :class:`~provenn.contracts.AttackCase`; ``part`` defaults to the factory's own name.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(AttackCase, case_or_make, options)
