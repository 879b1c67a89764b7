"""Neural collapse against brute force, planted frames and direct optimisation."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

from provenn.claims import Evidence
from provenn.claims.inspect import neural_collapse as claim
from provenn.contracts import BadInput, FunctionCase, ModuleCase, ProbeCase
from provenn.inspect import NeuralCollapse, UnconstrainedFeatures, collapse_solution, neural_collapse_metrics

FEATURES = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3
WEIGHT = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))


def classifier():
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 5), nn.Identity(), nn.Linear(5, 3))


def batches(generator):
    x = torch.randn(24, 4, generator=generator)
    y = torch.arange(24) % 3
    return [(x[:7], y[:7]), (x[7:], y[7:])]


def by_hand(model, data):
    """The last layer's metrics for an ETF, with NumPy and sums over samples one by one."""
    model.eval()
    x, y = torch.cat([one for one, _ in data]), torch.cat([one for _, one in data]).numpy()
    h = model[:5](x).detach().double().numpy()
    w = model[5].weight.detach().double().numpy()
    centre = h.mean(0)
    means = np.stack([h[y == label].mean(0) for label in range(3)])
    within = sum(np.outer(one - means[label], one - means[label]) for one, label in zip(h, y, strict=True)) / len(h)
    between = sum(np.outer(one - centre, one - centre) for one in means) / 3
    frame = np.eye(3) - 1 / 3
    frame /= np.linalg.norm(frame)
    gram = (means - centre) @ (means - centre).T
    cross = w @ (means - centre).T
    rows = w @ w.T
    return {
        "nc1": np.trace(within @ np.linalg.pinv(between, rcond=1e-8)) / 3,
        "nc2": np.linalg.norm(gram / np.linalg.norm(gram) - frame),
        "nc2_weight": np.linalg.norm(rows / np.linalg.norm(rows) - frame),
        "nc3": np.linalg.norm(cross / np.linalg.norm(cross) - frame),
    }


CASES = [
    FunctionCase(
        part="provenn.inspect.neural_collapse_metrics",
        call=lambda: neural_collapse_metrics(FEATURES, LABELS, WEIGHT),
        bad_input=(
            BadInput("labels", lambda: neural_collapse_metrics(FEATURES, LABELS + 1, WEIGHT)),
            BadInput("labels", lambda: neural_collapse_metrics(FEATURES, LABELS * 0, WEIGHT)),
            BadInput("features", lambda: neural_collapse_metrics(FEATURES, LABELS, WEIGHT[:, :4])),
            BadInput("target", lambda: neural_collapse_metrics(FEATURES, LABELS, WEIGHT, target="frame")),
            BadInput("target", lambda: neural_collapse_metrics(FEATURES, LABELS, WEIGHT, target=torch.eye(4))),
        ),
    ),
    FunctionCase(
        part="provenn.inspect.collapse_solution",
        call=lambda: collapse_solution((4, 4), (3,), (1e-3, 1e-3)),
        bad_input=(
            BadInput("lambdas", lambda: collapse_solution((4, 4), (3,), (1e-3, 0.0))),
            BadInput("lambdas", lambda: collapse_solution((4, 4), (3,), (1e-3,))),
            BadInput("counts", lambda: collapse_solution((4,), (3,), (1e-3, 1e-3))),
            BadInput("counts", lambda: collapse_solution((4, 0), (3,), (1e-3, 1e-3))),
            BadInput("counts", lambda: collapse_solution((4, 3), (3,), (1e-3, 1e-3), loss="ce", bias=True)),
            BadInput("dims", lambda: collapse_solution((4, 4), (), (1e-3,))),
            BadInput("dims", lambda: collapse_solution((4, 4, 4), (1,), (1e-3, 1e-3), loss="ce", bias=True)),
            BadInput("bias", lambda: collapse_solution((4, 4), (3,), (1e-3, 1e-3), loss="ce")),
            BadInput("loss", lambda: collapse_solution((4, 4), (3,), (1e-3, 1e-3), loss="mae")),
        ),
    ),
    ProbeCase(
        part="provenn.inspect.NeuralCollapse",
        run=lambda model, data: NeuralCollapse(layers=["5"])(model, data),
        model=classifier,
        data=batches,
        brute_force=lambda model, data: {"counts": (8, 8, 8)},
        bad_input=(
            BadInput("target", lambda: NeuralCollapse(target="frame")),
            BadInput("every", lambda: NeuralCollapse(every=0)),
            BadInput("layers", lambda: NeuralCollapse(layers=["2"])(classifier(), [])),
            BadInput("model", lambda: NeuralCollapse()(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), [])),
            BadInput("labels", lambda: NeuralCollapse()(classifier(), [(torch.ones(2, 4), torch.tensor([0, 3]))])),
            BadInput("labels", lambda: NeuralCollapse()(classifier(), [(torch.ones(2, 4), torch.tensor([0, 0]))])),
        ),
    ),
    ModuleCase(
        part="provenn.inspect.UnconstrainedFeatures",
        make=lambda: UnconstrainedFeatures((3, 2), (4, 3), lambdas=(1e-2, 1e-2, 1e-2)),
        inputs=lambda generator, dtype, batch: (),
        bad_input=(
            BadInput("lambdas", lambda: UnconstrainedFeatures((3, 2), (4,), lambdas=(1e-2, -1.0))),
            BadInput("dims", lambda: UnconstrainedFeatures((3, 2), (0,))),
            BadInput("loss", lambda: UnconstrainedFeatures((3, 2), (4,), loss="hinge")),
        ),
        empty_batch=False,
        empty_batch_reason="forward takes no input: the features are parameters",
        independent_samples=False,
        independent_samples_reason="forward takes no input: the features are parameters",
    ),
]


