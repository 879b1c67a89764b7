"""Recorded inputs and modes: the model is as it was, also after an error."""

import pytest
import torch
from torch import nn

from provenn.core.experiment.recording import evaluating, recorded_inputs


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))


def hooks(model):
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules())


class TestInputs:
    def test_the_first_input_of_the_latest_call(self):
        model = network().eval()
        with recorded_inputs({"first": model[0], "last": model[4]}) as held:
            assert held == {}
            for scale in (1.0, 2.0):
                x = torch.full((4, 2), scale, requires_grad=True)
                model(x)
        assert set(held) == {"first", "last"}
        assert torch.equal(held["first"], x)
        expected = model[2]((x @ model[0].weight.T + model[0].bias).relu())
        torch.testing.assert_close(held["last"], expected)
        assert not held["first"].requires_grad
        assert not held["last"].requires_grad

    def test_a_module_of_several_inputs(self):
        model = nn.Bilinear(2, 3, 1)
        with recorded_inputs({"product": model}) as held:
            model(torch.ones(4, 2), torch.zeros(4, 3))
        assert torch.equal(held["product"], torch.ones(4, 2))

    def test_later_in_place_operations_do_not_reach_it(self):
        model = network()
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
        with recorded_inputs({"activation": model[1], "first": model[0]}) as held:
            model(x)
        before = x.clone()
        x.zero_()
        assert torch.equal(held["first"], before)
        assert (held["activation"] < 0).any()

    @pytest.mark.parametrize("fails", [False, True])
    def test_hooks_are_gone(self, fails):
        model = network()
        model[0].register_forward_hook(lambda *_: None)
        try:
            with recorded_inputs(dict(model.named_children())):
                assert hooks(model) == 6
                if fails:
                    model(torch.zeros(4, 7))
        except RuntimeError:
            assert fails
        assert hooks(model) == 1

    def test_outputs_and_gradients_are_the_models(self):
        model = network().eval()
        x = torch.ones(1, 2, requires_grad=True)
        expected = torch.autograd.grad(model(x).sum(), x)
        with recorded_inputs({"last": model[4]}):
            got = torch.autograd.grad(model(x).sum(), x)
        assert torch.equal(got[0], expected[0])


class TestEvaluating:
    @pytest.mark.parametrize("fails", [False, True])
    def test_the_mode_of_each_part_is_put_back(self, fails):
        model = network()
        model[2].eval()
        before = [part.training for part in model.modules()]
        try:
            with evaluating(model):
                assert not any(part.training for part in model.modules())
                assert not model(torch.ones(1, 2)).requires_grad
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert [part.training for part in model.modules()] == before == [True, True, True, False, True, True]
        assert torch.is_grad_enabled()
        assert model[2].num_batches_tracked == 0

    def test_a_whole_in_evaluation_mode_with_a_part_in_training(self):
        model = network().eval()
        model[3].train()
        with evaluating(model):
            assert not model[3].training
        assert [part.training for part in model.modules()] == [False, False, False, False, True, False]
