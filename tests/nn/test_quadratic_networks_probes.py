"""The instruments of expressivity against dense sampling, kinks by hand, and dimensions from algebra."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from provenn.core.experiment.seeding import seeded
from provenn.nn import QuadraticLinear, polynomial_pieces, variety_dimension


class Square(nn.Module):
    def forward(self, x):
        return x * x


def drawn_sequence(kinds, seed=0, std=1.0):
    with seeded(seed):
        model = nn.Sequential(*(kind() for kind in kinds)).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=std)
    return model


def test_a_parabola_under_a_relu_has_its_kinks_at_its_roots():
    layer = QuadraticLinear(1, 1).double()
    with torch.no_grad():  # (x − 0.25)(x + 0.5): roots at 0.25 and −0.5
        layer.r.weight.fill_(1.0)
        layer.r.bias.fill_(-0.25)
        layer.g.weight.fill_(1.0)
        layer.g.bias.fill_(-0.5)
    found = polynomial_pieces(nn.Sequential(layer, nn.ReLU()), torch.tensor([-1.0]), torch.tensor([1.0]))
    assert found.pieces == 3
    assert found.breakpoints == pytest.approx([0.25, 0.625], abs=1e-12)
    assert found.degree == 2


def test_touching_and_missing_roots_are_no_breakpoints():
    layer = QuadraticLinear(1, 3, compact=True).double()
    with torch.no_grad():  # x², x² + 1 and −x²: no ReLU switches for longer than a point
        layer.r.weight.zero_()
        layer.r.bias.zero_()
        layer.b.weight.copy_(torch.tensor([[1.0], [1.0], [-1.0]]))
        layer.b.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    found = polynomial_pieces(nn.Sequential(layer, nn.ReLU()), torch.tensor([-1.0]), torch.tensor([1.0]))
    assert found.pieces == 1


def test_a_tent_map_doubles_its_pieces():
    tent = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():  # 2 relu(x) − 4 relu(x − ½), a tent on [0, 1]
        tent[0].weight.fill_(1.0)
        tent[0].bias.copy_(torch.tensor([0.0, -0.5]))
        tent[2].weight.copy_(torch.tensor([[2.0, -4.0]]))
        tent[2].bias.zero_()
    found = polynomial_pieces(nn.Sequential(tent, tent, tent), torch.tensor([0.0]), torch.tensor([1.0]))
    assert found.pieces == 8
    assert found.breakpoints == pytest.approx([k / 8 for k in range(1, 8)], abs=1e-9)
    assert found.degree == 1


def test_quadratic_neurons_give_more_pieces_than_linear_ones_of_equal_width():
    def pieces(make, seed):
        kinds = [lambda: make(2, 8), nn.ReLU, lambda: make(8, 8), nn.ReLU, lambda: make(8, 1)]
        model = drawn_sequence(kinds, seed, 0.7)
        return polynomial_pieces(model, torch.tensor([-2.0, -2.0]), torch.tensor([2.0, 1.5])).pieces

    ours, theirs = ([pieces(make, seed) for seed in range(8)] for make in (QuadraticLinear, nn.Linear))
    assert np.mean(ours) > 1.3 * np.mean(theirs)


@pytest.mark.parametrize(("features", "width"), [(3, 1), (4, 2), (4, 3), (5, 3), (3, 3), (3, 5)])
def test_sums_of_squares_have_the_dimension_of_symmetric_matrices_of_bounded_rank(features, width):
    model = nn.Sequential(nn.Linear(features, width, bias=False), Square(), nn.Linear(width, 1, bias=False))
    rank = min(features, width)
    expected = features * rank - rank * (rank - 1) // 2
    found = variety_dimension(model, features)
    assert found.dimension == expected
    assert found.parameters == width * (features + 1)


def rational_rank(rows):
    rows, rank = [[Fraction(one) for one in row] for row in rows], 0
    for column in range(len(rows[0])):
        pivot = next((index for index in range(rank, len(rows)) if rows[index][column]), None)
        if pivot is None:
            continue
        rows[rank], rows[pivot] = rows[pivot], rows[rank]
        for index in range(rank + 1, len(rows)):
            factor = rows[index][column] / rows[rank][column]
            rows[index] = [one - factor * other for one, other in zip(rows[index], rows[rank], strict=True)]
        rank += 1
    return rank


@pytest.mark.parametrize("features", [1, 2, 3, 4])
def test_one_neurons_dimension_is_the_exact_rank_of_its_coefficient_map(features):
    n = features
    draws = np.random.default_rng(features).integers(-9, 10, size=2 * n + 2).tolist()
    r, b_r, g, b_g = draws[:n], draws[n], draws[n + 1 : 2 * n + 1], draws[2 * n + 1]
    pairs = list(itertools.combinations(range(n), 2))

    def row(**change):
        """Coefficients' derivative by one parameter: squares, products, linear terms, constant."""
        d_r, d_g = change.get("r", [0] * n), change.get("g", [0] * n)
        d_br, d_bg, d_b = change.get("b_r", 0), change.get("b_g", 0), change.get("b", [0] * n)
        squares = [d_r[i] * g[i] + r[i] * d_g[i] + d_b[i] for i in range(n)]
        products = [d_r[i] * g[j] + r[i] * d_g[j] + d_r[j] * g[i] + r[j] * d_g[i] for i, j in pairs]
        linear = [d_r[i] * b_g + r[i] * d_bg + d_g[i] * b_r + g[i] * d_br for i in range(n)]
        return [*squares, *products, *linear, d_br * b_g + b_r * d_bg + change.get("c", 0)]

    units = np.eye(n, dtype=int).tolist()
    rows = [row(**{name: unit}) for name in ("r", "g", "b") for unit in units]
    rows += [row(b_r=1), row(b_g=1), row(c=1)]
    assert variety_dimension(QuadraticLinear(n, 1), n).dimension == rational_rank(rows)


def test_quadratic_networks_reach_more_than_squares_of_equal_width():
    def sizes(kind, n, width):
        if kind == "quadratic":
            layers = [QuadraticLinear(n, width), QuadraticLinear(width, 1)]
        else:
            layers = [nn.Linear(n, width), Square(), nn.Linear(width, 1), Square()]
        return variety_dimension(nn.Sequential(*layers), n)

    ours, theirs = (sizes(kind, 2, 2) for kind in ("quadratic", "squares"))
    assert ours.dimension > theirs.dimension
    assert ours.dimension <= math.comb(2 + 4, 4)  # all quartics of two variables
    # A gap in the singular values, of many orders, where the rank was read off.
    for one in (ours, theirs):
        if one.dimension < len(one.singular_values):
            assert one.singular_values[one.dimension - 1] > 1e5 * one.singular_values[one.dimension]


def test_the_generator_decides_the_draws_and_not_the_dimension():
    found = [variety_dimension(QuadraticLinear(2, 1), 2, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[0].singular_values != found[2].singular_values
    assert found[0].dimension == found[2].dimension == 6
