"""The converter: whichever way a model brings batch norm and activation together, EvoNorm takes the pair's place."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from provenn.contracts.watch import plain_signatures
from provenn.core.experiment.networks import resnet
from provenn.nn import EvoNorm2d, replace_norm_act


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settled(model, seed=0):
    """Give batch norms values that show when they get lost."""
    for index, module in enumerate(model.modules()):
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                for place, tensor in enumerate((module.weight, module.bias, module.running_mean, module.running_var)):
                    tensor.copy_(normal(*tensor.shape, seed=seed + 10 * index + place).abs() + 0.5)
    return model.double()


class SharedRelu(nn.Module):
    """torchvision's basic block: one ReLU module behind the first norm and behind the sum."""

    def __init__(self, channels=4):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + x)

    def wanted(self, x, layers):
        return torch.relu(layers["bn2"](self.conv2(layers["bn1"](self.conv1(x)))) + x)


class OwnRelu(SharedRelu):
    """A ReLU module of its own for each place."""

    def __init__(self, channels=4):
        super().__init__(channels)
        self.last = nn.ReLU()

    def forward(self, x):
        return self.last(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class FunctionalRelu(SharedRelu):
    """Functions in place of modules."""

    def forward(self, x):
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return (out + x).relu()


class MethodRelu(SharedRelu):
    """Methods in place of modules."""

    def forward(self, x):
        return torch.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_())) + x)


class PreActivation(SharedRelu):
    """Norm and activation come first, and the skip takes the activated."""

    def forward(self, x):
        y = self.relu(self.bn1(x))
        return y + self.conv2(functional.silu(self.bn2(self.conv1(y))))

    def wanted(self, x, layers):
        y = layers["bn1"](x)
        return y + self.conv2(layers["bn2"](self.conv1(y)))


class Across(SharedRelu):
    """The norm sits in an inner block, the activation in the outer one."""

    def __init__(self, channels=4):
        super().__init__(channels)
        self.inner = nn.Sequential(self.conv1, self.bn1)

    def forward(self, x):
        return functional.relu6(self.bn2(self.conv2(functional.relu(self.inner(x)))))

    def wanted(self, x, layers):
        return layers["bn2"](self.conv2(layers["bn1"](self.conv1(x))))


def checked(forward):
    """Refuse all but tensors, as a checker of signatures does."""

    @functools.wraps(forward)
    def guarded(self, x):
        assert type(x) is torch.Tensor
        return forward(self, x)

    return guarded


class Checked(FunctionalRelu):
    """A block whose signature is checked."""

    forward = checked(FunctionalRelu.forward)


BLOCKS = (SharedRelu, OwnRelu, FunctionalRelu, MethodRelu, PreActivation, Across, Checked)
ACTIVE = {PreActivation: ("bn1", "bn2"), Across: ("bn1", "bn2")}


def by_hand(block, kind):
    """Build the layers that the batch norms must become, from the converter's documentation."""
    layers = {}
    for name in ("bn1", "bn2"):
        norm = getattr(block, name)
        active = name in ACTIVE.get(type(block), ("bn1",))
        layer = EvoNorm2d(4, kind, group_size=2, apply_act=active).double()
        layer.weight, layer.bias = norm.weight, norm.bias
        if layer.running_var is not None:
            layer.running_var.copy_(norm.running_var)
        layers[name] = layer
    return layers


@pytest.mark.parametrize("kind", ["B0", "S0"])
@pytest.mark.parametrize("make", BLOCKS)
@pytest.mark.parametrize("outer", [False, True])
def test_blocks_of_every_style(make, kind, outer):
    block = settled(make())
    model = nn.Sequential(block, nn.Conv2d(4, 4, 1).double()) if outer else block
    before = copy.deepcopy(model.state_dict())
    converted = replace_norm_act(model, kind, group_size=2)
    x, layers = normal(2, 4, 5, 5, seed=3), by_hand(block, kind)
    for training in (False, True):
        converted.train(training)
        for layer in layers.values():
            layer.train(training)
        wanted = block.wanted(x, layers)
        assert torch.allclose(converted(x), model[1](wanted) if outer else wanted, atol=1e-12)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    if make is not Across:  # whose forward does not use the names that it gives its inner block's parts
        assert {name for name in converted.state_dict() if not name.endswith(".v")} >= {
            name for name in before if name.endswith(("weight", "bias"))
        }


