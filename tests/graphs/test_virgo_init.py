"""Virgo against dense matrices, torch_geometric's own layers, special graphs, and draws of whole networks."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.nn import GATConv, GCNConv, GINConv, SAGEConv

from provenn.contracts import BadInput, FunctionCase, InitCase, ProbeCase
from provenn.contracts.cases_training import Moment
from provenn.core.experiment.seeding import generator
from provenn.graphs import variance_report, virgo_, virgo_variances

NODES, FEATURES, WIDTH, CLASSES = 9, 5, 8, 3
EDGES = torch.tensor(
    [[0, 1, 1, 2, 3, 0, 4, 5, 6, 7, 0, 8, 2, 0, 3, 0], [1, 0, 2, 1, 0, 3, 5, 4, 7, 6, 8, 0, 0, 2, 4, 6]]
)
"""Directed here and there, with node 0 as a hub."""
X = torch.rand(NODES, FEATURES, generator=generator("features"))
Y = torch.arange(NODES) % CLASSES


def mlp(wide, narrow):
    return nn.Sequential(
        nn.Linear(wide, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, narrow)
    )


CONVOLUTIONS = {
    "gcn": GCNConv,
    "sage": SAGEConv,
    "gin": lambda wide, narrow: GINConv(mlp(wide, narrow), eps=0.5),
}


class Network(nn.Module):
    """Layers are registered last to first, and called first to last; decoder and norm are none of Virgo's business."""

    def __init__(self, make=GCNConv, dims=(FEATURES, WIDTH, WIDTH, CLASSES), activation=nn.functional.relu):
        super().__init__()
        self.decoder = nn.Linear(dims[-1], dims[-1])
        self.norm = nn.BatchNorm1d(dims[-1])
        self.last_first = nn.ModuleList([make(a, b) for a, b in zip(dims[-2::-1], dims[:0:-1], strict=True)])
        self.activation = activation

    def forward(self, x, edge_index):
        for layer in list(self.last_first)[:0:-1]:
            x = nn.functional.dropout(self.activation(layer(x, edge_index)), 0.5, self.training)
        return self.decoder(self.norm(self.last_first[0](x, edge_index)))


def dense(kind, edges=EDGES, nodes=NODES):
    """The operators as dense matrices, straight from their definitions."""
    A = np.zeros((nodes, nodes))
    for source, target in edges.T.tolist():
        A[target, source] += 1
    if kind == "sage":
        return A / np.maximum(A.sum(1, keepdims=True), 1e-300)
    if kind == "gin":
        return A + 1.5 * np.eye(nodes)
    loops = A + np.eye(nodes)
    columns = loops.sum(0) if kind == "published" else loops.sum(1)
    return np.diag(loops.sum(1) ** -0.5) @ loops @ np.diag(columns**-0.5)


def by_hand(P, x, widths, classes):
    """Forward and backward variances for one operator and equal hidden widths, by powers of the matrix."""
    depth, mean, ones = len(widths), np.asarray(x, dtype=float).mean(1), np.ones(len(P))
    power = np.linalg.matrix_power
    c = [np.sum((power(P, k) @ mean) ** 2) for k in range(depth + 1)]
    b = [np.sum((power(P, k) @ ones) ** 2) for k in range(depth + 1)]
    forward = [2 / widths[0]] + [2 / widths[place] * c[place] / c[place + 1] for place in range(1, depth)]
    backward = [len(P) / ((classes - 1) * b[1])] + [2 / widths[1] * b[k - 1] / b[k] for k in range(2, depth + 1)]
    return np.array(forward), np.array(backward[::-1])


def moments(kind, names):
    forward, backward = by_hand(dense(kind), X, (FEATURES, WIDTH, WIDTH), CLASSES)
    stated = {}
    for variance, layer in zip(2 / (1 / forward + 1 / backward), (2, 1, 0), strict=True):
        for name in names:
            # A uniform law on ±a has variance a²/3.
            stated[f"last_first.{layer}.{name}"] = Moment(std=variance**0.5, largest=(3 * variance) ** 0.5)
    return stated


