"""Normalisation of SPD matrices against the formulas written out matrix by matrix with SciPy, and closed forms."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from provenn.contracts import BadInput, FunctionCase, ModuleCase, OptimizerCase, Symmetry
from provenn.core.experiment.seeding import seeded
from provenn.nn import (
    BiMap,
    GBWBatchNorm,
    LogEig,
    ReEig,
    RiemannianSGD,
    SPDBatchNorm,
    SPDNet,
    manifold_groups,
    spd,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrices(*shape, seed=0, shift=0.3):
    """Symmetric positive definite matrices of the shape's last dimension."""
    A = normal(*shape, shape[-1], seed=seed)
    return A @ A.mT / shape[-1] + shift * torch.eye(shape[-1], dtype=torch.float64)


def rotation(n, seed=0):
    return torch.linalg.qr(normal(n, n, seed=seed))[0]


def stirred(layer, seed=5):
    """Move every parameter and statistic away from where it starts."""
    with torch.no_grad():
        for place, (name, tensor) in enumerate([*layer.named_parameters(), *layer.named_buffers()]):
            if tensor.dim() == 3:
                tensor.copy_(matrices(*tensor.shape[:2], seed=seed + place, shift=0.6))
            elif name.endswith(("scale", "running_var")):
                tensor.copy_(0.7 + 0.1 * torch.arange(len(tensor)))
    return layer


# The suites. Finite differences step out of the symmetric matrices, which the layers refuse: take the symmetric part.


class OnSymmetricPart(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, X):
        return self.layer(0.5 * (X + X.mT))


def made(layer):
    return OnSymmetricPart(layer)


def batch_of(channels, n):
    def inputs(generator, dtype, batch):
        A = torch.randn(batch, channels, n, n, generator=generator, dtype=torch.float64)
        return ((A @ A.mT / n + 0.3 * torch.eye(n, dtype=torch.float64)).to(dtype),)

    return inputs  # fmt: skip


NARROW = dict.fromkeys(("bfloat16", "dtype"), "eigendecompositions exist in float32 and float64 alone")
Q = rotation(3)
CONGRUENCE = Symmetry(
    "conjugation by a rotation", before=lambda inputs: (Q @ inputs[0] @ Q.T,), after=lambda output: Q @ output @ Q.T
)
STATISTICS = {"training_equals_eval": False, "training_equals_eval_reason": "batch statistics in training"}
NOT_SYMMETRIC = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1, 1)
NOT_SYMMETRIC[0, 0, 0, 1] = 1e-6
INDEFINITE = torch.diag(torch.tensor([1.0, -0.25, 2.0], dtype=torch.float64)).repeat(2, 1, 1, 1)
ONE = torch.eye(3, dtype=torch.float64)[None, None]


def bad_norm(kind):
    def option(argument, error=ValueError, **options):
        return BadInput(argument, lambda: kind(**{"n": 3, **options}), error)

    def inputs(X, error=ValueError):
        return BadInput("X", lambda: kind(3)(X), error)

    return (
        option("n", n=0),
        option("n", TypeError, n=3.0),
        option("channels", channels=0),
        option("momentum", momentum=1.5),
        option("eps", eps=0.0),
        option("mean_iters", mean_iters=0),
        inputs(NOT_SYMMETRIC),
        inputs(INDEFINITE),
        inputs(torch.zeros_like(INDEFINITE)),
        inputs(torch.full_like(INDEFINITE, math.nan)),
        inputs(ONE),  # one matrix has no statistics
        inputs(ONE[0].repeat(2, 1, 1)),
        inputs(ONE.repeat(2, 2, 1, 1)),
        inputs(ONE.float().repeat(2, 1, 1, 1), TypeError),
    )


def norm_case(kind, label="", **options):
    return ModuleCase(
        part=f"provenn.nn.{kind.__name__}",
        label=label,
        make=lambda: made(kind(3, channels=2, dtype=torch.get_default_dtype(), **options)),
        inputs=batch_of(2, 3),
        bad_input=bad_norm(kind),
        excluded=NARROW,
        **STATISTICS,
    )


