"""The prune loop against loops written out, with training that adds a fixed amount to every weight."""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import optimizer as optimizer_module

from provenn.core.compression.iterative import FixedRatio, IterativePruner, OneShot, PruningReport, _limited, smallest


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    return model


class Training:
    """Shifts every parameter by a fixed draw (the same in every round), and notes what it was given."""

    def __init__(self, size=0.3):
        self.size, self.given, self.grads = size, [], []

    def __call__(self, model):
        draws = torch.Generator().manual_seed(9)
        self.given.append(copy.deepcopy(model.state_dict()))
        self.grads.append([param.grad for param in model.parameters()])
        with torch.no_grad():
            for param in model.parameters():
                param += self.size * torch.randn(param.shape, generator=draws)
            model[1].running_mean += 1
        model(torch.zeros(3, 5)).sum().backward()
        return 0.1 * len(self.given)


def weights(state):
    return {name: state[name] for name in ("0.weight", "2.weight")}


def by_hand(rounds, ratio, scope, rewind, from_dense, size=0.3):
    """Weights given to each training and kept masks, by Python lists of (magnitude, place) sorted anew each round."""
    start = {name: value.clone() for name, value in weights(network().state_dict()).items()}
    draws = torch.Generator().manual_seed(9)
    shifts = {}
    for name, param in network().named_parameters():
        shifts[name] = size * torch.randn(param.shape, generator=draws)
    masks = {name: torch.ones_like(value) for name, value in start.items()}
    held, given, dense = start, [], None
    for turn in range(rounds + 1):
        held = {name: (start if rewind == "init" else held)[name] * masks[name] for name in start}
        given.append({name: value.clone() for name, value in held.items()})
        held = {name: (held[name] + shifts[name]) * masks[name] for name in held}
        dense = dense or held
        if turn == rounds:
            break
        ranked = dense if from_dense else held
        places = [(name, i) for name in start for i in range(start[name].numel())]
        group = {
            "global": lambda place: 0,
            "layer": lambda place: place[0],
            "neuron": lambda place: (place[0], place[1] // start[place[0]].shape[1]),
        }[scope]
        masks = {name: mask.clone() for name, mask in masks.items()}
        for key in {group(place) for place in places}:
            left = [p for p in places if group(p) == key and masks[p[0]].view(-1)[p[1]] == 1]
            left.sort(key=lambda p: abs(ranked[p[0]].reshape(-1)[p[1]].item()))
            for name, i in left[: int(ratio * len(left))]:
                masks[name].view(-1)[i] = 0
    return given, held, masks


class TestLoop:
    @pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
    @pytest.mark.parametrize("rewind", ["init", "none"])
    @pytest.mark.parametrize("rule", [FixedRatio, OneShot])
    def test_by_hand(self, scope, rewind, rule):
        model, training = network(), Training()
        result, report = IterativePruner(rule(0.25), scope, 4, rewind).compress(model, training)
        starts, ends, masks = by_hand(4, 0.25, scope, rewind, rule is OneShot)
        assert len(training.given) == 5
        for got, expected in zip(training.given, starts, strict=True):
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value)
                assert torch.equal(got[name] == 0, value == 0)
        for name, value in ends.items():
            torch.testing.assert_close(result.state_dict()[name], value)
        assert report.rounds[-1].remaining == sum(int(mask.sum()) for mask in masks.values())

    def test_rewinding_takes_everything_back(self):
        model, training = network(), Training()
        IterativePruner(FixedRatio(0.5), rounds=2).compress(model, training)
        start = model.state_dict()
        for state in training.given:
            for name in set(start) - {"0.weight", "2.weight"}:
                assert torch.equal(state[name], start[name])
        training = Training()
        IterativePruner(FixedRatio(0.5), rounds=1, rewind="none").compress(model, training)
        assert (training.given[1]["1.running_mean"] > 0.5).all()
        assert not torch.equal(training.given[1]["0.bias"], start["0.bias"])

    def test_the_model_given_is_left_and_its_gradients_stay_out(self):
        model, training = network(), Training()
        before = copy.deepcopy(model.state_dict())
        result, _ = IterativePruner(FixedRatio(0.5), rounds=2).compress(model, training)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(torch.equal(param.grad, torch.ones_like(param)) for param in model.parameters())
        assert result is not model
        assert training.grads == [[None] * 6] * 3
        assert all(param.grad is None for param in result.parameters())
        assert not any(param._backward_hooks for param in result.parameters())

    def test_report(self):
        model = network()
        result, report = IterativePruner(FixedRatio(0.5), rounds=2).compress(model, Training())
        left = [48, 24, 12]
        assert [one.remaining for one in report.rounds] == left
        assert [one.pruned for one in report.rounds] == [24, 12, 0]
        assert [one.density for one in report.rounds] == [1.0, 0.5, 0.25]
        assert [one.index for one in report.rounds] == [0, 1, 2]
        assert [one.score for one in report.rounds] == pytest.approx([0.1, 0.2, 0.3])
        assert (report.params, report.macs) == (48 + 6 + 12 + 3, None)
        assert report.nonzero == sum(int((param != 0).sum()) for param in result.parameters()) == 12 + 21
        assert report.bytes == 4 * 69 + 4 * 12 + 8
        assert PruningReport.from_json(report.to_json()) == report
        assert report.plot().axes[0].lines[0].get_xdata().tolist() == [100, 50, 25]

    def test_work_is_counted_without_touching_the_result(self):
        with_inputs, report = IterativePruner(FixedRatio(0.5), rounds=1).compress(
            network(), Training(), example_inputs=(torch.ones(1, 5),)
        )
        without, _ = IterativePruner(FixedRatio(0.5), rounds=1).compress(network(), Training())
        assert report.macs == 48
        for name, value in without.state_dict().items():
            assert torch.equal(with_inputs.state_dict()[name], value)
        assert with_inputs.training

    def test_no_rounds_train_once(self):
        training = Training()
        _, report = IterativePruner(FixedRatio(0.5), rounds=0).compress(network(), training)
        assert [one.remaining for one in report.rounds] == [48]
        assert len(training.given) == 1

    def test_everything_may_go(self):
        result, report = IterativePruner(FixedRatio(1.0), rounds=1).compress(network(), Training())
        assert report.rounds[-1].remaining == 0
        assert not result[0].weight.any()

    def test_thirty_rounds_unless_said_otherwise(self):
        _, report = IterativePruner(FixedRatio(0)).compress(network(), lambda model: None)
        assert len(report.rounds) == 31

    def test_training_that_returns_nothing(self):
        _, report = IterativePruner(FixedRatio(0.5), rounds=1).compress(network(), lambda model: None)
        assert all(math.isnan(one.score) for one in report.rounds)

    @pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
    @pytest.mark.parametrize("remaining", [1.0, 0.9, 0.33, 0.1])
    def test_a_budget_is_met_exactly(self, remaining, scope):
        result, report = IterativePruner(FixedRatio(0.4), scope, 30).compress(network(), Training(), remaining)
        wanted = math.floor(remaining * 48)
        if scope == "neuron" and wanted < 18:  # 40% of two weights is none: small groups end before the budget
            assert len(report.rounds) == 31
            return
        assert report.rounds[-1].remaining == wanted
        assert sum(int((result[i].weight != 0).sum()) for i in (0, 2)) == wanted
        assert all(one.remaining > wanted for one in report.rounds[:-1])

    def test_stopping(self):
        asked = []

        def stop(rounds):
            asked.append(rounds)
            return len(rounds) == 2

        training = Training()
        result, report = IterativePruner(FixedRatio(0.5), rounds=9, stop=stop).compress(network(), training)
        assert len(training.given) == len(report.rounds) == 2
        assert [len(rounds) for rounds in asked] == [1, 2]
        assert report.rounds[-1].pruned == 0
        assert sum(int((result[i].weight != 0).sum()) for i in (0, 2)) == 24

    def test_states(self):
        model = network()
        for state in IterativePruner(FixedRatio(0.5), rounds=2).iterate(model, Training()):
            assert state.masks.remaining == state.round.remaining
            assert state.pruned.remaining == state.round.remaining - state.round.pruned
            for name, mask in state.masks.items():
                weight = state.model.state_dict()[name]
                assert torch.equal(weight != 0, mask)  # trained, and not pruned yet
                assert not (state.pruned[name] & ~mask).any()

    def test_a_model_that_training_moves_to_another_type(self):
        result, report = IterativePruner(FixedRatio(0.5), rounds=2).compress(
            network(), lambda model: model.double() and 0
        )
        assert result[0].weight.dtype == torch.float64
        assert report.rounds[-1].remaining == 12

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("rule", [FixedRatio, OneShot])
    def test_a_model_that_training_moves_to_another_device(self, rule):
        def fit(model):
            model.cuda()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for _ in range(2):
                model(torch.ones(3, 5, device="cuda")).square().sum().backward()
                optimizer.step()

        result, report = IterativePruner(rule(0.5), rounds=2).compress(network(), fit)
        assert result[0].weight.is_cuda
        assert report.rounds[-1].remaining == sum(int((result[i].weight != 0).sum()) for i in (0, 2)) == 12

    def test_a_failing_training_leaves_no_hooks(self):
        before = len(optimizer_module._global_optimizer_post_hooks)
        with pytest.raises(ZeroDivisionError):
            IterativePruner(FixedRatio(0.5), rounds=2).compress(network(), lambda model: 1 / 0)
        assert len(optimizer_module._global_optimizer_post_hooks) == before

    @pytest.mark.parametrize(
        ("call", "error", "words"),
        [
            (lambda: FixedRatio(1.5), ValueError, r"ratio .*1\.5"),
            (lambda: OneShot(-0.1), ValueError, r"ratio .*-0\.1"),
            (lambda: IterativePruner(FixedRatio(), "weight"), ValueError, "scope .*'weight'"),
            (lambda: IterativePruner(FixedRatio(), rewind="late"), ValueError, "rewind .*'late'"),
            (lambda: IterativePruner(FixedRatio(), rounds=-1), ValueError, "rounds .*-1"),
            (lambda: IterativePruner(FixedRatio()).compress(network(), Training(), 0), ValueError, "remaining .*0"),
            (
                lambda: IterativePruner(FixedRatio()).compress(network(), Training(), 1.1),
                ValueError,
                r"remaining .*1\.1",
            ),
            (lambda: IterativePruner(FixedRatio()).compress(nn.ReLU(), Training()), ValueError, "ReLU has no weight"),
        ],
    )
    def test_bad_input(self, call, error, words):
        with pytest.raises(error, match=words):
            call()

    def test_rules_of_ones_own(self):
        """A rule sees the latest weights, pruned ones as zero, and the mask, a row a group."""
        seen = []

        @dataclass
        class One:
            from_dense: ClassVar[bool] = False

            def counts(self, weights, mask):
                seen.append((weights.shape, bool((weights[~mask] == 0).all()), mask.sum(1)))
                return torch.ones(len(weights), dtype=torch.long)

        _, report = IterativePruner(One(), "neuron", 2).compress(network(), Training())
        assert [tuple(shape) for shape, _, _ in seen] == [(6, 5), (3, 6)] * 2
        assert all(zero for _, zero, _ in seen)
        assert seen[2][2].tolist() == [4] * 6
        assert [one.remaining for one in report.rounds] == [48, 39, 30]