def changes(*names):
    return tuple(f"last_first.{layer}.{name}" for layer in range(3) for name in names)


def initialise(**options):
    return lambda module, source: virgo_(module, EDGES, X, CLASSES, generator=source, **options)


def ring(nodes):
    at = torch.arange(nodes)
    return torch.cat([torch.stack([at, (at + 1) % nodes]), torch.stack([(at + 1) % nodes, at])], dim=1)


def operator_of(P):
    matrix = torch.as_tensor(P, dtype=torch.float64)
    return lambda v: matrix @ v


IDENTITY = operator_of(np.eye(NODES))
LIST = "it returns the list of variances"


def layers_by_hand(model, data):
    """Outputs of every layer and their gradients, with dense matrices and the chain rule written out."""
    x, _, y = data
    P = dense("gcn")
    layers = [
        (layer.lin.weight.detach().numpy().T, layer.bias.detach().numpy()) for layer in list(model.last_first)[::-1]
    ]
    h, outputs = x.numpy(), []
    for weight, bias in layers:
        outputs.append(P @ h @ weight + bias)
        h = np.maximum(outputs[-1], 0)
    norm, decoder = model.norm, model.decoder
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
    shift = (norm.bias - norm.running_mean * torch.from_numpy(scale)).detach().numpy()
    scores = (outputs[-1] * scale + shift) @ decoder.weight.detach().numpy().T + decoder.bias.detach().numpy()
    share = np.exp(scores - scores.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    slope = (share - np.eye(CLASSES)[y.numpy()]) / NODES @ decoder.weight.detach().numpy() * scale
    slopes = [slope]
    for place in (1, 0):
        slope = (P.T @ slope @ layers[place + 1][0].T) * (outputs[place] > 0)
        slopes.insert(0, slope)
    return {"forward": [np.mean(one**2) for one in outputs], "backward": [np.mean(one**2) for one in slopes]}


CASES = [
    InitCase(
        part="provenn.graphs.virgo_",
        initialize=initialise(),
        make=Network,
        changes=changes("lin.weight", "bias"),
        moments=lambda: moments("gcn", ["lin.weight"]),
        returns_module=False,
        returns_module_reason=LIST,
        bad_input=(
            BadInput("module", lambda: virgo_(nn.Linear(5, 3), EDGES, X, 3)),
            BadInput("module", lambda: virgo_(Network(GATConv), EDGES, X, 3)),
            BadInput("module", lambda: virgo_(Network(lambda a, b: SAGEConv(a, b, aggr="max")), EDGES, X, 3)),
            BadInput("module", lambda: virgo_(nn.ModuleList([GCNConv(5, 3)]), EDGES, X, 3), TypeError),
            BadInput("num_classes", lambda: virgo_(Network(), EDGES, X, 1)),
            BadInput("num_classes", lambda: virgo_(Network(), EDGES, X, 3.0), TypeError),
            BadInput("mode", lambda: virgo_(Network(), EDGES, X, 3, mode="sideways")),
            BadInput("combine", lambda: virgo_(Network(), EDGES, X, 3, combine="geometric")),
            BadInput("operator", lambda: virgo_(Network(), EDGES, X, 3, operator="sage")),
            BadInput("layers", lambda: virgo_(Network(), EDGES, X, 3, layers=[])),
            BadInput("x", lambda: virgo_(Network(), EDGES, X - X.mean(1, keepdim=True), 3)),
        ),
    ),
    InitCase(
        part="provenn.graphs.virgo_",
        label="SAGE",
        initialize=initialise(),
        make=lambda: Network(SAGEConv),
        changes=changes("lin_l.weight", "lin_r.weight", "lin_l.bias"),
        moments=lambda: moments("sage", ["lin_l.weight", "lin_r.weight"]),
        returns_module=False,
        returns_module_reason=LIST,
        bad_input_reason="as the first case",
    ),
    InitCase(
        part="provenn.graphs.virgo_",
        label="GIN, the published operator",
        initialize=initialise(operator="gcn"),
        make=lambda: Network(CONVOLUTIONS["gin"]),
        changes=changes(*(f"nn.{place}.{name}" for place in (0, 2, 4) for name in ("weight", "bias"))),
        moments=lambda: (
            moments("published", ["nn.0.weight", "nn.4.weight"])
            | {name: Moment(std=(2 / WIDTH) ** 0.5, largest=(6 / WIDTH) ** 0.5) for name in changes("nn.2.weight")}
        ),
        returns_module=False,
        returns_module_reason=LIST,
        bad_input_reason="as the first case",
    ),
    FunctionCase(
        part="provenn.graphs.virgo_variances",
        call=lambda: virgo_variances([IDENTITY] * 2, X, (5, 8, 3), 3),
        bad_input=(
            BadInput("operators", lambda: virgo_variances([], X, (5,), 3)),
            BadInput("operators", lambda: virgo_variances([IDENTITY], X, (5, 8, 3), 3)),
            BadInput("operators", lambda: virgo_variances([torch.zeros_like], X, (5, 3), 3)),
            BadInput("dims", lambda: virgo_variances([IDENTITY], X, (0, 3), 3)),
            BadInput("num_classes", lambda: virgo_variances([IDENTITY], X, (5, 3), 1)),
            BadInput("mode", lambda: virgo_variances([IDENTITY], X, (5, 3), 3, mode="none")),
            BadInput("combine", lambda: virgo_variances([IDENTITY], X, (5, 3), 3, combine="median")),
            BadInput("x", lambda: virgo_variances([IDENTITY], torch.zeros(NODES, 5), (5, 3), 3)),
        ),
    ),
    ProbeCase(
        part="provenn.graphs.variance_report",
        run=lambda model, data: variance_report(model, *data),
        model=lambda: Network().double(),
        data=lambda source: (torch.rand(NODES, FEATURES, generator=source, dtype=torch.float64), EDGES, Y),
        brute_force=layers_by_hand,
        bad_input=(
            BadInput("module", lambda: variance_report(nn.Linear(5, 3), X, EDGES)),
            BadInput("y", lambda: variance_report(Network(), X, EDGES, Y[:3])),
        ),
    ),
]


# The numbers.


@pytest.mark.parametrize("kind", ["gcn", "sage", "gin", "published"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_variances_against_powers_of_dense_matrices(kind, depth):
    P, dims = dense(kind), (FEATURES, *[WIDTH] * (depth - 1), CLASSES)
    forward, backward = by_hand(P, X, dims[:-1] if depth > 1 else (FEATURES, 0), CLASSES) if depth > 1 else (None, None)
    if depth == 1:
        ones = P @ np.ones(NODES)
        forward, backward = np.array([2 / FEATURES]), np.array([NODES / ((CLASSES - 1) * np.sum(ones**2))])
    operators = [operator_of(P)] * depth
    assert virgo_variances(operators, X, dims, CLASSES, "forward") == pytest.approx(forward, rel=1e-6)
    assert virgo_variances(operators, X, dims, CLASSES, "backward") == pytest.approx(backward, rel=1e-12)
    harmonic = virgo_variances(operators, X, dims, CLASSES)
    arithmetic = virgo_variances(operators, X, dims, CLASSES, combine="arithmetic")
    assert harmonic == pytest.approx(2 * forward * backward / (forward + backward), rel=1e-6)
    assert arithmetic == pytest.approx((forward + backward) / 2, rel=1e-6)
    assert all(one <= other for one, other in zip(harmonic, arithmetic, strict=True))


def test_each_layer_has_its_own_operator():
    first, second, third = (np.random.default_rng(seed).random((NODES, NODES)) for seed in range(3))
    operators = [operator_of(one) for one in (first, second, third)]
    dims, mean, ones = (5, 8, 8, 3), X.double().numpy().mean(1), np.ones(NODES)
    c1, c2, c3 = (np.sum(one**2) for one in (first @ mean, second @ first @ mean, third @ second @ first @ mean))
    forward = [2 / 5, 2 / 8 * c1 / c2, 2 / 8 * c2 / c3]
    assert virgo_variances(operators, X, dims, 4, "forward") == pytest.approx(forward, rel=1e-6)
    b1, b2, b3 = (np.sum(one**2) for one in (third @ ones, second @ third @ ones, first @ second @ third @ ones))
    backward = [2 / 8 * b2 / b3, 2 / 8 * b1 / b2, NODES / (3 * b1)]
    assert virgo_variances(operators, X, dims, 4, "backward") == pytest.approx(backward, rel=1e-12)


def test_identity_is_kaiming_by_fan_in():
    found = virgo_variances([IDENTITY] * 4, X, (5, 8, 8, 8, 3), 3, "forward")
    assert found == pytest.approx([2 / 5, 2 / 8, 2 / 8, 2 / 8], rel=1e-12)


def test_row_means_and_regular_graphs_leave_ones_alone():
    edges = ring(10)
    x = torch.rand(10, 5, generator=generator(0))
    for make in (SAGEConv, GCNConv):  # a ring with self-loops is 3-regular
        found = virgo_(Network(make), edges, x, 4, mode="backward")
        assert found == pytest.approx([2 / WIDTH, 2 / WIDTH, 1 / 3], rel=1e-6)


def test_scalings():
    P = dense("gin")
    operators, scaled = [operator_of(P)] * 3, [operator_of(3 * P)] * 3
    dims = (5, 8, 8, 3)
    for mode in ("forward", "backward", "both"):
        plain = virgo_variances(operators, X, dims, 3, mode)
        assert virgo_variances(operators, 1e-6 * X, dims, 3, mode) == pytest.approx(plain, rel=1e-6)
    forward, tripled = (virgo_variances(one, X, dims, 3, "forward") for one in (operators, scaled))
    assert tripled == pytest.approx([forward[0], forward[1] / 9, forward[2] / 9], rel=1e-12)


def test_deep_sums_stay_finite():
    # The hub's graph grows by more than 2 a layer: ‖P^l x‖² leaves float64 long before 2000 layers.
    found = virgo_variances([operator_of(dense("gin"))] * 2000, X, (5, *[8] * 1999, 3), 3)
    assert np.isfinite(found).all()
    largest = max(abs(np.linalg.eigvals(dense("gin"))))
    assert found[1000] == pytest.approx(2 / 8 / largest**2, rel=1e-6)


def test_unequal_widths_warn_and_use_their_own():
    with pytest.warns(UserWarning, match="hidden widths"):
        found = virgo_variances([IDENTITY] * 3, X, (5, 4, 16, 3), 3, "forward")
    assert found == pytest.approx([2 / 5, 2 / 4, 2 / 16])
    with pytest.warns(UserWarning, match="hidden widths"):
        found = virgo_variances([IDENTITY] * 3, X, (5, 4, 16, 3), 3, "backward")
    assert found == pytest.approx([2 / 4, 2 / 16, 1 / 2])


def test_zero_mean_features_are_refused_with_advice():
    centred = X - X.mean(1, keepdim=True)
    with pytest.raises(ValueError, match=r"x\.abs\(\)"):
        virgo_variances([IDENTITY], centred, (5, 3), 3)
    assert virgo_variances([IDENTITY], centred.abs(), (5, 3), 3, "forward") == [2 / 5]
    assert virgo_variances([IDENTITY], centred, (5, 3), 3, "backward") == [1 / 2]


# Networks of torch_geometric.

ONE = {
    "gcn": lambda: GCNConv(1, 1),
    "gcn improved": lambda: GCNConv(1, 1, improved=True),
    "gcn without loops": lambda: GCNConv(1, 1, add_self_loops=False),
    "gcn not normalised": lambda: GCNConv(1, 1, normalize=False),
    "gcn reversed": lambda: GCNConv(1, 1, flow="target_to_source", normalize=False),
    "sage": lambda: SAGEConv(1, 1, root_weight=False),
    "sage sum": lambda: SAGEConv(1, 1, root_weight=False, aggr="sum"),
    "gin": lambda: GINConv(nn.Linear(1, 1), eps=0.3),
}


@pytest.mark.parametrize("kind", list(ONE))
def test_operators_are_the_layers_own(kind):
    """A layer with weight 1 and no bias is its operator: v₂ and v_1 backward give away ‖P²x̄‖ and ‖P 1‖."""
    layers = [ONE[kind]().double() for _ in range(2)]
    weight = None
    if kind.startswith("gcn"):
        weight = torch.rand(EDGES.shape[1], generator=generator("weights"), dtype=torch.float64) + 0.1
    with torch.no_grad():
        for layer in layers:
            for name, parameter in layer.named_parameters():
                parameter.fill_(1.0 if "weight" in name else 0.0)
    arguments = () if weight is None else (weight,)

    def applied(signal):
        with torch.no_grad():
            return layers[0](signal[:, None], EDGES, *arguments)[:, 0]

    x = torch.rand(NODES, 1, generator=generator(1), dtype=torch.float64)
    once = applied(x[:, 0])
    ratio = (once.square().sum() / applied(once).square().sum()).item()
    ones = applied(torch.ones(NODES, dtype=torch.float64)).square().sum().item()
    for mode, found in (("forward", [2.0, 2 * ratio]), ("backward", [None, NODES / ones])):
        got = virgo_(nn.Identity(), EDGES, x, 2, mode, edge_weight=weight, layers=layers)
        assert got[1] == pytest.approx(found[1], rel=1e-6)
        with torch.no_grad():
            for layer in layers:
                for name, parameter in layer.named_parameters():
                    parameter.fill_(1.0 if "weight" in name else 0.0)


@pytest.mark.parametrize("kind", list(CONVOLUTIONS))
def test_variances_of_networks_and_their_bounds(kind):
    network = Network(CONVOLUTIONS[kind])
    forward, backward = by_hand(dense(kind), X, (FEATURES, WIDTH, WIDTH), CLASSES)
    for mode, wanted in (("forward", forward), ("backward", backward)):
        found = virgo_(network, EDGES, X, CLASSES, mode=mode, generator=generator("bounds"))
        assert found == pytest.approx(wanted, rel=1e-6)
        for layer, variance in zip(list(network.last_first)[::-1], found, strict=True):
            linears = [one for one in layer.modules() if getattr(one, "weight", None) is not None]
            for one in (linears[0], linears[-1]):
                bound = (3 * variance) ** 0.5
                assert 0.8 * bound < one.weight.abs().max() <= bound * (1 + 1e-6)
            assert all((one.bias == 0).all() for one in linears if one.bias is not None)


def test_a_million_weights():
    layer = GCNConv(1000, 1000)
    x = torch.rand(NODES, 1000, generator=generator(3))
    (variance,) = virgo_(layer, EDGES, x, 7, generator=generator(4))
    assert layer.lin.weight.var().item() == pytest.approx(variance, rel=0.02)
    assert layer.lin.weight.abs().max() <= (3 * variance) ** 0.5


def test_order_is_that_of_the_call_or_as_given():
    network = Network()
    called = virgo_(network, EDGES, X, CLASSES)
    assert called == virgo_(network, EDGES, X, CLASSES, layers=list(network.last_first)[::-1])
    assert network.last_first[2].lin.weight.abs().max() <= (3 * called[0]) ** 0.5 * (1 + 1e-6)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = GCNConv(5, 5)

    def forward(self, x, edge_index):
        return self.layer(self.layer(x, edge_index), edge_index)


def test_a_layer_called_twice_is_refused():
    with pytest.raises(ValueError, match="module calls a message-passing layer twice"):
        virgo_(Twice(), EDGES, X, 3)


def test_cached_operators_are_not_filled_by_looking():
    network = Network(lambda a, b: GCNConv(a, b, cached=True))
    virgo_(network, EDGES, X, CLASSES)
    assert all(layer._cached_edge_index is None for layer in network.last_first)


def test_without_torch_geometric_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(ImportError, match=r"provenn\[graphs\]"):
        virgo_(nn.Identity(), EDGES, X, 3)
    assert virgo_variances([IDENTITY], X, (5, 3), 3, "forward") == [2 / 5]


def test_report_is_not_reached_by_activations_in_place():
    draws = generator(6)
    network, plain = Network(activation=lambda h: h.relu_()), Network()
    with torch.no_grad():
        for one, other in zip(network.parameters(), plain.parameters(), strict=True):
            one.copy_(torch.randn(one.shape, generator=draws))
            other.copy_(one)
    assert variance_report(network, X, EDGES, Y) == variance_report(plain, X, EDGES, Y)
    assert variance_report(plain, X, EDGES).backward == ()


# Whole networks.


def mean_squares(P, x, variances, width, draws):
    """Mean square of every layer's output of linear networks, over many draws of all weights."""
    source = generator("networks")
    h, found = torch.as_tensor(x).expand(draws, *x.shape), []
    for variance in variances:
        shape = (draws, h.shape[-1], width)
        h = P @ h @ ((3 * variance) ** 0.5 * (2 * torch.rand(shape, generator=source, dtype=torch.float64) - 1))
        found.append(h.square().mean().item())
    return np.array(found)


def test_linear_networks_keep_their_variance_over_depth():
    # Without ReLU no half is lost: the factor 2 becomes 1, so variances are half of Virgo's.
    P = torch.from_numpy(dense("gin"))
    mean = torch.rand(NODES, 1, generator=generator(7), dtype=torch.float64)
    x, width = mean.expand(NODES, FEATURES), 32
    variances = virgo_variances([operator_of(P)] * 4, x, (FEATURES, width, width, width, width), 2, "forward")
    found = mean_squares(P, x, [one / 2 for one in variances], width, 2000)
    assert found / found[0] == pytest.approx(np.ones(4), rel=0.03)
    general = torch.rand(NODES, FEATURES, generator=generator(8), dtype=torch.float64) - 0.3
    variances = virgo_variances([operator_of(P)] * 4, general, (FEATURES, width, width, width, width), 2, "forward")
    found = mean_squares(P, general, [one / 2 for one in variances], width, 2000)
    powers = [np.linalg.matrix_power(P.numpy(), depth) for depth in range(1, 5)]
    drift = [np.sum((one @ general.numpy()) ** 2) / np.sum((one @ general.numpy().mean(1)) ** 2) for one in powers]
    assert found / found[0] == pytest.approx(np.array(drift) / drift[0], rel=0.03)
    kaiming = mean_squares(P, x, [1 / FEATURES, *[1 / width] * 3], width, 200)
    assert kaiming[-1] > 50 * kaiming[0]


def test_variances_of_the_authors_code():
    """Their lists for five GCN layers on an undirected graph of nine nodes, from their PyG version run as it is."""
    edges = torch.cat([EDGES, EDGES.flip(0)], dim=1).unique(dim=1)
    x = (torch.arange(45).view(9, 5) % 7).double() / 7
    theirs = {
        "forward": (0.4, 0.25245843998942513, 0.2503989971581398, 0.25012382550133677, 0.25006460613068693),
        "backward": (
            0.2500868848202972,
            0.2501354281565015,
            0.2502507660243857,
            0.2507605812266094,
            0.5125285229273846,
        ),
    }
    for mode, wanted in theirs.items():
        for operator in ("own", "gcn"):
            found = virgo_(Network(dims=(5, 8, 8, 8, 8, 3)), edges, x, 3, mode, operator=operator)
            assert found == pytest.approx(wanted, rel=1e-12)
