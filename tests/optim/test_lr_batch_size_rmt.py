"""Batch curvature against sampled random matrices, dense matrices, simulated descent and closed forms."""

import functools
import itertools
import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from provenn import optim
from provenn.claims.claim import Evidence
from provenn.claims.optim import lr_batch_size_rmt as claim
from provenn.claims.optim._lr_batch_size_rmt_grid import final_losses
from provenn.contracts import BadInput, FunctionCase, ProbeCase
from provenn.core.experiment.networks import mlp
from provenn.core.experiment.seeding import generator, seeded
from provenn.core.numerics.spectra import stochastic_lanczos
from provenn.optim import BatchHessianProbe, BatchHessianReport, SpectralLRScheduler
from provenn.optim._lr_batch_size_rmt_products import Curvature

CE = nn.functional.cross_entropy


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def samples(generator, count=12):
    x = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long()


def dataset(count=12, seed=0):
    return TensorDataset(*samples(torch.Generator().manual_seed(seed), count))


def built():
    with seeded(0, "network"):
        return network()


def dense(model, x, y, matrix="hessian"):
    """The matrix entry by entry: reverse over reverse, or JᵀHJ with the softmax' diag(p) − ppᵀ, in eval mode."""
    model = model.eval()
    names = [name for name, one in model.named_parameters() if one.requires_grad]
    shapes = [one.shape for one in model.parameters() if one.requires_grad]
    flat = torch.cat([one.detach().flatten() for one in model.parameters() if one.requires_grad])

    def outputs(vector):
        pieces = vector.split([math.prod(shape) for shape in shapes])
        named = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes, strict=True)}
        return torch.func.functional_call(model, named, (x,))

    if matrix == "hessian":
        return torch.autograd.functional.hessian(lambda vector: CE(outputs(vector), y), flat)
    jacobian = torch.autograd.functional.jacobian(outputs, flat)
    p = outputs(flat).softmax(1)
    inner = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("nip,nij,njq->pq", jacobian, inner, jacobian) / len(x)


def brute_force(model, data, matrix):
    values = torch.linalg.eigvalsh(dense(model, *data, matrix)).tolist()
    count = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return {
        "largest": values[-1],
        "smallest": values[0],
        "parameters": count,
        "samples": len(data[0]),
        "max_lr": 2 / values[-1],
        "matrix": matrix,
    }


def probe(**options):
    given = {"model": built(), "loss_fn": CE, "dataset": dataset(), "lanczos_steps": 8, "batches": 2, **options}
    return BatchHessianProbe(**given)


SGD = functools.partial(torch.optim.SGD, lr=0.1)


def scheduler(make=SGD, model=None, **options):
    model = built() if model is None else model
    given = {"loss_fn": CE, "dataset": dataset(), "batch": 8, "steps": 6, **options}
    return SpectralLRScheduler(make(model.parameters()), model, **given)


class Infinite(nn.Module):
    def forward(self, outputs, targets):
        return outputs.sum() * math.inf


def identity(v):
    return v


def law_case(name, first, call, more=()):
    bad = (BadInput("dim", lambda: call(dim=0)), BadInput("batch", lambda: call(batch=0)))
    bad += (BadInput("batch", lambda: call(batch=51, n=50)), BadInput("n", lambda: call(n=0)))
    return FunctionCase(part=f"provenn.optim.{name}", call=lambda: call(**first), bad_input=bad + tuple(more))


def law(name, *leading):
    def call(dim=100, batch=10, n=None):
        return getattr(optim, name)(*leading, dim, batch, n)

    return call


