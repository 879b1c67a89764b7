"""M-FAC against dense matrices, closed forms, brute force, and scalar re-derivations of its recursions."""

import copy
import functools
import io
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from provenn.contracts import BadInput, CompressorCase, FunctionCase, OptimizerCase
from provenn.optim import MFAC, DynamicInverseFisher, GradualSchedule, MFACPruner, StaticInverseFisher

D = 40


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def parameter(value=1.0, size=3):
    return nn.Parameter(torch.full((size,), value, dtype=torch.float64))


def network():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 3))


def batches(count=8, size=16):
    x = torch.randn(count * size, 6, generator=seeded(5))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return list(zip(x.split(size), y.split(size), strict=True))


cross_entropy = nn.functional.cross_entropy


def pruner(**options):
    return MFACPruner(**{"model": network(), "loss_fn": cross_entropy, "loader": batches(), "num_grads": 8, **options})


def one_epoch(model, optimizer):
    for x, y in batches():
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return 0.5


def schedule(**options):
    make = functools.partial(torch.optim.SGD, lr=1.0, momentum=0.9)
    defaults = {"sparsities": (0.5, 0.8), "train_epoch": one_epoch, "make_optimizer": make, "epochs": 4}
    return GradualSchedule(**{**defaults, **options})


def inverse():
    return StaticInverseFisher(normal(4, D), damping=0.1, block_size=16)


BAD_ROW = torch.zeros(3, 2)
BAD_ROW[2, 1] = math.nan

