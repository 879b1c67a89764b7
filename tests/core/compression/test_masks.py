"""Masks held through training: what a forward pass sees, what optimizers remember, and what stays behind."""

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizer_module

from provenn.core.compression.masks import Masks, prunable_weights


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def pruned(model, share=0.5, seed=1):
    """Random masks, and their complement as what must be zero."""
    masks, draws = Masks(model), torch.Generator().manual_seed(seed)
    for name, mask in masks.items():
        masks.remove(name, torch.rand(mask.shape, generator=draws) < share)
    return masks


def zeros_hold(model, masks):
    weights = prunable_weights(model)
    return all((weights[name][~mask] == 0).all() for name, mask in masks.items())


def traces(model):
    """What hooks there are: on weights, and on every optimizer's step."""
    hooks = [len(param._backward_hooks or {}) for param in model.parameters()]
    return hooks, len(optimizer_module._global_optimizer_post_hooks)


def steps(model, optimizer, count=3, shape=(6, 4), before=lambda: None):
    draws = torch.Generator().manual_seed(5)
    for _ in range(count):
        optimizer.zero_grad()
        output = model(torch.randn(shape, generator=draws))
        (output[0] if isinstance(output, tuple) else output).square().sum().backward()
        optimizer.step()
        before()


class TestWeights:
    def test_names(self):
        model = nn.ModuleDict(
            {
                "conv": nn.Conv2d(1, 2, 3),
                "norm": nn.BatchNorm2d(2),
                "layer": nn.LayerNorm((2, 2)),
                "lstm": nn.LSTM(2, 3),
                "attention": nn.MultiheadAttention(4, 2),
                "embedding": nn.Embedding(3, 2),
                "act": nn.PReLU(),
            }
        )
        assert list(prunable_weights(model)) == [
            "conv.weight",
            "layer.weight",  # more than one dimension
            "lstm.weight_ih_l0",
            "lstm.weight_hh_l0",
            "attention.in_proj_weight",
            "attention.out_proj.weight",
            "embedding.weight",
        ]
        assert prunable_weights(model)["conv.weight"] is model["conv"].weight

    def test_a_matrix_that_is_no_weight(self):
        model = nn.Linear(2, 2)
        model.scale = nn.Parameter(torch.ones(2, 2))
        assert list(prunable_weights(model)) == ["weight"]

    def test_tied_weights_appear_once(self):
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
        model[1].weight = model[0].weight
        assert list(prunable_weights(model)) == ["0.weight"]
        assert Masks(model).total == 15

    @pytest.mark.parametrize("model", [nn.ReLU(), nn.BatchNorm1d(3)])
    def test_nothing_to_prune(self, model):
        with pytest.raises(ValueError, match=f"{type(model).__name__} has no weight"):
            prunable_weights(model)