def test_metrics_by_hand():
    torch.manual_seed(0)
    model = classifier()
    data = batches(torch.Generator().manual_seed(0))
    report = NeuralCollapse()(model, data)
    assert [layer.name for layer in report.layers] == ["3", "5"]
    for name, value in by_hand(model, data).items():
        assert getattr(report.layers[1], name) == pytest.approx(value, rel=1e-5), name


def test_every_layer_is_measured_with_its_partial_product():
    torch.manual_seed(0)
    model = classifier().eval()
    data = batches(torch.Generator().manual_seed(0))
    report = NeuralCollapse(target="of")(model, data)
    x, y = torch.cat([one for one, _ in data]), torch.cat([one for _, one in data])
    product = model[5].weight @ model[3].weight
    direct = neural_collapse_metrics(model[:3](x).detach(), y, product, target="of")
    for name, value in direct.items():
        assert getattr(report.layers[0], name) == pytest.approx(value, rel=1e-5), name
    assert report.layers[0].name == "3"


def test_probe_looks_at_one_batch_in_every():
    model = classifier()
    data = batches(torch.Generator().manual_seed(0)) * 2
    assert NeuralCollapse(every=2)(model, data).counts == (6, 4, 4)
    assert NeuralCollapse(every=1)(model, data).counts == (16, 16, 16)


def test_auto_target_goes_by_the_last_bias():
    data = batches(torch.Generator().manual_seed(0))
    assert NeuralCollapse()(classifier(), data).target == "etf"
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3, bias=False))
    assert NeuralCollapse()(plain, data).target == "of"


def planted(frame, copies=4, width=7):
    """Features exactly at the columns of a frame, rotated into a wider space, with rows to match."""
    basis = torch.linalg.qr(torch.randn(width, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    means = frame @ basis.T
    labels = torch.arange(3).repeat_interleave(copies)
    return means[labels], labels, 2.5 * means


SCORES = ("nc1", "nc2", "nc2_weight", "nc3")


@pytest.mark.parametrize(("target", "shift"), [("etf", 0.0), ("etf", 4.0), ("of", 0.0)])
def test_planted_collapse_scores_zero(target, shift):
    frame = torch.eye(3, dtype=torch.float64) - (1 / 3 if target == "etf" else 0)
    features, labels, weight = planted(frame)
    metrics = neural_collapse_metrics(features + shift, labels, weight, target)
    for name in SCORES:
        assert metrics[name] < 1e-12, name


def test_orthogonal_frame_keeps_the_global_mean():
    features, labels, weight = planted(torch.eye(3, dtype=torch.float64))
    assert neural_collapse_metrics(features + 4.0, labels, weight, "of")["nc2"] > 0.1
    # Centred orthogonal vectors are an ETF: the target decides whether the mean is taken away.
    assert neural_collapse_metrics(features, labels, weight, "etf")["nc2"] < 1e-12
    assert neural_collapse_metrics(features, labels, weight, "of")["feature_cosine"] < 1e-12


def test_gaussian_features_are_not_collapsed():
    metrics = neural_collapse_metrics(FEATURES, LABELS, WEIGHT)
    assert metrics["nc1"] > 0.1
    assert all(metrics[name] > 0.01 for name in SCORES)


@pytest.mark.parametrize("target", ["etf", "of"])
def test_invariances(target):
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))).Q
    features, weight = FEATURES.double(), WEIGHT.double()
    plain = neural_collapse_metrics(features, LABELS, weight, target)
    turned = neural_collapse_metrics(3.0 * features @ rotation, LABELS, 0.2 * weight @ rotation, target)
    for name in SCORES:
        assert turned[name] == pytest.approx(plain[name], rel=1e-10), name