CASES = [
    OptimizerCase(
        part="provenn.optim.MFAC",
        make=functools.partial(MFAC, num_grads=4, damping=1.0, **options),
        label=label,
        quadratic={"lr": 3.0, "damping": 10.0},
        rosenbrock={"lr": 0.03},
        warmup_steps=6,
        excluded={"device": "which weights are 0 is read at construction, and the meta device has no values"}
        if label == "sparse"
        else {},
        bad_input=(
            BadInput("num_grads", lambda: MFAC([parameter()], num_grads=0)),
            BadInput("num_grads", lambda: MFAC([parameter()], num_grads=8.0), TypeError),
            BadInput("damping", lambda: MFAC([parameter()], damping=0.0)),
            BadInput("damping", lambda: MFAC([parameter()], damping=-1e-5)),
            BadInput("lr", lambda: MFAC([parameter()], lr=-1.0)),
            BadInput("momentum", lambda: MFAC([parameter()], momentum=1.0)),
            BadInput("momentum", lambda: MFAC([{"params": [parameter()], "momentum": -0.1}])),
            BadInput("weight_decay", lambda: MFAC([parameter()], weight_decay=-0.1)),
            BadInput("params", lambda: MFAC([parameter(), nn.Parameter(torch.ones(2))]), TypeError),
            BadInput("params", lambda: MFAC([nn.Parameter(torch.ones(2, dtype=torch.complex64))]), TypeError),
            BadInput("params", lambda: MFAC([parameter(0.0)], sparse=True)),
        ),
    )
    for label, options in {"plain": {}, "momentum": {"momentum": 0.5}, "sparse": {"sparse": True}}.items()
] + [
    FunctionCase(
        part="provenn.optim.StaticInverseFisher",
        call=lambda: (inverse().mul(normal(D)), inverse().diag(), inverse().row(3), inverse().element(1, 2)),
        bad_input=(
            BadInput("grads", lambda: StaticInverseFisher(torch.zeros(3))),
            BadInput("grads", lambda: StaticInverseFisher(torch.zeros(0, 3))),
            BadInput("grads", lambda: StaticInverseFisher(BAD_ROW)),
            BadInput("grads", lambda: StaticInverseFisher(torch.zeros(2, 2, dtype=torch.long)), TypeError),
            BadInput("damping", lambda: StaticInverseFisher(torch.zeros(2, 2), damping=0.0)),
            BadInput("block_size", lambda: StaticInverseFisher(torch.zeros(2, 2), block_size=0)),
            BadInput("block_size", lambda: StaticInverseFisher(torch.zeros(2, 2), block_size=-2)),
            BadInput("pages", lambda: StaticInverseFisher(torch.zeros(4, 2), pages=3)),
            BadInput("pages", lambda: StaticInverseFisher(torch.zeros(4, 2), pages=0)),
            BadInput("x", lambda: inverse().mul(torch.zeros(D + 1))),
            BadInput("i", lambda: inverse().row(D)),
            BadInput("j", lambda: inverse().element(0, -1)),
        ),
    ),
    FunctionCase(
        part="provenn.optim.DynamicInverseFisher",
        call=lambda: DynamicInverseFisher(3, D).update_mul(normal(D).float()),
        bad_input=(
            BadInput("num_grads", lambda: DynamicInverseFisher(0, 3)),
            BadInput("dim", lambda: DynamicInverseFisher(2, 0)),
            BadInput("damping", lambda: DynamicInverseFisher(2, 3, damping=0.0)),
            BadInput("dtype", lambda: DynamicInverseFisher(2, 3, dtype=torch.bfloat16), TypeError),
            BadInput("grad", lambda: DynamicInverseFisher(2, 3).update(torch.zeros(2))),
            BadInput("grad", lambda: DynamicInverseFisher(2, 3).update(torch.full((3,), math.inf))),
            BadInput("x", lambda: DynamicInverseFisher(2, 3).mul(torch.zeros(2))),
            BadInput(
                "state_dict",
                lambda: DynamicInverseFisher(2, 3).load_state_dict(DynamicInverseFisher(3, 3).state_dict()),
            ),
        ),
    ),
    *(
        CompressorCase(
            part="provenn.optim.MFACPruner",
            make=functools.partial(pruner, n_recompute=2, block_size=size),
            label=label,
            model=network,
            example_inputs=lambda generator: (torch.randn(5, 6, generator=generator),),
            # A fifth of 144 weights, and biases and scales; of those, the shift of the norm starts at 0.
            budget={"nonzero": (28 + left) / (144 + 35)},
            compress=lambda compressor, model, how=how: compressor.compress(
                model, **how, example_inputs=(torch.ones(5, 6),)
            ),
            bad_input=(
                BadInput("num_grads", lambda: pruner(num_grads=0)),
                BadInput("damping", lambda: pruner(damping=0.0)),
                BadInput("n_recompute", lambda: pruner(n_recompute=0)),
                BadInput("block_size", lambda: pruner(block_size=0)),
                BadInput("sparsity", lambda: pruner().compress(sparsity=0.0)),
                BadInput("sparsity", lambda: pruner().compress(sparsity=1.0)),
                BadInput("sparsity", lambda: pruner().compress()),
                BadInput("schedule", lambda: pruner().compress(sparsity=0.5, schedule=schedule())),
                BadInput("loader", lambda: pruner(loader=[]).compress(sparsity=0.5)),
                BadInput("loader", lambda: pruner(loader=iter(batches(4))).compress(sparsity=0.5)),
                BadInput("grads", lambda: pruner(loss_fn=lambda z, y: z.sum() * math.nan).compress(sparsity=0.5)),
                BadInput("model", lambda: pruner().compress(nn.LayerNorm(3), sparsity=0.5)),
            ),
        )
        for label, size, left, how in (
            ("at once", -1, 35, {"sparsity": 0.8}),
            ("blocks", 32, 35, {"sparsity": 0.8}),
            ("gradual", 32, 51, {"schedule": schedule()}),
        )
    ),
    FunctionCase(
        part="provenn.optim.GradualSchedule",
        call=lambda: schedule().lr_at(0),
        bad_input=(
            BadInput("sparsities", lambda: schedule(sparsities=())),
            BadInput("sparsities", lambda: schedule(sparsities=(0.5, 1.0))),
            BadInput("sparsities", lambda: schedule(sparsities=(0.5, 0.4))),
            BadInput("prune_every", lambda: schedule(prune_every=0)),
            BadInput("epochs", lambda: schedule(epochs=0)),
            BadInput("prune_lrs", lambda: schedule(prune_every=2, prune_lrs=(0.1,))),
            BadInput("prune_lrs", lambda: schedule(prune_lrs=(0.0,))),
            BadInput("lr", lambda: schedule(lr=0.0)),
            BadInput("drop_by", lambda: schedule(drop_by=0.0)),
        ),
    ),
]


