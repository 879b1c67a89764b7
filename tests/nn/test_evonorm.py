"""EvoNorm's layers and graphs against loops over float64 numbers, batch norm, and formulas read back as text."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from provenn.contracts import BadInput, FunctionCase, ModuleCase, SearcherCase
from provenn.nn import (
    EvoNorm2d,
    EvoNormSearch,
    NormActAnchor,
    NormActGraph,
    NormActLayer,
    NormActRejection,
    NormActSpace,
    replace_norm_act,
)
from provenn.nn._evonorm_graph import BINARY, OPERATIONS

KINDS = ("B0", "B1", "B2", "S0", "S1", "S2")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def images(generator, dtype, batch):
    return ((0.3 + torch.randn(batch, 8, 3, 2, generator=generator, dtype=torch.float64)).to(dtype),)


def unsettled(module, seed=0):
    """Give every parameter and running value another number than where it starts."""
    with torch.no_grad():
        for index, (name, tensor) in enumerate(sorted(module.state_dict().items())):
            tensor.copy_(normal(*tensor.shape, seed=seed + index).to(tensor) * 0.3 + 1)
            if name.startswith("running"):
                tensor.abs_()
    return module


def bad_layer(argument, error=ValueError, **options):
    return BadInput(argument, lambda: EvoNorm2d(**{"num_features": 8, "groups": 4, **options}), error)


def bad_call(kind, shape, **options):
    return BadInput("x", lambda: EvoNorm2d(8, kind, groups=8, **options)(torch.zeros(shape)))


BAD_LAYERS = (
    bad_layer("num_features", num_features=0),
    bad_layer("num_features", TypeError, num_features=8.0),
    bad_layer("kind", kind="B3"),
    bad_layer("groups", kind="S0", groups=3),
    bad_layer("groups", kind="S1", groups=32),
    bad_layer("group_size", kind="S2", group_size=3),
    bad_layer("eps", eps=-1e-5),
    bad_layer("eps", eps=math.nan),
    bad_layer("momentum", momentum=1.5),
    bad_call("B0", (8, 3, 3)),
    bad_call("S0", (2, 8, 3)),
    bad_call("S2", (2, 4, 3, 3)),
    *(bad_call(kind, (1, 8, 1, 1)) for kind in ("B0", "B1", "B2", "S0", "S1")),
)


def layer_case(kind):
    batched = kind[0] == "B"
    return ModuleCase(
        part="provenn.nn.EvoNorm2d",
        make=lambda **options: EvoNorm2d(8, kind, group_size=2, **options),
        inputs=images,
        training_equals_eval=not batched,
        training_equals_eval_reason="in training the batch's own variance is used" if batched else "",
        bfloat16_tolerance=0.1 if kind == "B1" else 5e-2,  # (x + 1) near 0 loses digits
        bad_input=BAD_LAYERS,
        label=kind,
    )


def graph_case(name):
    batched = name[0] == "B"
    return ModuleCase(
        part="provenn.nn.NormActLayer",
        make=lambda **options: NormActLayer(NormActGraph.named(name), 8, group_size=2, **options),
        inputs=images,
        training_equals_eval=not batched,
        training_equals_eval_reason="in training the batch's own statistics are used" if batched else "",
        bad_input=(
            BadInput("graph", lambda: NormActLayer("B0", 8), TypeError),
            BadInput("num_features", lambda: NormActLayer(NormActGraph.named("B0"), 0)),
            BadInput("groups", lambda: NormActLayer(NormActGraph.named("S0"), 8)),
            BadInput("eps", lambda: NormActLayer(NormActGraph.named("B0"), 8, eps=-1)),
            BadInput("momentum", lambda: NormActLayer(NormActGraph.named("B0"), 8, momentum=2)),
            BadInput("x", lambda: NormActLayer(NormActGraph.named("B0"), 8)(torch.zeros(1, 8, 1, 1))),
            BadInput("x", lambda: NormActLayer(NormActGraph.named("SiLU"), 8)(torch.zeros(2, 4, 3, 3))),
        ),
        label=name,
    )


def pair():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


SPACE = NormActSpace()


def few_images(n=4):
    return {"x": torch.zeros(n, 1, 4, 4), "y": torch.zeros(n).long()} | {
        "x_validation": torch.zeros(2, 1, 4, 4),
        "y_validation": torch.zeros(2).long(),
    }


def anchor(**options):
    return NormActAnchor(**{"architecture": "resnet", **few_images(), **options})


def bad_anchor(argument, error=ValueError, **options):
    return BadInput(argument, lambda: anchor(**options), error)


def random_graph(generator):
    return NormActGraph.random(SPACE, generator)


def of_space(graph):
    return isinstance(graph, NormActGraph) and graph in SPACE and len(graph.nodes) == 10


def binary_nodes(graph):
    """One of six operations is binary, so that nine of ten are rarely met by chance."""
    return float(sum(op in BINARY for op, _ in graph.nodes))


def bad_search(argument, error=ValueError, **options):
    return BadInput(argument, lambda: EvoNormSearch(**{"space": SPACE, **options}), error)


def bad_tell(argument, points, values, error=ValueError):
    return BadInput(argument, lambda: EvoNormSearch(NormActSpace("S")).tell(points, values), error)


B0, S0 = NormActGraph.named("B0"), NormActGraph.named("S0")
BAD_SEARCHES = (
    bad_search("space", TypeError, space="B"),
    bad_search("anchors", TypeError, anchors=["resnet"]),
    bad_search("population", population=1),
    bad_search("tournament", tournament=0.0),
    bad_search("selection", selection="best"),
    bad_search("restart", restart=1.5),
    bad_search("seed", TypeError, seed=0.5),
    bad_tell("values", [S0], [1.0, 2.0]),
    bad_tell("values", [S0, S0], [1.0, (1.0, 2.0)]),
    bad_tell("values", [S0], [()]),
    bad_tell("points", [B0], [1.0]),
    bad_tell("points", ["S0"], [1.0], TypeError),
    BadInput("anchors", lambda: EvoNormSearch(SPACE).evaluate(B0)),
)

CASES = [
    *map(layer_case, KINDS),
    ModuleCase(
        part="provenn.nn.EvoNorm2d",
        make=lambda: EvoNorm2d(8, "B0", apply_act=False),
        inputs=images,
        bad_input=BAD_LAYERS[:1],
        label="affine",
    ),
    *map(graph_case, ("BN-ReLU", "B1", "S0")),
    FunctionCase(
        "provenn.nn.replace_norm_act",
        lambda: replace_norm_act(pair(), "S0", group_size=2),
        bad_input=(
            BadInput("model", lambda: replace_norm_act("resnet"), TypeError),
            BadInput("model", lambda: replace_norm_act(nn.Linear(2, 2))),
            BadInput("kind", lambda: replace_norm_act(pair(), "GN")),
            BadInput("groups", lambda: replace_norm_act(pair(), "S0")),
        ),
    ),
    FunctionCase(
        "provenn.nn.NormActGraph",
        lambda: NormActGraph((("add", (0, 3)), ("max", (4, 1)))).to_formula(),
        bad_input=(
            BadInput("nodes", lambda: NormActGraph(())),
            BadInput("nodes", lambda: NormActGraph((("relu", (0,)),))),
            BadInput("nodes", lambda: NormActGraph((("add", (0,)),))),
            BadInput("nodes", lambda: NormActGraph((("add", (0, 4)),))),
            BadInput("nodes", lambda: NormActGraph((("neg", (-1,)),))),
            BadInput("name", lambda: NormActGraph.named("B3")),
        ),
    ),
    FunctionCase(
        "provenn.nn.NormActSpace",
        lambda: NormActSpace("S").operations,
        bad_input=(
            BadInput("series", lambda: NormActSpace("C")),
            BadInput("nodes", lambda: NormActSpace(nodes=0)),
            BadInput("nodes", lambda: NormActSpace(nodes=2.0), TypeError),
        ),
    ),
    FunctionCase(
        "provenn.nn.NormActAnchor",
        lambda: anchor(width=8, steps=1, batch_size=2).accuracy(NormActGraph.named("BN-ReLU")),
        bad_input=(
            bad_anchor("architecture", architecture="vgg"),
            bad_anchor("width", width=0),
            bad_anchor("steps", TypeError, steps=1.5),
            bad_anchor("batch_size", batch_size=0),
            bad_anchor("lr", lr=0),
            bad_anchor("group_size", group_size=5),
            bad_anchor("momentum", momentum=1.5),
            bad_anchor("y", y=torch.zeros(3).long()),
            bad_anchor("x_validation", x_validation=torch.zeros(0, 1, 4, 4), y_validation=torch.zeros(0).long()),
        ),
    ),
    FunctionCase(
        "provenn.nn.NormActRejection",
        lambda: NormActRejection(1, 0.0, 1).reason(B0, [anchor(width=8, steps=1, batch_size=2)]),
        bad_input=(
            BadInput("quality_steps", lambda: NormActRejection(quality_steps=-1)),
            BadInput("min_accuracy", lambda: NormActRejection(min_accuracy=20)),
            BadInput("stability_steps", lambda: NormActRejection(stability_steps=0.5), TypeError),
            BadInput("stability_lr", lambda: NormActRejection(stability_lr=0)),
            BadInput("max_gradient_norm", lambda: NormActRejection(max_gradient_norm=-1)),
        ),
    ),
    SearcherCase(
        "provenn.nn.EvoNormSearch",
        make=lambda seed: EvoNormSearch(SPACE, population=20, tournament=0.3, seed=seed),
        valid=of_space,
        random_point=random_graph,
        objective=binary_nodes,
        budget=100,
        bad_input=BAD_SEARCHES,
        label="one anchor",
    ),
    SearcherCase(
        "provenn.nn.EvoNormSearch",
        make=lambda seed: EvoNormSearch(SPACE, population=20, tournament=0.3, seed=seed),
        valid=of_space,
        random_point=random_graph,
        objective=lambda graph: (binary_nodes(graph), binary_nodes(graph) - graph.nodes[0][0].count("mean")),
        budget=100,
        quality=lambda values: max(map(sum, values)),
        failed=(math.nan, math.nan),
        best_of_told=False,
        best_of_told_reason="best is by the mean of several scores",
        bad_input=BAD_SEARCHES[:1],
        label="two anchors",
    ),
]


# The layers against loops.


def by_loops(kind, x, v, gamma, beta, groups, eps, variance=None):
    """The tables' formulas, one output at a time; ``variance`` replaces the batch's."""
    x, out = x.numpy(), np.empty(tuple(x.shape))
    size = x.shape[1] // groups
    for b, c, h, w in np.ndindex(*x.shape):
        value, sample = x[b, c, h, w], x[b, c]
        group = x[b, c // size * size : (c // size + 1) * size]
        batch = math.sqrt((x[:, c].var() if variance is None else variance[c]) + eps)
        rms = math.sqrt((sample**2).mean() + eps)
        if kind == "B0":
            result = value / max(batch, v[c] * value + math.sqrt(sample.var() + eps))
        elif kind == "B1":
            result = value / max(batch, (value + 1) * rms)
        elif kind == "B2":
            result = value / max(batch, rms - value)
        else:
            gate = 1 / (1 + math.exp(-(v[c] if kind == "S0" else 1.0) * value))
            result = value * gate / math.sqrt(((group**2).mean() if kind == "S2" else group.var()) + eps)
        out[b, c, h, w] = result * gamma[c] + beta[c]
    return torch.from_numpy(out)


def parameters(layer):
    v = [1.0] * layer.num_features if layer.v is None else layer.v.tolist()
    return v, layer.weight.tolist(), layer.bias.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_output_is_the_tables_formula(kind, eps):
    layer = unsettled(EvoNorm2d(6, kind, groups=2, eps=eps).double())
    x = 2 * normal(3, 6, 4, 5) + 0.5
    assert torch.allclose(layer(x), by_loops(kind, x, *parameters(layer), 2, eps), rtol=1e-12, atol=1e-12)
    layer.eval()
    variance = None if layer.running_var is None else layer.running_var.tolist()
    wanted = by_loops(kind, x, *parameters(layer), 2, eps, variance)
    assert torch.allclose(layer(x), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_training_go_through_the_statistics(kind):
    layer = unsettled(EvoNorm2d(4, kind, groups=2).double())
    names = [name for name, _ in layer.named_parameters()]

    def output(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    given = [normal(2, 4, 2, 3, seed=5), *(parameter.detach() for parameter in layer.parameters())]
    assert torch.autograd.gradcheck(output, [one.requires_grad_() for one in given])


def test_group_size_is_the_channels_over_the_groups():
    assert EvoNorm2d(12, "S0", group_size=4).groups == 3
    x = normal(2, 12, 3, 3)
    by_size, by_count = EvoNorm2d(12, "S0", group_size=4).double(), EvoNorm2d(12, "S0", groups=3).double()
    assert torch.equal(by_size(x), by_count(x))
    assert not torch.allclose(by_size(x), EvoNorm2d(12, "S0", groups=4).double()(x))


@pytest.mark.parametrize("kind", KINDS)
def test_starts_and_what_each_kind_holds(kind):
    layer = EvoNorm2d(8, kind, groups=4)
    held = {"weight": 1.0, "bias": 0.0}
    held |= {"v": 1.0} if kind in ("B0", "S0") else {}
    held |= {"running_var": 1.0} if kind[0] == "B" else {}
    assert {name: tensor.unique().item() for name, tensor in layer.state_dict().items()} == held
    assert (layer.eps, layer.momentum) == (1e-5, 0.1)
    assert EvoNorm2d(64, "S0").groups == 32


def test_without_activation_it_is_affine_and_may_start_as_nothing():
    for kind in KINDS:
        layer = unsettled(EvoNorm2d(6, kind, apply_act=False).double())  # 32 groups do not matter here
        x = normal(2, 6, 3, 3)
        assert torch.equal(layer(x), x * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1))
        assert set(layer.state_dict()) == {"weight", "bias"}
    assert not EvoNorm2d(4, zero_init=True)(torch.ones(2, 4, 3, 3)).any()


def test_s1_is_silu_over_the_groups_deviation():
    x = normal(3, 6, 4, 4) + 1
    deviation = torch.stack([x[:, :3].std((1, 2, 3), correction=0), x[:, 3:].std((1, 2, 3), correction=0)], 1)
    wanted = nn.functional.silu(x) / deviation.repeat_interleave(3, 1)[:, :, None, None]
    assert torch.allclose(EvoNorm2d(6, "S1", groups=2, eps=0.0).double()(x), wanted, atol=1e-12)


def test_b0_with_v_zero_is_batch_norm_without_centring():
    x = normal(1, 4, 3, 3).repeat(4, 1, 1, 1) + normal(4, 1, 1, 1, seed=1)  # samples vary alike, around other means
    layer = EvoNorm2d(4, "B0").double()
    nn.init.zeros_(layer.v)
    batch = x.std((0, 2, 3), correction=0, keepdim=True)
    assert (batch >= x.std((2, 3), correction=0, keepdim=True)).all()
    assert torch.allclose(layer(x), x / (batch.square() + 1e-5).sqrt(), atol=1e-12)


@pytest.mark.parametrize("scale", [0.2, 7.0])
def test_s0_takes_a_scale_that_its_gate_undoes(scale):
    x = normal(2, 6, 4, 4) + 0.3
    one, other = (EvoNorm2d(6, "S0", groups=2, eps=0.0).double() for _ in range(2))
    nn.init.constant_(other.v, 1 / scale)
    assert torch.allclose(other(scale * x), one(x), atol=1e-12)
    assert not torch.allclose(one(scale * x), one(x), atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_centred(kind):
    layer, x = EvoNorm2d(6, kind, groups=2).double(), normal(2, 6, 4, 4)
    assert not torch.allclose(layer(x + 1), layer(x), atol=0.1)


@pytest.mark.parametrize("kind", ["B0", "B1", "B2"])
def test_running_variance(kind):
    layer = EvoNorm2d(4, kind, momentum=0.3).double()
    batches = [normal(3, 4, 2, 2, seed=seed) * (1 + seed) + seed for seed in range(3)]
    wanted = torch.ones(4).double()
    for x in batches:
        layer(x)
        wanted = 0.7 * wanted + 0.3 * x.transpose(0, 1).flatten(1).var(1, correction=1)
    assert torch.allclose(layer.running_var, wanted, atol=1e-12)
    layer.eval()(batches[0])
    assert torch.allclose(layer.running_var, wanted, atol=1e-12)
    assert not layer.running_var.requires_grad


@pytest.mark.parametrize("kind", ["B0", "B1", "B2"])
def test_eval_with_the_batchs_variance_is_training(kind):
    layer, x = EvoNorm2d(4, kind).double(), 3 * normal(5, 4, 3, 3) - 1
    trained = layer(x)
    layer.running_var.copy_(x.var((0, 2, 3), correction=0))
    assert torch.allclose(layer.eval()(x), trained, atol=1e-12)
    one_by_one = torch.cat([layer(sample[None]) for sample in x])
    assert torch.allclose(one_by_one, trained, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "scale", "shift"), [(torch.bfloat16, 1, 40), (torch.float16, 400, 0)])
def test_half_precision_keeps_the_digits_of_the_statistics(kind, dtype, scale, shift):
    x = (scale * normal(4, 8, 16, 16) + shift).to(dtype)  # 400² is past the range of float16
    exact = EvoNorm2d(8, kind, groups=2).double()(x.double())
    with torch.autocast("cpu", dtype=dtype):
        found = EvoNorm2d(8, kind, groups=2)(x)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), exact, rtol=2e-2, atol=1e-5)  # a few roundings of 2⁻⁸


def test_autocast_trains_and_an_empty_batch_leaves_the_running_variance():
    layer = EvoNorm2d(4, "B0")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(nn.Conv2d(2, 4, 3)(torch.ones(2, 2, 5, 5) * torch.arange(5.0)))
    y.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    before = layer.running_var.clone()
    assert layer(torch.zeros(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    assert torch.equal(layer.running_var, before)


@pytest.mark.parametrize("kind", ["B0", "B1", "B2"])
def test_training_compiles_with_its_running_variance(kind):
    plain = EvoNorm2d(4, kind).double()
    compiled = copy.deepcopy(plain)
    torch.compiler.reset()
    forward = torch.compile(compiled, backend="eager", fullgraph=True)
    for seed in range(2):
        x = normal(3, 4, 4, 4, seed=seed)
        assert torch.allclose(forward(x), plain(x), atol=1e-12)
    assert torch.equal(compiled.running_var, plain.running_var)
    assert (compiled.running_var != 1).all()


def test_one_pixel_is_refused_only_where_its_variance_is_zero():
    pixel = torch.ones(1, 8, 1, 1)
    for kind in ("B0", "B1", "B2"):
        layer = EvoNorm2d(8, kind)
        with pytest.raises(ValueError, match=r"x must have more than one value a channel.*\(1, 8, 1, 1\)"):
            layer(pixel)
        assert layer(torch.randn(2, 8, 1, 1)).isfinite().all()
        assert layer.eval()(pixel).isfinite().all()
    for kind in ("S0", "S1"):
        with pytest.raises(ValueError, match="more than one value a group"):
            EvoNorm2d(8, kind, groups=8)(torch.ones(4, 8, 1, 1))
        assert EvoNorm2d(8, kind, groups=4)(pixel).isfinite().all()
    assert EvoNorm2d(8, "S2", groups=8)(pixel).isfinite().all()


# The graphs.


@pytest.mark.parametrize("kind", KINDS)
def test_the_space_contains_every_evonorm(kind):
    graph, x = NormActGraph.named(kind), 2 * normal(3, 6, 4, 5) + 0.5
    assert graph in NormActSpace(series=kind[0])
    assert (graph in NormActSpace("S")) == (kind[0] == "S")
    ours, theirs = graph.to_module(6, groups=2).double(), EvoNorm2d(6, kind, groups=2).double()
    with torch.no_grad():
        for seed, name in enumerate(("weight", "bias")):
            for layer in (ours, theirs):
                getattr(layer, name).copy_(normal(6, seed=seed))
        if theirs.v is not None:
            ours.v1.copy_(normal(6, seed=2))
            theirs.v.copy_(ours.v1)
    for mode in (True, False):
        assert torch.allclose(ours.train(mode)(x), theirs.train(mode)(x), atol=1e-12)


def test_the_space_contains_batch_norm_with_relu_and_silu():
    x = [normal(3, 6, 4, 4, seed=seed) * 2 + 1 for seed in range(2)]
    graph = NormActGraph.named("BN-ReLU").to_module(6).double()
    plain = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()).double()
    with torch.no_grad():
        plain[0].weight.copy_(normal(6, seed=4))
        plain[0].bias.copy_(normal(6, seed=5))
        graph.v1.copy_(plain[0].weight)
        graph.v0.copy_(plain[0].bias)
    for one in x:
        assert torch.allclose(graph(one), plain(one), atol=1e-12)
    assert torch.allclose(graph.eval()(x[0]), plain.eval()(x[0]), atol=1e-12)
    silu = NormActGraph.named("SiLU").to_module(6).double()
    assert torch.allclose(silu(x[0]), nn.functional.silu(x[0]), atol=1e-14)
    assert set(silu.state_dict()) == {"weight", "bias"}


def moment_by_numpy(op, x, group_size=2):
    moment, axes = op.split("_")
    x = np.asarray(x)
    over = {"bwh": (0, 2, 3), "wh": (2, 3), "whc": (1, 2, 3), "whcg": (2, 3, 4)}[axes]
    given = x.reshape(len(x), -1, group_size, *x.shape[2:]) if axes == "whcg" else x
    value = {
        "mean": given.mean(over, keepdims=True),
        "rms": np.sqrt((given**2).mean(over, keepdims=True) + 1e-5),
        "std": np.sqrt(given.var(over, keepdims=True) + 1e-5),
    }[moment]
    return np.broadcast_to(value, given.shape).reshape(x.shape)


ELEMENTWISE = {
    "add": lambda a, b: a + b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b, "max": np.maximum,
    "neg": lambda a: -a, "sigmoid": lambda a: 1 / (1 + np.exp(-a)), "tanh": np.tanh, "exp": np.exp,
    "log": lambda a: np.sign(a) * np.log(np.abs(a)), "abs": np.abs, "square": lambda a: a * a,
    "sqrt": lambda a: np.sign(a) * np.sqrt(np.abs(a)),
}  # fmt: skip


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_operation_by_numpy(op):
    x = normal(3, 4, 3, 5) + 0.4
    v1 = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)
    wide_v1 = np.broadcast_to(v1.view(1, 4, 1, 1).numpy(), x.shape)
    for place, given in ((0, x.numpy()), (3, wide_v1)):  # vectors over channels count as if broadcast
        layer = NormActGraph(((op, (place, 3) if op in BINARY else (place,)),)).to_module(4, group_size=2).double()
        if layer.v1 is not None:
            layer.v1.data = v1
        if op in ELEMENTWISE:
            wanted = ELEMENTWISE[op](given, wide_v1) if op in BINARY else ELEMENTWISE[op](given)
        else:
            wanted = moment_by_numpy(op, given)
        assert torch.allclose(layer(x), torch.from_numpy(np.array(wanted)), atol=1e-12), place


def test_signed_root_and_logarithm_have_finite_slopes_at_zero():
    for op in ("sqrt", "log", "abs"):
        x = torch.zeros(2, 4, 2, 2, dtype=torch.float64, requires_grad=True)
        y = NormActGraph(((op, (0,)),)).to_module(4).double()(x)
        y.sum().backward()
        assert not y.any()
        assert not x.grad.any()


def read_back(formula, x, parameters):
    """Evaluate a formula as Python, on NumPy arrays of the full shape."""
    full = {name: np.broadcast_to(value, x.shape) for name, value in parameters.items()}
    names = {op: (lambda a, op=op: moment_by_numpy(op, a)) for op in OPERATIONS if "_" in op}
    names |= {"max": np.maximum, "exp": np.exp, "tanh": np.tanh, "abs": np.abs, "sigma": ELEMENTWISE["sigmoid"]}
    names |= {"slog": ELEMENTWISE["log"], "ssqrt": ELEMENTWISE["sqrt"], "x": x, **full}
    for sign, word in {"·": "*", "²": "**2", "−": "-", "σ": "sigma", "γ": "gamma", "β": "beta"}.items():
        formula = formula.replace(sign, word)
    formula = formula.replace("(0", "(zero").replace(" 0", " zero")
    return eval("zero " + formula[2:] if formula.startswith("0 ") else formula, names)


def test_formulas_read_back_give_the_modules_output():
    x, compared = normal(2, 4, 3, 3), 0
    draws = torch.Generator().manual_seed(0)
    for _ in range(60):
        graph = NormActGraph.random(NormActSpace(nodes=6), draws)
        layer = graph.to_module(4, group_size=2).double()
        per_channel = {name: normal(4, seed=seed) for seed, name in enumerate(("v0", "v1", "weight", "bias"))}
        for name, value in per_channel.items():
            if getattr(layer, name) is not None:
                getattr(layer, name).data = value
        given = {name: value.view(1, 4, 1, 1).numpy() for name, value in per_channel.items()}
        given |= {"gamma": given.pop("weight"), "beta": given.pop("bias"), "zero": np.zeros(())}
        with np.errstate(all="ignore"):
            wanted = np.broadcast_to(read_back(graph.to_formula(), x.numpy(), given), x.shape)
        found = layer(x).detach().numpy()
        if np.isfinite(wanted).all():
            compared += 1
            assert np.allclose(found, wanted, rtol=1e-9, atol=1e-9), graph.to_formula()
    assert compared > 30


def test_hash_is_of_the_function():
    plain = NormActGraph((("sigmoid", (0,)), ("mul", (0, 4))))
    swapped = NormActGraph((("sigmoid", (0,)), ("mul", (4, 0))))
    idle = NormActGraph((("exp", (3,)), ("sigmoid", (0,)), ("mul", (0, 5))))
    assert plain.hash() == swapped.hash() == idle.hash()
    quotients = [NormActGraph((("sigmoid", (0,)), ("div", inputs))) for inputs in ((0, 4), (4, 0))]
    others = [
        *quotients,
        NormActGraph((("tanh", (0,)), ("mul", (0, 4)))),
        NormActGraph((("sigmoid", (3,)), ("mul", (0, 4)))),
    ]
    assert len({graph.hash() for graph in (plain, *others)}) == 5
    assert len({NormActGraph.named(name).hash() for name in (*KINDS, "BN-ReLU", "SiLU")}) == 8


def test_random_graphs_draw_uniformly():
    draws = torch.Generator().manual_seed(1)
    graphs = [NormActGraph.random(SPACE, draws) for _ in range(300)]
    assert {len(graph.nodes) for graph in graphs} == {10}
    operations = [op for graph in graphs for op, _ in graph.nodes]
    shares = np.array([operations.count(op) / len(operations) for op in OPERATIONS])
    assert len(OPERATIONS) == 24
    assert np.abs(shares - 1 / 24).max() < 5 * math.sqrt(1 / 24 / 3000)  # five deviations
    last = [index for graph in graphs for index in graph.nodes[-1][1]]
    assert set(last) == set(range(13))
    series = [NormActGraph.random(NormActSpace("S"), draws) for _ in range(100)]
    assert not any(op.endswith("_bwh") for graph in series for op, _ in graph.nodes)


def test_mutation_changes_one_node():
    draws, parent = torch.Generator().manual_seed(2), NormActGraph.random(SPACE, torch.Generator().manual_seed(3))
    children = [parent.mutate(SPACE, draws) for _ in range(200)]
    changed = [[i for i in range(10) if child.nodes[i] != parent.nodes[i]] for child in children]
    assert max(map(len, changed)) == 1
    assert {places[0] for places in changed if places} == set(range(10))
    assert any(child.nodes[9][0] == parent.nodes[9][0] for child in children if child != parent)


def test_idle_nodes_cost_nothing():
    layer = NormActGraph((("mean_bwh", (2,)), ("tanh", (0,)))).to_module(4)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert [op for _, op, _ in layer.steps] == ["tanh"]