def test_nc1_is_invariant_to_any_invertible_map_in_few_dimensions():
    draws = torch.Generator().manual_seed(5)
    features = torch.randn(12, 2, dtype=torch.float64, generator=draws)
    skew = torch.tensor([[3.0, 1.0], [0.5, 0.2]], dtype=torch.float64)
    weight = torch.randn(3, 2, dtype=torch.float64, generator=draws)
    first = neural_collapse_metrics(features, LABELS, weight)["nc1"]
    assert neural_collapse_metrics(features @ skew, LABELS, weight)["nc1"] == pytest.approx(first, rel=1e-8)


def test_classes_weigh_by_their_samples_in_the_global_mean():
    features = torch.tensor([[0.0], [0.0], [0.0], [0.0], [3.0], [3.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    metrics = neural_collapse_metrics(features, labels, torch.ones(2, 1, dtype=torch.float64))
    assert metrics["feature_norms"] == pytest.approx((1.0, 2.0))


# The predicted minimum.


def optimum(counts, dims, lambdas, loss="mse", bias=False, restarts=20, seed=0):
    """The smallest objective that L-BFGS finds from random starts, in NumPy."""
    classes, samples, widths = len(counts), sum(counts), [*dims, len(counts)]
    labels = np.repeat(np.arange(classes), counts)
    hot = np.eye(classes)[labels]
    shapes = (
        [(samples, dims[0])] + [(wide, narrow) for narrow, wide in itertools.pairwise(widths)] + [(classes,)] * bias
    )
    sizes = [math.prod(shape) for shape in shapes]
    model = UnconstrainedFeatures(counts, dims, loss, lambdas, bias).double()
    params = [model.features, *model.weights] + ([model.bias] if bias else [])

    def value(flat):
        with torch.no_grad():
            for param, piece, shape in zip(params, np.split(flat, np.cumsum(sizes)[:-1]), shapes, strict=True):
                param.copy_(torch.from_numpy(piece.reshape(shape)))
        model.zero_grad()
        objective = model.objective()
        objective.backward()
        return objective.item(), np.concatenate([param.grad.numpy().ravel() for param in params])

    def plain(flat):
        pieces = [p.reshape(s) for p, s in zip(np.split(flat, np.cumsum(sizes)[:-1]), shapes, strict=True)]
        factors = pieces[: len(dims) + 1]
        out = factors[0]
        for weight in factors[1:]:
            out = out @ weight.T
        if bias:
            out = out + pieces[-1]
        if loss == "mse":
            fit = ((out - hot) ** 2).sum() / (2 * samples)
        else:
            fit = (np.log(np.exp(out).sum(1)) - out[np.arange(samples), labels]).mean()
        return fit + sum(one / 2 * (factor**2).sum() for one, factor in zip(lambdas, factors, strict=True))

    draws = np.random.default_rng(seed)
    found = []
    for _ in range(restarts):
        start = draws.normal(size=sum(sizes))
        assert value(start)[0] == pytest.approx(plain(start), rel=1e-12)
        options = {"maxiter": 5000, "ftol": 1e-16, "gtol": 1e-10}
        found.append(scipy.optimize.minimize(value, start, jac=True, method="L-BFGS-B", options=options).fun)
    return min(found), found


PROBLEMS = [
    {"counts": (2, 2), "dims": (2,), "lambdas": (0.05, 0.02), "restarts": 200},
    {"counts": (4, 2, 1), "dims": (3,), "lambdas": (0.03, 0.04)},
    {"counts": (5, 1), "dims": (3,), "lambdas": (0.2, 0.2)},  # class 1 is lost: N²λ² = 1.44 ≥ 1
    {"counts": (4, 3, 2), "dims": (4, 4), "lambdas": (0.01, 0.02, 0.03)},
    {"counts": (3, 2), "dims": (3, 2, 4), "lambdas": (0.01, 0.01, 0.01, 0.01)},
    {"counts": (4, 3, 2), "dims": (2,), "lambdas": (0.02, 0.02)},  # width 2: the smallest class is lost
    {"counts": (3, 3, 3), "dims": (4,), "lambdas": (0.02, 0.03), "bias": True},
    {"counts": (5, 3, 2), "dims": (4,), "lambdas": (0.02, 0.03), "bias": True},
    {"counts": (3, 3, 3), "dims": (4,), "lambdas": (0.02, 0.03), "loss": "ce", "bias": True},
    {"counts": (3, 3), "dims": (4, 3), "lambdas": (0.005, 0.005, 0.005), "loss": "ce", "bias": True},
]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: str(problem)[:60])
def test_no_restart_goes_below_the_predicted_objective(problem):
    problem = dict(problem)
    restarts = problem.pop("restarts", 20)
    predicted = collapse_solution(**problem).objective
    best, found = optimum(**problem, restarts=restarts)
    assert best == pytest.approx(predicted, abs=1e-8)
    assert min(found) >= predicted - 1e-8


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_scalar_problem_against_a_grid(layers):
    counts, lambdas = (40, 20, 10, 5, 1), (0.01,) * (layers + 1)
    solution = collapse_solution(counts, (8,) * layers, lambdas)
    grid = np.linspace(0, 7, 700_001)
    p, samples = layers + 1, sum(counts)
    for count, s in zip(counts, solution.singular_values, strict=True):
        values = (grid - math.sqrt(count)) ** 2 / (2 * samples) + p / 2 * (math.prod(lambdas) * grid**2) ** (1 / p)
        assert s == pytest.approx(grid[values.argmin()], abs=2e-5)


def test_single_layer_closed_form():
    counts, wide, features = (40, 20, 10, 5), 0.01, 0.02
    solution = collapse_solution(counts, (8,), (features, wide))
    for place, count in enumerate(counts):
        s = math.sqrt(count) - sum(counts) * math.sqrt(wide * features)
        assert solution.singular_values[place] == pytest.approx(s, rel=1e-12)
        assert solution.row_norms[place] ** 2 == pytest.approx(s * math.sqrt(features / wide), rel=1e-12)
        assert solution.feature_norms[place] ** 2 == pytest.approx(s * math.sqrt(wide / features) / count, rel=1e-12)


def test_class_is_lost_exactly_at_its_threshold():
    counts = (40, 20, 10, 5)
    threshold = math.sqrt(5) / sum(counts)
    assert collapse_solution(counts, (8,), (threshold * 0.999,) * 2).lost_classes == ()
    assert collapse_solution(counts, (8,), (threshold * 1.001,) * 2).lost_classes == (3,)
    # From two layers on the loss is a jump: s goes from well above zero to zero.
    strengths = np.linspace(0.005, 0.03, 400)
    smallest = [collapse_solution(counts, (8, 8), (one,) * 3).singular_values[3] for one in strengths]
    assert min(one for one in smallest if one > 0) > 0.5
    assert smallest[-1] == 0


def test_width_below_the_classes_keeps_the_largest():
    solution = collapse_solution((10, 20, 5, 15), (2,), (1e-3, 1e-3))
    assert solution.lost_classes == (0, 2)
    assert solution.unique
    assert not collapse_solution((5, 5, 5), (2,), (1e-3, 1e-3)).unique


def test_balanced_general_frame_is_the_orthogonal_frame():
    solution = collapse_solution((6, 6, 6), (5, 4), (1e-3, 2e-3, 3e-3))
    for layer in (1, 2):
        for frame in solution.targets(layer).values():
            torch.testing.assert_close(frame / frame[0, 0], torch.eye(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_bias_with_balanced_classes_gives_a_simplex_frame():
    simplex = torch.eye(4, dtype=torch.float64) - 1 / 4
    for loss in ("mse", "ce"):
        solution = collapse_solution((6,) * 4, (5, 5), (1e-3, 1e-3, 1e-3), loss=loss, bias=True)
        for frame in solution.targets(2).values():
            torch.testing.assert_close(frame / frame.norm(), simplex / simplex.norm(), atol=1e-9, rtol=0)


def settle(counts, dims, lambdas, bias=False):
    torch.manual_seed(0)
    model = UnconstrainedFeatures(counts, dims, lambdas=lambdas, bias=bias).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=4000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        objective = model.objective()
        objective.backward()
        return objective

    optimizer.step(closure)
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_optimised_model_has_the_predicted_geometry(bias):
    counts, dims, lambdas = (12, 6, 4), (6, 5), (0.01, 0.008, 0.005)
    model, solution = settle(counts, dims, lambdas, bias), collapse_solution(counts, dims, lambdas, bias=bias)
    # At a minimum neighbouring factors balance: λ_{j+1} W_{j+1}ᵀ W_{j+1} = λ_j W_j W_jᵀ.
    features, first, last = model.features.detach(), *(one.detach() for one in model.weights)
    torch.testing.assert_close(lambdas[1] * first.T @ first, lambdas[0] * features.T @ features, atol=1e-7, rtol=0)
    torch.testing.assert_close(lambdas[2] * last.T @ last, lambdas[1] * first @ first.T, atol=1e-7, rtol=0)
    assert last.norm(dim=1).tolist() == pytest.approx(solution.row_norms, rel=1e-4)
    for layer, (hidden, product) in enumerate(((features, last @ first), (features @ first.T, last)), 1):
        metrics = neural_collapse_metrics(hidden, model.labels, product, solution.targets(layer))
        assert max(metrics[name] for name in SCORES) < 1e-4
    norms = [features[model.labels == label].norm(dim=1).mean().item() for label in range(3)]
    assert norms == pytest.approx(solution.feature_norms, rel=1e-4)


def test_probe_uses_the_solutions_frame_at_each_layer():
    counts, dims, lambdas = (12, 6, 4), (6, 5), (0.01, 0.008, 0.005)
    model, solution = settle(counts, dims, lambdas), collapse_solution(counts, dims, lambdas)
    head = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False)).double()
    with torch.no_grad():
        for layer, weight in zip(head, model.weights, strict=True):
            layer.weight.copy_(weight)
    report = NeuralCollapse(target=solution)(head, [(model.features.detach(), model.labels)])
    assert max(getattr(layer, name) for layer in report.layers for name in SCORES) < 1e-4
    plain = NeuralCollapse(target="of")(head, [(model.features.detach(), model.labels)])
    assert min(layer.nc2 for layer in plain.layers) > 0.05


# The claim.


def evidence(norm_error=0.001, cosine=1e-5, nc1=1e-3, nc2=0.02, etf=0.5, rows=0.01):
    figures = {
        (study, "optimised"): {"largest norm error": [norm_error] * 3, "largest cosine": [cosine] * 3}
        for study in claim.PROBLEMS
    }
    for depth in claim.DEPTHS:
        figures[f"digits, M={depth}", "trained"] = {
            "nc1": [nc1] * 3,
            "nc2": [nc2] * 3,
            "nc2 against an ETF": [etf] * 3,
            "row norm error": [rows] * 3,
        }
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("changed", "outcome"),
    [
        ({}, "reproduced"),
        ({"nc1": 0.02}, "partly"),
        ({"nc2": 0.11}, "partly"),
        ({"nc2": 0.09, "etf": 0.2}, "partly"),
        ({"rows": 0.04}, "partly"),
        ({"norm_error": 0.02}, "not reproduced"),
        ({"cosine": 2e-3}, "not reproduced"),
    ],
)
def test_judge(changed, outcome):
    assert claim.judge(evidence(**changed)).outcome == outcome