def dense(grads, damping):
    """λI + GᵀG/m, as a matrix."""
    return damping * torch.eye(grads.shape[1], dtype=torch.float64) + grads.T @ grads / len(grads)


def window(grads, damping, num_grads=None):
    fisher = DynamicInverseFisher(num_grads or len(grads), grads.shape[1], damping, dtype=torch.float64)
    for grad in grads:
        fisher.update(grad)
    return fisher


def close(one, other, tolerance):
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# The static algorithm.


@pytest.mark.parametrize("m", [1, 7, 64])
def test_static_equals_the_dense_inverse(m):
    grads, x = normal(m, D), normal(D, seed=1)
    fisher = StaticInverseFisher(grads, damping=0.1)
    matrix = dense(grads, 0.1)
    close(fisher.mul(x), torch.linalg.solve(matrix, x), 1e-10)
    whole = torch.linalg.inv(matrix)
    close(fisher.diag(), whole.diagonal(), 1e-10)
    close(torch.stack([fisher.row(i) for i in range(D)]), whole, 1e-10)


def test_static_equals_the_dense_inverse_at_the_papers_damping():
    # Entries reach 1/λ = 1e5, so 1e-10 is relative to that.
    grads, x = normal(64, D), normal(D, seed=1)
    matrix = dense(grads, 1e-5)
    close(StaticInverseFisher(grads).mul(x) / 1e5, torch.linalg.solve(matrix, x) / 1e5, 1e-10)


def test_elements_are_symmetric_and_those_of_the_dense_inverse():
    grads = normal(7, D)
    fisher, whole = StaticInverseFisher(grads, damping=0.1), torch.linalg.inv(dense(grads, 0.1))
    for i, j in ((0, 0), (3, 17), (39, 2), (12, 12)):
        assert fisher.element(i, j) == pytest.approx(float(whole[i, j]), abs=1e-10)
        assert fisher.element(i, j) == fisher.element(j, i)


def test_the_order_of_gradients_does_not_matter():
    grads, x = normal(12, D), normal(D, seed=1)
    order = torch.randperm(12, generator=seeded(2))
    close(StaticInverseFisher(grads, 0.1).mul(x), StaticInverseFisher(grads[order], 0.1).mul(x), 1e-10)


def test_without_gradients_it_divides_by_the_damping():
    x = normal(D)
    assert torch.equal(StaticInverseFisher(torch.zeros(5, D, dtype=torch.float64), 0.25).mul(x), 4 * x)
    assert torch.equal(DynamicInverseFisher(5, D, 0.25, dtype=torch.float64).mul(x), 4 * x)


@pytest.mark.parametrize("make", [StaticInverseFisher, window])
def test_orthogonal_gradients_are_eigenvectors(make):
    basis = torch.linalg.qr(normal(D, D))[0]
    lengths = torch.linspace(0.5, 5, 8, dtype=torch.float64)
    grads = lengths[:, None] * basis[:8]
    fisher = make(grads, 0.1)
    for direction, length in zip(basis[:8], lengths, strict=True):
        close(fisher.mul(direction), direction / (0.1 + length**2 / 8), 1e-11)
    close(fisher.mul(basis[9]), 10 * basis[9], 1e-11)


def test_one_block_is_the_full_matrix():
    grads, x = normal(8, D), normal(D, seed=1)
    full = StaticInverseFisher(grads, 0.1)
    for size in (D, -1, D + 5):
        blocked = StaticInverseFisher(grads, 0.1, block_size=size)
        assert torch.equal(blocked.mul(x), full.mul(x))
        assert torch.equal(blocked.diag(), full.diag())