def moved_case(kind, label, **options):
    return ModuleCase(
        part=f"provenn.nn.{kind.__name__}",
        label=label,
        make=lambda: made(stirred(kind(3, channels=2, dtype=torch.get_default_dtype(), **options))),
        inputs=batch_of(2, 3),
        bad_input=bad_norm(kind)[:1],
        excluded=NARROW,
        float32_tolerance=1e-3,
        **STATISTICS,
    )


def round_norm(kind, **options):
    """A layer whose bias is I exactly, so that it does not see directions."""
    layer = kind(3, dtype=torch.get_default_dtype(), **options)
    with torch.no_grad():
        layer.bias.copy_(torch.eye(3))
        layer.running_mean.mul_(2.0)
    return made(layer)


def round_case(kind, label, **options):
    return ModuleCase(
        part=f"provenn.nn.{kind.__name__}",
        label=label,
        make=lambda: round_norm(kind, **options),
        inputs=batch_of(1, 3),
        bad_input=bad_norm(kind)[:1],
        excluded=NARROW,
        symmetries=(CONGRUENCE,),
        **STATISTICS,
    )


def bad_call(argument, make, X, error=ValueError):
    return BadInput(argument, lambda: make()(X), error)


def bad_make(argument, make, error=ValueError):
    return BadInput(argument, make, error)


def function_case(name, call, *bad):
    return FunctionCase(part=f"provenn.nn.spd.{name}", call=call, bad_input=bad)


EYE = torch.eye(3, dtype=torch.float64)
SKEW = EYE + torch.triu(torch.ones(3, 3, dtype=torch.float64), 1)
NEGATIVE = torch.diag(torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64))


def two_matrices(function):
    return (
        BadInput("P", lambda: function(NEGATIVE, EYE)),
        BadInput("P", lambda: function(SKEW, EYE)),
        BadInput("P", lambda: function(EYE[:2], EYE)),
        BadInput("P", lambda: function(EYE.long(), EYE), TypeError),
        BadInput("metric", lambda: function(EYE, EYE, metric=NEGATIVE)),
    )


