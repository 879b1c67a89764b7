"""Sparse MeZO against closed forms, sorted magnitudes, the dense optimizer, and what lies in memory."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from provenn.contracts import BadInput, FunctionCase, OptimizerCase
from provenn.core.experiment.accounting import TensorMemory
from provenn.core.numerics.zeroth_order import SeededDirection
from provenn.optim import MaskShare, SparseMeZO, ZerothOrder, magnitude_thresholds


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def parameter(*shape, dtype=torch.float64, seed=0):
    return nn.Parameter(torch.randn(shape, dtype=dtype, generator=seeded(seed)))


def sparse(params, lr=3e-3, **options):
    return SparseMeZO(params, lr, **{"mask": "stored", "min_numel": 4, "generator": seeded(), **options})


def one(**options):
    return SparseMeZO([parameter(20, 20)], **{"mask": "stored", **options})


def with_nan(**options):
    weight = parameter(20, 20)
    weight.data[3, 4] = math.nan
    return SparseMeZO([parameter(3, 3), weight], mask="stored", **options)


def loaded():
    state = one().state_dict()
    SparseMeZO([parameter(10, 40)], mask="stored").load_state_dict(state)


BAD_INPUT = (
    BadInput("sparsity", lambda: one(sparsity=1.0)),
    BadInput("sparsity", lambda: one(sparsity=-0.1)),
    BadInput("eps", lambda: one(eps=0.0)),
    BadInput("lr", lambda: one(lr=0.0)),
    BadInput("weight_decay", lambda: one(weight_decay=-1.0)),
    BadInput("min_numel", lambda: one(min_numel=0)),
    BadInput("mask", lambda: one(mask="packed")),
    BadInput("mask", lambda: one(mask="recompute")),
    BadInput("select", lambda: one(select="median")),
    BadInput("params", with_nan),
    BadInput("state_dict", loaded),
    BadInput("state_dict", lambda: one().load_state_dict(one(mask="static").state_dict())),
)

CASES = [
    OptimizerCase(
        part="provenn.optim.SparseMeZO",
        make=functools.partial(sparse, **options),
        label=label,
        closure="required",
        quadratic={"sparsity": 0.0},  # the quadratic's minimum is not where the mask lets through
        quadratic_steps=2000,
        rosenbrock={"lr": 6e-4},
        rosenbrock_steps=3000,
        excluded={
            "none_gradients": "it reads losses, not gradients",
            "sparse_gradients": "it reads losses, not gradients",
        },
        bad_input=BAD_INPUT,
    )
    for label, options in {
        "stored": {"sparsity": 0.5},
        "static": {"sparsity": 0.5, "mask": "static"},
        "random, decay": {"sparsity": 0.5, "select": "random", "weight_decay": 0.01},
    }.items()
] + [
    FunctionCase(
        part="provenn.optim.magnitude_thresholds",
        call=lambda: magnitude_thresholds([parameter(4, 5)], 0.5),
        bad_input=(
            BadInput("sparsity", lambda: magnitude_thresholds([parameter(4, 5)], 1.0)),
            BadInput("params", lambda: magnitude_thresholds([torch.tensor([1.0, math.inf])], 0.5)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.MaskShare",
        call=lambda: MaskShare("0.weight", 12, 0.5, 0.25, 0.2, 0).now,
        bad_input_reason="it holds what was counted",
    ),
]


def flat(tensors):
    return torch.cat([each.detach().flatten() for each in tensors])


def network(widths=(12, 30, 20, 3), dtype=torch.float64, seed=0):
    draws = seeded(seed)
    layers = []
    for wide, narrow in itertools.pairwise(widths):
        layer = nn.Linear(wide, narrow, dtype=dtype)
        layer.weight.data.copy_(torch.randn(narrow, wide, generator=draws, dtype=dtype) / math.sqrt(wide))
        layer.bias.data.zero_()
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def task(model):
    wide = model[0].in_features
    x = torch.randn(16, wide, generator=seeded(5), dtype=model[0].weight.dtype)
    y = torch.randint(model[-1].out_features, (16,), generator=seeded(6))
    return lambda: nn.functional.cross_entropy(model(x), y)


def optimizer_of(model, mode="recompute", **options):
    return SparseMeZO.for_model(model, **{"lr": 0.01, "mask": mode, "generator": seeded(2), **options})


# Thresholds.


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.75, 0.999])
def test_thresholds_keep_their_share_of_the_smallest(sparsity):
    tensors = [parameter(37, 11, seed=1), 5 * parameter(800, seed=2).detach()]
    found = magnitude_thresholds(tensors, sparsity)
    for tensor, threshold in zip(tensors, found, strict=True):
        magnitudes = np.sort(tensor.detach().abs().numpy().ravel())
        kept = round((1 - sparsity) * len(magnitudes))
        assert threshold == (magnitudes[kept - 1] if kept else -1.0)
        assert abs((magnitudes <= threshold).mean() - (1 - sparsity)) <= 1 / len(magnitudes)
    assert magnitude_thresholds(tensors, 0.0) == [math.inf, math.inf]


def test_thresholds_of_short_types_are_entries():
    weight = torch.randn(500, generator=seeded()).to(torch.bfloat16)
    (threshold,) = magnitude_thresholds([weight], 0.5)
    assert (weight.abs() <= threshold).sum() >= 250
    assert threshold in weight.abs().double().tolist()


@pytest.mark.parametrize(("select", "kept"), [("smallest", [0.5, 0.5, 0.5, 1.0]), ("largest", [0.5, 0.5, 0.5, 1.0])])
def test_ties_are_all_in_and_reported(select, kept):
    rest = [0.1] * 50 if select == "largest" else [2.0] * 50
    weight = nn.Parameter(torch.tensor(kept * 25 + rest, dtype=torch.float64).view(10, 15))
    # 75 magnitudes of one half. The smallest 20, or the largest 30 of which 25 are ones, end among them.
    wanted = 20 if select == "smallest" else 30
    optimizer = SparseMeZO([weight], sparsity=1 - wanted / 150, mask="stored", select=select)
    (report,) = optimizer.mask_report()
    inside = 75 if select == "smallest" else 100
    assert report.threshold == 0.5
    assert report.ties == inside - wanted
    assert report.at_start == report.now == inside / 150


def test_small_tensors_are_wholly_in_or_out():
    model = network()
    shapes = [(30, 12), (30,), (20, 30), (20,), (3, 20), (3,)]
    assert [tuple(each.shape) for each in model.parameters()] == shapes
    # 3 × 20 has fewer than 128 entries; biases are no matrices.
    inside = [report.now for report in optimizer_of(model).mask_report()]
    assert inside == [0.25, 1.0, 0.25, 1.0, 1.0, 1.0]
    optimizer = optimizer_of(model, dense_small=False)
    assert [report.now for report in optimizer.mask_report()] == [0.25, 0.0, 0.25, 0.0, 0.0, 0.0]
    before = [each.detach().clone() for each in model.parameters()]
    for _ in range(3):
        optimizer.step(task(model))
    moved = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
    assert moved == [True, False, True, False, False, False]
    names = [report.name for report in optimizer.mask_report()]
    assert names == [name for name, _ in model.named_parameters()]


# What moves.


@pytest.mark.parametrize("mode", ["recompute", "stored", "static"])
@pytest.mark.parametrize("select", ["smallest", "largest", "random"])
def test_weights_outside_the_mask_stay_bit_for_bit(mode, select):
    model = network()
    optimizer = optimizer_of(model, mode, select=select, sparsity=0.6, weight_decay=0.1)
    before = [each.detach().clone() for each in model.parameters()]
    optimizer.step(task(model))
    for tensor, old in zip(model.parameters(), before, strict=True):
        moved = (tensor.detach() != old).numpy().ravel()
        if tensor.ndim < 2 or tensor.numel() < 128:
            assert moved.mean() > 0.95 or not old.any()  # a bias of zeros moves by its noise alone
            continue
        order = np.argsort(old.abs().numpy().ravel())
        count = round(0.4 * len(order))
        if select == "random":
            assert abs(moved.mean() - 0.4) < 3 * math.sqrt(0.24 / len(moved))
            assert 0.2 < moved[order[:count]].mean() < 0.6
        else:
            chosen = order[:count] if select == "smallest" else order[-count:]
            assert moved[chosen].all()
            assert moved.sum() == count


def test_random_masks_stay_for_the_run_and_differ_by_tensor():
    weights = [parameter(40, 40, seed=1), parameter(40, 40, seed=2)]
    optimizer = SparseMeZO(weights, lr=0.1, mask="stored", select="random", sparsity=0.5)
    masks = []
    for _ in range(2):
        before = [each.detach().clone() for each in weights]
        optimizer.step(lambda: sum(each.sum() for each in weights))
        masks.append([now.detach() != then for now, then in zip(weights, before, strict=True)])
    assert torch.equal(masks[0][0], masks[1][0])
    assert abs((masks[0][0] == masks[0][1]).double().mean() - 0.5) < 0.05


@pytest.mark.parametrize("mode", ["recompute", "stored", "static"])
def test_no_sparsity_is_mezo_bit_for_bit(mode):
    model, twin = network(), network()
    optimizer = optimizer_of(model, mode, sparsity=0.0, weight_decay=0.02)
    exact = {"exact_restore": True, "model": twin} if mode == "recompute" else {}
    dense = ZerothOrder(twin.parameters(), 0.01, weight_decay=0.02, generator=seeded(2), **exact)
    for _ in range(10):
        assert optimizer.step(task(model)) == dense.step(task(twin))
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_hardly_anything_moves_at_sparsity_near_one():
    weight = parameter(100, 100)
    optimizer = SparseMeZO([weight], lr=0.1, sparsity=0.9999, mask="stored")
    before = weight.detach().clone()
    optimizer.step(lambda: weight.sum())
    assert (weight != before).sum() == 1
    with pytest.raises(RuntimeError, match="empty in all"):
        SparseMeZO([parameter(20, 20)], sparsity=0.9999, mask="stored")


def test_a_mask_that_has_drained_is_an_error_and_a_flat_loss_is_none():
    weight = parameter(20, 20)
    optimizer = SparseMeZO([weight], sparsity=0.5, mask="stored")
    optimizer.step(lambda: 1.0)
    weight.data.add_(100.0)
    with pytest.raises(RuntimeError, match="empty in all"):
        optimizer.step(lambda: weight.sum())


def test_the_mask_is_of_the_present_weights_unless_static():
    for mode, expected in (("stored", 0.0), ("static", 0.5)):
        weight, other = parameter(20, 20), parameter(20, 20)
        optimizer = SparseMeZO([weight, other], sparsity=0.5, mask=mode)
        weight.data.mul_(1e6)
        assert optimizer.mask_report()[0].now == pytest.approx(expected, abs=0.01)
        assert optimizer.mask_report()[0].at_start == 0.5
        before = weight.detach().clone()
        optimizer.step(lambda weight=weight, other=other: (weight / 1e6 + other).sum())
        assert (weight != before).double().mean() == pytest.approx(expected, abs=0.01)


# Consistency within a step.


def test_recomputed_and_stored_masks_train_alike():
    found, losses = [], []
    for mode in ("recompute", "stored"):
        model = network((12, 30, 3))
        optimizer, loss = optimizer_of(model, mode, lr=0.02, sparsity=0.7), task(model)
        losses.append([float(optimizer.step(loss)) for _ in range(200)])
        found.append(flat(model.parameters()))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(*losses, rtol=1e-6, atol=1e-6)
    assert losses[0][-1] < 0.9 * losses[0][0]


@pytest.mark.parametrize("mode", ["recompute", "stored"])
def test_weights_at_the_threshold_do_not_flip_between_the_two_losses(mode):
    # Half of the weights lie a tenth of ε from h, where a perturbation carries them over it.
    model = nn.Sequential(nn.Linear(20, 20, bias=False, dtype=torch.float64))
    near = 0.1 + 1e-4 * torch.tensor([1.0, -1.0] * 100, dtype=torch.float64)
    model[0].weight.data.copy_(torch.cat([near, torch.full((200,), 0.5, dtype=torch.float64)]).view(20, 20))
    optimizer = optimizer_of(model, mode, sparsity=0.75, lr=0.01)
    assert optimizer.mask_report()[0].now == 0.25  # the hundred below
    h, clean = optimizer.mask_report()[0].threshold, model[0].weight.detach().clone()
    inside, seen = clean.abs() <= h, []

    def loss():
        # What the layer computes with tells its weights: the rows of the identity come out as its columns.
        used = model(torch.eye(20, dtype=torch.float64)).T
        seen.append(used - clean)
        return used.square().sum()

    optimizer.step(loss)
    assert len(seen) == 2
    for moved in seen:
        assert torch.equal(moved.abs() > 1e-12, inside)
    flips = (clean + seen[0]).abs().le(h) != inside
    assert flips.sum() > 20  # a mask of the perturbed weights would have been another one
    torch.testing.assert_close(seen[0], -seen[1], rtol=0, atol=1e-12)
    assert torch.equal(model[0].weight.detach() != clean, inside)


def test_weights_in_memory_never_move_while_losses_are_evaluated():
    model = network()
    optimizer, loss = optimizer_of(model), task(model)
    for _ in range(3):
        before, seen = flat(model.parameters()), []

        def watched(before=before, seen=seen):
            value = loss()
            seen.append(torch.equal(before, flat(model.parameters())))
            return value

        optimizer.step(watched)
        assert seen == [True, True]
        assert not torch.equal(before, flat(model.parameters()))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_ties_and_functional_use_are_refused_by_name():
    model = network((20, 20, 20))
    model[2].weight = model[0].weight
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        optimizer_of(model)

    model = network()
    x = torch.randn(4, 12, dtype=torch.float64, generator=seeded())
    optimizer = optimizer_of(model)
    with pytest.raises(RuntimeError, match=r"2\.weight"):
        optimizer.step(
            lambda: nn.functional.linear(model[0](x), model[2].weight).sum() + model[4](model[2].weight[:, :20]).sum()
        )
    before = flat(model.parameters())
    optimizer.step(task(model))
    assert not torch.equal(before, flat(model.parameters()))


# The estimate.


@pytest.mark.parametrize("select", ["smallest", "largest"])
def test_estimate_of_a_linear_loss_is_exact(select):
    weight = parameter(15, 10)
    slope = torch.randn(15, 10, dtype=torch.float64, generator=seeded(4))
    optimizer = SparseMeZO([weight], lr=1.0, sparsity=0.6, mask="stored", select=select, generator=seeded(3))
    before = weight.detach().clone()
    order = before.abs().flatten().argsort(descending=select == "largest")
    mask = torch.zeros(150, dtype=torch.float64)
    mask[order[:60]] = 1
    z = flat(SeededDirection([weight], optimizer.draw_seed(0, 0)).materialize()) * mask
    optimizer.step(lambda: (slope * weight).sum())
    expected = -float(slope.flatten() @ z) * z
    torch.testing.assert_close((weight.detach() - before).flatten(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "count",
    [600, pytest.param(12_000, marks=pytest.mark.slow(reason="12 000 steps, a minute under checked signatures"))],
)
def test_mean_and_second_moment_have_the_effective_dimension(count):
    # E ĝ = m⊙∇f and E‖ĝ‖² = (d̂ + 2)‖m⊙∇f‖², d̂ = 80 of 200. ‖ĝ‖² varies by 1.4 times its mean: 3 % are 2.3 standard
    # errors of 12 000 seeds, and fewer get three of their own.
    slope = torch.randn(200, dtype=torch.float64, generator=seeded(4))
    mask = torch.zeros(200, dtype=torch.float64)
    weight = parameter(10, 20)
    mask[weight.detach().abs().flatten().argsort()[:80]] = 1
    start = weight.detach().clone()
    optimizer = SparseMeZO([weight], lr=1.0, sparsity=0.6, mask="stored", generator=seeded(7))
    rows = []
    for _ in range(count):
        weight.data.copy_(start)
        optimizer.step(lambda: slope @ weight.detach().flatten())
        rows.append((start - weight.detach()).flatten())
    found, inside = torch.stack(rows), mask * slope
    errors = ((found.mean(0) - inside) / (found.std(0) / math.sqrt(count)))[mask == 1]
    assert errors.abs().max() < 4  # the largest of eighty
    assert not found[:, mask == 0].any()
    squares, expected = found.square().sum(1), 82 * float(inside @ inside)
    margin = 0.03 * expected if count >= 12_000 else 3 * float(squares.std()) / math.sqrt(count)
    assert abs(float(squares.mean()) - expected) < margin


def test_decay_is_within_the_mask():
    weight = parameter(20, 20)
    optimizer = SparseMeZO([weight], lr=0.1, sparsity=0.5, mask="stored", weight_decay=0.5)
    before = weight.detach().clone()
    optimizer.step(lambda: 0.0)  # no slope: decay alone
    inside = before.abs() <= optimizer.mask_report()[0].threshold
    torch.testing.assert_close(weight.detach(), torch.where(inside, 0.95 * before, before))
    assert torch.equal(weight.detach()[~inside], before[~inside])


# Memory.


def peak_of_step(mode, layers, width=192):
    """Bytes of the weights, and beyond them at the peak of a forward pass and of a step."""
    model = network((width,) * (layers + 1), torch.float32)
    loss = task(model)
    optimizer = optimizer_of(model, mode)
    optimizer.step(loss)
    with torch.no_grad(), TensorMemory() as ahead:
        loss()
    with TensorMemory() as memory:
        optimizer.step(loss)
    return sum(each.numel() * each.element_size() for each in model.parameters()), ahead.peak, memory.peak


def test_a_step_needs_the_memory_of_a_forward_pass_and_one_layer():
    # A piece of noise and its comparisons come on top of a layer's copy. All noise at once would add 100 %, all masks
    # 25 %.
    weights, ahead, step = peak_of_step("recompute", layers=100)
    assert step - ahead <= 4 * (192 * 192 + 192) + 2 * 4 * 2**13
    assert weights + step <= 1.02 * (weights + ahead)


def test_stored_masks_cost_a_byte_a_weight():
    weights, ahead, step = peak_of_step("stored", layers=20)
    masked = weights // 4 - 20 * 192
    assert masked <= step <= masked + 192 * 192 + 2 * 4 * 2**13 + ahead


def test_static_masks_are_kept_and_thresholds_are_all_else():
    model = network()
    assert not optimizer_of(model).state_dict()["state"]
    assert not any(each is not None for each in optimizer_of(model).state_dict()["masks"]["static"])
    static = optimizer_of(model, "static").state_dict()["masks"]["static"]
    assert [None if each is None else each.dtype for each in static] == [torch.bool, None] * 2 + [None] * 2


# Resuming.


@pytest.mark.parametrize("mode", ["recompute", "stored", "static"])
@pytest.mark.parametrize("select", ["smallest", "random"])
def test_resumes_bit_for_bit_with_the_first_thresholds(mode, select):
    model = network()
    optimizer, loss = optimizer_of(model, mode, select=select), task(model)
    for _ in range(5):
        optimizer.step(loss)
    other = network()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        for each in other.parameters():
            each.mul_(3)  # thresholds of these weights would be others
    resumed = optimizer_of(other, mode, select=select, generator=seeded(99))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.mask_report() == optimizer.mask_report()
    for _ in range(5):
        optimizer.step(loss)
        resumed.step(task(other))
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))


def test_added_groups_have_thresholds_of_their_own():
    weight, late = parameter(20, 20), parameter(20, 20, seed=3)
    optimizer = SparseMeZO([weight], sparsity=0.5, mask="static", lr=0.1)
    late.data.mul_(7)
    optimizer.add_param_group({"params": [late]})
    assert [report.now for report in optimizer.mask_report()] == [0.5, 0.5]
    bad = parameter(20, 20)
    bad.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"params\[2\]"):
        optimizer.add_param_group({"params": [bad]})
    optimizer.step(lambda: (weight + late).sum())


def test_errors_name_the_parameter_of_the_model():
    model = network()
    model[2].weight.data[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"2\.weight"):
        optimizer_of(model)
