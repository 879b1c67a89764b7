"""M-FAC's pruner against the optimality conditions and a dense re-derivation in NumPy."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

from provenn.optim import GradualSchedule, MFACPruner, StaticInverseFisher
from provenn.optim._m_fac_pruner import surgeon_step

cross_entropy = nn.functional.cross_entropy


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)).double()


def batches(count=6, size=5):
    x = normal(count * size, 4, seed=7)
    y = torch.arange(count * size) % 3
    return list(zip(x.split(size), y.split(size), strict=True))


def flat(model):
    """All weights of more than one dimension in a NumPy vector."""
    return np.concatenate([p.detach().numpy().ravel() for p in model.parameters() if p.dim() > 1])


def set_flat(model, vector):
    start = 0
    for p in model.parameters():
        if p.dim() > 1:
            with torch.no_grad():
                p.copy_(torch.from_numpy(vector[start : start + p.numel()].copy()).view_as(p))
            start += p.numel()


def gradients(model, loader, count):
    rows = []
    for index in range(count):
        x, y = loader[index % len(loader)]
        other = copy.deepcopy(model).eval()
        cross_entropy(other(x), y).backward()
        rows.append(np.concatenate([p.grad.numpy().ravel() for p in other.parameters() if p.dim() > 1]))
    return np.array(rows)


def prune_by_hand(model, loader, sparsity, m, damping, steps, block=None):
    """The whole pruner with dense matrices, one weight at a time."""
    model = copy.deepcopy(model)
    total = len(flat(model))
    for j in range(1, steps + 1):
        w = flat(model)
        alive = [i for i in range(total) if w[i] != 0]
        size = block or len(alive)
        grads = gradients(model, loader, m)
        left = int((1 - sparsity) ** (j / steps) * total + 1e-9)
        saliency, inverses = {}, []
        for start in range(0, len(alive), size):
            places = alive[start : start + size]
            g = grads[:, places]
            fisher_inverse = np.linalg.inv(damping * np.eye(len(places)) + g.T @ g / m)
            inverses.append((places, fisher_inverse))
            saliency |= {p: w[p] ** 2 / (2 * fisher_inverse[k, k]) for k, p in enumerate(places)}
        dropped = sorted(alive, key=saliency.get)[: len(alive) - left]
        moved = w.copy()
        for places, fisher_inverse in inverses:
            for k, p in enumerate(places):
                if p in dropped:
                    moved[places] -= w[p] / fisher_inverse[k, k] * fisher_inverse[:, k]
        moved[dropped] = 0
        set_flat(model, moved)
    return flat(model)


# One step of the surgeon.


@pytest.fixture
def quadratic():
    grads, weights = normal(9, 12), normal(12, seed=1)
    fisher = 0.3 * torch.eye(12, dtype=torch.float64) + grads.T @ grads / 9
    return weights, fisher, StaticInverseFisher(grads, 0.3)


def test_dropping_one_weight_is_the_constrained_minimum(quadratic):
    weights, fisher, inverse = quadratic
    moved, dropped, predicted = surgeon_step(weights, inverse, 1)
    (place,) = dropped.nonzero().flatten().tolist()
    move = moved - weights
    assert moved[place] == 0
    # Stationary in every other direction: only the constraint's own multiplier is left of the gradient Fδ.
    slope = fisher @ move
    slope[place] = 0
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-12)
    increase = float(move @ fisher @ move / 2)
    assert increase == pytest.approx(float(weights[place] ** 2 / (2 * torch.linalg.inv(fisher)[place, place])))
    assert predicted == pytest.approx(increase)


def test_it_drops_the_weight_that_costs_least(quadratic):
    weights, fisher, inverse = quadratic
    costs = []
    for place in range(12):
        # The minimum over the other weights of the quadratic, by elimination.
        others = [i for i in range(12) if i != place]
        rest = torch.linalg.solve(fisher[others][:, others], fisher[others, place] * weights[place])
        move = torch.zeros(12, dtype=torch.float64)
        move[place], move[others] = -weights[place], rest
        costs.append(float(move @ fisher @ move / 2))
    _, dropped, predicted = surgeon_step(weights, inverse, 1)
    assert dropped.nonzero().item() == int(np.argmin(costs))
    assert predicted == pytest.approx(min(costs))


def test_the_moves_of_several_weights_add_up(quadratic):
    weights, fisher, inverse = quadratic
    whole = torch.linalg.inv(fisher)
    moved, dropped, predicted = surgeon_step(weights, inverse, 5)
    assert int(dropped.sum()) == 5
    expected = weights.clone()
    for place in dropped.nonzero().flatten().tolist():
        expected -= weights[place] / whole[place, place] * whole[:, place]
    torch.testing.assert_close(moved[~dropped], expected[~dropped], rtol=0, atol=1e-12)
    assert (moved[dropped] == 0).all()
    saliency = weights**2 / (2 * whole.diagonal())
    assert saliency[dropped].max() <= saliency[~dropped].min()
    assert predicted == pytest.approx(float(saliency[dropped].sum()))


def test_surviving_weights_move(quadratic):
    weights, _, inverse = quadratic
    moved, dropped, _ = surgeon_step(weights, inverse, 3)
    assert ((moved - weights)[~dropped].abs() > 1e-6).all()


# The whole pruner.


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("block", [None, 8])
def test_equals_dense_algebra(steps, block):
    # 8 gradients of 6 batches: the loader starts anew.
    model, loader = network(), batches()
    pruner = MFACPruner(
        model, cross_entropy, loader, num_grads=8, block_size=block or -1, damping=0.01, n_recompute=steps
    )
    pruned, report = pruner.compress(sparsity=0.7)
    expected = prune_by_hand(model, loader, 0.7, 8, 0.01, steps, block)
    np.testing.assert_allclose(flat(pruned), expected, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(flat(pruned) == 0, expected == 0)
    assert len(report.rounds) == len(report.predicted_increase) == steps


def test_kept_shares_are_geometric():
    model = network()
    pruner = MFACPruner(model, cross_entropy, batches(), num_grads=4, n_recompute=4)
    _, report = pruner.compress(sparsity=0.9)
    assert [one.remaining for one in report.rounds] == [int(42 * 0.1 ** (j / 4) + 1e-9) for j in (1, 2, 3, 4)]
    assert [one.pruned for one in report.rounds] == [19, 10, 6, 3]
    assert [one.index for one in report.rounds] == [0, 1, 2, 3]


def test_a_round_number_of_weights_is_met_exactly():
    # 100 · (1 − 0.9) is 9.999999999999998 in floats.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    loader = [(torch.randn(4, 10, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.long))]
    for n in (1, 5):
        _, report = MFACPruner(model, cross_entropy, loader, num_grads=2, n_recompute=n).compress(sparsity=0.9)
        assert report.rounds[-1].remaining == 20


def test_gradients_are_taken_in_eval_mode_and_modes_are_put_back():
    model = network(dropout=0.5)
    model.train()
    model[1].eval()
    pruner = MFACPruner(model, cross_entropy, batches(), num_grads=8, block_size=-1, damping=0.01, n_recompute=1)
    pruned, _ = pruner.compress(sparsity=0.7)
    expected = prune_by_hand(model, batches(), 0.7, 8, 0.01, 1)
    np.testing.assert_allclose(flat(pruned), expected, rtol=0, atol=1e-10)
    assert [module.training for module in pruned.modules()] == [module.training for module in model.modules()]


def test_biases_stay():
    model = network()
    pruned, _ = MFACPruner(model, cross_entropy, batches(), num_grads=4).compress(sparsity=0.9)
    assert torch.equal(pruned[0].bias, model[0].bias)
    assert torch.equal(pruned[3].bias, model[3].bias)


def test_zeros_count_as_pruned_and_stay():
    model = network()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    pruner = MFACPruner(model, cross_entropy, batches(), num_grads=4, n_recompute=2)
    pruned, report = pruner.compress(sparsity=0.5)
    assert (pruned[0].weight[:, ::2] == 0).all()
    assert [one.pruned for one in report.rounds] == [5, 4]
    same, nothing = pruner.compress(sparsity=0.1)
    np.testing.assert_array_equal(flat(same), flat(model))
    assert nothing.rounds == nothing.predicted_increase == ()


def test_frozen_weights_are_pruned_too_and_stay_frozen():
    model = network()
    free = copy.deepcopy(model)
    model.requires_grad_(False)
    with torch.no_grad():
        pruned, _ = MFACPruner(model, cross_entropy, batches(), num_grads=4).compress(sparsity=0.5)
    expected, _ = MFACPruner(free, cross_entropy, batches(), num_grads=4).compress(sparsity=0.5)
    np.testing.assert_array_equal(flat(pruned), flat(expected))
    assert not any(p.requires_grad for p in pruned.parameters())


def test_weights_that_the_loss_does_not_reach_are_dropped_by_size_and_do_not_move():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    torch.manual_seed(0)
    model = Unused().double()
    pruned, _ = MFACPruner(model, cross_entropy, batches(), num_grads=6, n_recompute=1).compress(sparsity=0.5)
    before, after = model.idle.weight.detach().flatten(), pruned.idle.weight.detach().flatten()
    gone = after == 0
    assert 0 < int(gone.sum()) < 12
    assert torch.equal(after[~gone], before[~gone])
    assert before[gone].abs().max() < before[~gone].abs().min()


def test_another_model_can_be_given():
    one, other = network(0), network(1)
    pruner = MFACPruner(one, cross_entropy, batches(), num_grads=4)
    expected, _ = MFACPruner(other, cross_entropy, batches(), num_grads=4).compress(sparsity=0.5)
    pruned, _ = pruner.compress(other, sparsity=0.5)
    np.testing.assert_array_equal(flat(pruned), flat(expected))


def test_it_loses_less_than_dropping_by_magnitude():
    # A network at its minimum, where the second order is what is left.
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    set_flat(model, flat(network()))
    x = normal(200, 4, seed=3)
    y = x[:, :3].argmax(dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    loader = list(zip(x.split(1), y.split(1), strict=True))
    pruned, _ = MFACPruner(model, cross_entropy, loader, num_grads=200, block_size=-1, n_recompute=4).compress(
        sparsity=0.5
    )
    small = copy.deepcopy(model)
    vector = flat(model)
    set_flat(small, np.where(np.abs(vector) > np.median(np.abs(vector)), vector, 0))
    with torch.no_grad():
        dense, ours, magnitude = (float(cross_entropy(one(x), y)) for one in (model, pruned, small))
    assert ours - dense < 0.2 * (magnitude - dense)


# The gradual schedule.


def schedule(train_epoch, **options):
    make = functools.partial(torch.optim.SGD, lr=1.0, momentum=0.9)
    return GradualSchedule(train_epoch=train_epoch, make_optimizer=make, **options)


def test_schedule_of_the_authors_example():
    # Their command: sparsities .5 .75 .875, a step every 2 epochs, rates .005 .0005 between, drops at 7 and 9 of 10.
    plan = schedule(
        lambda *_: None,
        sparsities=(0.5, 0.75, 0.875),
        epochs=10,
        prune_every=2,
        prune_lrs=(0.005, 0.0005),
        drop_at=(7, 9),
    )
    rates = [0.005, 0.0005, 0.005, 0.0005, 0.005, 0.005, 0.005, 0.0005, 0.0005, 0.00005]
    assert [plan.lr_at(epoch) for epoch in range(10)] == pytest.approx(rates)
    assert [plan.sparsity_at(epoch) for epoch in range(7)] == [0.5, None, 0.75, None, 0.875, None, None]


def test_rates_without_a_list_are_the_base_rate():
    plan = schedule(lambda *_: None, sparsities=(0.5, 0.75), epochs=4, prune_every=2, lr=0.3, drop_at=(3,), drop_by=0.5)
    assert [plan.lr_at(epoch) for epoch in range(4)] == pytest.approx([0.3, 0.3, 0.3, 0.15])


def test_gradual_pruning_trains_between_with_zeros_held():
    seen = []

    def train_epoch(model, optimizer):
        x, y = batches()[0]
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        zeros = int((flat(model) == 0).sum())
        seen.append((zeros, model.training, optimizer.param_groups[0]["lr"], id(optimizer), len(optimizer.state)))
        return float(len(seen))

    model = network()
    model.eval()
    pruner = MFACPruner(model, cross_entropy, batches(), num_grads=4, n_recompute=2)
    plan = schedule(train_epoch, sparsities=(0.5, 0.75), epochs=5, prune_every=2, prune_lrs=(0.1, 0.01), lr=0.05)
    pruned, report = pruner.compress(schedule=plan)
    assert [zeros for zeros, *_ in seen] == [21, 21, 32, 32, 32]
    assert all(training for _, training, *_ in seen)
    assert [lr for _, _, lr, *_ in seen] == [0.1, 0.01, 0.05, 0.05, 0.05]
    makers = [maker for *_, maker, _ in seen]
    assert makers[0] == makers[1]
    assert makers[2] == makers[3] == makers[4]
    assert not pruned.training
    assert int((flat(pruned) == 0).sum()) == 32
    assert [one.remaining for one in report.rounds] == [29, 21, 14, 10]
    # The score of a step's last recomputation is that of the last epoch before the next step.
    assert [one.score for one in report.rounds][1::2] == [2.0, 5.0]
    assert all(np.isnan(one.score) for one in report.rounds[::2])
    assert all(p.grad is None for p in pruned.parameters())


def test_the_last_step_may_end_the_schedule():
    plan = schedule(lambda model, optimizer: None, sparsities=(0.5, 0.75), epochs=1)
    _, report = MFACPruner(network(), cross_entropy, batches(), num_grads=4, n_recompute=1).compress(schedule=plan)
    assert [one.remaining for one in report.rounds] == [21, 10]


def test_report_plots_and_counts():
    x = torch.zeros(2, 4, dtype=torch.float64)
    _, report = MFACPruner(network(), cross_entropy, batches(), num_grads=4).compress(sparsity=0.5, example_inputs=(x,))
    assert report.macs == 2 * 42
    assert report.nonzero == 21 + 9
    assert report.plot() is not None
