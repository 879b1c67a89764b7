"""SAP against brute force, closed forms and torch's own pruning."""

import copy
import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from provenn.claims import Evidence
from provenn.claims.compress import sap_pruning as claim
from provenn.compress import (
    SAP,
    FixedRatio,
    IterativePruner,
    OneShot,
    SAPPruner,
    SparsityMonitor,
    gini_index,
    pq_index,
    retain_bound,
)
from provenn.contracts import BadInput, CompressorCase, FunctionCase, ProbeCase


def network():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 3))


def fit(model, steps=20, seed=0):
    """Train on a fixed blob problem; a stand-in for a user's training function."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 6, generator=draws)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return (model(x).argmax(1) == y).double().mean().item()


def observe(model, data):
    monitor = SparsityMonitor()
    monitor.observe(model, accuracy=0.5)
    return monitor.report()


def brute_force_report(model, data):
    weights = np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters() if p.dim() > 1])
    return {"smoothed": (pq_by_hand(weights),)}


VECTOR = torch.tensor([3.0, -1.0, 0.5])
CASES = [
    CompressorCase(
        part="provenn.compress.SAPPruner",
        make=functools.partial(SAPPruner, gamma=2.0, rounds=4, scope=scope),
        label=scope,
        model=network,
        example_inputs=lambda generator: (torch.randn(5, 6, generator=generator),),
        budget={"nonzero": 0.9},
        compress=lambda pruner, model: pruner.compress(model, fit, example_inputs=(torch.ones(5, 6),)),
        bad_input=(
            BadInput("p", lambda: SAPPruner(p=1.0, q=1.0)),
            BadInput("p", lambda: SAPPruner(p=0.0)),
            BadInput("beta", lambda: SAPPruner(beta=0.0)),
            BadInput("beta", lambda: SAPPruner(beta=1.1)),
            BadInput("gamma", lambda: SAPPruner(gamma=-1.0)),
            BadInput("eta", lambda: SAPPruner(eta=-0.1)),
            BadInput("scope", lambda: SAPPruner(scope="channel")),
            BadInput("rewind", lambda: SAPPruner(rewind="late")),
            BadInput("stop", lambda: SAPPruner(stop="soon")),
            BadInput("rounds", lambda: SAPPruner(rounds=-1)),
            BadInput("remaining", lambda: SAPPruner().compress(network(), fit, remaining=0.0)),
            BadInput("model", lambda: SAPPruner().compress(nn.BatchNorm1d(3), fit)),
        ),
    )
    for scope in ("global", "layer", "neuron")
] + [
    FunctionCase(
        part="provenn.compress.pq_index",
        call=lambda: pq_index(VECTOR),
        bad_input=(
            BadInput("p", lambda: pq_index(VECTOR, p=1.0, q=0.5)),
            BadInput("p", lambda: pq_index(VECTOR, p=-1.0)),
            BadInput("mask", lambda: pq_index(VECTOR, mask=torch.ones(2, dtype=torch.bool))),
        ),
    ),
    FunctionCase(
        part="provenn.compress.gini_index",
        call=lambda: gini_index(VECTOR),
        bad_input=(BadInput("mask", lambda: gini_index(VECTOR, mask=torch.ones(2, dtype=torch.bool))),),
    ),
    FunctionCase(
        part="provenn.compress.retain_bound",
        call=lambda: retain_bound(torch.tensor(0.5), 10),
        bad_input=(
            BadInput("eta", lambda: retain_bound(torch.tensor(0.5), 10, eta=-1.0)),
            BadInput("p", lambda: retain_bound(torch.tensor(0.5), 10, p=2.0)),
        ),
    ),
    FunctionCase(
        part="provenn.compress.SAP",
        call=lambda: SAP().counts(VECTOR[None], torch.ones(1, 3, dtype=torch.bool)),
        bad_input=(BadInput("gamma", lambda: SAP(gamma=-1.0)), BadInput("beta", lambda: SAP(beta=2.0))),
    ),
    FunctionCase(
        part="provenn.compress.FixedRatio",
        call=lambda: FixedRatio(0.5).counts(VECTOR[None], torch.ones(1, 3, dtype=torch.bool)),
        bad_input=(BadInput("ratio", lambda: FixedRatio(1.5)),),
    ),
    FunctionCase(
        part="provenn.compress.OneShot",
        call=lambda: OneShot(0.5).counts(VECTOR[None], torch.ones(1, 3, dtype=torch.bool)),
        bad_input=(BadInput("ratio", lambda: OneShot(-0.5)),),
    ),
    FunctionCase(
        part="provenn.compress.IterativePruner",
        call=lambda: IterativePruner(FixedRatio(), rounds=1).compress(network(), lambda model: fit(model, steps=1)),
        bad_input=(
            BadInput("scope", lambda: IterativePruner(FixedRatio(), scope="all")),
            BadInput("rounds", lambda: IterativePruner(FixedRatio(), rounds=-1)),
            BadInput("remaining", lambda: IterativePruner(FixedRatio()).compress(network(), fit, remaining=2.0)),
        ),
    ),
    ProbeCase(
        part="provenn.compress.SparsityMonitor",
        run=observe,
        model=network,
        data=lambda generator: None,
        brute_force=brute_force_report,
        bad_input=(
            BadInput("p", lambda: SparsityMonitor(p=2.0)),
            BadInput("stage", lambda: SparsityMonitor().observe(network(), stage="dense")),
            BadInput("mask", lambda: SparsityMonitor().observe(network(), mask={})),
        ),
        excluded={"model_restored_after_error": "the monitor reads weights and runs no model, so none can fail midway"},
    ),
]


def pq_by_hand(values, p=0.5, q=1.0):
    """The definition, word for word, in NumPy."""
    values = np.abs(np.asarray(values, dtype=np.float64))
    norm = lambda exponent: (values**exponent).sum() ** (1 / exponent)  # noqa: E731
    return 1 - len(values) ** (1 / q - 1 / p) * norm(p) / norm(q)


def vectors(count=50, seed=0):
    draws = np.random.default_rng(seed)
    return [draws.normal(size=draws.integers(2, 30)) ** 3 for _ in range(count)]


PAIRS = [(0.5, 1.0), (1.0, 2.0), (0.3, 0.7), (0.5, 3.0)]


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_index_is_its_definition(p, q):
    for values in vectors():
        assert pq_index(torch.from_numpy(values), p, q).item() == pytest.approx(pq_by_hand(values, p, q), abs=1e-12)


def test_index_closed_forms():
    one_hot = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert pq_index(one_hot, 1.0, 2.0).item() == pytest.approx(0.5, abs=1e-15)
    assert pq_index(one_hot).item() == pytest.approx(1 - 4 ** (1 - 2), abs=1e-15)
    assert pq_index(torch.full((7,), -2.5)).item() == 0.0


@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_index_invariances(p, q):
    for values in map(torch.from_numpy, vectors(20)):
        index = pq_index(values, p, q).item()
        shuffled = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
        for same in (-7.5 * values, torch.cat([values, values]), shuffled, values.abs()):
            assert pq_index(same, p, q).item() == pytest.approx(index, abs=1e-10)


def test_robin_hood_never_increases_the_index():
    for values in map(np.abs, vectors(50)):
        rich, poor = values.argmax(), values.argmin()
        moved = values.copy()
        amount = 0.3 * (values[rich] - values[poor])
        moved[rich] -= amount
        moved[poor] += amount
        assert pq_index(torch.from_numpy(moved)) <= pq_index(torch.from_numpy(values)) + 1e-12


def test_index_moves_as_sparsity_does():
    for values in (torch.from_numpy(np.abs(one)) for one in vectors(20)):
        index = pq_index(values)
        assert pq_index(values + 1.0) < index
        assert pq_index(torch.cat([values, torch.zeros(3, dtype=values.dtype)])) > index
        huge = values.clone()
        huge[0] = 1e15
        assert pq_index(huge).item() == pytest.approx(1 - 1 / len(values), abs=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e300])
def test_index_neither_under_nor_overflows(scale):
    values = torch.tensor([1.0, 2.0, 5.0, 0.1], dtype=torch.float64)
    for options in ({}, {"dim": 0}):
        assert pq_index(values * scale, 0.5, 3.0, **options) == pytest.approx(pq_by_hand(values, 0.5, 3.0), abs=1e-12)


def test_index_counts_only_what_the_mask_keeps():
    values, mask = torch.tensor([5.0, 1.0, -2.0, 9.0]), torch.tensor([True, True, True, False])
    assert pq_index(values, mask=mask).item() == pytest.approx(pq_by_hand([5, 1, 2]), abs=1e-12)
    assert pq_index(values[None], mask=mask[None], dim=1).item() == pytest.approx(pq_by_hand([5, 1, 2]), abs=1e-12)
    assert pq_index(values, mask=torch.zeros(4, dtype=torch.bool)).item() == 0.0


def test_index_over_dimensions_and_over_chunks():
    values = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = pq_index(values, dim=(1, 2))
    assert rows.tolist() == pytest.approx([pq_by_hand(row.flatten()) for row in values], abs=1e-12)
    # More than two chunks, of growing magnitude, so that the running scale changes from chunk to chunk.
    many = torch.randn(600_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    many *= torch.linspace(0.1, 30, len(many), dtype=torch.float64)
    assert pq_index(many).item() == pytest.approx(pq_by_hand(many), abs=1e-12)


def test_all_zero_group_is_zero_with_a_warning():
    with pytest.warns(UserWarning, match="all zero"):
        assert pq_index(torch.zeros(4)).item() == 0.0
    with pytest.warns(UserWarning, match="all zero"):
        assert pq_index(torch.tensor([[0.0, 0.0], [1.0, 3.0]]), dim=1).tolist() == [
            0.0,
            pytest.approx(pq_by_hand([1, 3])),
        ]


def test_gini_is_the_mean_absolute_difference():
    for values in map(np.abs, vectors(30)):
        n = len(values)
        pairs = np.abs(values[:, None] - values[None, :]).sum() / (2 * n * values.sum())
        assert gini_index(torch.from_numpy(values)).item() == pytest.approx(pairs, abs=1e-10)
        padded = torch.from_numpy(np.stack([np.append(values, 7.0), np.append(values, 0.0)]))
        mask = torch.ones_like(padded, dtype=torch.bool)
        mask[:, -1] = False
        assert gini_index(padded, mask, dim=1).tolist() == pytest.approx([pairs, pairs], abs=1e-10)


@pytest.mark.parametrize(("p", "q"), PAIRS)
@pytest.mark.parametrize("eta", [0.0, 0.1, 1.0])
def test_bound_is_never_above_the_smallest_count_that_meets_its_condition(p, q, eta):
    tight = 0
    draws = np.random.default_rng(3)
    for _ in range(200):
        values = np.sort(np.abs(draws.normal(size=draws.integers(1, 9))) ** draws.uniform(0, 6))[::-1]
        powers = values**p
        needed = next(r for r in range(1, len(values) + 1) if powers[r:].sum() <= eta * powers[:r].sum())
        bound = retain_bound(pq_index(torch.from_numpy(values.copy()), p, q), len(values), p, q, eta).item()
        assert bound <= needed
        tight += bound == needed
    assert tight > 0


def test_bound_by_hand():
    index = torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)
    assert retain_bound(index, 100).tolist() == [100, 75, 50]
    assert retain_bound(index, 100, eta=0.25).tolist() == [64, 48, 32]


def ones(rows):
    return torch.ones_like(rows, dtype=torch.bool)


def test_rule_by_hand():
    # (1, 9) repeated: Σ√ = 4 a pair, so ‖w‖_½ = (4·50)², ‖w‖₁ = 10·50, I = 1 − 200²/(100·500) = 0.2, r = 80.
    weights = torch.tensor([1.0, 9.0] * 50)[None]
    assert SAP().counts(weights, ones(weights)).tolist() == [20]
    assert SAP(gamma=2.0).counts(weights, ones(weights)).tolist() == [40]
    assert SAP(gamma=20.0, beta=0.55).counts(weights, ones(weights)).tolist() == [55]
    assert SAP(eta=1.0).counts(weights, ones(weights)).tolist() == [80]


def test_equal_magnitudes_are_not_pruned():
    weights = torch.tensor([[2.0, -2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert SAP().counts(weights, ones(weights)).tolist() == [0, 0]
    assert SAP().counts(weights[:1], ones(weights[:1])).tolist() == [0]


def states(pruner, model=None, train=fit):
    """Every state of a loop, with the model copied, since the loop goes on with its own."""
    torch.manual_seed(0)
    model = network() if model is None else model
    return model, [copy.deepcopy(state) for state in pruner.iterate(model, train)]


@pytest.mark.parametrize("scope", ["global", "layer", "neuron"])
def test_prunes_the_smallest_of_what_is_left(scope):
    _, found = states(SAPPruner(gamma=1.5, rounds=4, scope=scope))
    for state in found[:-1]:
        rows = {}
        for name, mask in state.masks.items():
            weight, after = dict(state.model.named_parameters())[name].detach().abs(), state.pruned[name]
            assert not (after & ~mask).any()
            if scope == "neuron":
                rows |= {f"{name} {row}": one for row, one in enumerate(zip(weight, mask, after, strict=True))}
            else:
                rows[name] = (weight.flatten(), mask.flatten(), after.flatten())
        if scope == "global":
            rows = {"all": tuple(torch.cat(column) for column in zip(*rows.values(), strict=True))}
        for weight, mask, after in rows.values():
            left, gone = weight[mask], weight[mask & ~after]
            # The count by the paper's formula, from the definition of the index.
            index = pq_by_hand(left)
            kept = math.ceil(len(left) * (1 - index) - 1e-9)
            expected = math.floor(len(left) * min(1.5 * (1 - kept / len(left)), 0.9) + 1e-9)
            assert len(gone) == expected
            assert torch.equal(gone.sort().values, left.sort().values[:expected])


def test_neuron_scope_of_one_row_is_layer_scope():
    model = nn.Linear(40, 1)
    train = lambda one: None  # noqa: E731
    _, by_neuron = states(SAPPruner(rounds=3, scope="neuron"), model, train)
    _, by_layer = states(SAPPruner(rounds=3, scope="layer"), model, train)
    for one, other in zip(by_neuron, by_layer, strict=True):
        assert torch.equal(one.masks["weight"], other.masks["weight"])


def test_rewinds_to_the_initial_weights_bitwise():
    seen = []

    def train(model):
        seen.append(copy.deepcopy(model.state_dict()))
        fit(model)

    initial, found = states(SAPPruner(gamma=2.0, rounds=3), train=train)
    for state, start in zip(found, seen, strict=True):
        for name, value in initial.state_dict().items():
            expected = torch.where(state.masks[name], value, 0) if name in state.masks else value
            assert torch.equal(start[name], expected), name
    assert found[-1].masks.remaining < found[0].masks.remaining


def test_fine_tuning_goes_on_from_the_trained_weights():
    starts, ends = [], []

    def train(model):
        starts.append(copy.deepcopy(model.state_dict()))
        fit(model)
        ends.append(copy.deepcopy(model.state_dict()))

    _, found = states(SAPPruner(rounds=2, rewind="none"), train=train)
    for state, end, start in zip(found[1:], ends[:-1], starts[1:], strict=True):
        assert torch.equal(start["0.weight"], torch.where(state.masks["0.weight"], end["0.weight"], 0))
        assert torch.equal(start["2.running_mean"], end["2.running_mean"])


class Noisy(torch.optim.SGD):
    """An optimizer that moves every weight, gradient or not."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                param.add_(0.01)