class TestMasks:
    def test_a_mapping(self):
        model = network()
        masks = Masks(model)
        assert list(masks) == ["0.weight", "3.weight"]
        assert len(masks) == 2
        assert "0.bias" not in masks
        assert all(mask.dtype == torch.bool and mask.all() for mask in masks.values())
        assert (masks.total, masks.remaining, masks.density) == (48, 48, 1.0)

    def test_removing(self):
        masks = Masks(network())
        removed = torch.zeros(8, 4, dtype=torch.bool)
        removed[0], removed[:, 1] = True, True
        masks.remove("0.weight", removed)
        assert (masks.total, masks.remaining) == (48, 48 - 11)
        assert masks.density == 37 / 48
        assert torch.equal(masks["0.weight"], ~removed)
        masks.remove("0.weight", torch.zeros(8, 4, dtype=torch.bool))  # what is gone stays gone
        masks.remove("0.weight", removed)
        assert masks.remaining == 37

    def test_a_copy_is_its_own(self):
        masks = Masks(network())
        other = copy.deepcopy(masks)
        other.remove("0.weight", torch.ones(8, 4, dtype=torch.bool))
        assert (masks.remaining, other.remaining) == (48, 16)

    @pytest.mark.parametrize(
        ("name", "removed", "error", "words"),
        [
            ("0.weight", torch.ones(4, 8, dtype=torch.bool), ValueError, r"removed .*\(8, 4\) of 0\.weight.*\(4, 8\)"),
            ("0.weight", torch.ones(8, 4, dtype=torch.int64), TypeError, r"removed .*int64"),
            ("0.weight", torch.ones(8, 4), TypeError, r"removed .*float32"),
            ("0.bias", torch.ones(8, dtype=torch.bool), KeyError, r"0\.bias"),
        ],
    )
    def test_bad_input(self, name, removed, error, words):
        masks = Masks(network())
        with pytest.raises(error, match=words):
            masks.remove(name, removed)
        assert masks.remaining == 48

    def test_apply(self):
        model = network()
        before = copy.deepcopy(model.state_dict())
        masks = pruned(model)
        masks.apply(model)
        for name, value in model.state_dict().items():
            expected = before[name] * masks[name] if name in masks else before[name]
            assert torch.equal(value, expected)
        assert model[0].weight.requires_grad


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda params: torch.optim.Adam(params, lr=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.1, momentum=0.5, centered=True),
}


