"""Virgo's claim: its features, its stacks, and its judge on made-up evidence."""

import numpy as np
import pytest
import torch

from provenn.claims import Evidence
from provenn.claims.graphs import virgo_init as claim
from provenn.core.experiment.seeding import generator


def test_principal_features_keep_the_products_of_low_rank_data():
    draws = generator(0)
    x = torch.rand(40, 6, generator=draws) @ torch.rand(6, 30, generator=draws)
    reduced = claim.principal_features(x, 6)
    torch.testing.assert_close(reduced @ reduced.T, x @ x.T, rtol=1e-4, atol=1e-3)
    scales = np.linalg.svd(x.numpy(), compute_uv=False)[:4]
    assert claim.principal_features(x, 4).norm(dim=0).tolist() == pytest.approx(scales, rel=1e-3)


def test_sum_stack_adds_neighbours_and_oneself():
    stack = claim.Stack("sum", (2, 3), dropout=0.5)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.copy_(torch.ones_like(parameter) if parameter.dim() > 1 else torch.zeros_like(parameter))
    x = torch.tensor([[1.0, 0.0], [10.0, 0.0], [100.0, 0.0]])
    found = stack(x, torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]]))
    assert found[:, 0].tolist() == [11.0, 111.0, 110.0]


def evidence(level=0.2, seeds=3, accuracies=None, **changed):
    """log₁₀ R of Virgo's arms is ``level`` (or as changed, by place), of all others 2."""
    figures = {}
    for name in ("cora", "citeseer"):
        for arm in claim.VARIANCE_ARMS:
            metrics = {}
            for operator in claim.OPERATORS:
                for side, method in (("outputs", "Virgo-forward"), ("gradients", "Virgo-backward")):
                    value = changed.get(f"{name}_{operator}_{side}", level) if arm == method else 2.0
                    metrics[f"{operator}, L=8: log10 R of {side}"] = [value] * seeds
            figures[f"variance, {name}", arm] = metrics
    found = {"symmetric": (0.8, 0.7, 0.85), "sum": (0.7, 0.6, 0.65)} | (accuracies or {})
    for operator, values in found.items():
        for arm, value in zip(claim.ACCURACY_ARMS, values, strict=True):
            figures[f"accuracy, {operator}", arm] = {"test accuracy": [value] * seeds}
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("changed", "outcome"),
    [
        ({}, "reproduced"),
        ({"seeds": 1}, "reproduced"),
        ({"level": 1.39}, "reproduced"),  # 10^1.39 is just below a quarter of 10²
        ({"accuracies": {"symmetric": (0.7, 0.7, 0.6)}}, "partly"),
        ({"accuracies": {"sum": (0.6, 0.61, 0.5)}}, "partly"),
        ({"accuracies": {"sum": (0.6, 0.5, 0.61)}}, "partly"),
        ({"level": 1.41}, "not reproduced"),
        *(
            ({f"{name}_{operator}_{side}": 1.41}, "not reproduced")
            for name in ("cora", "citeseer")
            for operator in ("symmetric", "sum")
            for side in ("outputs", "gradients")
        ),
    ],
)
def test_judge(changed, outcome):
    assert claim.judge(evidence(**changed)).outcome == outcome
