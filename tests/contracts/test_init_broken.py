"""Each check of the suite of initialisations catches one that is broken in that way."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from contracts.broken import DOCUMENTED_ELSEWHERE, assert_caught, broken_runs, good_runs, own_checks
from torch import nn

from provenn.contracts import BadInput, ContractError, InitCase, Moment, check_init, checks_of

STD = math.sqrt(2 / 6)
BOUND = math.sqrt(3) * STD


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3, bias=False))


def moments():
    return {"0.weight": Moment(STD, largest=BOUND), "0.bias": Moment(0.0), "2.weight": Moment(0.5, mean=1.0)}


def good(module, generator, gain=1.0):
    """A correct little initialisation, to be broken below."""
    if gain <= 0:
        raise ValueError(f"gain must be > 0, got {gain}")
    with torch.no_grad():
        module[0].weight.uniform_(-gain * BOUND, gain * BOUND, generator=generator)
        module[0].bias.zero_()
        module[2].weight.normal_(1, gain / 2, generator=generator)
    return module


def returns_nothing(module, generator):
    good(module, generator)


def returns_a_copy(module, generator):
    return copy.deepcopy(good(module, generator))


def replaces_a_parameter(module, generator):
    good(module, generator)[0].weight = nn.Parameter(module[0].weight.detach().clone())
    return module


def replaces_storage(module, generator):
    good(module, generator)[0].weight.data = module[0].weight.detach().clone()
    return module


def transposes_storage(module, generator):
    good(module, generator)[0].weight.data = module[0].weight.detach().T.contiguous().T
    return module


def adds_a_buffer(module, generator):
    good(module, generator)[0].register_buffer("scale", torch.ones(()))
    return module


def sets_batch_norm_too(module, generator):
    good(module, generator)[1].reset_parameters()
    return module


def forgets_the_bias(module, generator):
    with torch.no_grad():
        before = module[0].bias.clone()
        good(module, generator)[0].bias.copy_(before)
    return module


def counter():
    calls = [0]

    def drifts(module, generator):
        calls[0] += 1
        with torch.no_grad():
            good(module, generator)[0].weight.mul_(1 + 1e-6 * calls[0])
        return module

    return drifts


def seeds_itself(module, generator):
    return good(module, torch.Generator().manual_seed(0))


def draws_elsewhere(module, generator):
    return good(module, None)


def draws_one_tensor_elsewhere(module, generator):
    with torch.no_grad():
        good(module, generator)[2].weight.normal_(1, 0.5)
    return module


def wastes_a_draw(module, generator):
    torch.rand(1)
    return good(module, generator)


def copies_the_generator(module, generator):
    return good(module, torch.Generator().set_state(generator.get_state()))


def rescales_the_old_values(module, generator):
    with torch.no_grad():
        old = module[0].weight.mean()
        good(module, generator)[0].weight.mul_(old.sign() * (1 + 1e-3 * old))
    return module


def uses_fan_out(module, generator):
    with torch.no_grad():
        good(module, generator)[0].weight.mul_(math.sqrt(6 / 8))
    return module


def slightly_wide(module, generator):
    with torch.no_grad():
        good(module, generator)[0].weight.mul_(1.05).clamp_(-BOUND, BOUND)
    return module


def is_normal(module, generator):
    with torch.no_grad():
        good(module, generator)[0].weight.normal_(0, STD, generator=generator)
    return module


def is_off_centre(module, generator):
    with torch.no_grad():
        good(module, generator)[2].weight.add_(0.05)
    return module


def makes_float32(module, generator):
    return good(module, generator).float()


def overflows(module, generator):
    with torch.no_grad():
        good(module, generator)[0].bias.copy_(torch.zeros(8) if module[0].bias.dtype != torch.bfloat16 else torch.inf)
    return module


def mixes_devices(module, generator):
    with torch.no_grad():
        module[0].bias.copy_(good(module, generator)[0].bias + torch.zeros(8))
    return module


def leaves_the_device(module, generator):
    good(module, generator)[1]._buffers["running_mean"] = torch.zeros(8)
    return module


def unfreezes(module, generator):
    return good(module, generator).requires_grad_(True)


def freezes(module, generator):
    good(module, generator)[0].weight.requires_grad_(False)
    return module


def clears_gradients(module, generator):
    good(module, generator).zero_grad()
    return module


def sets_training_mode(module, generator):
    return good(module, generator).train()


def records_a_graph(module, generator):
    good(module, generator)[1].running_var = module[1].running_var * module[0].weight.sum() / module[0].weight.sum()
    return module


def returns_a_graph(module, generator):
    return good(module, generator)[0].weight.square().mean()


def needs_gradients(module, generator):
    if not torch.is_grad_enabled():
        raise RuntimeError("gradients are off")
    return good(module, generator)


GOOD = InitCase(
    "contracts.broken.own_checks",
    good,
    network,
    ("0.weight", "0.bias", "2.weight"),
    moments,
    bad_input=(BadInput("gain", lambda: good(network(), None, gain=0)),),
    excluded={**DOCUMENTED_ELSEWHERE, "public_name": "the part is a test's own"},
    label="good",
)


def broken(initialize, **options):
    return replace(GOOD, **{"initialize": initialize, "label": initialize.__name__, **options})


BROKEN = {
    "returns_module": [broken(returns_nothing), broken(returns_a_copy)],
    "in_place": [
        broken(replaces_a_parameter),
        broken(replaces_storage),
        broken(transposes_storage),
        broken(adds_a_buffer),
    ],
    "promised_tensors": [
        broken(sets_batch_norm_too),
        broken(forgets_the_bias),
        broken(good, changes=("0.weights",), label="unknown name"),
        broken(good, changes=(), label="nothing"),
    ],
    "seed": [broken(counter())],
    "random": [broken(seeds_itself)],
    "generator": [
        broken(draws_elsewhere),
        broken(draws_one_tensor_elsewhere),
        broken(wastes_a_draw),
        broken(copies_the_generator),
    ],
    "forgets": [broken(rescales_the_old_values), broken(forgets_the_bias)],
    "moments": [
        broken(uses_fan_out),
        broken(slightly_wide),
        broken(is_normal),
        broken(is_off_centre),
        broken(good, moments=dict, label="nothing stated"),
        broken(good, moments=lambda: {"1.weight": Moment(0.0, 1.0)}, label="of another tensor"),
    ],
    "dtype": [broken(makes_float32), broken(overflows)],
    "device": [broken(mixes_devices), broken(leaves_the_device)],
    "autograd": [
        broken(unfreezes),
        broken(freezes),
        broken(clears_gradients),
        broken(sets_training_mode),
        broken(records_a_graph),
        broken(returns_a_graph),
        broken(needs_gradients),
    ],
}


def orthogonal(module, generator):
    """Elements of one matrix depend on one another; the matrices do not."""
    return nn.init.orthogonal_(module.weight, generator=generator)


ORTHOGONAL = InitCase(
    "torch.nn.init.orthogonal_",
    orthogonal,
    lambda: nn.Linear(4, 4),
    ("weight",),
    lambda: {"weight": Moment(0.5, largest=1.0)},
    returns_module=False,
    returns_module_reason="it is given the tensor, and returns that",
    excluded={
        **DOCUMENTED_ELSEWHERE,
        "bad_input": "its message names no argument",
        "dtype": "no QR decomposition in bfloat16",
    },
)


@pytest.mark.parametrize("check", good_runs(GOOD, ORTHOGONAL))
def test_good_initialisation_passes(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_initialisations_are_caught(name, case):
    assert_caught(name, case)


def test_every_check_has_a_broken_initialisation():
    assert set(BROKEN) == own_checks("init")


def test_check_init_lists_failures():
    with pytest.raises(ContractError, match="'returns_module'"):
        check_init(broken(returns_nothing))


def test_an_initialisation_without_a_generator_is_seeded_by_the_global_one():
    """The same draws pass when the case says that they come from torch's global generator."""
    reason = "it takes no generator"
    case = broken(draws_elsewhere, generator=False, generator_reason=reason)
    for check in checks_of(case).values():
        check()
