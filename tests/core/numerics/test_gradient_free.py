"""The base of gradient-free optimizers: counts, seeds, bad losses, closures that want gradients, and resuming."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from provenn.core.numerics.gradient_free import (
    Evaluations,
    GradientFreeOptimizer,
    NonFiniteLossError,
    layerwise_difference,
    restoring_difference,
)
from provenn.core.numerics.zeroth_order import SeededDirection, finite_difference


class Walk(GradientFreeOptimizer):
    """Moves by a draw, and looks at the loss twice."""

    def __init__(self, params, lr=1.0, generator=None, model=None):
        super().__init__(params, {"lr": lr}, generator, model)

    def _take_step(self, loss):
        if not math.isfinite(float(loss()) + float(loss())):
            raise NonFiniteLossError("it was bad")
        SeededDirection(self.tensors, self.draw_seed("walk")).add_(self.param_groups[0]["lr"])


def walk(seed=0, **options):
    return Walk([nn.Parameter(torch.zeros(3))], generator=torch.Generator().manual_seed(seed), **options)


def trajectory(optimizer, steps):
    found = []
    for _ in range(steps):
        optimizer.step(lambda: 0.5)
        found.append(optimizer.tensors[0].detach().clone())
    return torch.stack(found)


def test_seed_decides_the_draws_and_steps_differ():
    assert torch.equal(trajectory(walk(1), 4), trajectory(walk(1), 4))
    assert not torch.equal(trajectory(walk(1), 4), trajectory(walk(2), 4))
    moves = trajectory(walk(1), 5).diff(dim=0)
    assert len(moves.unique(dim=0)) == 4


def test_without_a_generator_the_global_one_gives_the_seed_once():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        one = Walk([nn.Parameter(torch.zeros(3))])
        before = torch.random.get_rng_state()
        trajectory(one, 3)
        assert torch.equal(before, torch.random.get_rng_state())
        torch.manual_seed(3)
        assert Walk([nn.Parameter(torch.zeros(3))]).seed == one.seed
        assert Walk([nn.Parameter(torch.zeros(3))]).seed != one.seed


def test_queries_steps_and_first_loss_are_kept():
    optimizer, values = walk(), iter(range(10))
    assert optimizer.step(lambda: float(next(values))) == 0.0
    assert optimizer.step(lambda: torch.tensor(float(next(values)))) == torch.tensor(2.0)
    assert (optimizer.steps, optimizer.queries, optimizer.skipped) == (2, 4, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_losses_skip_steps_and_ten_in_a_row_end_it(bad):
    optimizer = walk()
    for _ in range(3):
        for _ in range(9):
            optimizer.step(lambda: bad)
        optimizer.step(lambda: 0.0)  # a good one starts the count anew
    assert optimizer.skipped == 27
    for _ in range(9):
        optimizer.step(lambda: bad)
    with pytest.raises(RuntimeError, match="10 steps in a row"):
        optimizer.step(lambda: bad)
    assert optimizer.steps == 40


def test_a_closure_that_calls_backward_works_and_is_told_once():
    weight = nn.Parameter(torch.ones(2))
    optimizer = Walk([weight])

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="calls backward"):
        assert float(optimizer.step(closure)) == 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not optimizer.step(closure).requires_grad


def test_a_closure_that_builds_a_graph_works_and_is_told():
    weight = nn.Parameter(torch.ones(2))

    def closure():
        with torch.enable_grad():
            return weight.square().sum()

    with pytest.warns(UserWarning, match="builds a graph"):
        assert not Walk([weight]).step(closure).requires_grad


def test_an_error_of_the_closure_is_the_callers():
    def closure():
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        walk().step(closure)


def test_gradients_are_off_in_the_closure():
    seen = []
    Evaluations(lambda: seen.append(torch.is_grad_enabled()) or 0.0)()
    with torch.enable_grad():
        walk().step(lambda: seen.append(torch.is_grad_enabled()) or 0.0)
    assert seen == [False] * 3


def test_the_model_evaluates_within_a_step_and_is_put_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2).eval())
    modes = []
    Walk(model.parameters(), model=model).step(lambda: modes.append([one.training for one in model]) or 0.0)
    assert modes == [[False] * 3] * 2
    assert [one.training for one in model] == [True, True, False]


def test_resumes_copies_and_pickles():
    first = walk(1)
    trajectory(first, 3)
    twins = [copy.deepcopy(first), pickle.loads(pickle.dumps(first)), walk(2)]
    with torch.no_grad():
        twins[2].tensors[0].copy_(first.tensors[0])
    twins[2].load_state_dict(copy.deepcopy(first.state_dict()))
    expected = trajectory(first, 3)
    for twin in twins:
        assert (twin.steps, twin.queries) == (3, 6)
        assert torch.equal(trajectory(twin, 3), expected)


def test_counts_of_bad_losses_are_resumed():
    first, second = walk(), walk()
    for _ in range(9):
        first.step(lambda: math.nan)
    second.load_state_dict(first.state_dict())
    assert second.skipped == 9
    with pytest.raises(RuntimeError, match="in a row"):
        second.step(lambda: math.nan)


def test_foreign_states_and_parameters_are_refused():
    with pytest.raises(ValueError, match="state_dict"):
        walk().load_state_dict(torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1).state_dict())
    for bad, named in ((torch.zeros(2, dtype=torch.complex64), "complex"), (torch.zeros(4, 3).t(), "contiguous")):
        optimizer = walk()
        with pytest.raises(ValueError, match=named):
            optimizer.add_param_group({"params": [nn.Parameter(bad)]})
        assert len(optimizer.param_groups) == 1


# Differences that put parameters back exactly.


def network():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("way", ["layers", "copy"])
def test_exact_differences_equal_the_moving_one_and_restore_every_bit(way, two_sided):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = network(), torch.randn(4, 5)
    model.double()
    x = x.double()
    direction = SeededDirection(list(model.parameters()), 7)
    before = [one.detach().clone() for one in model.parameters()]

    def loss():
        return model(x).square().mean()

    def differentiate(**options):
        if way == "layers":
            return layerwise_difference(loss, model, direction, 1e-3, two_sided, **options)
        return restoring_difference(loss, direction, 1e-3, two_sided, **options)

    found = differentiate()
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    expected = finite_difference(loss, direction, 1e-3, two_sided)
    assert found.derivative == pytest.approx(expected.derivative, rel=1e-9)
    assert found.ahead == pytest.approx(expected.ahead, rel=1e-12)
    assert found.behind == pytest.approx(expected.behind, rel=1e-12)
    if not two_sided:
        assert differentiate(base=found.behind) == pytest.approx(found)


def test_the_copy_is_put_back_when_the_loss_raises():
    weight = nn.Parameter(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    before, calls = weight.detach().clone(), iter([1.0])

    def loss():
        return next(calls)  # the second call raises

    with pytest.raises(StopIteration):
        restoring_difference(loss, SeededDirection([weight], 1), 1e-1)
    assert torch.equal(before, weight)


def test_a_step_that_is_not_positive_is_refused():
    model = network()
    direction = SeededDirection(list(model.parameters()), 7)
    with pytest.raises(ValueError, match="step"):
        layerwise_difference(lambda: 0.0, model, direction, 0.0)