class TestHeld:
    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize("warm", [False, True])
    def test_a_forward_pass_never_sees_them(self, name, warm):
        model, seen = network(), []
        masks = pruned(model)
        optimizer = OPTIMIZERS[name](model.parameters())
        if warm:
            steps(model, optimizer)  # momentum from before would move the masked weights
        with masks.held(model):
            handle = model.register_forward_pre_hook(lambda *_: seen.append(zeros_hold(model, masks)))
            steps(model, optimizer, before=lambda: seen.append(zeros_hold(model, masks)))
            handle.remove()
        assert seen == [True] * 6
        assert zeros_hold(model, masks)

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_no_momentum_builds_up(self, name):
        model = network()
        masks = pruned(model)
        optimizer = OPTIMIZERS[name](model.parameters())
        with masks.held(model):
            steps(model, optimizer)
        for key, weight in prunable_weights(model).items():
            for value in optimizer.state[weight].values():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                    assert (value[~masks[key]] == 0).all()
                    assert (value[masks[key]] != 0).any()

    def test_kept_weights_train_as_if_only_they_existed(self):
        """SGD with masks equals gradient descent in the kept weights alone."""
        model = network()
        masks = pruned(model)
        other = copy.deepcopy(model)
        with masks.held(model):
            steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
        masks.apply(other)
        draws = torch.Generator().manual_seed(5)
        for _ in range(3):
            other(torch.randn(6, 4, generator=draws)).square().sum().backward()
            with torch.no_grad():
                for name, param in other.named_parameters():
                    param -= 0.1 * param.grad * masks.get(name, 1)
            other.zero_grad()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, two)

    @pytest.mark.parametrize("fails", [False, True])
    def test_hooks_are_gone(self, fails):
        model = network()
        masks = pruned(model)
        before = traces(model)
        with contextlib.suppress(KeyError), masks.held(model):
            assert traces(model) != before
            model[0].weight.data.add_(1)
            if fails:
                raise KeyError
        assert traces(model) == before
        assert zeros_hold(model, masks)  # also what was written by hand
        steps(model, OPTIMIZERS["sgd"](model.parameters()))
        assert not zeros_hold(model, masks)

    def test_zero_from_the_first_moment(self):
        model = network()
        masks = pruned(model)
        with masks.held(model):
            assert zeros_hold(model, masks)

    def test_tied_weights(self):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
        model[2].weight = model[0].weight
        masks = pruned(model)
        with masks.held(model):
            steps(model, OPTIMIZERS["adam"](model.parameters()))
        assert model[2].weight is model[0].weight
        assert (model[2].weight[~masks["0.weight"]] == 0).all()
        assert (model[2].weight[masks["0.weight"]] != 0).all()

    def test_frozen_weights(self):
        model = network()
        model[0].weight.requires_grad_(False)
        masks = pruned(model)
        frozen = model[0].weight.clone() * masks["0.weight"]
        with masks.held(model):
            steps(model, OPTIMIZERS["adam"](param for param in model.parameters() if param.requires_grad))
        assert torch.equal(model[0].weight, frozen)
        assert zeros_hold(model, masks)
        assert not model[0].weight.requires_grad

    @pytest.mark.parametrize(
        "model",
        [nn.LSTM(4, 5, num_layers=2), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)],
        ids=["lstm", "encoder"],
    )
    @pytest.mark.filterwarnings("ignore:RNN module weights")
    def test_recurrent_and_attention_weights(self, model):
        masks = pruned(model)
        assert len(masks) == 4
        with masks.held(model):
            steps(model, OPTIMIZERS["adamw"](model.parameters()), shape=(6, 2, 4))
        assert zeros_hold(model, masks)
        weights = prunable_weights(model)
        assert all((weights[name][mask] != 0).all() for name, mask in masks.items())

    def test_two_models_at_once(self):
        first, second, free = network(0), network(1), network(2)
        ones, others = pruned(first, 0.3, 1), pruned(second, 0.7, 2)
        optimizers = [OPTIMIZERS["adam"](model.parameters()) for model in (first, second, free)]
        with ones.held(first), others.held(second):
            for _ in range(2):
                for model, optimizer in zip((first, second, free), optimizers, strict=True):
                    steps(model, optimizer, count=1)
            assert zeros_hold(first, ones)
            assert zeros_hold(second, others)
            assert not zeros_hold(second, ones)
        assert all((weight != 0).all() for weight in prunable_weights(free).values())

    def test_an_optimizer_of_part_of_the_model(self):
        model = network()
        masks = pruned(model)
        with masks.held(model):
            steps(model, OPTIMIZERS["adam"](model[3].parameters()))
            steps(model, OPTIMIZERS["adam"](model[0].parameters()))
            assert zeros_hold(model, masks)

    def test_an_optimizer_of_something_else_does_no_work_here(self):
        model, other = network(), network()
        masks = pruned(model)
        with masks.held(model):
            model[0].weight.data.fill_(1)
            steps(other, OPTIMIZERS["sgd"](other.parameters()), count=1)
            assert (model[0].weight == 1).all()

    def test_a_copy_inside_the_block_is_free(self):
        model = network()
        masks = pruned(model)
        with masks.held(model):
            twin = copy.deepcopy(model)
            steps(twin, OPTIMIZERS["sgd"](twin.parameters()))
            assert not zeros_hold(twin, masks)
            steps(model, OPTIMIZERS["sgd"](model.parameters()))
            assert zeros_hold(model, masks)
        assert traces(twin)[0] == [0] * len(traces(twin)[0])

    def test_state_dicts_load_inside_the_block(self):
        model = network()
        masks, dense = pruned(model), copy.deepcopy(model.state_dict())
        with masks.held(model):
            model.load_state_dict(dense)
            steps(model, OPTIMIZERS["sgd"](model.parameters()), count=1)
            assert zeros_hold(model, masks)

    def test_pruning_inside_the_block(self):
        model = network()
        masks = Masks(model)
        optimizer = OPTIMIZERS["adam"](model.parameters())
        with masks.held(model):
            steps(model, optimizer, count=1)
            masks.remove("0.weight", torch.eye(8, 4, dtype=torch.bool))
            steps(model, optimizer, count=1)
            assert zeros_hold(model, masks)
        assert masks.remaining == 44


def test_parametrized_weights_are_left_out():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 5))
    assert list(prunable_weights(model)) == ["1.weight"]