def test_zeros_are_held_under_any_optimizer():
    seen = []

    def train(model):
        optimizer = Noisy(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(4, 6)).sum().backward()
            optimizer.step()
            seen.append(sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1))
        other = torch.nn.Parameter(torch.zeros(1))
        other.grad = torch.ones(1)
        torch.optim.SGD([other], lr=1.0).step()
        assert other.item() == -1.0

    _, found = states(IterativePruner(FixedRatio(0.5), rounds=1), train=train)
    assert seen[:3] == [0, 0, 0]
    assert seen[3:] == [found[0].round.pruned] * 3


def test_momentum_does_not_build_up_on_pruned_weights():
    optimizers = []

    def train(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
        model(inputs).pow(3).sum().backward()
        optimizer.step()
        optimizers.append((optimizer, model))

    _, found = states(IterativePruner(FixedRatio(0.5), rounds=1), train=train)
    optimizer, model = optimizers[1]
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    assert (momentum[~found[1].masks["0.weight"]] == 0).all()
    assert (momentum != 0).any()


def test_lottery_ticket_equals_torchs_pruning():
    _, found = states(IterativePruner(FixedRatio(0.3), rounds=1))
    model, mask = found[0].model, found[0].pruned
    amount = int(0.3 * mask.total)
    prune.global_unstructured([(model[0], "weight"), (model[3], "weight")], prune.L1Unstructured, amount=amount)
    assert torch.equal(model[0].weight_mask.bool(), mask["0.weight"])
    assert torch.equal(model[3].weight_mask.bool(), mask["3.weight"])


def test_one_shot_ranks_by_the_dense_model():
    _, found = states(IterativePruner(OneShot(0.4), rounds=3))
    dense = torch.cat([p.detach().abs().flatten() for p in found[0].model.parameters() if p.dim() > 1])
    for state in found:
        kept = torch.cat([mask.flatten() for mask in state.masks.values()])
        assert dense[kept].min() >= (dense[~kept].max() if (~kept).any() else 0)
    left = [state.masks.remaining for state in found]
    assert [a - b for a, b in itertools.pairwise(left)] == [int(0.4 * a) for a in left[:-1]]


def test_target_is_met_exactly():
    # Rows of six weights cannot go down to 13 %: the bound is rounded up to a whole weight.
    for scope, target in (("global", 0.5), ("global", 0.13), ("layer", 0.5), ("layer", 0.13), ("neuron", 0.5)):
        torch.manual_seed(0)
        pruned, report = SAPPruner(eta=0.2, scope=scope).compress(network(), fit, remaining=target)
        assert report.rounds[-1].remaining == math.floor(target * (6 * 16 + 16 * 3))
        assert sum(int((p != 0).sum()) for p in pruned.parameters() if p.dim() > 1) == report.rounds[-1].remaining


def test_report_follows_the_rounds():
    torch.manual_seed(0)
    _, report = SAPPruner(gamma=2.0, rounds=3).compress(network(), fit)
    assert [one.index for one in report.rounds] == [0, 1, 2, 3]
    for before, after in itertools.pairwise(report.rounds):
        assert before.remaining - before.pruned == after.remaining
    assert report.rounds[-1].pruned == 0
    assert [one.density for one in report.sparsity.retrained] == [one.density for one in report.rounds]
    assert all(0 <= one.score <= 1 for one in report.rounds)


def test_stops_at_the_compression_limit():
    # Training plants weights whose index falls for three rounds and then rises: planted, not learned.
    course = iter([3.0, 2.0, 1.0, 0.5, 1.5, 2.5, 3.5, 4.5])

    def train(model):
        power = next(course)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    spread = torch.linspace(0.1, 1, weight.numel()).pow(power).reshape(weight.shape)
                    weight.copy_(torch.where(weight == 0, 0, spread))

    torch.manual_seed(0)
    _, report = SAPPruner(gamma=0.01, rounds=7, stop="limit").compress(network(), train)
    assert report.sparsity.stop_round == 3
    assert len(report.rounds) < 8


def test_phases_of_a_planted_course():
    observed = observe(network(), None).retrained[0]
    course = [0.5, 0.4, 0.3, 0.35, 0.45, 0.5, 0.4, 0.2]
    report = dataclasses.replace(
        observe(network(), None), retrained=tuple(dataclasses.replace(observed, pq_global=value) for value in course)
    )
    assert [(one.name, one.first, one.last) for one in report.phases] == [
        ("regularisation", 0, 2),
        ("compression limit", 2, 5),
        ("collapse", 5, 7),
    ]
    assert report.stop_round == 2


# The claim.


def evidence(sap, lottery, one_shot, turns=(2, 4, 6), variation=3.0):
    minimum, maximum, drop = turns
    course = {"index minimum": [minimum] * 3, "index maximum": [maximum] * 3, "accuracy drop": [drop] * 3}
    return Evidence.of(
        {
            ("mnist", "SAP"): {
                "area": [sap] * 3,
                "ratio variation": [variation] * 3,
                "share left": [0.01] * 3,
                **course,
            },
            ("mnist", "lottery ticket"): {"area": [lottery] * 3},
            ("mnist", "one-shot"): {"area": [one_shot] * 3},
        }
    )


@pytest.mark.parametrize(
    ("found", "outcome"),
    [
        (evidence(0.900, 0.901, 0.85), "reproduced"),
        (evidence(0.900, 0.903, 0.85), "not reproduced"),
        (evidence(0.900, 0.890, 0.90), "not reproduced"),
        (evidence(0.900, 0.890, 0.85, turns=(2, 7, 6)), "partly"),
        (evidence(0.900, 0.890, 0.85, turns=(6, 6, 6)), "partly"),
        (evidence(0.900, 0.890, 0.85, variation=1.9), "not reproduced"),
    ],
)
def test_judge(found, outcome):
    assert claim.judge(found).outcome == outcome


def test_area_is_the_mean_accuracy_over_log_density():
    # A straight line in log density from 1 at 100 % to 0 at 1 % has mean ½; beyond the last point chance counts.
    assert claim.area([1.0, 0.1, 0.01], [1.0, 0.5, 0.0], chance=0.1) == pytest.approx(0.5)
    assert claim.area([1.0, 0.1], [0.9, 0.9], chance=0.1) == pytest.approx(0.5, abs=1e-3)  # the jump, on a grid
    assert claim.area([1.0, 0.001], [1.0, 0.4], chance=0.1) == pytest.approx((1.0 + 0.6) / 2)


def test_turns_of_the_index():
    assert claim.turns([0.5, 0.4, 0.3, 0.4, 0.5, 0.4], never=9) == (2, 4)
    assert claim.turns([0.5, 0.4, 0.3], never=9) == (9, 9)
    assert claim.turns([0.3, 0.4, 0.5], never=9) == (9, 9)