@pytest.mark.parametrize("size", [1, 8, 16, 39])
@pytest.mark.parametrize("pages", [1, 3])
def test_blocks_are_inverted_each_on_its_own(size, pages):
    # 16 and 39 leave a smaller last block.
    grads, x = normal(9, D), normal(D, seed=1)
    fisher = StaticInverseFisher(grads, 0.1, block_size=size, pages=pages)
    matrix = torch.zeros(D, D, dtype=torch.float64)
    for start in range(0, D, size):
        block = slice(start, min(start + size, D))
        matrix[block, block] = torch.linalg.inv(dense(grads[:, block], 0.1))
    close(fisher.mul(x), matrix @ x, 1e-10)
    close(fisher.diag(), matrix.diagonal(), 1e-10)
    close(torch.stack([fisher.row(i) for i in range(D)]), matrix, 1e-10)
    for i, j in ((0, 0), (D - 1, D - 1), (0, D - 1), (17, 18), (38, 39)):
        assert fisher.element(i, j) == pytest.approx(float(matrix[i, j]), abs=1e-10)


@pytest.mark.parametrize("pages", [2, 4, 12])
def test_pages_do_not_change_the_result(pages):
    grads, x = normal(12, D), normal(D, seed=1)
    one, paged = (StaticInverseFisher(grads, 0.1, pages=count) for count in (1, pages))
    close(paged.mul(x), one.mul(x), 1e-12)
    close(paged.diag(), one.diag(), 1e-12)
    close(paged.row(5), one.row(5), 1e-12)
    assert paged.element(2, 31) == pytest.approx(one.element(2, 31), abs=1e-12)
    (part,) = paged._parts
    assert [tuple(page.shape) for page in part.pages] == [(1, 12 // pages, D)] * pages


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("size", [1, 8, 50, -1])
def test_no_intermediate_is_larger_than_the_gradients(size):
    grads = normal(64, 200)
    with Largest() as largest:
        fisher = StaticInverseFisher(grads, 0.1, block_size=size)
        fisher.diag()
        fisher.mul(grads[0])
    assert largest.elements == grads.numel()


def test_vectors_and_denominators_are_those_of_the_recursion():
    # Sherman and Morrison's formula, a dense matrix after every gradient.
    grads = normal(7, D)
    fisher, dynamic = StaticInverseFisher(grads, 0.1, pages=7), window(grads, 0.1)
    whole = torch.eye(D, dtype=torch.float64) / 0.1
    vectors, denominators = [], []
    for grad in grads:
        vector = whole @ grad
        denominators.append(7 + grad @ vector)
        whole = whole - torch.outer(vector, vector) / denominators[-1]
        vectors.append(vector)
    (part,) = fisher._parts
    close(torch.cat([page[0] for page in part.pages]), torch.stack(vectors), 1e-10)
    close(part.denominators[0], torch.stack(denominators), 1e-10)
    close(dynamic.pivots(), torch.stack(denominators), 1e-10)
    close(dynamic.coefficients() @ grads, torch.stack(vectors), 1e-9)
    assert torch.equal(dynamic.coefficients(), dynamic.coefficients().tril())


def test_grads_are_left_alone_and_the_row_that_is_not_finite_is_named():
    grads = normal(6, D)
    before = grads.clone()
    StaticInverseFisher(grads, 0.1, block_size=7, pages=2)
    assert torch.equal(grads, before)
    grads[4, 3] = math.inf
    with pytest.raises(ValueError, match="row 4"):
        StaticInverseFisher(grads, 0.1)


def test_float32_diagonal_stays_above_its_bound():
    # 64 gradients of 40 entries against λ = 1e-5, of condition number 1e7: half of the digits' worth is lost in
    # float32, and rounding alone must not make a diagonal that is too small.
    grads = 10 * normal(64, D) * torch.logspace(0, -3, D, dtype=torch.float64)
    fisher, exact = StaticInverseFisher(grads.float()), StaticInverseFisher(grads)
    diagonal = fisher.diag()
    assert diagonal.dtype == torch.float32
    least = 1 / (1e-5 + grads.square().mean(dim=0))
    assert (exact.diag() >= least).all()
    assert (diagonal >= least.float() * (1 - 1e-5)).all()
    fisher._least = 2 * diagonal.max() * torch.ones(D)
    assert torch.equal(fisher.diag(), fisher._least)
    assert fisher.element(3, 3) == fisher.row(3)[3] == fisher._least[3]


def test_gradients_that_float32_cannot_hold_are_refused():
    grads = 1e3 * normal(64, D)
    with pytest.raises(ValueError, match="float64"):
        StaticInverseFisher(grads.float())
    assert StaticInverseFisher(grads).diag().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_raised(dtype):
    fisher = StaticInverseFisher(normal(4, D).to(dtype), 0.1)
    assert fisher.diag().dtype == torch.float32


# The dynamic algorithm.


@pytest.mark.parametrize("m", [1, 7, 64])
def test_dynamic_equals_the_dense_inverse(m):
    grads, x = normal(m, D), normal(D, seed=1)
    matrix = dense(grads, 0.1)
    close(window(grads, 0.1).mul(x), torch.linalg.solve(matrix, x), 1e-10)
    fisher = window(grads[:-1], 0.1, num_grads=m)
    close(fisher.update_mul(grads[-1]), torch.linalg.solve(matrix, grads[-1]), 1e-10)
    close(fisher.mul(x), torch.linalg.solve(matrix, x), 1e-10)


def test_the_window_holds_the_last_gradients():
    m = 7
    grads, x = normal(m + 3, D), normal(D, seed=1)
    fisher = window(grads, 0.1, num_grads=m)
    close(fisher.mul(x), StaticInverseFisher(grads[-m:], 0.1).mul(x), 1e-9)
    for more in normal(3 * m, D, seed=2):
        fisher.mul(x)  # a product between updates must not leave anything behind
        fisher.update(more)
    close(fisher.mul(x), StaticInverseFisher(normal(3 * m, D, seed=2)[-m:], 0.1).mul(x), 1e-9)


def test_the_divisor_is_m_while_the_window_fills():
    m, grads, x = 10, normal(4, D), normal(D, seed=1)
    matrix = 0.1 * torch.eye(D, dtype=torch.float64) + grads.T @ grads / m
    close(window(grads, 0.1, num_grads=m).mul(x), torch.linalg.solve(matrix, x), 1e-10)


@pytest.mark.parametrize("m", [1, 5, 33])
def test_first_product_is_along_the_gradient(m):
    grad = normal(D)
    u = DynamicInverseFisher(m, D, 0.3, dtype=torch.float64).update_mul(grad)
    torch.testing.assert_close(u, grad * m / (m * 0.3 + grad @ grad), rtol=1e-12, atol=0)


def test_a_refused_gradient_leaves_the_window_alone():
    fisher, x = window(normal(5, D), 0.1, num_grads=4), normal(D, seed=1)
    before, state = fisher.mul(x), copy.deepcopy(fisher.state_dict())
    for bad in (torch.full((D,), math.nan), torch.full((D,), 1e200, dtype=torch.float64)):
        with pytest.raises(ValueError, match="finite"):
            fisher.update(bad)
    assert torch.equal(fisher.mul(x), before)
    for name in ("grads", "gram", "next"):
        assert torch.equal(state[name], fisher.state_dict()[name])


def test_float32_products_stay_bounded_where_gradients_are_large_and_parallel():
    # GGᵀ/λ reaches 1e12 against m = 8 on the diagonal: rounded to float32 it is indefinite.
    grads = (1e3 * normal(1, D) + 1e-2 * normal(20, D)).float()
    fisher = DynamicInverseFisher(8, D, 1e-5)
    for grad in grads:
        u = fisher.update_mul(grad)
        assert u.isfinite().all()
        assert u.norm() <= grad.norm() / 1e-5
    shifted = fisher.gram / 1e-5 + 8 * torch.eye(8, dtype=torch.float64)
    assert torch.linalg.cholesky_ex(shifted)[1] > 0


def test_float32_products_stay_near_float64():
    grads = normal(50, 1000)
    one, exact = DynamicInverseFisher(32, 1000, 1e-3), DynamicInverseFisher(32, 1000, 1e-3, dtype=torch.float64)
    for grad in grads:
        u, expected = one.update_mul(grad.float()), exact.update_mul(grad)
    # F has the condition number 3e4 here.
    assert (u - expected).norm() <= 1e-5 * expected.norm()


def test_loading_copies_and_goes_on_bit_by_bit():
    one = window(normal(5, D), 0.1, num_grads=4)
    other = DynamicInverseFisher(4, D, 0.7, dtype=torch.float64)
    other.load_state_dict(one.state_dict())
    for grad in normal(6, D, seed=3):
        assert torch.equal(one.update_mul(grad), other.update_mul(grad))
    assert other.damping == 0.1
    assert one.grads.data_ptr() != other.grads.data_ptr()


# The optimizer.


def by_hand(grads, m, damping, lr, momentum=0.0, weight_decay=0.0, start=None):
    """The optimizer on one vector with dense matrices in NumPy; returns the trajectory."""
    d = grads.shape[1]
    theta = np.ones(d) if start is None else start.copy()
    velocity, rows, trajectory = np.zeros(d), [], []
    lr = np.broadcast_to(lr, d)
    for grad in grads:
        g = grad + weight_decay * theta
        rows = [*rows, g][-m:]
        fisher = damping * np.eye(d) + sum(np.outer(r, r) for r in rows) / m
        u = np.linalg.solve(fisher, g)
        velocity = momentum * velocity + (1 - momentum) * u
        theta = theta - lr * velocity
        trajectory.append(theta)
    return np.array(trajectory)


def run(optimizer, params, grads):
    """Feed gradients, cut to the parameters in order; returns the trajectory of all parameters."""
    trajectory = []
    for grad in grads:
        pieces = torch.from_numpy(np.array(grad)).split([p.numel() for p in params])
        for param, piece in zip(params, pieces, strict=True):
            param.grad = piece.view_as(param).clone()
        optimizer.step()
        trajectory.append(np.concatenate([p.detach().numpy().ravel() for p in params]))
    return np.array(trajectory)


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"weight_decay": 0.3}, {"momentum": 0.5, "weight_decay": 2}]
)
def test_follows_the_equations(options):
    # m = 5 is no multiple of 32, and the window wraps round twice.
    grads = np.random.default_rng(0).normal(size=(13, 12))
    params = [nn.Parameter(torch.ones(2, 3, dtype=torch.float64)), parameter(size=6)]
    got = run(MFAC(params, lr=0.1, num_grads=5, damping=0.05, **options), params, grads)
    np.testing.assert_allclose(got, by_hand(grads, 5, 0.05, 0.1, **options), rtol=1e-10)


