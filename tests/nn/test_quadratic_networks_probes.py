"""The instruments of expressivity against dense sampling, kinks by hand, and dimensions from algebra."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from provenn.contracts import BadInput, ProbeCase
from provenn.core.experiment.seeding import seeded
from provenn.nn import QuadraticConv2d, QuadraticLinear, polynomial_pieces, variety_dimension


class Square(nn.Module):
    def forward(self, x):
        return x * x


def drawn_sequence(kinds, seed=0, std=1.0):
    with seeded(seed):
        model = nn.Sequential(*(kind() for kind in kinds)).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=std)
    return model


def piecewise_model():
    net = nn.Sequential(QuadraticLinear(2, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 3), nn.ReLU()), nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    return net


def polynomial_model():
    return nn.Sequential(QuadraticLinear(2, 2), QuadraticLinear(2, 2, compact=True), nn.Linear(2, 1))


def line(generator):
    return 2 * torch.rand(2, generator=generator) - 3, 2 * torch.rand(2, generator=generator) + 1


def sampled_pieces(model, points, count=200_001):
    """Count stretches of equal activation patterns on a dense grid, with NumPy."""
    t = np.linspace(0, 1, count)[:, None]
    x = (1 - t) * points[0].double().numpy() + t * points[1].double().numpy()
    patterns = []
    for layer in model.modules():
        if isinstance(layer, QuadraticLinear):
            r, g, b = (x @ part.weight.detach().double().numpy().T + part.bias.detach().double().numpy()
                       for x, part in ((x, layer.r), (x, layer.g), (x * x, layer.b)))  # fmt: skip
            x = r * (g + 1) + b
        elif isinstance(layer, nn.Linear) and layer in LINEAR(model):
            x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        elif isinstance(layer, nn.ReLU):
            patterns.append(x > 0)
            x = np.maximum(x, 0)
    switched = (np.diff(np.concatenate(patterns, axis=1).astype(int), axis=0) != 0).any(axis=1)
    return t[1:, 0][switched]


def LINEAR(model):  # noqa: N802 - linear layers that are not a map of a quadratic one
    inside = {part for layer in model.modules() if isinstance(layer, QuadraticLinear) for part in layer.modules()}
    return {part for part in model.modules() if isinstance(part, nn.Linear)} - inside


def rank_by_differences(model, features):
    """Rank of the Jacobian of coefficients: values on a grid, derivatives by central differences, NumPy's rank."""
    model = model.double()
    degree = 4
    grid = torch.tensor(list(itertools.product(np.cos(np.arange(degree + 1) * np.pi / degree), repeat=features)))
    vector = np.random.default_rng(5).normal(size=sum(p.numel() for p in model.parameters()))

    @torch.no_grad()
    def values(vector):
        nn.utils.vector_to_parameters(torch.from_numpy(vector), model.parameters())
        return model(grid).flatten().numpy().copy()

    jacobian = [(values(vector + 1e-4 * one) - values(vector - 1e-4 * one)) / 2e-4 for one in np.eye(len(vector))]
    return int(np.linalg.matrix_rank(np.stack(jacobian), tol=1e-6))


def bad_line(argument, error=ValueError, **changes):
    given = {"model": piecewise_model(), "start": torch.zeros(2), "end": torch.ones(2), **changes}
    return BadInput(argument, lambda: polynomial_pieces(**given), error)


CASES = [
    ProbeCase(
        part="provenn.nn.polynomial_pieces",
        run=lambda model, data: polynomial_pieces(model, *data),
        model=piecewise_model,
        data=line,
        brute_force=lambda model, data: {
            "pieces": 1 + len(sampled_pieces(model, data)),
            "breakpoints": tuple(sampled_pieces(model, data).tolist()),
            "degree": 2,
        },
        tolerance=1e-4,  # the spacing of the grid is 5e-6
        bad_input=(
            bad_line("model", TypeError, model=nn.Sequential(nn.Linear(2, 2), nn.Tanh())),
            bad_line("model", TypeError, model=nn.Sequential(QuadraticConv2d(2, 2, 1))),
            bad_line("model", TypeError, model="net"),
            bad_line("start", TypeError, start=torch.zeros(2, dtype=torch.int64)),
            bad_line("start", start=torch.zeros(3), end=torch.ones(3)),
            bad_line("end", end=torch.zeros(2)),
            bad_line("end", end=torch.ones(1, 2)),
        ),
    ),
    ProbeCase(
        part="provenn.nn.variety_dimension",
        run=lambda model, data: variety_dimension(model, 2),
        model=polynomial_model,
        data=lambda generator: None,
        brute_force=lambda model, data: {
            "dimension": rank_by_differences(model, 2),
            "parameters": 18 + 12 + 3,
        },
        bad_input=(
            BadInput("features", lambda: variety_dimension(polynomial_model(), 0)),
            BadInput("model", lambda: variety_dimension(piecewise_model(), 2), TypeError),
            BadInput("model", lambda: variety_dimension(nn.Identity(), 2)),
            BadInput("model", lambda: variety_dimension(None, 2), TypeError),
        ),
    ),
]


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


@pytest.mark.parametrize("seed", range(4))
def test_deep_pieces_agree_with_dense_sampling_and_are_polynomials(seed):
    wide = 5
    kinds = [lambda: QuadraticLinear(2, wide), nn.ReLU, lambda: QuadraticLinear(wide, wide), nn.ReLU]
    model = drawn_sequence([*kinds, lambda: QuadraticLinear(wide, 1)], seed, 0.7)
    points = torch.tensor([-1.5, -1.0]), torch.tensor([1.5, 2.0])
    found = polynomial_pieces(model, *points)
    assert found.degree == 8
    sampled = sampled_pieces(model, points)
    exact = np.array(found.breakpoints)
    assert all(np.abs(sampled - one).min() < 1e-5 for one in exact)
    assert all(np.abs(exact - one).min() < 1e-5 for one in sampled)
    edges = [0.0, *found.breakpoints, 1.0]
    left, right = max(itertools.pairwise(edges), key=lambda pair: pair[1] - pair[0])
    nodes = np.cos((np.arange(20) + 0.5) * np.pi / 20)
    t = torch.from_numpy(left + (right - left) * (1 + nodes) / 2)[:, None]
    values = model((1 - t) * points[0].double() + t * points[1].double())[:, 0].detach().numpy()
    fit = np.polynomial.chebyshev.chebfit(nodes, values, 19)
    assert np.abs(fit[9:]).max() < 1e-10 * np.abs(fit).max()


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