@pytest.mark.parametrize("make", [SharedRelu, FunctionalRelu])
def test_a_rewritten_block_copies_pickles_and_converts_in_its_mode(make):
    converted = replace_norm_act(settled(nn.Sequential(make())).eval(), "B1")
    x = normal(2, 4, 5, 5)
    for again in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(again(x), converted(x))
    assert not any(module.training for module in converted.modules())


def test_modes_of_parts_are_kept():
    block = FunctionalRelu()
    block.bn2.eval()
    converted = replace_norm_act(block, "B0")
    assert (converted.training, converted.bn1.training, converted.bn2.training) == (True, True, False)


def test_blocks_that_need_no_rewriting_keep_their_class():
    converted = replace_norm_act(nn.Sequential(OwnRelu(), OwnRelu()), "B2")
    assert [type(block) for block in converted] == [OwnRelu, OwnRelu]
    assert isinstance(converted[0].relu, nn.Identity)
    assert isinstance(converted[0].last, nn.ReLU)


def test_the_house_residual_network():
    model = resnet((8, 16))
    converted = replace_norm_act(model, "S0", group_size=8)
    layers = [module for module in converted.modules() if isinstance(module, EvoNorm2d)]
    assert [layer.apply_act for layer in layers] == [True, True, False, True, False, False]  # stem, blocks, skip
    assert isinstance(converted[1].activation, nn.ReLU)
    assert isinstance(converted[1].branch[2], nn.Identity)
    converted(torch.randn(2, 1, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in converted.parameters())


def test_what_is_kept_of_a_batch_norm():
    norm = nn.BatchNorm2d(4, eps=1e-3, momentum=0.3)
    norm.bias.requires_grad_(False)
    converted = replace_norm_act(settled(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.SiLU())).eval(), "B0")
    layer = converted[1]
    assert (layer.eps, layer.momentum, layer.kind, layer.training) == (1e-3, 0.3, "B0", False)
    for name in ("weight", "bias", "running_var"):
        assert torch.equal(getattr(layer, name), getattr(norm, name))
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (True, False)
    assert layer.weight.dtype == torch.float64
    assert (layer.v == 1).all()
    assert replace_norm_act(nn.Sequential(norm, nn.ReLU()), "B0", eps=1e-5)[0].eps == 1e-5
    plain = replace_norm_act(nn.Sequential(nn.BatchNorm2d(4, affine=False, momentum=None), nn.ReLU6()), "B0")[0]
    assert not plain.weight.requires_grad
    assert plain.momentum == 0.1


def test_a_norm_used_twice_is_one_layer():
    norm, first, second = nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU()
    converted = replace_norm_act(nn.Sequential(norm, first, nn.Conv2d(4, 4, 1), norm, second), "B0")
    assert converted[0] is converted[3]
    assert sum(isinstance(module, nn.Identity) for module in converted.modules()) == 2
    with pytest.raises(ValueError, match="both with and without an activation"):
        replace_norm_act(nn.Sequential(norm, nn.ReLU(), nn.Conv2d(4, 4, 1), norm), "B0")


def test_a_norm_with_a_second_reader_is_no_pair():
    class Forked(SharedRelu):
        def forward(self, x):
            y = self.bn1(x)
            return self.relu(y) + y

    converted = replace_norm_act(Forked(), "B0")
    assert not converted.bn1.apply_act
    assert isinstance(converted.relu, nn.ReLU)


def test_other_activations_stay():
    converted = replace_norm_act(nn.Sequential(nn.BatchNorm2d(4), nn.Tanh()), "B0")
    assert not converted[0].apply_act
    assert isinstance(converted[1], nn.Tanh)


