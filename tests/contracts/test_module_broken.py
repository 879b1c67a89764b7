"""Each check of the suite of modules catches a module that is broken in that way."""

from dataclasses import replace

import pytest
import torch
from contracts.broken import DOCUMENTED_ELSEWHERE, assert_caught, broken_runs, good_runs, own_checks
from torch import nn
from torch.nn.functional import dropout

from provenn.contracts import BadInput, ContractError, Form, ModuleCase, Symmetry, check_module, checks_of

LENGTH, WIDTH = 4, 6


def sequences(generator, dtype, batch):
    return (torch.randn(batch, LENGTH, WIDTH, generator=generator, dtype=dtype),)


class Attention(nn.Module):
    """A correct little module, to be broken below: one head of self-attention, causal if asked."""

    def __init__(self, causal=False):
        super().__init__()
        self.causal = causal
        self.projections = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        query, key, value = self.projections(x).chunk(3, dim=-1)
        scores = query @ key.transpose(-1, -2) / WIDTH**0.5
        if self.causal:
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(future, -torch.inf)
        return scores.softmax(-1) @ value


class Wrapped(nn.Module):
    """A linear layer with something wrong before, in or after it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.prepare()

    def prepare(self):
        pass

    def forward(self, x):
        return self.after(self.linear(self.before(x)))

    def before(self, x):
        return x

    def after(self, y):
        return y


class UnusedParameter(Wrapped):
    def prepare(self):
        self.spare = nn.Parameter(torch.zeros(2))


class InfiniteOutput(Wrapped):
    def after(self, y):
        return y / (y - y.detach())


class InfiniteGradient(Wrapped):
    def after(self, y):
        return y + (y - y.detach()).clamp(min=0).sqrt()


class Rounds(Wrapped):
    def after(self, y):
        return y + (y.round() - y).detach()


class HalfInside(Wrapped):
    def before(self, x):
        return x.half().to(x.dtype) if x.dtype == torch.float32 else x


class Cancels(Wrapped):
    def after(self, y):
        return (y + 1e4) - 1e4


class UnregisteredConstant(Wrapped):
    def prepare(self):
        self.mask = torch.ones(WIDTH)

    def after(self, y):
        return y * self.mask


class AlwaysDrops(Wrapped):
    def after(self, y):
        return dropout(y, 0.5, training=True)


class CountsCalls(Wrapped):
    def prepare(self):
        self.register_buffer("calls", torch.zeros(()))

    def after(self, y):
        self.calls += 1
        return y + self.calls


class Drops(Wrapped):
    def after(self, y):
        return dropout(y, 0.5, training=self.training)


class CentresTheBatch(Wrapped):
    def after(self, y):
        return y - y.detach().mean(0)


class ScalesByTheLargest(Wrapped):
    def after(self, y):
        return y / y.amax(dim=(1, 2), keepdim=True).amax(0) if len(y) > 1 else y


class LosesEmptyBatches(Wrapped):
    def after(self, y):
        return y if len(y) else y.new_zeros(1, LENGTH, WIDTH)


class NeedsASample(Wrapped):
    def after(self, y):
        return y + 0 * y.amax()


class NanForEmptyBatches(Wrapped):
    def forward(self, x):
        return self.linear(x) if len(x) else self.linear(x) * (self.linear.bias.sum() / x.sum())


class UnregisteredDraw(Wrapped):
    def prepare(self):
        self.factor = float(torch.rand(()) + 0.5)

    def after(self, y):
        return y * self.factor


class HoldsAFunction(Wrapped):
    def prepare(self):
        self.activation = lambda y: y.tanh()

    def after(self, y):
        return self.activation(y)


class SharesItsStorage(Wrapped):
    def __deepcopy__(self, memo):
        twin = SharesItsStorage()
        twin.linear = self.linear
        return twin


class ScalesItsInput(Wrapped):
    def before(self, x):
        with torch.no_grad():
            x.mul_(2)
        return x


class FreezesItself(Wrapped):
    def after(self, y):
        self.linear.bias.requires_grad_(False)
        return y


class BranchesOnValues(Wrapped):
    def after(self, y):
        return y if y.sum() > 0 else 2 * y


class PrintsInside(Wrapped):
    def after(self, y):
        torch._dynamo.graph_break()
        return y


class BakesAConstant(Wrapped):
    """Exports, but with a number of the example inputs in the program."""

    def before(self, x):
        if torch.compiler.is_exporting():
            return x.new_ones(x.shape)
        return x


class CountsItsSamples(Wrapped):
    """Exports, but for the number of samples of the example inputs alone."""

    def before(self, x):
        return x + x.new_zeros(len(x), 1, 1)


class KeepsItsInputsType(Wrapped):
    """Copies what a linear layer gives into a tensor of the inputs' type, which autocast makes another."""

    def forward(self, x):
        y = super().forward(x)
        return x.new_zeros(y.shape).index_copy_(0, torch.arange(len(y), device=y.device), y)