CASES = [
    norm_case(GBWBatchNorm),
    moved_case(GBWBatchNorm, "theta and metric", theta=0.5, mean_iters=2),
    moved_case(GBWBatchNorm, "variance about the identity", theta=1.5, var_about="identity", learn_metric=False),
    round_case(GBWBatchNorm, "round", theta=0.5),
    norm_case(SPDBatchNorm),
    *(moved_case(SPDBatchNorm, metric, metric=metric) for metric in ("aim", "lem", "bw")),
    *(round_case(SPDBatchNorm, f"{metric}, round", metric=metric) for metric in ("aim", "lem", "bw")),
    ModuleCase(
        part="provenn.nn.BiMap",
        make=lambda: made(BiMap(3, 2, 2, 3, dtype=torch.get_default_dtype())),
        inputs=batch_of(2, 3),
        excluded=NARROW,
        bad_input=(
            bad_make("in_size", lambda: BiMap(0, 1)),
            bad_make("out_size", lambda: BiMap(3, 4)),
            bad_make("out_size", lambda: BiMap(3, 2.0), TypeError),
            bad_make("in_channels", lambda: BiMap(3, 2, 0)),
            bad_make("out_channels", lambda: BiMap(3, 2, 1, 0)),
            bad_call("X", lambda: BiMap(3, 2), NOT_SYMMETRIC),
            bad_call("X", lambda: BiMap(4, 2), ONE),
            bad_call("X", lambda: BiMap(3, 2), ONE.float(), TypeError),
        ),
    ),
    ModuleCase(
        part="provenn.nn.ReEig",
        make=lambda: made(ReEig(0.8)),
        inputs=batch_of(2, 3),
        excluded=NARROW,
        symmetries=(CONGRUENCE,),
        bad_input=(
            bad_make("minimum", lambda: ReEig(0.0)),
            bad_make("minimum", lambda: ReEig("1e-4"), TypeError),
            bad_call("X", ReEig, NOT_SYMMETRIC),
            bad_call("X", ReEig, ONE.half(), TypeError),
        ),
    ),
    ModuleCase(
        part="provenn.nn.LogEig",
        make=lambda: made(LogEig()),
        inputs=batch_of(2, 3),
        excluded=NARROW,
        symmetries=(CONGRUENCE,),
        bad_input=(bad_call("X", LogEig, INDEFINITE), bad_call("X", LogEig, NOT_SYMMETRIC)),
    ),
    ModuleCase(
        part="provenn.nn.SPDNet",
        make=lambda: made(
            SPDNet(
                (4, 3, 2),
                3,
                lambda n: GBWBatchNorm(n, dtype=torch.get_default_dtype()),
                dtype=torch.get_default_dtype(),
            )
        ),
        inputs=batch_of(1, 4),
        excluded=NARROW,
        float32_tolerance=1e-3,
        **STATISTICS,
        bad_input=(
            bad_make("dims", lambda: SPDNet((3,), 2)),
            bad_make("dims", lambda: SPDNet((3, 4), 2)),
            bad_make("classes", lambda: SPDNet((3, 2), 0)),
            bad_make("norm", lambda: SPDNet((3, 2), 2, "gbw"), TypeError),
            bad_make("minimum", lambda: SPDNet((3, 2), 2, minimum=-1.0)),
            bad_call("X", lambda: SPDNet((3, 2), 2), INDEFINITE),
            bad_call("X", lambda: SPDNet((4, 2), 2), ONE),
        ),
    ),
    function_case("log", lambda: spd.log(EYE, 2 * EYE), *two_matrices(spd.log)),
    function_case(
        "exp",
        lambda: spd.exp(EYE, EYE),
        BadInput("P", lambda: spd.exp(NEGATIVE, EYE)),
        BadInput("V", lambda: spd.exp(EYE, SKEW)),
        BadInput("metric", lambda: spd.exp(EYE, EYE, NEGATIVE)),
    ),
    function_case(
        "dist",
        lambda: spd.dist(EYE, 2 * EYE),
        *two_matrices(spd.dist),
        BadInput("theta", lambda: spd.dist(EYE, EYE, theta=0.0)),
        BadInput("theta", lambda: spd.dist(EYE, EYE, theta="1"), TypeError),
    ),
    function_case(
        "geodesic",
        lambda: spd.geodesic(EYE, 2 * EYE, 0.5),
        BadInput("Q", lambda: spd.geodesic(EYE, NEGATIVE, 0.5)),
        BadInput("t", lambda: spd.geodesic(EYE, EYE, math.inf)),
    ),
    function_case(
        "transport",
        lambda: spd.transport(EYE, EYE),
        BadInput("P", lambda: spd.transport(NEGATIVE, EYE)),
        BadInput("V", lambda: spd.transport(EYE, SKEW)),
    ),
    function_case(
        "barycenter",
        lambda: spd.barycenter(torch.stack([EYE, 2 * EYE])),
        BadInput("X", lambda: spd.barycenter(NEGATIVE[None])),
        BadInput("X", lambda: spd.barycenter(EYE[None][:0])),
        BadInput("metric", lambda: spd.barycenter(EYE[None], NEGATIVE)),
        BadInput("theta", lambda: spd.barycenter(EYE[None], theta=0)),
        BadInput("max_iters", lambda: spd.barycenter(EYE[None], max_iters=0)),
        BadInput("tol", lambda: spd.barycenter(EYE[None], tol=-1.0)),
    ),
    FunctionCase(
        part="provenn.nn.manifold_groups",
        call=lambda: manifold_groups(SPDNet((3, 2), 2)),
        bad_input=(BadInput("manifolds", lambda: manifold_groups(OnTheMoon())),),
    ),
    OptimizerCase(
        part="provenn.nn.RiemannianSGD",
        make=lambda params, **options: RiemannianSGD(params, **{"lr": 0.05, **options}),
        quadratic={"lr": 0.1, "momentum": 0.5},
        rosenbrock={"lr": 1e-3, "momentum": 0.5},
        bad_input=(
            BadInput("momentum", lambda: RiemannianSGD([nn.Parameter(EYE)], momentum=1.0)),
            BadInput("weight_decay", lambda: RiemannianSGD([nn.Parameter(EYE)], weight_decay=-1.0)),
            BadInput("lr", lambda: RiemannianSGD([nn.Parameter(EYE)], lr="1"), TypeError),
            BadInput("manifold", lambda: RiemannianSGD([nn.Parameter(EYE)], manifold="sphere")),
            BadInput("params", lambda: RiemannianSGD([nn.Parameter(EYE[:2])], manifold="spd")),
            BadInput("params", lambda: RiemannianSGD([nn.Parameter(EYE[:, :2])], manifold="stiefel")),
        ),
    ),
]