def test_groups_have_their_own_rate_and_share_the_matrix():
    grads = np.random.default_rng(0).normal(size=(9, 6))
    params = [parameter(), parameter()]
    optimizer = MFAC([{"params": params[:1], "lr": 0.3}, {"params": params[1:]}], lr=0.02, num_grads=4, damping=0.1)
    rates = np.array([0.3] * 3 + [0.02] * 3)
    np.testing.assert_allclose(run(optimizer, params, grads), by_hand(grads, 4, 0.1, rates), rtol=1e-10)


def test_momentum_averages_within_each_group():
    grads = np.random.default_rng(0).normal(size=(9, 6))
    params = [parameter(), parameter()]
    groups = [{"params": params[:1], "momentum": 0.8}, {"params": params[1:]}]
    got = run(MFAC(groups, lr=0.1, num_grads=20, damping=0.1), params, grads)
    # Gradients are given, so each half moves as in a run where all have its momentum.
    np.testing.assert_allclose(got[:, :3], by_hand(grads, 20, 0.1, 0.1, momentum=0.8)[:, :3], rtol=1e-10)
    np.testing.assert_allclose(got[:, 3:], by_hand(grads, 20, 0.1, 0.1)[:, 3:], rtol=1e-10)


def test_first_step_is_along_the_gradient():
    grad = np.array([[3.0, -4.0, 12.0]])
    param = parameter(0.0)
    (step,) = run(MFAC([param], lr=1.0, num_grads=7, damping=0.2), [param], grad)
    np.testing.assert_allclose(-step, grad[0] * 7 / (7 * 0.2 + 169), rtol=1e-12)