class KnowsPositions(Wrapped):
    def after(self, y):
        return y + torch.arange(y.shape[1], dtype=y.dtype, device=y.device)[:, None]


class LooksOneAhead(Wrapped):
    def after(self, y):
        return y + y.roll(-1, dims=1)


class IgnoresLateInputs(Wrapped):
    def after(self, y):
        return y[:, :1].expand_as(y).contiguous()


class Convex(Wrapped):
    """A maximum of linear functions, which is convex and has the norm of its weights as a bound."""

    def after(self, y):
        return y.relu()


class ConcaveFarAway(Wrapped):
    """Convex where inputs of the usual size lie, and bounded above far away."""

    def after(self, y):
        return y.relu().clamp(max=15)


class ConcaveInOneCorner(Wrapped):
    """Has a dent that few random segments meet."""

    def after(self, y):
        dent = (y[..., :1] - 4).relu() * 3
        return y.square() - torch.minimum(dent, dent * 0 + 60) * (y[..., :1] > 4)


class SteepFarAway(Wrapped):
    def after(self, y):
        return y + 3 * (y.abs() - 20).relu()


class SteepInOneDirection(Wrapped):
    """Is steep along one direction alone, of small weight in random pairs."""

    def after(self, y):
        return y + y[..., :1] * 0.2


def norm_of_weights(module, inputs):
    return torch.linalg.matrix_norm(module.linear.weight, 2).item()


def matrix_product(module, inputs):
    return inputs[0] @ module.linear.weight.T + module.linear.bias


def rounded_product(module, inputs):
    return matrix_product(module, inputs) + 1e-7


def detached_product(module, inputs):
    return matrix_product(module, (inputs[0].detach(),))


class ReadsItsWeights(Wrapped):
    def prepare(self):
        self.largest = self.linear.weight.max().item()


class BuildsOnTheCPU(Wrapped):
    def prepare(self):
        self.register_buffer("table", torch.ones(WIDTH, device="cpu"))


class ConstantOnTheCPU(Wrapped):
    def after(self, y):
        return y + torch.ones(WIDTH, dtype=y.dtype)


class ReadsAndMakes(Wrapped):
    """Reads a value, which the meta device has none of, before it makes something on the default device."""

    def after(self, y):
        return y + torch.ones(WIDTH, dtype=y.dtype) if y.sum().isfinite() else y


class OutputOnTheCPU(Wrapped):
    def forward(self, x):
        return self.linear(x), torch.zeros(3)


BAD_WIDTH = (BadInput("foo", lambda: {}["foo"], KeyError),)


def reversed_order(x):
    return x.flip(1)


PERMUTATION = Symmetry("order of the sequence", lambda inputs: (reversed_order(inputs[0]),), reversed_order)
GOOD = ModuleCase(
    "torch.nn.Linear",
    lambda: nn.Linear(WIDTH, 3),
    sequences,
    bad_input=BAD_WIDTH,
    symmetries=(PERMUTATION,),
    causal_dim=1,
    excluded={**DOCUMENTED_ELSEWHERE, "causality": "acts on each position alone"},
)
WHOLE = replace(GOOD, make=Attention, label="attention", causal_dim=None, excluded=DOCUMENTED_ELSEWHERE)
CAUSAL = replace(WHOLE, make=lambda: Attention(causal=True), label="causal", causal_dim=1, symmetries=())
NORMALISED = replace(
    WHOLE,
    make=lambda: nn.Sequential(nn.Conv1d(LENGTH, 5, 1), nn.BatchNorm1d(5), nn.Dropout(0.5)),
    label="batch norm and dropout",
    symmetries=(),
    training_equals_eval=False,
    training_equals_eval_reason="batch statistics and dropout",
)