def test_what_cannot_be_read_or_rewritten_is_refused():
    class ByValue(SharedRelu):
        def forward(self, x):
            return self.relu(self.bn1(x)) if x.sum() > 0 else x

    class ByMode(SharedRelu):
        def forward(self, x):
            return functional.dropout(functional.relu(self.bn1(x)), 0.1, self.training)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.BatchNorm2d(4), nn.Sequential(FunctionOnly())

        def forward(self, x):
            return self.act(self.act(self.norm(x)) + x)

    class FunctionOnly(nn.Module):
        def forward(self, x):
            return functional.relu(x)

    with pytest.raises(ValueError, match=r"model must have a forward that torch\.fx can trace"):
        replace_norm_act(ByValue(), "B0")
    with pytest.raises(ValueError, match="ByMode that calls activations by its mode"):
        replace_norm_act(ByMode(), "B0")
    with pytest.raises(ValueError, match="FunctionOnly where its activations follow batch norms and where not"):
        replace_norm_act(Twice(), "B0")


class Merge(nn.Module):
    """A block of a decoder, with or without a skip connection."""

    def __init__(self):
        super().__init__()
        self.norm, self.skip = nn.BatchNorm2d(4), nn.Identity()

    def forward(self, x, skip=None, *, gain=2.0):
        if skip is not None:
            x = x + self.skip(skip)
        return gain * functional.relu(self.norm(x))


class Decoder(nn.Module):
    def __init__(self, *skips):
        super().__init__()
        self.block, self.skips = Merge(), skips

    def forward(self, x):
        for skips in self.skips:
            x = self.block(x, skip=x if skips else None, gain=3.0)
        return x


@pytest.mark.parametrize("skips", [True, False])
def test_a_rewritten_block_does_with_optional_arguments_what_it_does_in_the_model(skips):
    x, model = normal(2, 4, 5, 5), settled(Decoder(skips, skips))
    converted = replace_norm_act(model, "B0").eval()
    layer = converted.block.norm
    assert layer.apply_act
    expected = x
    for _ in range(2):
        expected = 3 * layer(2 * expected if skips else expected)
    for one in (converted, pickle.loads(pickle.dumps(converted))):
        torch.testing.assert_close(one(x), expected)


def test_a_block_that_is_called_with_and_without_an_argument_is_refused():
    message = "Merge whose forward does other things where skip is None"
    with pytest.raises(ValueError, match=message):
        replace_norm_act(Decoder(True, False), "B0")
    with pytest.raises(ValueError, match=message):  # nobody knows how the model itself will be called
        replace_norm_act(Merge(), "B0")


def test_a_batch_norm_by_itself_becomes_its_affine_map():
    norm = settled(nn.BatchNorm2d(4))
    layer, x = replace_norm_act(norm, "S0"), normal(2, 4, 5, 5)
    expected = norm.weight.view(4, 1, 1) * x + norm.bias.view(4, 1, 1)
    torch.testing.assert_close(layer(x), expected)


def test_a_converted_model_exports_and_a_traced_one_converts():
    x, block = normal(2, 4, 5, 5), settled(SharedRelu())
    converted = replace_norm_act(block, "S1", group_size=2).eval()
    with plain_signatures():
        assert torch.allclose(torch.export.export(converted, (x,)).module()(x), converted(x), atol=1e-12)
        traced = torch.fx.symbolic_trace(block)
        assert torch.allclose(replace_norm_act(traced, "S1", group_size=2).eval()(x), converted(x), atol=1e-12)


def test_subclasses_and_norms_that_are_not_called_stay():
    class OwnNorm(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), OwnNorm(4), nn.ReLU())
    model[0].spare = nn.BatchNorm2d(4)
    converted = replace_norm_act(model, "B0")
    assert isinstance(converted[0], EvoNorm2d)
    assert type(converted[2]) is OwnNorm
    assert isinstance(converted[3], nn.ReLU)


def test_a_model_with_several_inputs():
    class Two(SharedRelu):
        def forward(self, x, skip=None):
            return functional.relu(self.bn1(x)) + skip

    model = settled(Two())
    x, skip = normal(2, 4, 3, 3), normal(2, 4, 3, 3, seed=1)
    converted = replace_norm_act(model, "B0")
    layer = by_hand(SharedRelu().double(), "B0")["bn1"]
    layer.weight, layer.bias = model.bn1.weight, model.bn1.bias
    assert torch.allclose(converted(x, skip), layer(x) + skip, atol=1e-12)
