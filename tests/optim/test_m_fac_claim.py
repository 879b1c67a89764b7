"""The rule of M-FAC's claim on made-up evidence, and its baselines against brute force."""

import copy

import pytest
import torch
from torch import nn

from provenn.claims import Evidence
from provenn.claims.optim import m_fac as claim
from provenn.optim import MFACPruner


def evidence(pruned, losses, others=0.5):
    """Mean accuracies of M-FAC ×8, magnitude and diagonal Fisher; mean losses of MFAC and SGD."""
    accuracies = dict(zip((claim.SURGEON, claim.MAGNITUDE, claim.DIAGONAL), pruned, strict=True))
    figures = {
        ("pruning", arm): {"test_accuracy": [accuracies.get(arm, others) + shift for shift in (-0.02, 0.0, 0.02)]}
        for arm in (*claim.PRUNERS, claim.MAGNITUDE)
    }
    for arm, loss in zip((claim.PRECONDITIONED, claim.SGD, claim.ADAM), (*losses, 0.0), strict=True):
        figures["training", arm] = {"training_loss": [loss - 0.01, loss + 0.01]}
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("pruned", "losses", "outcome"),
    [
        ((0.90, 0.80, 0.70), (0.1, 0.2), "reproduced"),
        # Exactly five points, and equal losses, are enough.
        ((0.90, 0.85, 0.85), (0.2, 0.2), "reproduced"),
        # One of the two baselines too near.
        ((0.90, 0.8501, 0.70), (0.1, 0.2), "not reproduced"),
        ((0.90, 0.70, 0.8501), (0.1, 0.2), "not reproduced"),
        # Pruning holds, training does not.
        ((0.90, 0.80, 0.70), (0.2001, 0.2), "partly"),
        # Training alone counts for nothing.
        ((0.80, 0.90, 0.90), (0.1, 0.2), "not reproduced"),
        ((0.80, 0.90, 0.90), (0.3, 0.2), "not reproduced"),
    ],
)
def test_judge(pruned, losses, outcome):
    assert claim.judge(evidence(pruned, losses)).outcome == outcome


def test_judge_ignores_what_is_only_reported():
    # Adam's loss is 0 above, and the other pruners prune perfectly here.
    assert claim.judge(evidence((0.90, 0.80, 0.70), (0.1, 0.2), others=1.0)).outcome == "reproduced"


def test_judge_gives_its_margins():
    margins = claim.judge(evidence((0.90, 0.80, 0.70), (0.1, 0.3))).margins
    assert [round(margin.estimate, 6) for margin in margins.values()] == [0.1, 0.2, -0.2]


def test_arms_are_tuned_alike():
    tuning = claim.CLAIM.studies["training"].tuning
    assert {len(tuning.of(arm)) for arm in claim.CLAIM.studies["training"].arms} == {6}
    assert claim.CLAIM.studies["pruning"].tuning is None


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def test_drop_smallest_drops_by_magnitude_over_all_layers():
    model = network()
    flat = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach()
    claim.drop_smallest(model, 0.75)
    left = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()]).detach()
    threshold = sorted(flat.abs().tolist())[42]
    assert torch.equal(left, torch.where(flat.abs() >= threshold, flat, 0))


def test_the_diagonal_arm_drops_by_weight_squared_times_mean_squared_gradient_and_moves_nothing():
    model = network()
    x, y = torch.randn(32, 5, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 3
    loader = list(zip(x.split(4), y.split(4), strict=True))
    block_size, recomputations = claim.PRUNERS[claim.DIAGONAL]
    pruner = MFACPruner(
        model, nn.functional.cross_entropy, loader, num_grads=8, block_size=block_size, n_recompute=recomputations
    )
    pruned, _ = pruner.compress(sparsity=0.75)
    weights, second = [], []
    for name in ("0.weight", "2.weight"):
        weight = dict(model.named_parameters())[name]
        grads = []
        for xs, ys in loader:
            other = copy.deepcopy(model)
            nn.functional.cross_entropy(other(xs), ys).backward()
            grads.append(dict(other.named_parameters())[name].grad.flatten())
        weights.append(weight.detach().flatten())
        second.append(torch.stack(grads).square().mean(dim=0))
    flat = torch.cat(weights)
    saliency = flat.square() * (torch.cat(second) + 1e-5)
    kept = saliency >= saliency.sort().values[42]
    left = torch.cat([pruned[0].weight.flatten(), pruned[2].weight.flatten()]).detach()
    torch.testing.assert_close(left, torch.where(kept, flat, 0), rtol=1e-5, atol=1e-6)


def test_gradient_batches_come_in_another_order_each_time_and_the_same_for_a_seed():
    samples = (torch.arange(12.0)[:, None], torch.arange(12))
    one, other = claim.Shuffled(samples, 4, seed=3), claim.Shuffled(samples, 4, seed=3)
    first, second = (torch.cat([y for _, y in one]) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.cat([y for _, y in other]))
    assert sorted(second.tolist()) == list(range(12))
