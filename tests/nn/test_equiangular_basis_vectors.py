"""Equiangular basis vectors against QR, Welch's bound, finite differences, closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from provenn.claims import Evidence
from provenn.claims.nn import equiangular_basis_vectors as claim
from provenn.contracts import BadInput, FunctionCase, LossCase, Minimum, ModuleCase
from provenn.nn import CosineHead, EBVHead, EBVLoss, SimplexETFHead, equiangular_basis


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=draws(seed), dtype=torch.float64)


def features(generator, dtype, batch):
    return (torch.randn(batch, 6, generator=generator, dtype=dtype),)


def embeddings(generator, dtype):
    z = torch.randn(5, 4, generator=generator, dtype=dtype)
    return z, torch.arange(5) % 3, F.normalize(torch.randn(3, 4, generator=generator, dtype=dtype))


def extreme(scale, label=None):
    def inputs():
        z, labels, basis = embeddings(draws(1), torch.float32)
        return scale * z, labels if label is None else torch.full_like(labels, label), basis

    return inputs


def one_sample():
    z, labels, basis = embeddings(draws(1), torch.float32)
    return z[:1], labels[:1], basis


def at_its_vector():
    basis = torch.eye(3, dtype=torch.float64)
    return 7 * basis, torch.arange(3), basis


HEADS = {
    "EBVHead": (lambda **options: EBVHead(**{"in_features": 6, "num_classes": 5, "dim": 4, **options})),
    "SimplexETFHead": (lambda **options: SimplexETFHead(**{"in_features": 6, "num_classes": 5, "dim": 4, **options})),
    "CosineHead": (lambda **options: CosineHead(**{"in_features": 6, "num_classes": 5, **options})),
}


def zero_input(make):
    module = make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module(torch.zeros(2, 6))


CASES = [
    *(
        ModuleCase(
            f"provenn.nn.{name}",
            make,
            features,
            bfloat16_tolerance=0.6,  # logits are cosines over 0.07, and may be 14 apart
            bad_input=(
                BadInput("in_features", lambda make=make: make(in_features=0)),
                BadInput("num_classes", lambda make=make: make(num_classes=1)),
                BadInput("tau", lambda make=make: make(tau=0.0)),
                BadInput("tau", lambda make=make: make(tau="warm"), TypeError),
                BadInput("z", lambda make=make: zero_input(make)),
                *(() if name == "CosineHead" else (BadInput("dim", lambda make=make: make(dim=0)),)),
                *(
                    (
                        BadInput("basis", lambda: EBVHead(6, 5, 4, basis=torch.ones(4, 5))),
                        BadInput("basis", lambda: EBVHead(6, 5, 4, basis=torch.zeros(5, 4))),
                        BadInput("n_new", lambda: EBVHead(6, 5, 4).extend(0)),
                    )
                    if name == "EBVHead"
                    else ()
                ),
            ),
        )
        for name, make in HEADS.items()
    ),
    *(
        LossCase(
            "provenn.nn.EBVLoss",
            lambda mode=mode, **options: EBVLoss(**{"mode": mode, **options}),
            embeddings,
            minimum=Minimum(at_its_vector, value),
            extremes=(extreme(1e4), extreme(-1e4), extreme(1.0, label=2), one_sample),
            label=mode,
            bad_input=(
                BadInput("tau", lambda: EBVLoss(tau=-1.0)),
                BadInput("label_smoothing", lambda: EBVLoss(label_smoothing=1.0)),
                BadInput("mode", lambda: EBVLoss(mode="cosine")),
                BadInput("reduction", lambda: EBVLoss(reduction="max")),
                BadInput("labels", lambda: EBVLoss()(torch.ones(1, 2), torch.tensor([2]), torch.eye(2))),
                BadInput("labels", lambda: EBVLoss()(torch.ones(1, 2), torch.tensor([-1]), torch.eye(2))),
                BadInput("z", lambda: EBVLoss()(torch.zeros(1, 2), torch.tensor([1]), torch.eye(2))),
                BadInput("z", lambda: EBVLoss()(torch.ones(1, 3), torch.tensor([1]), torch.eye(2))),
            ),
        )
        for mode, value in (("softmax", math.log(1 + 2 * math.exp(-1 / 0.07))), ("angle", 0.0))
    ),
    FunctionCase(
        "provenn.nn.equiangular_basis",
        lambda: equiangular_basis(6, 8),
        bad_input=(
            BadInput("num_classes", lambda: equiangular_basis(1, 8)),
            BadInput("dim", lambda: equiangular_basis(6, 0)),
            BadInput("alpha", lambda: equiangular_basis(6, 8, alpha=1.0)),
            BadInput("alpha", lambda: equiangular_basis(6, 8, alpha=-0.1)),
            BadInput("steps", lambda: equiangular_basis(6, 8, steps=-1)),
            BadInput("lr", lambda: equiangular_basis(6, 8, lr=0.0)),
            BadInput("slice_size", lambda: equiangular_basis(6, 8, slice_size=0)),
            BadInput("initial", lambda: equiangular_basis(6, 8, initial=torch.ones(8, 6))),
        ),
    ),
]


def cosines(V):
    G = (V @ V.T).abs().double()
    return G.fill_diagonal_(0)


# The vectors


@pytest.mark.parametrize(("classes", "dim", "alpha"), [(10, 10, 0.002), (40, 16, 0.35), (70, 64, 0.1), (2, 1, 0.999)])
def test_the_bound_holds_on_the_whole_gram_matrix(classes, dim, alpha):
    V, report = equiangular_basis(classes, dim, alpha, generator=draws(3))
    reached = dim > 1  # on a line all vectors are parallel
    assert report.feasible is reached
    torch.testing.assert_close(V.norm(dim=1), torch.ones(classes))
    top = cosines(V).max().item()
    assert (top <= alpha + 1e-4) is reached
    assert report.max_cosine == pytest.approx(top, abs=1e-6)
    assert report.mean_cosine == pytest.approx(cosines(V).sum().item() / (classes * (classes - 1)), abs=1e-6)


def test_an_orthogonal_start_is_accepted_at_once():
    Q = torch.linalg.qr(randn(8, 5)).Q.T
    V, report = equiangular_basis(5, 8, alpha=0.0, initial=Q)
    assert report.steps == 0
    torch.testing.assert_close(V @ V.T, torch.eye(5, dtype=torch.float64))


def test_the_size_of_slices_changes_no_bit():
    start = randn(100, 70, seed=1)
    sets = [equiangular_basis(100, 70, 0.05, 30, slice_size=size, initial=start)[0] for size in (1, 33, 64, 130, 1000)]
    assert all(torch.equal(sets[0], one) for one in sets)


def test_three_lines_in_the_plane_reach_welchs_bound_and_less_is_infeasible():
    V, report = equiangular_basis(3, 2, alpha=0.5, steps=2000, lr=1e-2)
    assert report.welch_bound == pytest.approx(0.5)
    assert cosines(V).max().item() == pytest.approx(0.5, abs=1e-3)
    _, worse = equiangular_basis(3, 2, alpha=0.4, steps=200)
    assert not worse.feasible


@pytest.mark.parametrize(("classes", "dim"), [(7, 3), (16, 4), (5, 5), (4, 9)])
def test_welchs_bound_is_below_every_set(classes, dim):
    for seed in range(20):
        V = F.normalize(randn(classes, dim, seed=seed))
        _, report = equiangular_basis(classes, dim, alpha=0.0, steps=0, initial=V)
        assert report.welch_bound <= cosines(V).max().item()
        expected = math.sqrt((classes - dim) / (dim * (classes - 1))) if classes > dim else 0.0
        assert report.welch_bound == pytest.approx(expected)


def test_a_step_is_the_gradient_of_the_summed_excess():
    start, alpha, lr = F.normalize(randn(6, 3, seed=2)), 0.3, 1e-3
    moved, report = equiangular_basis(6, 3, alpha, steps=1, lr=lr, initial=start)
    free = start.clone().requires_grad_()
    loss = sum(F.relu((free[i] @ free[j]).abs() - alpha) for i in range(6) for j in range(6) if i != j)
    expected = F.normalize(start - lr * torch.autograd.grad(loss, free)[0])
    # The better of the two sets is returned, and this step makes this one better.
    assert cosines(expected).max() < cosines(start).max()
    torch.testing.assert_close(moved, expected)
    assert report.steps == 1


def test_the_best_set_met_is_returned():
    tops = []
    _, report = equiangular_basis(30, 6, 0.2, steps=400, lr=0.02, progress=lambda step, top: tops.append((step, top)))
    assert [step for step, _ in tops] == [0, 100, 200, 300]
    assert report.max_cosine <= min(top for _, top in tops) + 1e-6


def test_the_start_is_fixed_without_a_generator_and_touches_no_global_state():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = equiangular_basis(6, 8)[0], equiangular_basis(6, 8)[0]
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, equiangular_basis(6, 8, generator=draws(1))[0])


def test_a_search_can_be_broken_off_and_goes_on_from_where_it_was():
    start = randn(40, 20, seed=4)
    whole, _ = equiangular_basis(40, 20, 0.05, 60, initial=start)
    half, _ = equiangular_basis(40, 20, 0.05, 30, initial=start)
    # What is returned is the best set, so that going on can only improve it.
    rest, _ = equiangular_basis(40, 20, 0.05, 30, initial=half)
    assert cosines(rest).max() <= cosines(half).max()
    assert cosines(whole).max() <= cosines(half).max()


# The heads


def test_logits_are_cosines_over_tau_and_ignore_length():
    head = EBVHead(6, 5, 4, tau=0.5).double()
    x = randn(3, 6, seed=1)
    z = x.numpy() @ head.linear.weight.detach().numpy().T + head.linear.bias.detach().numpy()
    V = head.basis.numpy()
    for row in range(3):
        for k in range(5):
            cosine = z[row] @ V[k] / np.linalg.norm(z[row]) / np.linalg.norm(V[k])
            assert head(x)[row, k].item() == pytest.approx(cosine / 0.5)
    with torch.no_grad():
        before = head(x)
        head.linear.weight *= 100
        head.linear.bias *= 100
    torch.testing.assert_close(head(x), before)
    assert torch.equal(head.predict(x), before.argmax(1))


def test_the_head_trains_nothing_but_its_linear_map():
    head = EBVHead(6, 20, 4)
    assert {name for name, _ in head.named_parameters()} == {"linear.weight", "linear.bias"}
    assert sum(p.numel() for p in head.parameters()) == 4 * 7 < sum(p.numel() for p in nn.Linear(6, 20).parameters())
    assert "basis" in head.state_dict()
    assert not head.basis.requires_grad
    before = head.basis.clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, weight_decay=0.5)
    F.cross_entropy(head(torch.ones(2, 6)), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert torch.equal(head.basis, before)


def test_a_given_basis_is_scaled_and_not_shared():
    given = 3 * torch.eye(4)
    head = EBVHead(6, 4, 4, basis=given)
    torch.testing.assert_close(head.basis, torch.eye(4))
    given.zero_()
    assert head.basis.norm() > 0


def test_new_classes_leave_the_old_ones_alone():
    head = EBVHead(6, 6, 16)
    x, old = torch.ones(2, 6), head.basis.clone()
    logits = head(x)
    report = head.extend(5)
    assert head.basis.shape == (11, 16)
    assert torch.equal(head.basis[:6], old)
    torch.testing.assert_close(head(x)[:, :6], logits)
    assert report.feasible
    assert cosines(head.basis).max() <= 0.002 + 2e-4
    assert not torch.allclose(head.basis[6], head.basis[7])


def test_old_pairs_that_break_the_bound_do_not_keep_the_search_from_ending():
    head = EBVHead(6, 2, 12, basis=torch.nn.functional.pad(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), (0, 10)))
    report = head.extend(4, steps=5000)
    assert report.steps < 5000
    assert report.max_cosine == pytest.approx(0.5**0.5)
    assert not report.feasible


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (5, 4), (5, 9), (11, 10)])
def test_the_simplex_has_equal_angles(classes, dim):
    V = SimplexETFHead(6, classes, dim).double().basis
    gram = torch.full((classes, classes), -1 / (classes - 1), dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(V @ V.T, gram, rtol=0, atol=1e-6)  # made for float32
    assert V.shape == (classes, dim)


def test_the_cosine_head_is_trained_and_ignores_the_length_of_its_vectors():
    head = CosineHead(6, 5).double()
    x = randn(3, 6)
    before = head(x)
    with torch.no_grad():
        head.weight *= torch.arange(1, 6).double()[:, None]
    torch.testing.assert_close(head(x), before)
    expected = F.cosine_similarity(x[:, None], head.weight[None], dim=-1) / 0.07
    torch.testing.assert_close(head(x), expected)


# The loss


def test_the_loss_is_cross_entropy_of_the_heads_logits():
    head, x, y = EBVHead(6, 5, 4).double(), randn(7, 6), torch.arange(7) % 5
    for smoothing in (0.0, 0.1):
        ours = EBVLoss(label_smoothing=smoothing)(head.embed(x), y, head.basis)
        torch.testing.assert_close(ours, F.cross_entropy(head(x), y, label_smoothing=smoothing))


def test_lower_bound_at_the_own_vector():
    for classes in (3, 10):
        V = torch.eye(classes, dtype=torch.float64)
        loss = EBVLoss()(V, torch.arange(classes), V)
        assert loss.item() == pytest.approx(math.log(1 + (classes - 1) * math.exp(-1 / 0.07)), rel=1e-9)


@pytest.mark.parametrize("mode", ["softmax", "angle"])
def test_the_gradient_is_tangent_to_the_sphere(mode):
    z, y, V = (randn(4, 3), torch.tensor([0, 1, 2, 1]), F.normalize(randn(3, 3, seed=8)))
    loss = EBVLoss(mode=mode, reduction="sum")
    step = 1e-6
    numeric = torch.zeros_like(z)
    for row in range(4):
        for column in range(3):
            moved = [z.clone(), z.clone()]
            moved[0][row, column] += step
            moved[1][row, column] -= step
            numeric[row, column] = (loss(moved[0], y, V) - loss(moved[1], y, V)) / (2 * step)
    assert (numeric * z).sum(1).abs().max() < 1e-6
    free = z.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(free, y, V), free)[0], numeric, rtol=1e-5, atol=1e-7)


def test_the_angle_is_arccos_and_keeps_its_digits_where_arccos_loses_them():
    V = torch.eye(2, dtype=torch.float64)
    for angle in (1e-9, 1e-4, 0.3, 1.0, 2.5, math.pi - 1e-9):
        z = 3 * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
        assert EBVLoss(mode="angle")(z, torch.tensor([0]), V).item() == pytest.approx(angle, rel=1e-9)


# The claim


def evidence(photographs=(0.02, 0.0), characters=(0.05, 0.0), noise=0.001, short_parameters=100):
    wiggle = np.array([-1, 0, 1, 0, 0]) * noise
    figures = {}
    for study, (ours, theirs) in (("photographs", photographs), ("characters", characters)):
        for arm in claim.STUDIES[study]:
            seeds = 3 if study == "photographs" else 5
            base = 0.5 + (ours if arm == claim.EBV else theirs if arm == claim.FC else 0.0)
            figures[study, arm] = {
                "test accuracy": (base + (wiggle[:seeds] if arm == claim.EBV else 0 * wiggle[:seeds])).tolist(),
                "parameters": [short_parameters if arm == claim.SHORT else 1000.0] * seeds,
            }
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("options", "outcome"),
    [
        ({}, "reproduced"),
        ({"photographs": (0.0, 0.0)}, "reproduced"),
        ({"photographs": (-0.004, 0.0)}, "partly"),
        ({"photographs": (-0.006, 0.0)}, "not reproduced"),
        ({"characters": (0.0, 0.0), "noise": 0.01}, "partly"),
        ({"characters": (-0.004, 0.0)}, "partly"),
        ({"characters": (-0.006, 0.0)}, "not reproduced"),
        ({"photographs": (-0.001, 0.0), "characters": (-0.001, 0.0)}, "not reproduced"),
        ({"characters": (0.001, 0.0), "noise": 0.01}, "partly"),
        ({"short_parameters": 1001.0}, "partly"),
    ],
)
def test_the_rule(options, outcome):
    assert claim.judge(evidence(**options)).outcome == outcome


def test_the_claims_networks_differ_in_their_head_alone():
    sizes = {}
    for arm in claim.STUDIES["characters"]:
        torch.manual_seed(0)
        model = claim.network(1, [4, 4], arm, 12)
        sizes[arm] = [p.detach().clone() for p in model[:-1].parameters()]
        assert model(torch.ones(2, 1, 8, 8)).shape == (2, 12)
    first = sizes.pop(claim.FC)
    for other in sizes.values():
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_claims_validation_part_is_held_out_of_every_class():
    x, y, _, _ = claim.images("digits", 200)
    kept, kept_y, held, held_y = claim._validation(x, y)
    assert len(kept) + len(held) == 200
    assert set(held_y.tolist()) == set(kept_y.tolist()) == set(range(10))
    assert 0.2 < len(held) / 200 < 0.35