def rows(most):
    """Groups of small integers, so that ties abound, with masks and counts."""
    row = st.tuples(
        st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=4, max_size=4), st.integers(0, most)
    )
    return st.lists(row, min_size=1, max_size=4)


@given(rows(6))
def test_smallest_is_a_loop_with_ties_to_the_earlier(groups):
    weights = torch.tensor([[float(value) for value, _ in row] for row, _ in groups])
    mask = torch.tensor([[kept for _, kept in row] for row, _ in groups])
    count = torch.tensor([wanted for _, wanted in groups])
    marked = smallest(weights, mask, count)
    for (row, wanted), got in zip(groups, marked.tolist(), strict=True):
        left = sorted((abs(value), place) for place, (value, kept) in enumerate(row) if kept)
        expected = {place for _, place in left[:wanted]}
        assert {place for place, chosen in enumerate(got) if chosen} == expected


def test_many_ties_go_to_the_earlier():
    """Sorts that are stable for a few values need not be for many."""
    marked = smallest(torch.ones(2, 5000), torch.ones(2, 5000, dtype=torch.bool), torch.tensor([1234, 0]))
    assert marked[0, :1234].all()
    assert marked.sum() == 1234


@given(st.lists(st.lists(st.integers(0, 10**9), min_size=1, max_size=4), min_size=1, max_size=5), st.floats(0, 1.2))
def test_limits_are_hit_exactly_and_in_proportion(counts, share):
    total = sum(map(sum, counts))
    allowed = int(share * total)
    got = [part.tolist() for part in _limited([torch.tensor(part) for part in counts], allowed)]
    assert [len(part) for part in got] == [len(part) for part in counts]
    if total <= allowed:
        assert got == counts
        return
    assert sum(map(sum, got)) == allowed
    for part, limited in zip(counts, got, strict=True):
        for count, left in zip(part, limited, strict=True):
            assert 0 <= left <= count
            assert abs(left - count * allowed / total) < 1 + 1e-6


def test_what_is_left_over_goes_to_the_largest_remainder():
    (got,) = _limited([torch.tensor([1, 8])], 7)  # 7/9 and 56/9
    assert got.tolist() == [1, 6]


def test_fixed_ratio_of_more_weights_than_float32_can_count():
    many = 30_000_001
    (count,) = FixedRatio(1.0).counts(torch.ones(1, 1).expand(1, many), torch.tensor([[True]]).expand(1, many)).tolist()
    assert count == many


@given(st.integers(0, 200), st.floats(0, 1))
def test_fixed_ratio_rounds_down(remaining, ratio):
    mask = torch.arange(200)[None] < remaining
    (count,) = FixedRatio(ratio).counts(torch.ones(1, 200), mask).tolist()
    assert count == int(remaining * ratio)