def test_maximize_negates_the_gradient_and_not_the_decay():
    grads = np.random.default_rng(0).normal(size=(6, 3))
    up, down = parameter(), parameter()
    options = {"lr": 0.1, "num_grads": 4, "damping": 0.1, "weight_decay": 0.5}
    np.testing.assert_allclose(
        run(MFAC([up], maximize=True, **options), [up], grads), run(MFAC([down], **options), [down], -grads)
    )


def test_a_parameter_without_gradient_stays_and_counts_with_zeros():
    first, second = parameter(), parameter()
    optimizer = MFAC([first, second], lr=0.1, num_grads=4, damping=0.1, weight_decay=0.3)
    grads = np.random.default_rng(0).normal(size=(2, 6))
    start = run(optimizer, [first, second], grads[:1])[0]
    first.grad, second.grad = torch.from_numpy(grads[1, :3].copy()), None
    optimizer.step()
    decayed = np.concatenate([grads[1, :3] + 0.3 * start[:3], np.zeros(3)])
    window_rows = np.stack([grads[0] + 0.3, decayed])
    matrix = 0.1 * np.eye(6) + window_rows.T @ window_rows / 4
    moved = start - 0.1 * np.linalg.solve(matrix, decayed)
    np.testing.assert_allclose(first.detach().numpy(), moved[:3], rtol=1e-10)
    np.testing.assert_array_equal(second.detach().numpy(), start[3:])