class OnTheMoon(nn.Linear):
    manifolds = {"weight": "moon"}  # noqa: RUF012

    def __init__(self):
        super().__init__(2, 2)


# The formulas, one matrix at a time.


def power(A, p):
    return np.real(scipy.linalg.fractional_matrix_power(A, p))


def product_root(P, X):
    """(PX)^½ as the principal root of a matrix that is not symmetric."""
    return np.real(scipy.linalg.sqrtm(P @ X))


def carried(P, V, p):
    """Transport by the power of the Kronecker sum."""
    n = len(P)
    S = 0.5 * (np.kron(P, np.eye(n)) + np.kron(np.eye(n), P))
    return (power(S, p) @ V.reshape(-1)).reshape(n, n)


def bures(P, X):
    return np.trace(P) + np.trace(X) - 2 * np.trace(product_root(P, X))


def mean_after(X, steps):
    B = X.mean(0)
    for _ in range(steps):
        root = power(B, 0.5)
        inner = np.mean([power(root @ one @ root, 0.5) for one in X], axis=0)
        B = power(B, -0.5) @ inner @ inner @ power(B, -0.5)
    return B


def deformed(A, theta, M):
    return power(M, -0.5) @ power(A, theta) @ power(M, -0.5)


def by_the_paper(X, B, v, G, M, s, theta, eps=1e-5):
    """Steps 3 to 6 for one matrix X, given the mean and the variance."""
    eye = np.eye(len(X))
    X, G = deformed(X, theta, M), deformed(G, theta, M)
    V = carried(B, product_root(B, X) + product_root(X, B) - 2 * B, -0.5)
    Y = (eye + V / 2) @ (eye + V / 2)
    W = s / math.sqrt(v + eps) * 2 * (power(Y, 0.5) - eye)
    Z = (eye + W / 2) @ (eye + W / 2)
    T = carried(G, 2 * (power(Z, 0.5) - eye), 0.5)
    L = scipy.linalg.solve_continuous_lyapunov(G, T)
    root = power(M, 0.5)
    return power(root @ (G + T + L @ G @ L) @ root, 1 / theta)


def parts_of(layer, channel):
    M = np.eye(layer.n) if layer.metric is None else layer.metric[channel].detach().numpy()
    return layer.bias[channel].detach().numpy(), M, layer.scale[channel].item()


