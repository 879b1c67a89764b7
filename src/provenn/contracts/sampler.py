"""The suite of samplers: seeds, shapes, and moments within sampling error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from provenn.contracts._statistics import Estimate, expect_independent, expect_means
from provenn.contracts.cases_results import SamplerCase
from provenn.contracts.suite import check_part, expect
from provenn.contracts.watch import differences, generator, model_state, same, seeded, unsettle


def _make(case: SamplerCase) -> Any:
    with seeded(0):
        return case.make()


def _sample(case: SamplerCase, count: int, *, seed: int | None = 0, outside: int = 0, sampler: Any = None) -> Any:
    """Sample with a seeded generator, or with none; ``outside`` seeds torch's global one."""
    maker = _make(case) if sampler is None else sampler
    with seeded(outside):
        return case.sample(maker, count, None if seed is None else generator(seed))


def exercise(case: SamplerCase) -> Callable[[], object]:
    """Return a call that builds the sampler and draws from it."""
    source = generator(0)
    return lambda: case.sample(case.make(), 4, source)


def check_shape(case: SamplerCase) -> None:
    """n samples are n rows of the stated shape, for n of 1 and more."""
    for count in (1, 2, 7):
        found = _sample(case, count)
        expect(isinstance(found, Tensor), f"it is a {type(found).__name__}")
        wanted = (count, *case.shape)
        expect(tuple(found.shape) == wanted, f"{count} samples have the shape {tuple(found.shape)}, not {wanted}")


def check_finite(case: SamplerCase) -> None:
    """Every sample is finite."""
    finite = _sample(case, case.count).isfinite()
    expect(finite.all(), f"{int((~finite).sum())} of {finite.numel()} entries are not")


def check_detached(case: SamplerCase) -> None:
    """Samples carry no autograd graph."""
    found = _sample(case, 3)
    expect(not found.requires_grad, "they require a gradient")


def check_empty(case: SamplerCase) -> None:
    """No samples are an empty tensor of the stated shape and the usual dtype."""
    found, usual = _sample(case, 0), _sample(case, 2)
    expect(tuple(found.shape) == (0, *case.shape), f"0 samples have the shape {tuple(found.shape)}")
    expect(found.dtype == usual.dtype, f"0 samples are of {found.dtype}, 2 of {usual.dtype}")


def check_seed(case: SamplerCase) -> None:
    """The same generator gives the same samples bit by bit, whatever torch's global seed; another gives others."""
    first = _sample(case, 5, outside=1)
    for outside in (1, 2):
        same_again = same(first, _sample(case, 5, outside=outside))
        expect(same_again, f"two calls differ (torch's global seeds 1 and {outside})")
    expect(not same(first, _sample(case, 5, seed=1)), "two seeds gave the same samples")


def check_generator(case: SamplerCase) -> None:
    """The generator that is given moves on, so that the next call gives other samples; the global one stays."""
    sampler, source = _make(case), generator(0)
    with seeded(0):
        before = torch.random.get_rng_state()
        first, second = case.sample(sampler, 5, source), case.sample(sampler, 5, source)
        expect(same(before, torch.random.get_rng_state()), "torch's global generator was drawn from")
    expect(not same(source.get_state(), generator(0).get_state()), "the generator's state did not move on")
    expect(not same(first, second), "two calls in a row gave the same samples")
    expect(same(first, _sample(case, 5, sampler=sampler)), "a sampler that was used before gives other samples")


def check_default_generator(case: SamplerCase) -> None:
    """Without a generator it draws from torch's global one."""
    expect(same(_sample(case, 5, seed=None), _sample(case, 5, seed=None)), "torch's global seed does not decide")
    sampler = _make(case)
    with seeded(0):
        first, second = (case.sample(sampler, 5, None) for _ in range(2))
    expect(not same(first, second), "two calls in a row gave the same samples")
    expect(not same(first, _sample(case, 5, seed=None, outside=1)), "two global seeds gave the same samples")


def _calls(case: SamplerCase) -> list[Tensor]:
    sampler, source = _make(case), generator(0)
    with seeded(0):
        return [case.sample(sampler, case.count, source) for _ in range(case.calls)]


def check_expectations(case: SamplerCase) -> None:
    """Means, second moments and what else is known of the law hold within sampling error."""
    expect(case.expectations, "the case knows nothing of the law")
    calls = _calls(case)
    estimates = {}
    for known in case.expectations:
        rows = torch.stack([known.of(samples).double().mean(dim=0) for samples in calls])
        wanted = known.value()
        expect(rows[0].shape == wanted.shape, f"{known.name} is of shape {tuple(wanted.shape)} in the case")
        estimates[known.name] = Estimate(rows.flatten(1), wanted.flatten(), known.bias)
    expect_means(estimates)


def check_independent(case: SamplerCase) -> None:
    """The samples of a call are independent of one another, as far as their means can tell."""
    numbers = torch.stack([samples.double().flatten(1) for samples in _calls(case)])
    expect_independent("the samples", numbers)


def check_networks_untouched(case: SamplerCase) -> None:
    """Networks that the sampler holds keep their values, buffers, gradients, flags, modes and hooks."""
    sampler = _make(case)
    held = {name: value for name, value in getattr(sampler, "__dict__", {}).items() if isinstance(value, nn.Module)}
    networks = {"the sampler": sampler} if isinstance(sampler, nn.Module) else held
    for network in networks.values():
        unsettle(network)
    before = {name: model_state(network) for name, network in networks.items()}
    _sample(case, 3, sampler=sampler)
    for name, network in networks.items():
        changed = differences(before[name], model_state(network))
        expect(not changed, f"of {name} {', '.join(changed)} changed")


CHECKS: dict[str, Callable[[SamplerCase], None]] = {
    "shape": check_shape,
    "finite": check_finite,
    "detached": check_detached,
    "empty": check_empty,
    "seed": check_seed,
    "generator": check_generator,
    "default_generator": check_default_generator,
    "expectations": check_expectations,
    "independent": check_independent,
    "networks_untouched": check_networks_untouched,
}


def check_sampler(case_or_make: SamplerCase | Callable[..., Any], **options: Any) -> None:
    """Hold a sampler to the contract of its kind.

    Args:
        case_or_make: A case, or what builds the sampler; then ``shape`` and ``expectations`` come with the options.
        **options: Fields of :class:`~provenn.contracts.SamplerCase`; ``part`` defaults to the factory's own name.

    Raises:
        ContractError: At least one check fails; the message lists all that do.
    """
    check_part(SamplerCase, case_or_make, options)