def test_a_step_without_gradients_does_nothing():
    param = parameter()
    optimizer = MFAC([param], num_grads=4)
    param.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(before["state"]["m_fac"]["grads"], optimizer.state["m_fac"]["grads"])
    assert int(optimizer.state["m_fac"]["next"]) == 1


def test_sparse_keeps_zeros_and_leaves_them_out():
    start = np.array([1.0, 0.0, -2.0, 0.0, 0.5, 3.0])
    kept = start != 0
    grads = np.random.default_rng(0).normal(size=(9, 6))
    params = [nn.Parameter(torch.from_numpy(piece.copy())) for piece in (start[:2], start[2:])]
    optimizer = MFAC(params, lr=0.1, momentum=0.5, weight_decay=0.3, num_grads=4, damping=0.1, sparse=True)
    assert optimizer.state["m_fac"]["grads"].shape == (4, 4)
    got = run(optimizer, params, grads)
    np.testing.assert_array_equal(got[:, ~kept], 0)
    expected = by_hand(grads[:, kept], 4, 0.1, 0.1, momentum=0.5, weight_decay=0.3, start=start[kept])
    np.testing.assert_allclose(got[:, kept], expected, rtol=1e-10)


def test_a_weight_that_becomes_zero_is_not_frozen():
    param = parameter(1.0, size=1)
    optimizer = MFAC([param], lr=1.0, num_grads=1, damping=0.5, sparse=True)
    param.data.zero_()
    param.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    assert param.item() == pytest.approx(-1 / 1.5)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_group_added_later_counts_with_zeros_in_old_gradients(sparse):
    first = parameter(size=3)
    second = nn.Parameter(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    optimizer = MFAC([first], lr=0.1, momentum=0.5, num_grads=3, damping=0.1, sparse=sparse)
    grads = np.random.default_rng(0).normal(size=(6, 6))
    run(optimizer, [first], grads[:2, :3])
    optimizer.add_param_group({"params": [second]})
    got = run(optimizer, [first, second], grads[2:])
    grads[:2, 3:] = 0
    if sparse:
        grads[:, 4] = 0
    start = np.array([1.0, 1.0, 1.0, 1.0, 0.0, 2.0])
    expected = by_hand(grads, 3, 0.1, 0.1, momentum=0.5, start=start)[2:]
    np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_a_group_that_does_not_fit_is_not_added():
    optimizer = MFAC([parameter()], num_grads=2)
    with pytest.raises(TypeError, match="params"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [parameter()], "lr": -1.0})
    assert len(optimizer.param_groups) == 1
    assert optimizer.state["m_fac"]["grads"].shape == (2, 3)


