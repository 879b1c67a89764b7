"""Quadratic layers and ReLinear against assembled matrices, polynomials by hand, and the linear layers themselves."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from provenn.contracts import BadInput, FunctionCase, InitCase, ModuleCase, Moment, ProbeCase
from provenn.core.experiment.accounting import model_size, multiply_accumulates
from provenn.core.experiment.networks import resnet
from provenn.core.experiment.seeding import seeded
from provenn.nn import (
    QResNet,
    QuadraticConv2d,
    QuadraticLinear,
    ReLinearShrink,
    polynomial_pieces,
    quadratize,
    relinear_init_,
    relinear_param_groups,
    variety_dimension,
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def drawn(make, seed=0, std=0.5):
    """Build a module whose every parameter is at work."""
    with seeded(seed):
        made = make().double()
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=std)
    return made


def away(make):
    """Build a layer for the suites away from its start, where all parts have gradients of their own."""
    made = make()
    with torch.no_grad():
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=0.3)
    return made


def features(generator, dtype, batch):
    return (torch.randn(batch, 4, generator=generator, dtype=torch.float64).to(dtype),)


def images(generator, dtype, batch):
    return (torch.randn(batch, 2, 5, 5, generator=generator, dtype=torch.float64).to(dtype),)


def small_images(generator, dtype, batch):
    return (torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype),)


def mixed_model():
    return nn.Sequential(nn.Conv2d(2, 3, 3), QuadraticConv2d(2, 4, 3), QuadraticLinear(5, 2, compact=True))


def small_model():
    return nn.Sequential(QuadraticLinear(4, 3), nn.ReLU(), nn.Linear(3, 2))


LINEAR_BAD = (
    BadInput("in_features", lambda: QuadraticLinear(0, 2)),
    BadInput("out_features", lambda: QuadraticLinear(2, 2.0), TypeError),
    BadInput("compact", lambda: QuadraticLinear(2, 2, compact=3), TypeError),
    BadInput("x", lambda: QuadraticLinear(2, 2)(torch.ones(3, 2, dtype=torch.int64)), TypeError),
    BadInput("x", lambda: QuadraticLinear(2, 2)(torch.ones(3, 3))),
)
CONV_BAD = (
    BadInput("in_channels", lambda: QuadraticConv2d(0, 2, 3)),
    BadInput("out_channels", lambda: QuadraticConv2d(2, 0, 3)),
    BadInput("x", lambda: QuadraticConv2d(2, 2, 3)(torch.ones(3, 2, 5, 5, dtype=torch.uint8)), TypeError),
    BadInput("x", lambda: QuadraticConv2d(2, 2, 3)(torch.ones(3, 3, 5, 5))),
    BadInput("x", lambda: QuadraticConv2d(2, 2, 3)(torch.ones(2, 5))),
)
GROUPED = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))


def quadratize_bad():
    nested = nn.Sequential(nn.Sequential(nn.ConvTranspose2d(2, 2, 3)), nn.Linear(2, 2))
    attention = nn.TransformerEncoderLayer(4, 2, 8)
    return (
        BadInput("layers", lambda: quadratize(GROUPED), TypeError),
        BadInput("layers", lambda: quadratize(nested, ["0"]), TypeError),
        BadInput("layers", lambda: quadratize(nn.Sequential(nn.Conv1d(2, 2, 3))), TypeError),
        BadInput("layers", lambda: quadratize(nn.Sequential(nn.LazyLinear(2))), TypeError),
        BadInput("layers", lambda: quadratize(attention), TypeError),
        BadInput("layers", lambda: quadratize(nested, "1"), TypeError),
        BadInput("layers", lambda: quadratize(nested, ["2"])),
        BadInput("layers", lambda: quadratize(nn.ReLU())),
        BadInput("layers", lambda: quadratize(small_model(), ["1"]), TypeError),
        BadInput("model", lambda: quadratize([nn.Linear(2, 2)]), TypeError),
        BadInput("compact", lambda: quadratize(nn.Linear(2, 2), compact=1), TypeError),
    )


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
    ModuleCase(
        part="provenn.nn.QuadraticLinear",
        make=lambda: away(lambda: QuadraticLinear(4, 3)),
        inputs=features,
        bad_input=LINEAR_BAD,
    ),
    ModuleCase(
        part="provenn.nn.QuadraticLinear",
        label="compact",
        make=lambda: away(lambda: QuadraticLinear(4, 3, compact=True, bias=False)),
        inputs=features,
        bad_input=LINEAR_BAD,
    ),
    ModuleCase(
        part="provenn.nn.QuadraticConv2d",
        make=lambda: away(lambda: QuadraticConv2d(2, 3, 3, stride=2, padding=1)),
        inputs=images,
        bad_input=CONV_BAD,
    ),
    ModuleCase(
        part="provenn.nn.QuadraticConv2d",
        label="compact",
        make=lambda: away(lambda: QuadraticConv2d(2, 3, 3, compact=True, padding=1, padding_mode="reflect")),
        inputs=images,
        bad_input=CONV_BAD,
    ),
    ModuleCase(
        part="provenn.nn.QResNet",
        make=lambda: QResNet(8, classes=3, width=2),
        inputs=small_images,
        bfloat16_tolerance=0.1,
        training_equals_eval=False,
        training_equals_eval_reason="batch norm",
        bad_input=(
            BadInput("depth", lambda: QResNet(18)),
            BadInput("depth", lambda: QResNet(2)),
            BadInput("classes", lambda: QResNet(8, classes=0)),
            BadInput("channels_in", lambda: QResNet(8, channels_in=0)),
            BadInput("width", lambda: QResNet(8, width=0)),
        ),
    ),
    InitCase(
        part="provenn.nn.relinear_init_",
        initialize=lambda module, generator: relinear_init_(module, generator=generator),
        make=mixed_model,
        changes=tuple(f"1.{part}.{kind}" for part in "rgb" for kind in ("weight", "bias"))
        + tuple(f"2.{part}.{kind}" for part in "rb" for kind in ("weight", "bias")),
        # By hand: fan-in 2 · 9 = 18 and 5; std √(2/fan_in); a uniform one on ±1/√fan_in has std 1/√(3 fan_in).
        moments=lambda: {
            "1.r.weight": Moment(std=1 / 3),
            "1.r.bias": Moment(std=1 / math.sqrt(54), largest=1 / math.sqrt(18)),
            "2.r.weight": Moment(std=math.sqrt(2 / 5)),
            **{f"1.{part}.{kind}": Moment(std=0.0, largest=0.0) for part in "gb" for kind in ("weight", "bias")},
            "2.b.weight": Moment(std=0.0, largest=0.0),
        },
        bad_input=(
            BadInput("base", lambda: relinear_init_(QuadraticLinear(2, 2), "xavier")),
            BadInput("module", lambda: relinear_init_(nn.Linear(2, 2))),
            BadInput("module", lambda: relinear_init_("layer"), TypeError),
            BadInput(
                "module",
                lambda: relinear_init_(quadratize(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))),
                TypeError,
            ),
        ),
    ),
    FunctionCase(
        part="provenn.nn.relinear_param_groups",
        call=lambda: relinear_param_groups(small_model(), 0.1, 1e-3, 1e-3),
        bad_input=(
            BadInput("lr", lambda: relinear_param_groups(small_model(), -0.1, 0.0, 0.0)),
            BadInput("lr_g", lambda: relinear_param_groups(small_model(), 0.1, math.nan, 0.0)),
            BadInput("lr_b", lambda: relinear_param_groups(small_model(), 0.1, 0.0, "0"), TypeError),
            BadInput("model", lambda: relinear_param_groups(nn.Linear(2, 2), 0.1, 0.0, 0.0)),
        ),
    ),
    FunctionCase(
        part="provenn.nn.ReLinearShrink",
        call=lambda: ReLinearShrink(small_model(), 0.1, 0.1).step(),
        bad_input=(
            BadInput("alpha_g", lambda: ReLinearShrink(small_model(), 1.0, 0.1)),
            BadInput("alpha_g", lambda: ReLinearShrink(small_model(), math.nan, 0.1)),
            BadInput("alpha_b", lambda: ReLinearShrink(small_model(), 0.1, -0.1)),
            BadInput("norm", lambda: ReLinearShrink(small_model(), 0.1, 0.1, "linf")),
            BadInput("model", lambda: ReLinearShrink(nn.Linear(2, 2), 0.1, 0.1)),
        ),
    ),
    FunctionCase(
        part="provenn.nn.quadratize",
        call=lambda: quadratize(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Conv2d(2, 2, 3))),
        bad_input=quadratize_bad(),
    ),
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


# The neuron.


def test_the_neuron_is_the_assembled_quadratic_form():
    layer = drawn(lambda: QuadraticLinear(5, 1))
    w_r, w_g, w_b = (part.weight[0].detach().numpy() for part in (layer.r, layer.g, layer.b))
    b_r, b_g, c = layer.r.bias.item(), layer.g.bias.item() + 1, layer.b.bias.item()
    matrix = (np.outer(w_r, w_g) + np.outer(w_g, w_r)) / 2 + np.diag(w_b)
    vector, constant = b_g * w_r + b_r * w_g, b_r * b_g + c
    x = normal(6, 5)
    expected = [one @ matrix @ one + vector @ one + constant for one in x.numpy()]
    assert np.allclose(layer(x).detach().numpy()[:, 0], expected, rtol=0, atol=1e-12)
    # Autograd's Hessian is twice the matrix, with rank at most n, and n − 2 dimensions of it are diagonal alone.
    hessian = torch.autograd.functional.hessian(lambda one: layer(one)[0], x[0])
    assert np.allclose(hessian.numpy(), 2 * matrix, atol=1e-12)
    assert np.linalg.matrix_rank(matrix) <= 5
    assert np.linalg.matrix_rank(matrix - np.diag(w_b)) == 2


def test_the_compact_neuron_has_no_products_of_different_features():
    layer = drawn(lambda: QuadraticLinear(3, 2, compact=True))
    x = normal(4, 3)
    expected = np.stack(
        [
            [
                sum(layer.r.weight[m, i].item() * v + layer.b.weight[m, i].item() * v * v for i, v in enumerate(one))
                + layer.r.bias[m].item()
                + layer.b.bias[m].item()
                for m in range(2)
            ]
            for one in x.tolist()
        ]
    )
    assert np.allclose(layer(x).detach().numpy(), expected, atol=1e-12)


def set_neuron(w_r, b_r, w_g, b_g, w_b, c):
    layer = QuadraticLinear(len(w_r), 1).double()
    with torch.no_grad():
        for part, weight, bias in ((layer.r, w_r, b_r), (layer.g, w_g, b_g - 1), (layer.b, w_b, c)):
            part.weight.copy_(torch.tensor([weight]))
            part.bias.fill_(bias)
    return layer


def test_one_neuron_multiplies_takes_norms_and_computes_xor():
    x = normal(20, 2)
    product = set_neuron([1.0, 0.0], 0.0, [0.0, 1.0], 0.0, [0.0, 0.0], 0.0)
    assert torch.allclose(product(x)[:, 0], x[:, 0] * x[:, 1], atol=1e-14)
    norm = set_neuron([0.0, 0.0], 0.0, [0.0, 0.0], 1.0, [1.0, 1.0], 0.0)
    assert torch.allclose(norm(x)[:, 0], x.square().sum(1), atol=1e-14)
    xor = set_neuron([-1.0, 0.0], 0.0, [0.0, 1.0], 0.0, [0.0, 0.0], 0.0)
    for first, second in itertools.product((-1.0, 1.0), repeat=2):
        assert (xor(torch.tensor([first, second], dtype=torch.float64)).item() > 0) == (first != second)


def test_a_deep_network_on_a_line_is_a_polynomial_of_degree_two_to_the_depth():
    net = drawn(lambda: nn.Sequential(QuadraticLinear(1, 3), QuadraticLinear(3, 3), QuadraticLinear(3, 1)), std=0.4)
    degree = 8
    t = np.linspace(-1, 1, 101)

    def values(places):
        return net(torch.from_numpy(places)[:, None])[:, 0].detach().numpy()

    def residual(count):
        nodes = np.cos((np.arange(count) + 0.5) * np.pi / count)
        fit = np.polynomial.chebyshev.chebfit(nodes, values(nodes), count - 1)
        return np.abs(np.polynomial.chebyshev.chebval(t, fit) - values(t)).max()

    assert residual(degree + 1) < 1e-8
    assert residual(degree) > 1e-6


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1}, {"padding": 2, "dilation": 2}, {"padding": 1, "padding_mode": "circular"}],
)
def test_the_convolution_is_the_neuron_on_every_patch(compact, options):
    layer = drawn(lambda: QuadraticConv2d(2, 3, 3, compact=compact, **options))
    dense = QuadraticLinear(18, 3, compact=compact).double()
    for part in ("r", "g", "b"):
        if getattr(layer, part) is not None:
            getattr(dense, part).weight.data = getattr(layer, part).weight.data.flatten(1)
            getattr(dense, part).bias.data = getattr(layer, part).bias.data
    x = normal(2, 2, 7, 7)
    pad = options.get("padding", 0)
    mode = options.get("padding_mode", "constant")
    padded = nn.functional.pad(x, (pad,) * 4, mode=mode)
    patches = nn.functional.unfold(padded, 3, options.get("dilation", 1), 0, options.get("stride", 1))
    expected = dense(patches.mT).mT
    assert torch.allclose(layer(x).flatten(2), expected, atol=1e-12)


def test_shared_weights_give_the_outputs_of_the_authors_formula():
    layer = drawn(lambda: QuadraticConv2d(3, 4, 3, 2, 1))
    convs = [nn.Conv2d(3, 4, 3, 2, 1).double() for _ in range(3)]
    for conv, part, shift in zip(convs, (layer.r, layer.g, layer.b), (0.0, 1.0, 0.0), strict=True):
        conv.weight.data, conv.bias.data = part.weight.data, part.bias.data + shift
    x = normal(2, 3, 9, 9)
    expected = convs[0](x) * convs[1](x) + convs[2](x.pow(2))
    assert torch.allclose(layer(x), expected, atol=1e-12)


def test_costs_are_three_times_and_compactly_twice_the_linear_ones():
    x = torch.zeros(5, 7)
    plain = nn.Linear(7, 4)
    for compact, times in ((False, 3), (True, 2)):
        layer = QuadraticLinear(7, 4, compact)
        assert model_size(layer).parameters == times * model_size(plain).parameters
        assert multiply_accumulates(layer, x) == times * multiply_accumulates(plain, x)
    image, conv = torch.zeros(2, 3, 8, 8), nn.Conv2d(3, 4, 3)
    for compact, times in ((False, 3), (True, 2)):
        layer = QuadraticConv2d(3, 4, 3, compact=compact)
        assert model_size(layer).parameters == times * model_size(conv).parameters
        assert multiply_accumulates(layer, image) == times * multiply_accumulates(conv, image)
    # Without biases there is still b_g.
    assert model_size(QuadraticLinear(7, 4, bias=False)).parameters == 3 * 28 + 4


@pytest.mark.parametrize("kind", ["autocast float16", "autocast bfloat16", "float16"])
def test_squares_do_not_overflow_in_half_precision(kind):
    layer = set_neuron([0.0, 0.0], 0.0, [0.0, 0.0], 1.0, [1e-3, 1e-3], 0.0).float()
    x = torch.tensor([[1000.0, 2000.0]])  # squares up to 4e6, beyond float16's 65504
    if kind == "float16":
        found = layer.half()(x.half())
        assert found.dtype == torch.float16
    else:
        with torch.autocast("cpu", getattr(torch, kind.split()[1])):
            found = layer(x)
            assert found.dtype == torch.float32
            assert layer(x.half()).item() == pytest.approx(5000.0, rel=1e-3)
        found.sum().backward()
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert found.item() == pytest.approx(5000.0, rel=1e-3)


# ReLinear.


def test_a_fresh_layer_is_linear_bit_by_bit():
    for layer, x in (
        (QuadraticLinear(6, 4).double(), normal(8, 6)),
        (QuadraticConv2d(2, 3, 3, 2, 1).double(), normal(4, 2, 9, 9)),
        (QuadraticConv2d(2, 3, 3, compact=True).double(), normal(4, 2, 9, 9)),
    ):
        assert torch.equal(layer(x), layer.r(x))


@pytest.mark.parametrize("base", ["kaiming", "default", "keep"])
def test_the_initialisation_makes_any_state_linear(base):
    net = drawn(lambda: nn.Sequential(QuadraticLinear(4, 5), nn.ReLU(), QuadraticLinear(5, 2)))
    before = [net[0].r.weight.detach().clone(), net[0].r.bias.detach().clone()]
    relinear_init_(net, base, generator=torch.Generator().manual_seed(3))
    plain = nn.Sequential(net[0].r, nn.ReLU(), net[2].r)
    x = normal(6, 4)
    assert torch.equal(net(x), plain(x))
    assert torch.equal(net[0].r.weight, before[0]) == (base == "keep")
    assert torch.equal(net[0].r.bias, before[1]) == (base == "keep")
    if base == "default":
        assert net[0].r.weight.abs().max() <= 0.5  # 1/√4


class Tangled(nn.Module):
    """A layer in two places, a tied weight, a nested convolution, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.first = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4, bias=False))])
        self.again = self.first[0]
        self.conv = nn.ModuleDict({"deep": nn.Sequential(nn.Conv2d(1, 2, 3, padding="same", padding_mode="reflect"))})
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.first[1][1].requires_grad_(False)

    def forward(self, tokens):
        x = self.first[1](self.first[0](self.embedding(tokens)))
        x = self.normed(self.again(x))
        return self.head(self.conv["deep"](x[:, None]).mean(1))