BOUNDED = replace(WHOLE, make=Convex, label="convex", symmetries=(), convex=True, lipschitz=norm_of_weights)
TWO_FORMS = replace(WHOLE, make=Wrapped, label="forms", symmetries=(), forms=(Form("product", matrix_product),))


def broken(make, **options):
    return replace(WHOLE, **{"make": make, "label": make.__name__.strip("<>"), "symmetries": (), **options})


BROKEN = {
    "gradients": [broken(UnusedParameter), broken(InfiniteOutput), broken(InfiniteGradient)],
    "gradcheck": [broken(Rounds)],
    "float32": [broken(HalfInside), broken(Cancels)],
    "bfloat16": [broken(Cancels)],
    "dtype": [broken(UnregisteredConstant)],
    "eval_deterministic": [broken(AlwaysDrops), broken(CountsCalls)],
    "training_equals_eval": [broken(Drops)],
    "independent_samples": [broken(CentresTheBatch), broken(ScalesByTheLargest)],
    "empty_batch": [broken(LosesEmptyBatches), broken(NeedsASample), broken(NanForEmptyBatches)],
    "state_dict": [broken(UnregisteredDraw)],
    "copies": [broken(HoldsAFunction), broken(SharesItsStorage)],
    "inputs_untouched": [broken(ScalesItsInput), broken(FreezesItself)],
    "compile": [broken(BranchesOnValues), broken(PrintsInside)],
    "export": [broken(BranchesOnValues), broken(BakesAConstant), broken(CountsItsSamples)],
    "autocast": [broken(KeepsItsInputsType), broken(Cancels)],
    "symmetries": [
        broken(KnowsPositions, symmetries=(PERMUTATION,)),
        broken(Wrapped, symmetries=(replace(PERMUTATION, before=lambda inputs: inputs),)),
    ],
    "causality": [
        broken(Attention, causal_dim=1),
        broken(LooksOneAhead, causal_dim=1),
        broken(IgnoresLateInputs, causal_dim=1),
    ],
    "forms": [
        broken(Wrapped, forms=(Form("product", rounded_product),)),
        broken(Wrapped, forms=(Form("product", detached_product),)),
        broken(Convex, forms=(Form("product", matrix_product),)),
    ],
    "convexity": [broken(one, convex=True) for one in (Attention, ConcaveFarAway, ConcaveInOneCorner)],
    "lipschitz": [
        *(broken(one, lipschitz=norm_of_weights) for one in (SteepFarAway, SteepInOneDirection)),
        broken(Wrapped, lipschitz=lambda module, inputs: 0.999 * norm_of_weights(module, inputs)),
    ],
    "meta": [broken(ReadsItsWeights), broken(BuildsOnTheCPU)],
    "device": [broken(ConstantOnTheCPU), broken(OutputOnTheCPU), broken(ReadsAndMakes)],
}


@pytest.mark.parametrize("check", good_runs(GOOD, WHOLE, CAUSAL, NORMALISED, BOUNDED, TWO_FORMS))
def test_good_modules_pass(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_modules_are_caught(name, case):
    assert_caught(name, case)


def test_every_check_has_a_broken_module():
    assert set(BROKEN) == own_checks("module")


def test_check_module_lists_failures():
    with pytest.raises(ContractError, match="'bfloat16'"):
        check_module(broken(Cancels))


def test_tokens_are_disturbed_too():
    """Causality is checked for integer inputs as well."""

    def tokens(generator, dtype, batch):
        return (torch.randint(0, 50, (batch, 5), generator=generator),)

    case = broken(lambda: nn.Embedding(50, WIDTH).double(), inputs=tokens, causal_dim=1)
    ahead = broken(lambda: nn.Sequential(nn.Embedding(50, WIDTH), LooksOneAhead()), inputs=tokens, causal_dim=1)
    checks_of(case)["causality"]()
    with pytest.raises(ContractError, match="change earlier outputs"):
        checks_of(ahead)["causality"]()
