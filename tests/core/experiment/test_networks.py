"""Reference networks against closed forms: parameters, shapes, and a gradient everywhere."""

import itertools

import pytest
import torch
from torch import nn

from provenn.core.experiment.networks import ResidualBlock, mlp, resnet


def parameters(model):
    return sum(param.numel() for param in model.parameters())


@pytest.mark.parametrize("sizes", [(3, 2), (4, 7, 5, 2), [1, 1, 1]])
def test_perceptron(sizes):
    model = mlp(sizes, nn.Tanh)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh] * (len(sizes) - 2) + [nn.Linear]
    assert parameters(model) == sum(a * b + b for a, b in itertools.pairwise(sizes))
    x = torch.randn(5, sizes[0], generator=torch.Generator().manual_seed(0))
    expected = x
    for place, layer in enumerate(layer for layer in model if isinstance(layer, nn.Linear)):
        expected = (expected.tanh() if place else expected) @ layer.weight.T + layer.bias
    torch.testing.assert_close(model(x), expected)


def test_activations_are_relu_unless_named_and_not_shared():
    model = mlp((2, 3, 3, 2))
    assert [type(layer) for layer in model if not isinstance(layer, nn.Linear)] == [nn.ReLU, nn.ReLU]
    prelus = [layer for layer in mlp((2, 3, 3, 2), nn.PReLU) if isinstance(layer, nn.PReLU)]
    assert prelus[0] is not prelus[1]


def block(wide_in, wide, stride=1):
    """Weights of two 3×3 convolutions, their norms, and a projection where the shape changes."""
    skip = wide_in * wide + 2 * wide if stride != 1 or wide_in != wide else 0
    return 9 * wide_in * wide + 9 * wide * wide + 4 * wide + skip


CONFIGURATIONS = [
    # ResNet-8 for one channel, by hand
    ({}, 9 * 8 + 16 + block(8, 8) + block(8, 16, 2) + block(16, 32, 2) + 32 * 10 + 10),
    # ResNet-18 for 32×32 images: the figure that PyTorch implementations of it report for CIFAR-10
    ({"channels": (64, 128, 256, 512), "blocks": 2, "channels_in": 3}, 11_173_962),
    (
        {"channels": (4, 4), "blocks": 3, "channels_in": 2, "classes": 7},
        2 * 9 * 4 + 8 + 5 * block(4, 4) + block(4, 4, 2) + 4 * 7 + 7,
    ),
]


@pytest.mark.parametrize(("options", "count"), CONFIGURATIONS)
def test_parameters_of_residual_networks(options, count):
    with torch.device("meta"):
        assert parameters(resnet(**options)) == count


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (7, 7), (1, 1), (5, 9)])
def test_images_of_any_size(size):
    model = resnet((2, 3, 4), channels_in=3, classes=5)
    assert model(torch.zeros(2, 3, *size)).shape == (2, 5)
    sizes = []
    for layer in model:
        if isinstance(layer, ResidualBlock):
            layer.register_forward_hook(lambda _module, _inputs, output: sizes.append(tuple(output.shape[1:])))
    model(torch.zeros(2, 3, *size))
    height, width = size
    halves = [(-(-height // by), -(-width // by)) for by in (1, 2, 4)]
    assert sizes == [(wide, *half) for wide, half in zip((2, 3, 4), halves, strict=True)]


@pytest.mark.parametrize(
    ("options", "layers"), [({}, 8), ({"channels": (64, 128, 256, 512), "blocks": 2, "channels_in": 3}, 18)]
)
def test_layers_are_counted_as_in_the_paper(options, layers):
    """Convolutions of the branches and the linear map; projections do not count."""
    with torch.device("meta"):
        modules = list(resnet(**options).modules())
    convolutions = [one for one in modules if isinstance(one, nn.Conv2d) and one.kernel_size == (3, 3)]
    assert len(convolutions) + sum(isinstance(one, nn.Linear) for one in modules) == layers
    assert [one.stride for one in convolutions].count((2, 2)) == len(options.get("channels", (8, 16, 32))) - 1


@pytest.mark.parametrize(("wide", "stride"), [(3, 1), (5, 1), (3, 2)])
def test_block_by_its_equation(wide, stride):
    """max(0, branch + skip), the skip being the input itself where the shape is kept."""
    one = ResidualBlock(3, wide, stride).eval()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    scale = (1 + 1e-5) ** -0.5  # batch norm before any training
    convolve = nn.functional.conv2d
    y = convolve((convolve(x, one.branch[0].weight, None, stride, 1) * scale).relu(), one.branch[3].weight, padding=1)
    same = wide == 3 and stride == 1
    skip = x if same else convolve(x, one.skip[0].weight, None, stride) * scale
    torch.testing.assert_close(one(x), (y * scale + skip).relu())


@pytest.mark.parametrize("model", [mlp((4, 8, 8, 3)), resnet((2, 3), blocks=2, channels_in=1, classes=3)])
def test_gradient_reaches_every_parameter(model):
    draws = torch.Generator().manual_seed(0)
    shape = (16, 4) if isinstance(model[0], nn.Linear) else (16, 1, 8, 8)
    output = model(torch.randn(shape, generator=draws))
    nn.functional.cross_entropy(output, torch.randint(3, (16,), generator=draws)).backward()
    assert all(param.grad is not None and param.grad.abs().sum() > 0 for param in model.parameters())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: mlp([3]), ValueError, r"sizes .*\[3\]"),
        (lambda: mlp([3, 0, 2]), ValueError, r"sizes\[1\] .*0"),
        (lambda: mlp([3, 2.5]), TypeError, r"sizes\[1\] .*2\.5"),
        (lambda: resnet(()), ValueError, "channels"),
        (lambda: resnet((8, 0)), ValueError, r"channels\[1\] .*0"),
        (lambda: resnet(blocks=0), ValueError, r"blocks .*0"),
        (lambda: resnet(channels_in=-1), ValueError, r"channels_in .*-1"),
        (lambda: resnet(classes=0), ValueError, r"classes .*0"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()