def test_a_gradient_that_is_not_finite_changes_nothing():
    param = parameter()
    optimizer = MFAC([param], num_grads=3, momentum=0.9)
    run(optimizer, [param], np.ones((2, 3)))
    before, state = param.detach().clone(), copy.deepcopy(optimizer.state["m_fac"])
    param.grad = torch.tensor([1.0, math.nan, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="finite"):
        optimizer.step()
    assert torch.equal(param, before)
    assert all(torch.equal(state[name], optimizer.state["m_fac"][name]) for name in ("grads", "gram", "velocity"))


def test_sparse_gradients_are_refused():
    param = nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        MFAC([param], num_grads=2).step()


def test_loading_takes_over_window_and_frozen_weights():
    start = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    trained = nn.Parameter(start.clone())
    one = MFAC([trained], lr=0.1, momentum=0.9, num_grads=3, damping=0.1, sparse=True)
    grads = np.random.default_rng(0).normal(size=(8, 3))
    run(one, [trained], grads[:4])
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    # The other was built on dense weights and with other options, before the checkpoint was loaded.
    fresh = nn.Parameter(torch.ones(3, dtype=torch.float64))
    other = MFAC([fresh], lr=1.0, num_grads=9, damping=7.0)
    fresh.data.copy_(trained.data)
    other.load_state_dict(saved)
    np.testing.assert_array_equal(run(one, [trained], grads[4:]), run(other, [fresh], grads[4:]))
    again = MFAC([nn.Parameter(start.clone())], num_grads=3)
    again.load_state_dict(saved)  # the steps above did not write into it
    assert int(again.state["m_fac"]["next"]) == 4 % 3


def test_foreign_states_are_refused():
    param = parameter()
    optimizer = MFAC([param], num_grads=2)
    with pytest.raises(ValueError, match="MFAC"):
        optimizer.load_state_dict(torch.optim.SGD([param], lr=0.1).state_dict())
    with pytest.raises(ValueError, match="elements"):
        optimizer.load_state_dict(MFAC([parameter(size=4)], num_grads=2).state_dict())


def state_bytes(optimizer):
    held = optimizer.state["m_fac"].values()
    return sum(value.numel() * value.element_size() for value in held if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("m", "d"), [(3, 100), (6, 100), (6, 250)])
def test_state_is_m_times_d_and_stays(m, d, momentum):
    param = nn.Parameter(torch.ones(d))
    optimizer = MFAC([param], num_grads=m, momentum=momentum)
    expected = 4 * m * d + 8 * m**2 + 8 + (4 * d if momentum else 0)
    for step in range(500):
        param.grad = torch.randn(d, generator=seeded(step))
        optimizer.step()
        if step in (0, m, 499):
            assert state_bytes(optimizer) == expected
    assert set(optimizer.state) == {"m_fac"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_a_float32_window(dtype):
    param = nn.Parameter(torch.ones(5, dtype=dtype))
    optimizer = MFAC([param], lr=0.1, num_grads=3, damping=0.1)
    exact = parameter(size=5)
    reference = MFAC([exact], lr=0.1, num_grads=3, damping=0.1)
    for grad in (torch.arange(5.0), torch.ones(5), -torch.arange(5.0)):
        param.grad, exact.grad = grad.to(dtype), grad.double()
        optimizer.step()
        reference.step()
    assert optimizer.state["m_fac"]["grads"].dtype == torch.float32
    # Three steps round the parameter to 8 bits (11) each.
    torch.testing.assert_close(param.double(), exact, rtol=0, atol=3 * torch.finfo(dtype).eps)


def test_an_added_window_position_wraps_where_the_oldest_lies():
    param = parameter()
    optimizer = MFAC([param], num_grads=3)
    run(optimizer, [param], np.arange(15.0).reshape(5, 3))
    rows = optimizer.state["m_fac"]["grads"]
    assert rows[:, 0].tolist() == [9.0, 12.0, 6.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    grads, x = normal(8, D), normal(D, seed=1)
    for options in ({}, {"block_size": 7}, {"pages": 4}):
        here = StaticInverseFisher(grads, 0.1, **options)
        for there in (
            StaticInverseFisher(grads.cuda(), 0.1, **options),
            StaticInverseFisher(grads, 0.1, **options, device="cuda"),
        ):
            close(there.mul(x).cpu(), here.mul(x), 1e-10)
            close(there.diag().cpu(), here.diag(), 1e-10)