CASES = [
    ProbeCase(
        part="provenn.optim.BatchHessianProbe",
        label=matrix,
        run=lambda model, data, matrix=matrix: BatchHessianProbe(
            model, CE, TensorDataset(*data), matrix, lanczos_steps=40, batches=2
        ).report((4, 12)),
        model=network,
        data=samples,
        brute_force=functools.partial(brute_force, matrix=matrix),
        tolerance=1e-6,
        bad_input=(
            BadInput("batch_sizes", lambda: probe().report((13,))),
            BadInput("batch_sizes", lambda: probe().report((0,))),
            BadInput("batch_sizes", lambda: probe().report(())),
            BadInput("lanczos_steps", lambda: probe(lanczos_steps=1)),
            BadInput("num_vectors", lambda: probe(num_vectors=0)),
            BadInput("batches", lambda: probe(batches=0)),
            BadInput("matrix", lambda: probe(matrix="fisher")),
            BadInput("dataset", lambda: probe(dataset=dataset(1))),
            BadInput("loss_fn", lambda: probe(loss_fn=nn.CrossEntropyLoss(reduction="sum"))),
            BadInput("loss_fn", lambda: probe(loss_fn=functools.partial(CE, reduction="sum"))),
            BadInput("loss_fn", lambda: probe(loss_fn=lambda out, y: CE(out, y, reduction="sum")).report((4,))),
            BadInput("loss_fn", lambda: probe(loss_fn=Infinite()).report((4,))),
        ),
    )
    for matrix in ("hessian", "ggn")
] + [
    FunctionCase(
        part="provenn.optim.BatchHessianReport",
        call=lambda: probe().report((4,)).suggest_lr(0.1, 2, 4, "adaptive"),
        bad_input=(
            BadInput("from_batch", lambda: probe().report((4,)).suggest_lr(0.1, 0, 4)),
            BadInput("kind", lambda: probe().report((4,)).suggest_lr(0.1, 2, 4, "lion")),
        ),
    ),
    FunctionCase(
        part="provenn.optim.SpectralLRScheduler",
        call=scheduler,
        bad_input=(
            BadInput("interval", lambda: scheduler(interval=0)),
            BadInput("batch", lambda: scheduler(batch=13)),
            BadInput("batch", lambda: scheduler(batch=0)),
            BadInput("steps", lambda: scheduler(steps=1)),
            BadInput("train_batch", lambda: scheduler(train_batch=13)),
            BadInput("lr_min", lambda: scheduler(lr_min=-1.0)),
            BadInput("lr_max", lambda: scheduler(lr_min=1.0, lr_max=0.5)),
            BadInput("momentum_max", lambda: scheduler(momentum_max=1.0)),
            BadInput("matrix", lambda: scheduler(matrix="fisher")),
            BadInput("loss_fn", lambda: scheduler(loss_fn=nn.CrossEntropyLoss(reduction="sum"))),
            BadInput("loss_fn", lambda: scheduler(loss_fn=Infinite())),
            BadInput("optimizer", lambda: scheduler(functools.partial(torch.optim.RMSprop, lr=0.1)), TypeError),
            BadInput(
                "optimizer",
                lambda: scheduler(functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True)),
            ),
            BadInput("optimizer", lambda: scheduler(lambda params: torch.optim.SGD(list(params)[1:], lr=0.1))),
        ),
    ),
    FunctionCase(
        part="provenn.optim.effective_batch_size",
        call=lambda: optim.effective_batch_size(10, 50),
        bad_input=(
            BadInput("batch", lambda: optim.effective_batch_size(0.5)),
            BadInput("batch", lambda: optim.effective_batch_size(51, 50)),
            BadInput("n", lambda: optim.effective_batch_size(1, 0)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.noise_variance",
        call=lambda: optim.noise_variance(identity, [identity], torch.zeros(3), 2),
        bad_input=(
            BadInput("batch", lambda: optim.noise_variance(identity, [identity], torch.zeros(3), 5, 5)),
            BadInput("parts", lambda: optim.noise_variance(identity, [], torch.zeros(3), 2)),
            BadInput("parts", lambda: optim.noise_variance(identity, [lambda v: v * math.nan], torch.zeros(3), 2)),
        ),
    ),
    law_case("wigner_bulk_radius", {}, law("wigner_bulk_radius", 0.1)),
    law_case("spiked_wigner_edge", {}, law("spiked_wigner_edge", 5.0, 0.1)),
    law_case("spiked_wigner_overlap", {}, law("spiked_wigner_overlap", 5.0, 0.1)),
    law_case("wigner_spike", {}, law("wigner_spike", 5.0, 0.1)),
    law_case(
        "spiked_wishart_edge",
        {},
        law("spiked_wishart_edge", 5.0, 0.1),
        [
            BadInput("lam", lambda: optim.spiked_wishart_edge(-1.0, 1.0, 10, 10)),
            BadInput("scale", lambda: optim.spiked_wishart_edge(1.0, -1.0, 10, 10)),
        ],
    ),
    law_case("spiked_wishart_overlap", {}, law("spiked_wishart_overlap", 5.0, 0.1)),
    law_case("wishart_spike", {}, law("wishart_spike", 5.0, 0.1)),
    FunctionCase(
        part="provenn.optim.critical_batch_size",
        call=lambda: optim.critical_batch_size(2.0, 0.1, 100, 50),
        bad_input=(
            BadInput("lam", lambda: optim.critical_batch_size(0.0, 0.1, 100)),
            BadInput("sigma2", lambda: optim.critical_batch_size(1.0, -0.1, 100)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.max_learning_rate",
        call=lambda: optim.max_learning_rate(2.0, 0.9),
        bad_input=(
            BadInput("lam", lambda: optim.max_learning_rate(0.0)),
            BadInput("momentum", lambda: optim.max_learning_rate(1.0, 1.0)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.polyak_parameters",
        call=lambda: optim.polyak_parameters(2.0, 1.0),
        bad_input=(
            BadInput("smallest", lambda: optim.polyak_parameters(1.0, 2.0)),
            BadInput("smallest", lambda: optim.polyak_parameters(1.0, 0.0)),
            BadInput("largest", lambda: optim.polyak_parameters(-1.0, 0.5)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.suggest_lr",
        call=lambda: optim.suggest_lr(8, 64),
        bad_input=(
            BadInput("from_batch", lambda: optim.suggest_lr(0, 4)),
            BadInput("to_batch", lambda: optim.suggest_lr(4, 11, n=10)),
            BadInput("to_batch", lambda: optim.suggest_lr(4, 10, n=10)),
            BadInput("kind", lambda: optim.suggest_lr(4, 8, "muon")),
            BadInput("lr", lambda: optim.suggest_lr(4, 8, lr=0.0)),
            BadInput("critical_batch", lambda: optim.suggest_lr(4, 8, critical_batch=0.5)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.suggest_damping",
        call=lambda: optim.suggest_damping(8, 64),
        bad_input=(
            BadInput("from_batch", lambda: optim.suggest_damping(0, 4)),
            BadInput("damping", lambda: optim.suggest_damping(4, 8, damping=-1.0)),
            BadInput("to_lr", lambda: optim.suggest_damping(4, 8, to_lr=0.0)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.minimal_damping",
        call=lambda: optim.minimal_damping(0.1, 5.0, 0.1, 100, 10),
        bad_input=(
            BadInput("lr", lambda: optim.minimal_damping(0.0, 5.0, 0.1, 100, 10)),
            BadInput("lam", lambda: optim.minimal_damping(0.1, 0.0, 0.1, 100, 10)),
        ),
    ),
]


# The theorems, against matrices drawn by NumPy.


def noisy(dim, sigma2, batch, rng):
    """A symmetric matrix whose entries have the variance σ²/B."""
    upper = np.triu(rng.normal(size=(dim, dim)) * math.sqrt(sigma2 / batch))
    return upper + np.triu(upper, 1).T


@pytest.mark.parametrize(("spike", "seed"), [(2.0, 0), (-2.0, 1), (0.5, 2)])
def test_rank_one_plus_goe(spike, seed):
    rng = np.random.default_rng(seed)
    dim, sigma2, batch = 2000, 0.04, 80  # √(P/B)σ = 1
    direction = rng.normal(size=dim)
    direction /= np.linalg.norm(direction)
    matrix = noisy(dim, sigma2, batch, rng) + spike * np.outer(direction, direction)
    values, vectors = scipy.sparse.linalg.eigsh(matrix, k=1, which="SA" if spike < 0 else "LA", v0=direction, tol=1e-5)
    assert optim.spiked_wigner_edge(spike, sigma2, dim, batch) == pytest.approx(values[0], rel=0.02)
    overlap = (vectors[:, 0] @ direction) ** 2
    predicted = optim.spiked_wigner_overlap(spike, sigma2, dim, batch)
    assert predicted == pytest.approx(overlap, abs=0.02)
    assert optim.wigner_bulk_radius(sigma2, dim, batch) == pytest.approx(2.0)
    if abs(spike) < 1:
        assert predicted == 0
        assert values[0] == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("spike", [9.0, 2.0])
def test_spiked_sample_covariance(spike):
    rng = np.random.default_rng(3)
    dim, batch, scale = 600, 300, 1.5  # q = 2: the threshold is 3.62
    edges, overlaps = [], []
    for _ in range(4):
        rows = rng.normal(size=(batch, dim)) * math.sqrt(scale)
        rows[:, 0] *= math.sqrt(spike / scale)
        _, singular, right = scipy.sparse.linalg.svds(rows, k=1, random_state=0)
        edges.append(singular[0] ** 2 / batch)
        overlaps.append(right[0, 0] ** 2)
    assert optim.spiked_wishart_edge(spike, scale, dim, batch) == pytest.approx(np.mean(edges), rel=0.04)
    assert optim.spiked_wishart_overlap(spike, scale, dim, batch) == pytest.approx(np.mean(overlaps), abs=0.04)


def test_without_replacement_the_noise_is_that_of_the_effective_batch():
    # The variance of the mean of B of N numbers, from all subsets.
    values, batch = np.array([1.0, 4.0, -2.0, 0.5, 3.0]), 3
    means = [np.mean(one) for one in itertools.combinations(values, batch)]
    assert np.var(means) == pytest.approx(values.var(ddof=1) / optim.effective_batch_size(batch, 5), rel=1e-12)


def test_whole_data_has_no_inflation():
    assert optim.effective_batch_size(50, 50) == math.inf
    assert optim.spiked_wigner_edge(0.3, 9.0, 1000, 50, 50) == 0.3
    assert optim.spiked_wigner_edge(-0.3, 9.0, 1000, 50, 50) == -0.3
    assert optim.spiked_wigner_overlap(0.3, 9.0, 1000, 50, 50) == 1
    assert optim.wigner_bulk_radius(9.0, 1000, 50, 50) == 0
    assert optim.spiked_wishart_edge(3.0, 1.0, 1000, 50, 50) == 3.0
    assert optim.minimal_damping(0.1, 1.0, 9.0, 1000, 50, 50) == 0


@pytest.mark.parametrize("edge", [optim.spiked_wigner_edge, optim.spiked_wishart_edge])
def test_edges_fall_with_the_batch_and_stay_above_the_spike(edge):
    found = [edge(2.0, 0.5, 200, batch, 500) for batch in range(1, 501)]
    assert all(one > other for one, other in itertools.pairwise(found))
    assert found[-1] == 2.0


def test_edges_meet_at_the_threshold():
    dim, batch = 200, 50
    for sigma2 in (0.25, 4.0):
        threshold = math.sqrt(dim / batch * sigma2)
        for lam in (threshold * (1 - 1e-7), threshold, threshold * (1 + 1e-7)):
            assert optim.spiked_wigner_edge(lam, sigma2, dim, batch) == pytest.approx(2 * threshold, rel=1e-6)
            assert optim.spiked_wigner_overlap(lam, sigma2, dim, batch) == pytest.approx(0, abs=1e-6)
        threshold = sigma2 * (1 + math.sqrt(dim / batch))
        for lam in (threshold * (1 - 1e-7), threshold * (1 + 1e-7)):
            wanted = sigma2 * (1 + math.sqrt(dim / batch)) ** 2
            assert optim.spiked_wishart_edge(lam, sigma2, dim, batch) == pytest.approx(wanted, rel=1e-6)
            assert optim.spiked_wishart_overlap(lam, sigma2, dim, batch) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("lam", [4.0, 12.0, 100.0])
def test_spikes_are_found_back(lam):
    law = (0.5, 200, 20, 100)
    assert optim.wigner_spike(optim.spiked_wigner_edge(lam, *law), *law) == pytest.approx(lam, rel=1e-9)
    assert optim.wigner_spike(optim.spiked_wigner_edge(-lam, *law), *law) == pytest.approx(-lam, rel=1e-9)
    assert optim.wishart_spike(optim.spiked_wishart_edge(lam, *law), *law) == pytest.approx(lam, rel=1e-9)


def test_hidden_spikes_are_bounded_by_the_threshold():
    # P/𝔟 = 8 and σ² = ½: the threshold is 2, and the bulk ends at 4.
    assert optim.wigner_spike(3.0, 0.5, 200, 20, 100) == pytest.approx(2.0)
    assert optim.wishart_spike(3.0, 0.5, 200, 20, 100) == pytest.approx(0.5 * (1 + math.sqrt(8)))


def test_critical_batch_doubles_the_largest_eigenvalue():
    lam, sigma2, dim, n = 1.5, 0.02, 3000, 400
    batch = optim.critical_batch_size(lam, sigma2, dim, n)
    assert 1 < batch < n
    assert optim.spiked_wigner_edge(lam, sigma2, dim, batch, n) == pytest.approx(2 * lam, rel=1e-9)
    assert optim.critical_batch_size(lam, sigma2, dim) == pytest.approx(dim * sigma2 / lam**2)


# The variance of the noise.


def test_noise_variance_of_matrices_with_known_variance():
    rng = np.random.default_rng(0)
    dim, sigma2, batch = 60, 0.7, 8
    centre = torch.from_numpy(noisy(dim, 1.0, 1, rng))
    parts = [(centre + torch.from_numpy(noisy(dim, sigma2, batch, rng))).matmul for _ in range(400)]
    draws = torch.Generator().manual_seed(0)
    found = optim.noise_variance(centre.matmul, parts, torch.zeros(dim).double(), batch, generator=draws)
    assert found == pytest.approx(sigma2, rel=0.03)
    direction = torch.eye(dim)[0].double()
    found = optim.noise_variance(centre.matmul, parts, direction, batch, direction=direction)
    assert found == pytest.approx(sigma2, rel=0.03)


@pytest.mark.parametrize("batch", [2, 10])
def test_noise_variance_without_replacement(batch):
    """From the population of all samples' Hessians: the same σ² at every batch size."""
    model, (x, y) = built(), dataset().tensors
    each = torch.stack([dense(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    wanted = each.var(dim=0, correction=1).sum().item() / each.shape[1] ** 2
    top = torch.linalg.eigh(each.mean(dim=0)).eigenvectors[:, -1]
    along = (each @ top).var(dim=0, correction=1).sum().item() / each.shape[1]
    found = probe(lanczos_steps=8, batches=60).report((batch,))
    assert found.batches[0].sigma2 == pytest.approx(wanted, rel=0.25)  # three standard errors of 60 batches
    assert found.sigma2 == found.batches[0].sigma2
    assert found.sigma2_top == pytest.approx(along, rel=0.25)


# Products and quadrature.


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_products_equal_the_dense_matrix(matrix):
    model, data = built().eval(), dataset()
    curvature = Curvature(model, CE, data, matrix)
    operator = curvature.operator(curvature.batches(torch.arange(12)))
    found = torch.stack([operator(v) for v in torch.eye(operator.dim, dtype=torch.float64)])
    torch.testing.assert_close(found, dense(model, *data.tensors, matrix), atol=1e-10, rtol=0)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_squared_error_has_its_curvature(matrix, reduction):
    model, x = nn.Linear(3, 2, bias=False).double(), dataset().tensors[0]
    loss, data = nn.MSELoss(reduction=reduction), TensorDataset(x, torch.zeros(12, 2).double())
    curvature = Curvature(model, loss, data, matrix)
    operator = curvature.operator(curvature.batches(torch.arange(12)))
    found = torch.stack([operator(v) for v in torch.eye(6, dtype=torch.float64)])
    torch.testing.assert_close(found, torch.block_diag(*[x.T @ x / 12] * 2), atol=1e-12, rtol=0)


def test_hessian_products_equal_differences_of_the_gradient():
    model, (x, y) = built().eval(), dataset().tensors
    curvature = Curvature(model, CE, dataset(), "hessian")
    operator = curvature.operator(curvature.batches(torch.arange(12)))
    v = torch.randn(operator.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for sign in (1, -1):
        moved = built().eval()
        start = nn.utils.parameters_to_vector(moved.parameters()).detach()
        nn.utils.vector_to_parameters(start + sign * 1e-5 * v, moved.parameters())
        gradients.append(
            torch.cat([one.flatten() for one in torch.autograd.grad(CE(moved(x), y), list(moved.parameters()))])
        )
    torch.testing.assert_close(operator(v), (gradients[0] - gradients[1]) / 2e-5, atol=1e-8, rtol=1e-6)


def test_lanczos_quadrature():
    a = torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    a = a + a.T
    values = torch.linalg.eigvalsh(a)
    like = torch.zeros(30, dtype=torch.float64)
    whole = stochastic_lanczos(a.matmul, like, 30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(whole.nodes, values, atol=1e-9, rtol=0)
    v = torch.randn(30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = v / v.norm()
    for steps in (2, 3, 7):
        some = stochastic_lanczos(a.matmul, like, steps, generator=torch.Generator().manual_seed(0))
        assert some.moment(1).item() == pytest.approx((v @ a @ v).item(), abs=1e-10)
        assert some.moment(2).item() == pytest.approx((v @ a @ a @ v).item(), rel=1e-10)
        assert values[0] - 1e-9 <= some.nodes[0]
        assert some.nodes[-1] <= values[-1] + 1e-9


# The probe.


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_single_batch_is_measured_on_its_own_samples(matrix):
    model, data = built(), dataset(2)
    report = probe(model=model, dataset=data, matrix=matrix, lanczos_steps=40, batches=1).report((1, 2))
    x, y = data.tensors
    whole = torch.linalg.eigh(dense(model, x, y, matrix))
    one, both = report.batches
    matches = []
    for i in range(2):
        values, vectors = torch.linalg.eigh(dense(model, x[i : i + 1], y[i : i + 1], matrix))
        overlap = (vectors[:, -1] @ whole.eigenvectors[:, -1]).item() ** 2
        wanted = (values[-1].item(), values[0].item(), overlap)
        found = (one.largest_measured, one.smallest_measured, one.overlap_measured)
        matches.append(found == pytest.approx(wanted, abs=1e-8))
    assert sum(matches) == 1
    assert both.largest_measured == pytest.approx(whole.eigenvalues[-1].item(), rel=1e-9)
    assert both.overlap_measured == pytest.approx(1.0)
    assert both.effective_batch == math.inf
    assert math.isnan(both.sigma2)
    assert (both.largest_predicted, both.smallest_predicted) == (report.largest, report.smallest)


def test_report_predicts_by_the_wigner_theorem():
    report = probe(lanczos_steps=40).report((3, 6))
    p, s2, n = report.parameters, report.sigma2, 12
    assert s2 == pytest.approx(np.mean([one.sigma2 for one in report.batches]))
    for one in report.batches:
        noise = p * s2 * (1 / one.batch - 1 / n)  # Pσ²/𝔟
        assert one.bulk_radius == pytest.approx(2 * math.sqrt(noise))
        above = report.largest > math.sqrt(noise)
        high = report.largest + noise / report.largest if above else 2 * math.sqrt(noise)
        assert one.largest_predicted == pytest.approx(high)
        assert one.overlap_predicted == pytest.approx(1 - noise / report.largest**2 if above else 0)
        below = report.smallest < -math.sqrt(noise)
        low = report.smallest + noise / report.smallest if below else -2 * math.sqrt(noise)
        assert one.smallest_predicted == pytest.approx(low)
        assert one.max_lr_predicted == pytest.approx(2 / high)
        assert one.max_lr_measured == pytest.approx(2 / one.largest_measured)
        noise = p * report.sigma2_top * (1 / one.batch - 1 / n)
        above = report.largest > math.sqrt(noise)
        along = report.largest + noise / report.largest if above else 2 * math.sqrt(noise)
        assert one.largest_along_top == pytest.approx(along)
    assert report.critical_batch == pytest.approx(1 / (report.largest**2 / (p * s2) + 1 / n))


def test_report_predicts_by_the_wishart_theorem():
    report = probe(matrix="ggn", lanczos_steps=40, num_vectors=12).report((6,))
    values = torch.linalg.eigvalsh(dense(built(), *dataset().tensors, "ggn"))
    assert report.scale == pytest.approx(values[:-1].mean().item(), rel=0.5)  # a trace from 12 vectors
    one, q, s2 = report.batches[0], report.parameters / 12, report.scale
    high = report.largest
    assert high > s2 * (1 + math.sqrt(q))
    assert one.largest_predicted == pytest.approx(high * (1 + q * s2 / (high - s2)))
    assert one.bulk_radius == pytest.approx(2 * math.sqrt(q) * s2)
    assert one.smallest_predicted == 0


def test_only_trainable_parameters_count():
    model = built()
    model[0].requires_grad_(False)
    report = probe(model=model, lanczos_steps=40).report((12,))
    values = torch.linalg.eigvalsh(dense(model, *dataset().tensors))
    assert report.parameters == len(values) == 18
    assert report.largest == pytest.approx(values[-1].item(), rel=1e-9)


def test_any_dataset_of_pairs_will_do():
    class Listed(Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, place):
            x, y = dataset().tensors
            return x[place], int(y[place])

    assert probe(dataset=Listed()).report((4,)) == probe().report((4,))


def test_mean_and_unreduced_losses_agree_and_the_seed_decides():
    unreduced = functools.partial(CE, reduction="none")
    first, second = probe().report((4,)), probe(loss_fn=unreduced).report((4,))
    assert first.largest == pytest.approx(second.largest, rel=1e-12)
    assert first.batches[0].largest_measured == pytest.approx(second.batches[0].largest_measured, rel=1e-9)
    assert probe(seed=1).report((4,)).sigma2 != first.sigma2


def test_dropout_in_training_mode_warns_and_is_switched_off():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)).double()
    with pytest.warns(UserWarning, match="dropout"):
        report = probe(model=model, lanczos_steps=40).report((4,))
    assert model.training
    assert model[1].training
    values = torch.linalg.eigvalsh(dense(model.eval(), *dataset().tensors))
    assert report.largest == pytest.approx(values[-1].item(), rel=1e-9)


def test_report_carries_rates_with_saturation():
    report = probe().report((4,))
    star = max(1.0, report.critical_batch_top)
    assert star < 11
    assert report.suggest_lr(0.1, 11, 12) == pytest.approx(0.1)
    grown = (1 / 1 - 1 / 12) / (1 / star - 1 / 12)  # 𝔟(B*)/𝔟(1)
    assert report.suggest_lr(0.1, 1, 12) == pytest.approx(0.1 * grown)
    assert report.suggest_lr(0.1, 1, 12, "adaptive") == pytest.approx(0.1 * math.sqrt(grown))
    assert isinstance(report, BatchHessianReport)


# The rules.


def test_suggested_rates():
    assert optim.suggest_lr(32, 256, lr=0.1) == pytest.approx(0.8)
    assert optim.suggest_lr(32, 256, "adaptive", lr=0.1) == pytest.approx(0.1 * math.sqrt(8))
    assert optim.suggest_lr(32, 256, critical_batch=64) == pytest.approx(2.0)
    assert optim.suggest_lr(256, 16, critical_batch=64) == pytest.approx(0.25)
    assert optim.suggest_lr(128, 256, critical_batch=64) == 1
    assert optim.suggest_lr(10, 50, n=100) == pytest.approx(9.0)  # 𝔟: 100/9 → 100
    assert optim.suggest_lr(10, 100, n=100, critical_batch=50) == pytest.approx(9.0)


def test_damping_goes_with_rate_over_batch():
    assert optim.suggest_damping(32, 128, damping=1e-3) == pytest.approx(2.5e-4)
    assert optim.suggest_damping(32, 32, damping=1e-3, from_lr=0.1, to_lr=0.3) == pytest.approx(3e-3)
    lr, lam, law = 0.2, 8.0, (0.5, 100, 10)
    # A step −lr/δ · Δ along a flat direction is at its stability's edge: lr Δ/δ = 2.
    added = optim.spiked_wigner_edge(lam, *law) - lam
    assert lr * added / optim.minimal_damping(lr, lam, *law) == pytest.approx(2.0)
    assert optim.minimal_damping(2 * lr, lam, 0.5, 100, 20) == pytest.approx(optim.minimal_damping(lr, lam, *law))


class Quadratic(nn.Module):
    """Squared error whose Hessian is diagonal, with given eigenvalues."""

    def __init__(self, eigenvalues):
        super().__init__()
        values = torch.tensor(eigenvalues, dtype=torch.float64)
        self.w = nn.Parameter(torch.linspace(1, 2, len(values), dtype=torch.float64))
        self.data = TensorDataset(torch.diag((values * len(values) / 2).sqrt()), torch.zeros(len(values)).double())

    def forward(self, x):
        return (x * self.w).sum(1)

    def descend(self, optimizer, steps):
        lengths = []
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(self(self.data.tensors[0]), self.data.tensors[1]).backward()
            optimizer.step()
            lengths.append(self.w.detach().norm().item())
        return lengths


EIGENVALUES = [0.05, 0.11, 0.4, 0.9, 1.7, 2.3, 4.1, 5.0]


def on_quadratic(make=SGD, eigenvalues=EIGENVALUES, **options):
    model = Quadratic(eigenvalues)
    optimizer = make(model.parameters())
    size = len(eigenvalues)
    given = {"batch": size, "steps": size, **options}
    return model, optimizer, SpectralLRScheduler(optimizer, model, nn.functional.mse_loss, model.data, **given)


@pytest.mark.parametrize("dampening", [0.0, 0.3])
def test_learned_rate_contracts_as_polyak_says(dampening):
    model, optimizer, learner = on_quadratic(functools.partial(torch.optim.SGD, lr=1.0, dampening=dampening))
    assert (learner.largest, learner.smallest) == (pytest.approx(5.0), pytest.approx(0.05))
    (group,) = optimizer.param_groups
    assert group["lr"] * (1 - dampening) == pytest.approx((2 / (math.sqrt(5) + math.sqrt(0.05))) ** 2)
    assert group["momentum"] == pytest.approx((9 / 11) ** 2)
    lengths = model.descend(optimizer, 500)
    # Two equal roots leave a factor of the step's number: 2.5 over 300 steps, 0.3 % a step.
    assert (lengths[-1] / lengths[199]) ** (1 / 300) == pytest.approx(9 / 11, rel=0.02)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dampened", [False, True])
def test_stability_ends_at_the_largest_rate(momentum, dampened):
    damp = momentum if dampened else 0.0
    for share, stable in ((0.98, True), (1.02, False)):
        model = Quadratic(EIGENVALUES)
        rate = share * optim.max_learning_rate(5.0, momentum) / (1 - damp)
        lengths = model.descend(torch.optim.SGD(model.parameters(), rate, momentum, dampening=damp), 1500)
        assert (lengths[-1] < lengths[0]) == stable


def test_polyak_is_the_best_of_heavy_ball():
    """The spectral radius of the two-step recursion, over a grid of rates and momenta."""

    def radius(lr, momentum):
        steps = [np.array([[1 + momentum - lr * one, -momentum], [1, 0]]) for one in (0.05, 0.3, 5.0)]
        return max(np.abs(np.linalg.eigvals(step)).max() for step in steps)

    lr, momentum = optim.polyak_parameters(5.0, 0.05)
    best = radius(lr, momentum)
    assert best == pytest.approx(9 / 11, rel=1e-6)
    grid = [radius(lr * a, 1 - (1 - momentum) * b) for a in (0.8, 0.95, 1.05, 1.2) for b in (0.7, 0.9, 1.1, 1.3)]
    assert best < min(grid)


def test_bulk_near_zero_does_not_count():
    _, _, learner = on_quadratic(eigenvalues=[0.0049, 0.0051, 0.4, 5.0])
    assert learner.smallest == pytest.approx(0.0051)


def test_clipping_and_the_rate_at_a_clipped_momentum():
    _, optimizer, _ = on_quadratic(momentum_max=0.5)
    assert optimizer.param_groups[0]["momentum"] == 0.5
    assert optimizer.param_groups[0]["lr"] == pytest.approx(3 / 5.05)  # optimal at μ = ½, and stable
    _, optimizer, _ = on_quadratic(lr_max=0.1)
    assert optimizer.param_groups[0]["lr"] == 0.1
    _, optimizer, _ = on_quadratic(lr_min=3.0)
    assert optimizer.param_groups[0]["lr"] == 3.0


def test_every_group_is_set_and_the_interval_kept():
    model = built()

    def make(params):
        params = list(params)
        return torch.optim.SGD([{"params": params[:2], "lr": 0.3}, {"params": params[2:]}], lr=0.1)

    learner = scheduler(make, model, interval=3)
    groups = learner.optimizer.param_groups
    first = learner.largest
    assert groups[0]["lr"] == groups[1]["lr"] == learner.get_last_lr()[0]
    assert groups[0]["momentum"] == groups[1]["momentum"] > 0
    with torch.no_grad():
        model[3].weight.mul_(3)
    learner.optimizer.step()
    learner.step()
    learner.step()
    assert learner.largest == first
    learner.step()
    assert learner.largest != first


def test_resumed_learner_goes_on_identically():
    first = scheduler()
    first.optimizer.step()
    first.step()
    kept, groups = first.state_dict(), first.optimizer.state_dict()
    again = scheduler()
    again.optimizer.load_state_dict(groups)
    again.load_state_dict(kept)
    assert (again.largest, again.last_epoch) == (first.largest, 1)
    for one in (first, again):
        one.optimizer.step()
        one.step()
    assert first.get_last_lr() == again.get_last_lr()
    assert first.largest == again.largest
    assert all(isinstance(value, (int, float, list)) for value in kept.values())


def test_without_positive_curvature_nothing_changes():
    model = nn.Linear(3, 1).double()

    def concave(outputs, targets):
        return -outputs.square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.2)
    data = TensorDataset(dataset().tensors[0], torch.zeros(12))
    learner = SpectralLRScheduler(optimizer, model, concave, data, batch=12, steps=4)
    # The eigenvalue of the constant direction may round to just above 0.
    assert learner.largest < 1e-9
    if learner.largest <= 0:
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.3, 0.2)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_training_batch_raises_the_largest_eigenvalue(matrix):
    model = built()
    options = {"model": model, "batch": 10, "steps": 15, "matrix": matrix}
    plain = scheduler(**options).largest
    found = [scheduler(train_batch=size, **options).largest for size in (1, 4, 10, 12)]
    assert found[0] > found[1] > plain
    assert found[2] == plain
    assert found[3] < plain  # all data: without the noise of the subsample


def test_training_batch_is_corrected_by_the_theorem(monkeypatch):
    from provenn.optim import _lr_batch_size_rmt_scheduler as module

    sigma2, dim = 1e-4, built()[0].weight.numel() + 4 + 8 + 10
    monkeypatch.setattr(module, "noise_variance", lambda *arguments: sigma2)
    options = {"model": built(), "batch": 6, "steps": 30}
    plain = scheduler(**options).largest
    noise = dim * sigma2 * (1 / 6 - 1 / 12)
    lam = (plain + math.sqrt(plain**2 - 4 * noise)) / 2
    wanted = lam + dim * sigma2 * (1 / 2 - 1 / 12) / lam
    assert scheduler(train_batch=2, **options).largest == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("stepped", [False, True])
def test_adamw_is_measured_through_its_denominators(stepped):
    model = Quadratic(EIGENVALUES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0)
    size, curved = len(EIGENVALUES), torch.tensor(EIGENVALUES, dtype=torch.float64)
    start = model.w.detach().clone()
    if stepped:
        model.descend(optimizer, 2)
        second = start - 1e-3 * (curved * start).sign() / (1 + 1e-3 / (curved * start).abs())
        squares = (0.99 * (curved * start) ** 2 + (curved * second) ** 2) * 0.01 / (1 - 0.99**2)
        root = squares.sqrt()
    else:
        root = (curved * start).abs()
    learner = SpectralLRScheduler(optimizer, model, nn.functional.mse_loss, model.data, batch=size, steps=size)
    values = (curved / (root + 1e-3)).sort().values
    assert learner.largest == pytest.approx(values[-1].item(), rel=1e-6)
    assert learner.smallest == pytest.approx(values[0].item(), rel=1e-6)
    lr, momentum = optim.polyak_parameters(values[-1].item(), values[0].item())
    (group,) = optimizer.param_groups
    assert group["betas"] == (pytest.approx(momentum, rel=1e-5), 0.99)
    assert group["lr"] == pytest.approx(lr / (1 - momentum), rel=1e-5)


def test_measuring_leaves_the_model_alone():
    model = built()
    model[2].eval()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    state = torch.get_rng_state()
    scheduler(model=model)
    assert torch.equal(state, torch.get_rng_state())
    assert [one.training for one in model] == [True, True, False, True]
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert model[3].weight.grad is None
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


# The claim.


def evidence(error=0.01, small=0.9, large=0.1, adam=0.5, slope=0.8, ours=0.11, best=0.1):
    figures = {
        ("edge", "spiked Wigner"): {"relative error": [error] * 3},
        ("rates", "SGD"): {"slope B ≤ 8": [small] * 3, "slope B ≥ 64": [large] * 3, "slope B ≤ 64": [9.0] * 3},
        ("rates", "Adam"): {"slope B ≤ 8": [9.0] * 3, "slope B ≥ 64": [9.0] * 3, "slope B ≤ 64": [adam] * 3},
        ("inflation", "Hessian"): {"slope": [slope] * 3},
        ("learner", claim.LEARNER): {"final loss": [ours] * 3},
    }
    for place, arm in enumerate(claim.CONSTANT):
        figures["learner", arm] = {"final loss": [best + (place - 2) ** 2] * 3}
    return Evidence.of(figures)


@pytest.mark.parametrize(
    ("changed", "outcome"),
    [
        ({}, "reproduced"),
        ({"error": 0.029, "small": 0.61, "large": 0.34, "adam": 0.36, "slope": 0.51, "ours": 0.119}, "reproduced"),
        ({"small": 1.19, "large": -1.0, "adam": 0.74, "slope": 1.19}, "reproduced"),
        ({"slope": 0.49}, "partly"),
        ({"slope": 1.21}, "partly"),
        ({"ours": 0.121}, "partly"),
        ({"error": 0.031}, "not reproduced"),
        ({"small": 0.59}, "not reproduced"),
        ({"small": 1.21}, "not reproduced"),
        ({"large": 0.36}, "not reproduced"),
        ({"adam": 0.34}, "not reproduced"),
        ({"adam": 0.76}, "not reproduced"),
    ],
)
def test_judge(changed, outcome):
    assert claim.judge(evidence(**changed)).outcome == outcome


@pytest.mark.parametrize("arm", ["SGD", "Adam"])
def test_rates_side_by_side_train_like_torchs_optimizers(arm):
    x, y = torch.rand(40, 64, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 10
    rates = torch.tensor([0.01, 0.05])
    found = final_losses(arm, rates, x, y, 8, 6, seed=3)
    for rate, loss in zip(rates.tolist(), found.tolist(), strict=True):
        with seeded(3, "weights"):
            model = mlp((64, 32, 10), nn.Tanh)
        optimizer = getattr(torch.optim, arm)(model.parameters(), lr=rate)
        draws = generator(3, "batches", 8)
        for _ in range(6):
            picked = torch.randperm(40, generator=draws)[:8]
            optimizer.zero_grad()
            CE(model(x[picked]), y[picked]).backward()
            optimizer.step()
        assert loss == pytest.approx(CE(model(x), y).item(), rel=1e-4)