@pytest.mark.parametrize("compact", [False, True])
def test_conversion_keeps_the_function_of_a_tangled_model(compact):
    with seeded(0):
        model = Tangled().double().eval()
    untouched = copy.deepcopy(model.state_dict())
    made = quadratize(model, compact=compact)
    tokens = torch.arange(6).reshape(2, 3)
    assert torch.equal(made(tokens), model(tokens))
    assert made.again is made.first[0]
    assert made.head.r.weight is made.embedding.weight
    assert isinstance(made.conv["deep"][0], QuadraticConv2d)
    assert isinstance(made.normed, QuadraticLinear)
    assert made.first[1][1].b.bias is None
    assert [p.requires_grad for p in made.first[1][1].parameters()] == [False] * (2 if compact else 4)
    assert not made.training
    assert all(torch.equal(value, untouched[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(part, (QuadraticLinear, QuadraticConv2d)) for part in model.modules())
    # The copy is free of the original, and goes on being converted nowhere.
    with torch.no_grad():
        made.first[0].b.weight.fill_(0.3)
    assert not torch.equal(made(tokens), model(tokens))
    with pytest.raises(ValueError, match="nothing to convert"):
        quadratize(made)


def test_names_choose_layers_and_all_inside_parts():
    net = resnet((4, 8), 1, 3)
    made = quadratize(net, ["1", "2.branch.3"])
    kinds = {name: type(part) for name, part in made.named_modules()}
    assert kinds["0.0"] is nn.Conv2d
    assert kinds["1.branch.0"] is kinds["1.branch.3"] is kinds["2.branch.3"] is QuadraticConv2d
    assert kinds["2.branch.0"] is kinds["2.skip.0"] is nn.Conv2d
    assert kinds["5"] is nn.Linear
    x = normal(3, 3, 8, 8, dtype=torch.float32)
    assert torch.equal(made(x), net(x))


def test_a_layer_by_itself_is_converted():
    linear = nn.Linear(3, 2)
    made = quadratize(linear)
    assert isinstance(made, QuadraticLinear)
    assert made.r.weight is not linear.weight
    assert torch.equal(made(torch.eye(3)), linear(torch.eye(3)))


def test_refusals_name_the_layer():
    with pytest.raises(TypeError, match=r"'0'.*groups=2"):
        quadratize(GROUPED)
    with pytest.raises(TypeError, match=r"'0\.0'.*ConvTranspose2d"):
        quadratize(nn.Sequential(nn.Sequential(nn.ConvTranspose2d(2, 2, 3))))
    with pytest.raises(TypeError, match=r"self_attn\.out_proj"):
        quadratize(nn.TransformerEncoderLayer(4, 2, 8))


def test_a_transformer_in_inference_uses_the_quadratic_parts():
    with seeded(0):
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    made = quadratize(model, ["layers.0.linear1", "layers.1.linear2"])
    x = normal(2, 3, 4)
    with torch.no_grad():
        assert torch.allclose(made(x), model(x), atol=1e-12)
        made.layers[0].linear1.b.weight.fill_(0.5)
        assert not torch.allclose(made(x), model(x), atol=1e-3)


def step(model, optimizer, seed):
    optimizer.zero_grad()
    model(normal(16, 4, seed=seed)).square().mean().backward()
    optimizer.step()


def test_without_rates_the_model_stays_linear_bit_by_bit():
    with seeded(0):
        plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    made = quadratize(plain)
    rest = {"momentum": 0.9, "weight_decay": 1e-2}
    ours = torch.optim.SGD(relinear_param_groups(made, 0.1, 0.0, 0.0), **rest)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, **rest)
    for seed in range(10):
        step(made, ours, seed)
        step(plain, theirs, seed)
    x = normal(5, 4, seed=99)
    assert torch.equal(made(x), plain(x))
    assert not torch.equal(made[0].r.weight, quadratize(nn.Sequential(nn.Linear(4, 6)).double())[0].r.weight)


def test_with_rates_the_quadratic_part_grows_in_proportion():
    def grown(rate):
        with seeded(0):
            model = quadratize(nn.Sequential(nn.Linear(4, 6)).double())
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        step(model, torch.optim.SGD(relinear_param_groups(model, 0.1, rate, 2 * rate)), 0)
        return {name: (value - before[name]).norm().item() for name, value in model.named_parameters()}

    one, two = grown(1e-3), grown(2e-3)
    for name in ("0.g.weight", "0.g.bias", "0.b.weight", "0.b.bias"):
        assert two[name] == pytest.approx(2 * one[name], rel=1e-9)
        assert one[name] > 0
    assert two["0.r.weight"] == one["0.r.weight"]
    assert one["0.b.bias"] == pytest.approx(2e-3 / 0.1 * one["0.r.bias"], rel=1e-9)  # equal gradients at the start


def test_groups_hold_every_parameter_once_and_schedules_scale_them_alike():
    model = nn.Sequential(QuadraticLinear(4, 3), nn.BatchNorm1d(3), QuadraticLinear(3, 3, compact=True))
    model.append(model[0])
    groups = relinear_param_groups(model, 0.1, 1e-3, 1e-4)
    assert [group["name"] for group in groups] == ["linear", "g", "g bias", "b"]
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    by_name = {group["name"]: {id(parameter) for parameter in group["params"]} for group in groups}
    assert by_name["g"] == {id(model[0].g.weight)}
    assert by_name["b"] == {id(p) for layer in (model[0], model[2]) for p in layer.b.parameters()}
    optimizer = torch.optim.SGD(groups, lr=0.5, weight_decay=1e-4)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [0.1, 1e-3, 1e-3, 1e-4]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1])
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 * rate for rate in rates])
    assert [group["name"] for group in relinear_param_groups(model[2], 0.1, 0.0, 0.0)] == ["linear", "b"]