OPTIONS = [
    {},
    {"theta": 0.5},
    {"theta": 1.5, "var_about": "identity"},
    {"theta": -1.0, "mean_iters": 3},
    {"learn_metric": False, "mean_iters": 2, "momentum": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_evaluation_is_the_papers_algorithm(options):
    layer = stirred(GBWBatchNorm(3, channels=2, **options)).eval()
    X = matrices(4, 2, 3)
    out = layer(X)
    for sample in range(4):
        for channel in range(2):
            G, M, s = parts_of(layer, channel)
            B, v = layer.running_mean[channel].numpy(), layer.running_var[channel].item()
            expected = by_the_paper(X[sample, channel].numpy(), B, v, G, M, s, layer.theta)
            np.testing.assert_allclose(out[sample, channel].detach(), expected, atol=1e-9, rtol=1e-9)


def test_evaluation_folds_what_leaves_the_cone_as_the_papers_roots_do():
    """Far from the mean I + V/2 and I + W/2 are indefinite; the roots of their squares are their absolute values."""
    layer = GBWBatchNorm(3).eval()
    with torch.no_grad():
        layer.scale.fill_(4.0)
        layer.running_mean.copy_(8 * matrices(1, 3, seed=4))
    X = matrices(4, 1, 3)
    G, M, s = parts_of(layer, 0)
    smallest = []
    for one, found in zip(X[:, 0].numpy(), layer(X)[:, 0].detach(), strict=True):
        B = layer.running_mean[0].numpy()
        np.testing.assert_allclose(found, by_the_paper(one, B, 1.0, G, M, s, 1.0), atol=1e-8, rtol=1e-8)
        V = carried(B, product_root(B, one) + product_root(one, B) - 2 * B, -0.5)
        first = np.linalg.eigvalsh(np.eye(3) + V / 2)
        smallest.append((first.min(), (1 + 4 * (np.abs(first) - 1)).min()))  # √(v + ε) is 1 but for 5e-6
    assert (np.min(smallest, axis=0) < -0.1).all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_takes_mean_and_variance_of_the_batch_and_records_them(options):
    layer = stirred(GBWBatchNorm(3, channels=2, **options))
    X, before = matrices(4, 2, 3), {name: buffer.clone() for name, buffer in layer.named_buffers()}
    out = layer(X)
    theta, momentum = options.get("theta", 1.0), options.get("momentum", 0.1)
    for channel in range(2):
        G, M, s = parts_of(layer, channel)
        white = np.stack([deformed(one, theta, M) for one in X[:, channel].numpy()])
        B = mean_after(white, options.get("mean_iters", 1))
        about = np.eye(3) if "var_about" in options else B
        v = np.mean([bures(about, one) for one in white]) / theta**2
        for sample in range(4):
            expected = by_the_paper(X[sample, channel].numpy(), B, v, G, M, s, theta)
            np.testing.assert_allclose(out[sample, channel].detach(), expected, atol=1e-9, rtol=1e-9)
        old, t = before["running_mean"][channel].numpy(), momentum
        products = product_root(old, B) + product_root(B, old)
        moved = (1 - t) ** 2 * old + t**2 * B + t * (1 - t) * products
        np.testing.assert_allclose(layer.running_mean[channel], moved, atol=1e-10)
        expected_var = (1 - t) * before["running_var"][channel].item() + t * v
        assert layer.running_var[channel].item() == pytest.approx(expected_var, abs=1e-10)


def test_defaults_are_the_papers():
    layer = GBWBatchNorm(4)
    assert layer.bias.dtype == torch.float64
    ramp = torch.tensor([1e-7, 2e-7, 3e-7, 4e-7], dtype=torch.float64)
    assert torch.equal(layer.bias[0], torch.eye(4, dtype=torch.float64) + torch.diag(ramp))
    assert torch.equal(layer.metric[0], torch.eye(4, dtype=torch.float64))
    assert torch.equal(layer.running_mean[0], torch.eye(4, dtype=torch.float64))
    assert (layer.scale.item(), layer.running_var.item()) == (1.0, 1.0)
    assert (layer.eps, layer.momentum, layer.mean_iters, layer.theta) == (1e-5, 0.1, 1, 1.0)
    assert {name for name, _ in layer.named_buffers()} == {"running_mean", "running_var"}


def centred_by(layer, X):
    """The centred batch alone: bias I, and a scale that undoes the division by the deviation."""
    with torch.no_grad():
        layer.bias.copy_(torch.eye(layer.n))
    quiet = GBWBatchNorm(layer.n, momentum=1.0, mean_iters=layer.mean_iters)
    quiet(X)
    with torch.no_grad():
        layer.scale.copy_((quiet.running_var + layer.eps).sqrt())
    return layer(X).detach()


def test_the_centred_batch_has_the_identity_as_its_barycentre():
    X = 0.5 * matrices(8, 1, 5, shift=0.5)
    out = centred_by(GBWBatchNorm(5, mean_iters=60), X)
    torch.testing.assert_close(spd.barycenter(out)[0], torch.eye(5, dtype=torch.float64), atol=1e-10, rtol=0)
    once = centred_by(GBWBatchNorm(5), X)  # one step is not the barycentre
    assert (spd.barycenter(once)[0] - torch.eye(5, dtype=torch.float64)).abs().max() > 1e-5


def test_diagonal_inputs_have_a_closed_form():
    x = 0.5 + torch.rand(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer = GBWBatchNorm(4)
    with torch.no_grad():
        layer.bias.copy_(torch.eye(4))
        layer.scale.fill_(0.4)
    roots = x.sqrt()
    mean = roots.mean(0)
    v = (roots - mean).square().sum(1).mean()  # one for the whole matrix
    expected = (1 + 0.4 * (roots - mean) / (v + 1e-5).sqrt()).square()
    torch.testing.assert_close(layer(torch.diag_embed(x)[:, None]), torch.diag_embed(expected)[:, None])


def test_bures_wasserstein_is_the_special_case():
    X = matrices(5, 2, 3)
    general, fixed, rival = GBWBatchNorm(3, 2), GBWBatchNorm(3, 2, learn_metric=False), SPDBatchNorm(3, "bw", 2)
    for train in (True, False):
        outputs = [layer.train(train)(X) for layer in (general, fixed, rival)]
        torch.testing.assert_close(outputs[0], outputs[1], atol=1e-12, rtol=0)
        assert torch.equal(outputs[1], outputs[2])
    assert "metric" not in dict(fixed.named_parameters())


def test_gradients_in_training_hold_mean_and_variance_fixed():
    X = matrices(5, 1, 3)
    gradients = []
    for train in (True, False):
        layer = stirred(GBWBatchNorm(3, theta=0.5, momentum=1.0))
        layer(X)  # with momentum 1 the running statistics are the batch's
        given = X.clone().requires_grad_()
        weights = normal(5, 1, 3, 3, seed=2)
        (layer.train(train)(given) * weights).sum().backward()
        gradients.append([given.grad, *(p.grad for p in layer.parameters())])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


REPEATED = torch.stack([torch.eye(3), torch.diag(torch.tensor([2.0, 2.0, 0.5])), 3 * torch.eye(3)]).double()[:, None]


@pytest.mark.parametrize(("kind", "theta"), [("gbw", 1.0), ("gbw", 0.5), ("aim", 1.0), ("lem", 1.0), ("bw", 1.0)])
def test_gradients_at_repeated_eigenvalues(kind, theta):
    layer = (GBWBatchNorm(3, theta=theta) if kind == "gbw" else SPDBatchNorm(3, kind)).eval()
    with torch.no_grad():
        layer.bias.copy_(torch.eye(3))
    names = [name for name, _ in layer.named_parameters()]

    def evaluate(X, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (0.5 * (X + X.mT),))

    points = [REPEATED, *(p.detach() for p in layer.parameters())]
    assert torch.autograd.gradcheck(evaluate, [p.clone().requires_grad_() for p in points])


def test_evaluation_repeats_bit_by_bit_and_changes_no_statistic():
    layer = GBWBatchNorm(5, theta=0.5)
    X = matrices(7, 1, 5)
    layer(X)
    layer.eval()
    before = [buffer.clone() for buffer in layer.buffers()]
    assert torch.equal(layer(X), layer(X))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True))


def test_running_statistics_reach_those_of_a_batch_that_repeats():
    layer, X = GBWBatchNorm(4, mean_iters=30), matrices(6, 1, 4)
    for _ in range(300):
        layer(X)
    B = spd.barycenter(X)
    torch.testing.assert_close(layer.running_mean, B, atol=1e-9, rtol=0)
    torch.testing.assert_close(layer.running_var, spd.dist(B, X).square().mean(0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("metric", ["aim", "lem", "bw", "gbw"])
def test_ill_conditioned_batches_stay_finite(metric):
    spectra = 10.0 ** torch.linspace(-6, 1, 8, dtype=torch.float64)
    rotations = torch.linalg.qr(normal(10, 1, 8, 8))[0]
    X = (rotations * spectra) @ rotations.mT
    X = (0.5 * (X + X.mT)).requires_grad_()
    layer = GBWBatchNorm(8, theta=0.5) if metric == "gbw" else SPDBatchNorm(8, metric)
    out = layer(X)
    out.square().sum().backward()
    for tensor in (out, X.grad, *(p.grad for p in layer.parameters())):
        assert tensor.isfinite().all()


# The rivals.


def test_affine_invariant_normalisation_has_the_bias_as_its_mean():
    mean = pytest.importorskip("pyriemann.geometry.mean")
    X = matrices(9, 1, 4)
    layer = stirred(SPDBatchNorm(4, "aim", mean_iters=50))
    G = layer.bias[0].detach()
    out = layer(X).detach()[:, 0]
    np.testing.assert_allclose(mean.mean_riemann(out.numpy(), tol=1e-12), G, atol=1e-9)
    moved = SPDBatchNorm(4, "aim", mean_iters=50)
    A = normal(4, 4, seed=3)
    first, second = (torch.linalg.eigvalsh(moved(one).detach()) for one in (X, A @ X @ A.T))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)  # but for the bias's ramp of 1e-7, congruences vanish


def test_affine_invariant_running_mean_moves_along_its_geodesic():
    X = matrices(6, 1, 3)
    layer = stirred(SPDBatchNorm(3, "aim", momentum=0.25))
    old = layer.running_mean[0].numpy().copy()
    layer(X)
    flow = X[:, 0].mean(0).numpy()
    root, inverse = power(flow, 0.5), power(flow, -0.5)
    logs = np.mean([scipy.linalg.logm(inverse @ one @ inverse) for one in X[:, 0].numpy()], axis=0)
    B = root @ scipy.linalg.expm(logs) @ root
    root, inverse = power(old, 0.5), power(old, -0.5)
    np.testing.assert_allclose(layer.running_mean[0], root @ power(inverse @ B @ inverse, 0.25) @ root, atol=1e-10)


def test_log_euclidean_normalisation_is_a_batch_norm_of_logarithms():
    X = matrices(7, 1, 3)
    layer = stirred(SPDBatchNorm(3, "lem", momentum=0.25))
    before, s = layer.running_mean[0].numpy().copy(), layer.scale.item()
    old_var = layer.running_var.item()
    out = layer(X).detach()[:, 0]
    logs = np.stack([scipy.linalg.logm(one) for one in X[:, 0].numpy()])
    deviation = logs - logs.mean(0)
    v = np.square(deviation).sum((1, 2)).mean()
    for one, d in zip(out, deviation, strict=True):
        expected = s / math.sqrt(v + 1e-5) * d + scipy.linalg.logm(layer.bias[0].detach().numpy())
        np.testing.assert_allclose(one, scipy.linalg.expm(expected), atol=1e-10)
    running = scipy.linalg.expm(0.75 * scipy.linalg.logm(before) + 0.25 * logs.mean(0))
    np.testing.assert_allclose(layer.running_mean[0], running, atol=1e-10)
    assert layer.running_var.item() == pytest.approx(0.75 * old_var + 0.25 * v)


# Layers and network.


def test_bimap_sums_over_input_channels_by_orthonormal_rows():
    with seeded(0):
        layer = BiMap(5, 3, in_channels=2, out_channels=4)
    X = matrices(3, 2, 5)
    W = layer.weight.detach()
    torch.testing.assert_close(W @ W.mT, torch.eye(3, dtype=torch.float64).expand(4, 2, 3, 3))
    expected = torch.einsum("oiab,nibc,oidc->noad", W, X, W)
    torch.testing.assert_close(layer(X), expected)


def test_reeig_and_logeig_act_on_eigenvalues():
    U = rotation(4)
    X = U @ torch.diag(torch.tensor([1e-7, 1e-3, 0.5, 2.0], dtype=torch.float64)) @ U.T
    X = 0.5 * (X + X.T)
    expected = U @ torch.diag(torch.tensor([1e-4, 1e-3, 0.5, 2.0], dtype=torch.float64)) @ U.T
    torch.testing.assert_close(ReEig()(X), expected, atol=1e-12, rtol=0)
    np.testing.assert_allclose(LogEig()(expected), scipy.linalg.logm(expected.numpy()), atol=1e-9)


def test_spdnet_puts_the_norm_between_bimap_and_reeig():
    plain, normed = SPDNet((6, 4, 2), 3), SPDNet((6, 4, 2), 3, lambda n: SPDBatchNorm(n, "lem"))
    assert [type(m).__name__ for m in plain.features] == ["BiMap", "ReEig"] * 2 + ["LogEig"]
    assert [type(m).__name__ for m in normed.features] == ["BiMap", "SPDBatchNorm", "ReEig"] * 2 + ["LogEig"]
    assert [m.n for m in normed.features if isinstance(m, SPDBatchNorm)] == [4, 2]
    X = matrices(5, 1, 6)
    by_hand = X[:, 0]
    for layer in (plain.features[0], plain.features[2]):
        W = layer.weight[0, 0].detach()
        by_hand = W @ by_hand @ W.T
        values, U = torch.linalg.eigh(by_hand)
        by_hand = (U * values.clamp(min=1e-4)[:, None]) @ U.mT
    features = torch.stack([torch.from_numpy(scipy.linalg.logm(one.numpy())) for one in by_hand]).flatten(1)
    torch.testing.assert_close(plain(X), features @ plain.head.weight.T + plain.head.bias)


def test_autocast_changes_nothing():
    layer, X = GBWBatchNorm(3, dtype=torch.float32).eval(), matrices(4, 1, 3).float()
    with pytest.warns(UserWarning, match="float32"):
        expected = layer(X)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(UserWarning, match="float32"):
        assert torch.equal(layer(X), expected)


# What is refused.


@pytest.mark.parametrize("make", [lambda: GBWBatchNorm(3), lambda: SPDBatchNorm(3), LogEig, lambda: SPDNet((3, 2), 2)])
def test_errors_name_the_smallest_eigenvalue(make):
    with pytest.raises(ValueError, match=r"smallest eigenvalue -0\.25"):
        make()(INDEFINITE)


def test_a_batch_of_one_is_refused_in_training_alone():
    layer = GBWBatchNorm(3)
    with pytest.raises(ValueError, match="at least two"):
        layer(ONE)
    assert layer.eval()(ONE).shape == ONE.shape
    with pytest.raises(ValueError, match="theta"):
        GBWBatchNorm(3, theta=0)


def test_a_matrix_of_tiny_but_positive_eigenvalues_is_taken():
    X = torch.diag(torch.tensor([1.0, 1e-30, 1e-12], dtype=torch.float64)).repeat(3, 1, 1, 1)
    assert GBWBatchNorm(3)(X).isfinite().all()


def test_float32_warns():
    for layer in (GBWBatchNorm(3, dtype=torch.float32), SPDBatchNorm(3, dtype=torch.float32), LogEig(), ReEig()):
        with pytest.warns(UserWarning, match="float32"):
            layer(ONE.float().repeat(2, 1, 1, 1))
