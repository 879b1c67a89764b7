"""Test functions: published optima, BoTorch's own functions, and the scaling."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad

from provenn.core.numerics.objectives import Objective, ackley, branin, hartmann, levy, rosenbrock, six_hump_camel

MADE = {
    "Branin": branin(),
    "Hartmann3": hartmann(3),
    "Hartmann6": hartmann(6),
    "Ackley": ackley(3),
    "Levy": levy(4),
    "Rosenbrock": rosenbrock(3),
    "SixHumpCamel": six_hump_camel(),
}
EVERY = pytest.mark.parametrize(("name", "objective"), MADE.items(), ids=list(MADE))


def points(objective: Objective, count: int, seed: int = 0) -> torch.Tensor:
    low, high = objective.bounds
    draws = torch.rand(count, len(low), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return low + (high - low) * draws


def test_scaling_is_measured_whatever_the_default_device() -> None:
    with torch.device("meta"):  # where what is made without a device would be, without values
        found = hartmann(3)
    assert (found.mean, found.deviation) == (MADE["Hartmann3"].mean, MADE["Hartmann3"].deviation)


@EVERY
def test_agrees_with_botorch(name: str, objective: Objective) -> None:
    functions = pytest.importorskip("botorch.test_functions")
    kind = name.rstrip("36")
    own = {} if kind in ("Branin", "SixHumpCamel") else {"dim": objective.bounds.shape[1]}
    theirs = getattr(functions, kind)(**own)
    x = points(objective, 100)
    # BoTorch keeps its constants in single precision, which is where the tolerance comes from.
    torch.testing.assert_close(objective.published(x), theirs(x).double(), rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(objective.bounds, theirs.bounds.double(), rtol=1e-6, atol=0)
    assert objective.minimum == pytest.approx(theirs._optimal_value, abs=5e-5)  # it is stated to four digits


@EVERY
def test_optimum(name: str, objective: Objective) -> None:
    """At every stated optimum the value is the maximum, the gradient vanishes, and no drawn point is better."""
    values = objective(objective.optimum)
    torch.testing.assert_close(values, torch.full_like(values, objective.maximum), rtol=0, atol=1e-9)
    assert objective(points(objective, 20_000, seed=1)).max() <= objective.maximum + 1e-12
    near = objective.optimum + 1e-3 * points(objective, len(objective.optimum), seed=2).sign()
    assert (objective(near) < values).all()
    if name != "Ackley":  # which has a kink there
        slopes = torch.stack([grad(lambda x: objective(x))(x) for x in objective.optimum])
        assert slopes.abs().max() < 1e-5


@EVERY
def test_unit_spread(name: str, objective: Objective) -> None:
    values = objective(points(objective, 200_000, seed=3))
    assert values.mean().item() == pytest.approx(0, abs=0.02)  # 1/√200000 = 0.002, the Sobol points' own error beside
    assert values.std().item() == pytest.approx(1, abs=0.02)


def test_branin_has_three_equal_optima_and_camel_two() -> None:
    assert len(branin().optimum) == 3
    assert len(six_hump_camel().optimum) == 2


def test_shapes_and_precision() -> None:
    x = torch.rand(4, 5, 6)
    assert hartmann()(x).shape == (4, 5)
    assert hartmann()(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: hartmann(4), "dim"),
        (lambda: rosenbrock(1), "dim"),
        (lambda: ackley(0), "dim"),
        (lambda: branin()(torch.zeros(2, 3)), "points"),
    ],
)
def test_bad_input(call, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        call()