@pytest.mark.parametrize("rates", [(0.1, 0.2, 0.0), (0.1, 0.0, 0.2)])
def test_rates_above_the_linear_one_are_warned_of(rates):
    with pytest.warns(UserWarning, match="not ReLinear"):
        relinear_param_groups(small_model(), *rates)


@pytest.mark.filterwarnings("error")
def test_equal_rates_are_not_warned_of():
    assert {group["lr"] for group in relinear_param_groups(small_model(), 0.1, 0.1, 0.1)} == {0.1}


@pytest.mark.parametrize("decay_to_linear", [False, True])
def test_weight_decay_spares_the_gates_bias_or_pulls_it_to_one(decay_to_linear):
    layer = set_neuron([1.0, 1.0], 0.5, [0.4, 0.0], 3.0, [0.2, 0.0], 0.1)
    groups = relinear_param_groups(layer, 0.1, 0.1, 0.1, decay_to_linear=decay_to_linear)
    optimizer = torch.optim.SGD(groups, weight_decay=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        (0 * layer(torch.ones(1, 2, dtype=torch.float64))).sum().backward()
        optimizer.step()
    # By hand: entries shrink by (1 − 0.05)^200 = 3.5e-5; b_g − 1 was 2.
    assert layer.g.bias.item() == pytest.approx(2 * 0.95**200 if decay_to_linear else 2.0, rel=1e-9)
    assert layer.g.weight[0, 0].item() == pytest.approx(0.4 * 0.95**200, rel=1e-9)
    assert layer.b.bias.item() == pytest.approx(0.1 * 0.95**200, rel=1e-9)


def test_l2_shrinking_is_geometric_towards_the_linear_neuron():
    layer = set_neuron([1.0, -1.0], 0.5, [0.4, -0.2], 3.0, [0.2, 0.3], 0.1)
    shrink = ReLinearShrink(layer, 0.1, 0.2)
    for _ in range(5):
        shrink.step()
    assert layer.g.weight[0].tolist() == pytest.approx([0.4 * 0.9**5, -0.2 * 0.9**5])
    assert 1 + layer.g.bias.item() == pytest.approx(1 + 2 * 0.9**5)
    assert layer.b.weight[0].tolist() == pytest.approx([0.2 * 0.8**5, 0.3 * 0.8**5])
    assert layer.b.bias.item() == pytest.approx(0.1 * 0.8**5)
    assert layer.r.weight[0].tolist() == [1.0, -1.0]
    for _ in range(500):
        shrink.step()
    x = normal(4, 2)
    assert torch.allclose(layer(x), layer.r(x), atol=1e-12)  # b_g is 1, and the linear term alive


def test_l1_shrinking_is_a_soft_threshold():
    layer = set_neuron([1.0, -1.0], 0.5, [0.4, -0.05], 0.7, [-0.2, 0.3], 0.1)
    ReLinearShrink(layer, 0.1, 0.25, "l1").step()
    assert layer.g.weight[0].tolist() == pytest.approx([0.3, 0.0])
    assert 1 + layer.g.bias.item() == pytest.approx(0.8)  # towards 1, by the threshold
    assert layer.b.weight[0].tolist() == pytest.approx([0.0, 0.05])
    assert layer.b.bias.item() == 0.0
    assert layer.r.bias.item() == 0.5


def test_an_attached_shrink_follows_every_step_until_removed():
    layer = set_neuron([1.0, 0.0], 0.0, [1.0, 0.0], 2.0, [1.0, 0.0], 0.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    handle = ReLinearShrink(layer, 0.5, 0.0).attach(optimizer)
    layer(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
    for _ in range(3):
        optimizer.step()
    assert layer.g.weight[0, 0].item() == 0.125
    assert layer.b.weight[0, 0].item() == 1.0
    handle.remove()
    optimizer.step()
    assert layer.g.weight[0, 0].item() == 0.125


# The residual network.


def test_the_resnets_have_the_public_sizes():
    # By hand, for depth 20: blocks have 2 convs of three maps with biases and two batch norms.
    def size(depth, compact):
        maps = 2 if compact else 3
        total = 3 * 16 * 9 + 32 + 64 * 10 + 10
        for stage, wide in enumerate((16, 32, 64)):
            for block in range((depth - 2) // 6):
                before = wide // 2 if stage and not block else wide
                total += maps * ((before + wide) * wide * 9 + 2 * wide) + 4 * wide
        return total

    for depth, compact in ((20, False), (32, True)):
        assert model_size(QResNet(depth, compact=compact)).parameters == size(depth, compact)
    assert sum(isinstance(part, QuadraticConv2d) for part in QResNet(32).modules()) == 30


def test_the_resnet_starts_as_a_plain_one_with_padded_skips():
    with seeded(0):
        model = QResNet(8, classes=5, width=4).double()
    x = normal(3, 3, 8, 8)
    y = torch.relu(model.stem[1](model.stem[0](x)))
    for block in model.blocks:
        first, norm, _, second, last = block.branch
        branch = last(second.r(torch.relu(norm(first.r(y)))))
        if block.stride == 2:
            small = y[:, :, ::2, ::2]
            zeros = torch.zeros_like(small[:, : small.shape[1] // 2])
            y = torch.cat([zeros, small, zeros], dim=1)
        y = torch.relu(branch + y)
    expected = model.classifier(y.flatten(2).mean(2))
    assert torch.allclose(model(x), expected, atol=1e-12)
    assert [block.stride for block in model.blocks] == [1, 2, 2]


def test_rezero_starts_every_block_as_its_skip():
    with seeded(0):
        model = QResNet(14, width=4, rezero=True).double()
    factors = [parameter for name, parameter in model.named_parameters() if name.endswith("factor")]
    assert [factor.item() for factor in factors] == [0.0] * 6
    x = normal(2, 3, 8, 8).abs()
    block = model.blocks[1]
    y = normal(2, 4, 6, 6).abs()
    assert torch.equal(block(y), y)
    model(x).sum().backward()
    assert all(factor.grad is not None and factor.grad != 0 for factor in factors)
    groups = {group["name"]: group["params"] for group in relinear_param_groups(model, 0.1, 1e-3, 1e-3)}
    assert all(any(factor is held for held in groups["linear"]) for factor in factors)


# Pieces on a line; the other tests of the instruments are in test_quadratic_networks_probes.py.


@pytest.mark.parametrize("seed", range(4))
def test_deep_pieces_agree_with_dense_sampling_and_are_polynomials(seed):
    wide = 5
    kinds = [lambda: QuadraticLinear(2, wide), nn.ReLU, lambda: QuadraticLinear(wide, wide), nn.ReLU]
    model = drawn(lambda: nn.Sequential(*(kind() for kind in [*kinds, lambda: QuadraticLinear(wide, 1)])), seed, 0.7)
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
