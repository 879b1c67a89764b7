"""Each check of the suite of compressors catches a compressor that is broken in that way."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from contracts.broken import DOCUMENTED_ELSEWHERE, assert_caught, broken_runs, good_runs, own_checks
from torch import nn

from provenn.contracts import BadInput, CompressorCase, ContractError, check_compressor
from provenn.contracts.compressor import count
from provenn.core.experiment.accounting import model_size, multiply_accumulates
from provenn.core.experiment.reports import Report


@dataclass(frozen=True)
class SizeReport(Report):
    params: int
    macs: int
    bytes: int


@dataclass
class OpenReport:
    params: int
    macs: int
    bytes: int


def network():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def example(generator):
    return (torch.randn(2, 6, generator=generator),)


class NeuronPruner:
    """A correct little compressor, to be broken below: keeps the half of the hidden units with the largest weights."""

    def __init__(self, share=0.5):
        if not 0 < share < 1:
            raise ValueError(f"share must be in (0, 1), got {share}")
        self.share = share

    def compress(self, model):
        first, activation, last = model
        smaller = self.build(first, activation, last, self.kept(first))
        return smaller, self.report(smaller)

    def kept(self, first):
        norms = first.weight.detach().norm(dim=1)
        return norms.topk(max(1, int(self.share * len(norms)))).indices.sort().values

    def build(self, first, activation, last, kept):
        one = nn.Linear(first.in_features, len(kept))
        two = nn.Linear(len(kept), last.out_features)
        with torch.no_grad():
            one.weight.copy_(first.weight[kept])
            one.bias.copy_(first.bias[kept])
            two.weight.copy_(last.weight[:, kept])
            two.bias.copy_(last.bias)
        return nn.Sequential(one, copy.deepcopy(activation), two)

    def report(self, model):
        size = model_size(model)
        return SizeReport(size.parameters, multiply_accumulates(model, torch.zeros(2, 6)), size.bytes)


class EditsTheOriginal(NeuronPruner):
    def kept(self, first):
        kept = super().kept(first)
        first.weight.data[kept[0]] *= 0.5
        return kept


class LeavesEvalMode(NeuronPruner):
    def compress(self, model):
        return super().compress(model.eval())


class LeavesAHook(NeuronPruner):
    def compress(self, model):
        model[1].register_forward_hook(print)
        return super().compress(model)


class SharesTheBias(NeuronPruner):
    def build(self, first, activation, last, kept):
        smaller = super().build(first, activation, last, kept)
        smaller[2].bias = last.bias
        return smaller


class PrunesTooLittle(NeuronPruner):
    def kept(self, first):
        return torch.arange(first.out_features - 1)


class PrunesNothing(NeuronPruner):
    def kept(self, first):
        return torch.arange(first.out_features)


class ForgetsBiases(NeuronPruner):
    def report(self, model):
        return replace(super().report(model), params=sum(layer.weight.numel() for layer in (model[0], model[2])))


class CountsFlops(NeuronPruner):
    def report(self, model):
        right = super().report(model)
        return replace(right, macs=2 * right.macs)


class HalvesBytes(NeuronPruner):
    def report(self, model):
        return replace(super().report(model), bytes=super().report(model).params * 2)


class SaysNothing(NeuronPruner):
    def report(self, model):
        return None


class ReportsOpenly(NeuronPruner):
    def report(self, model):
        return OpenReport(**vars(super().report(model)))


@dataclass(frozen=True)
class ListReport(SizeReport):
    kept: list


class ReportsAList(NeuronPruner):
    def report(self, model):
        return ListReport(**vars(super().report(model)), kept=[1, 2])


class DropsAnOutput(NeuronPruner):
    def build(self, first, activation, last, kept):
        return super().build(first, activation, last, kept)[:2]


class BreaksNumbers(NeuronPruner):
    def build(self, first, activation, last, kept):
        smaller = super().build(first, activation, last, kept)
        smaller[2].bias.data[0] = torch.nan
        return smaller


class OwnLinear(nn.Linear):
    pass


class OwnModules(NeuronPruner):
    def build(self, first, activation, last, kept):
        smaller = super().build(first, activation, last, kept)
        smaller[2].__class__ = OwnLinear
        return smaller


class HooksTheOutput(NeuronPruner):
    def build(self, first, activation, last, kept):
        smaller = super().build(first, activation, last, kept)
        smaller.register_forward_hook(lambda module, inputs, output: output)
        return smaller


class BranchesOnValues(nn.Sequential):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else 1 * x)


class CannotBeExported(NeuronPruner):
    def build(self, first, activation, last, kept):
        return BranchesOnValues(*super().build(first, activation, last, kept))


class OnlyOnce(NeuronPruner):
    def kept(self, first):
        if first.out_features < 16:
            raise RuntimeError("already compressed")
        return super().kept(first)


class GrowsBack(NeuronPruner):
    def kept(self, first):
        return super().kept(first) if first.out_features == 16 else torch.arange(16) % first.out_features


GOOD = CompressorCase(
    "contracts.broken.own_checks",
    NeuronPruner,
    network,
    example,
    budget={"params": 0.6, "macs": 0.5, "bytes": 0.6},
    bad_input=(BadInput("share", lambda: NeuronPruner(1.5)),),
    excluded={**DOCUMENTED_ELSEWHERE, "public_name": "the part is a test's own"},
    label="good",
)


def broken(make, **options):
    return replace(GOOD, **{"make": make, "label": make.__name__, **options})


BROKEN = {
    "original_untouched": [
        broken(EditsTheOriginal),
        broken(LeavesEvalMode),
        broken(LeavesAHook),
        broken(SharesTheBias),
    ],
    "budget_met": [
        broken(PrunesTooLittle),
        broken(PrunesNothing, budget={"params": 1.0}),
        broken(NeuronPruner, budget={}),
    ],
    "report_counts": [broken(ForgetsBiases), broken(CountsFlops), broken(HalvesBytes), broken(SaysNothing)],
    "report_frozen": [broken(ReportsOpenly), broken(ReportsAList)],
    "output_works": [broken(DropsAnOutput), broken(BreaksNumbers)],
    "plain_output": [broken(OwnModules), broken(HooksTheOutput)],
    "export": [broken(CannotBeExported)],
    "compress_again": [broken(OnlyOnce), broken(GrowsBack)],
}


@pytest.mark.parametrize("check", good_runs(GOOD))
def test_good_compressor_passes(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_compressors_are_caught(name, case):
    assert_caught(name, case)


def test_every_check_has_a_broken_compressor():
    assert set(BROKEN) == own_checks("compressor")


def test_check_compressor_lists_failures():
    with pytest.raises(ContractError, match="'report_counts'"):
        check_compressor(broken(ForgetsBiases))


@pytest.mark.parametrize(
    ("model", "shape", "products"),
    [
        (nn.Linear(6, 5), (2, 3, 6), 2 * 3 * 6 * 5),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 5, 5), 2 * 6 * 25 * 2 * 9),
        (nn.Conv1d(3, 4, 3, stride=2), (2, 3, 9), 2 * 4 * 4 * 3 * 3),
        (nn.ConvTranspose2d(3, 2, 2, stride=2), (1, 3, 4, 4), 3 * 16 * 2 * 4),
        (nn.Bilinear(6, 6, 2), None, None),
    ],
)
def test_products_are_counted_by_hand(model, shape, products):
    if shape is None:
        inputs = (torch.randn(3, 6), torch.randn(3, 6))
        assert count(model, inputs)["params"] == 2 * 36 + 2
        return
    found = count(model, (torch.randn(shape),))
    assert found["macs"] == products
    assert found["params"] == sum(p.numel() for p in model.parameters())
    assert found["bytes"] == 4 * found["params"]


def test_attention_is_counted_by_hand():
    class Attention(nn.Module):
        def forward(self, query, key, value):
            return nn.functional.scaled_dot_product_attention(query, key, value)

    query, key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    assert count(Attention(), (query, key, value))["macs"] == 2 * 3 * 5 * 7 * (8 + 8)


def test_counting_leaves_batch_statistics_and_modes_alone():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    count(model, (torch.randn(5, 6),))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, True, False]
