"""Linear state-space layers against plain loops, closed forms, scipy, and the differential equations they stand for."""

import copy
import io
import math
import pickle
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, linalg, signal
from torch import nn

from provenn.contracts import BadInput, Form, FunctionCase, ModuleCase
from provenn.contracts.watch import plain_signatures
from provenn.core.experiment.accounting import TensorMemory
from provenn.core.experiment.seeding import generator, seeded
from provenn.nn import (
    LSSL,
    DenseTransition,
    LinearStateSpace,
    LSSLModel,
    StructuredTransition,
    gated_recurrence,
    gbt,
    hippo,
    krylov,
    lssl_parameter_groups,
    picard_iteration,
)
from provenn.nn._lssl_tridiagonal import tridiagonal_product, tridiagonal_solve

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# The suites.


def sequences(features):
    def inputs(source, dtype, batch):
        return (torch.randn(batch, 11, features, generator=source, dtype=F64).to(dtype),)

    return inputs


def with_state(source, dtype, batch):
    u = torch.randn(batch, 11, 3, generator=source, dtype=F64)
    return u.to(dtype), torch.randn(batch, 3, 4, generator=source, dtype=F64).to(dtype), 1.5


def vectors(source, dtype, batch):
    return (torch.randn(batch, 3, 4, generator=source, dtype=F64).to(dtype),)


def stepped(module, inputs):
    u, state = inputs[0], inputs[1] if len(inputs) > 1 else None
    outputs = []
    for u_t in u.unbind(1):
        y, state = module.step(u_t, state, *inputs[2:])
        outputs.append(y)
    y = torch.stack(outputs, 1)
    return y if len(inputs) == 1 else (y, state.to(u.dtype))


def walked(module, inputs):
    y, state = module.recurrent(*inputs)
    return y if len(inputs) == 1 else (y, state)


def handed_over(module, inputs):
    """The sequence in three pieces, of which each takes the state that the last one left."""
    u, state = inputs[0], inputs[0].new_zeros(len(inputs[0]), 3, 4, dtype=F64)
    pieces = []
    for piece in u.split([1, 6, u.shape[1] - 7], 1):
        y, state = module(piece, state)
        pieces.append(y)
    return torch.cat(pieces, 1)


FORMS = (Form("recurrent", walked), Form("step by step", stepped))
WHOLE = (*FORMS, Form("convolution in pieces", handed_over))


def small(learn="none", **options):
    return lambda: LSSL(3, 4, learn=learn, **options)


def bad(argument, error=ValueError, **options):
    return BadInput(argument, lambda: LSSL(**{"d_model": 3, "d_state": 4, **options}), error)


def bad_call(argument, u=(2, 5, 3), state=None, rate=1.0):
    return BadInput(argument, lambda: LSSL(3, 4)(torch.zeros(u), None if state is None else torch.zeros(state), rate))


BAD_LSSL = (
    bad("d_model", d_model=0),
    bad("d_model", TypeError, d_model=3.0),
    bad("d_state", d_state=0),
    bad("channels", channels=0),
    bad("measure", measure="fourier"),
    bad("learn", learn="all"),
    bad("dt_min", dt_min=0.0),
    bad("dt_max", dt_max=1e-4),
    bad("alpha", alpha=1.5),
    bad("dropout", dropout=1.0),
    bad_call("u", u=(2, 0, 3)),
    bad_call("u", u=(2, 5, 4)),
    bad_call("u", u=(5, 3)),
    bad_call("state", state=(2, 3, 5)),
    bad_call("state", state=(1, 3, 4)),
    bad_call("rate", rate=0.0),
    bad_call("rate", rate=-2.0),
    BadInput("L", lambda: LSSL(3, 4).kernel(0)),
    BadInput("rate", lambda: LSSL(3, 4).kernel(5, 0.0)),
    BadInput("rate", lambda: LSSL(3, 4).step(torch.zeros(2, 3), None, -1.0)),
    BadInput("state", lambda: LSSL(3, 4).step(torch.zeros(2, 3), torch.zeros(2, 3, 3))),
)


def bank(alpha=0.5, channels=2, features=None, learn_dt=True):
    """Three systems of order 4 with random matrices of spectral abscissa −0.1, so that ρ(Ā) < 1."""
    A = torch.randn(features or 1, 4, 4, dtype=F64)
    A = A - (torch.linalg.eigvals(A).real.amax(-1)[:, None, None] + 0.1) * torch.eye(4, dtype=F64)
    B = torch.randn(features or 1, 4, dtype=F64)
    transition = DenseTransition(*((A, B) if features else (A[0], B[0])), trainable=True)
    C, D = torch.randn(3, channels, 4, dtype=F64), torch.randn(3, channels, dtype=F64)
    return LinearStateSpace(transition, C, D, torch.tensor([0.05, 0.3, 1.1], dtype=F64), alpha, learn_dt=learn_dt)


def bad_bank(argument, **changes):
    def call():
        given = {"transition": DenseTransition(-torch.eye(4), torch.ones(4)), "C": torch.ones(3, 2, 4)}
        given |= {"D": torch.ones(3, 2), "dt": torch.ones(3)}
        LinearStateSpace(**{**given, **changes})

    return BadInput(argument, call)


BAD_BANKS = (
    bad_bank("C", C=torch.ones(3, 2, 5)),
    bad_bank("C", C=torch.ones(3, 4)),
    bad_bank("D", D=torch.ones(3)),
    bad_bank("dt", dt=torch.ones(2)),
    bad_bank("dt", dt=torch.tensor([1.0, 0.0, 1.0])),
    bad_bank("alpha", alpha=-0.1),
    bad_bank("transition", transition=StructuredTransition("legs", 4, features=2)),
)


def model(**options):
    return lambda: LSSLModel(2, 3, 4, 2, 5, learn="shared", **options)


def model_steps(module, inputs):
    states, outputs = None, []
    for u_t in inputs[0].unbind(1):
        y, states = module.step(u_t, states)
        outputs.append(y)
    return torch.stack(outputs, 1)


def last_of_steps(module, inputs):
    return model_steps(module, inputs)[:, -1]


def bad_model(argument, **options):
    return BadInput(argument, lambda: LSSLModel(**{"d_input": 2, "d_output": 3, "d_model": 4, "d_state": 5, **options}))


BAD_MODELS = (
    bad_model("d_input", d_input=0),
    bad_model("d_output", d_output=0),
    bad_model("n_layers", n_layers=0),
    bad_model("d_state", d_state=0),
    bad_model("pooling", pooling="max"),
    BadInput("pooling", lambda: model()().step(torch.zeros(1, 2))),
    BadInput("states", lambda: model(pooling="last")().step(torch.zeros(1, 2), [torch.zeros(1, 4, 5)])),
)


def singular():
    """N = 1 and A = 2, so that I − ½ · 1 · A = 0."""
    one = StructuredTransition("lagt", 1)
    one.d.data.fill_(-3.0)
    return one


def dense_product(module, inputs):
    """A from its definition, by an inverse."""
    T = torch.diag_embed(module.diagonal) + torch.diag_embed(module.lower, -1) + torch.diag_embed(module.upper, 1)
    A = -module.p[..., None] * (torch.diag_embed(module.d) + torch.linalg.inv(T)) * module.q[..., None, :]
    return (A @ inputs[0][..., None])[..., 0]


def trained(measure, features=None):
    """A structured system away from its start, all of its diagonals changed; b has no part in A x."""

    def make():
        one = StructuredTransition(measure, 4, features=features)
        with torch.no_grad():
            for parameter in one.parameters():
                parameter += 0.1 * torch.randn(parameter.shape)
        one.b.requires_grad_(False)
        return one

    return make


def dense():
    one = DenseTransition(torch.randn(3, 4, 4), torch.randn(3, 4), trainable=True)
    one.B.requires_grad_(False)
    return one


BAD_STRUCTURED = (
    BadInput("measure", lambda: StructuredTransition("fourier", 4)),
    BadInput("d_state", lambda: StructuredTransition("legs", 0)),
    BadInput("features", lambda: StructuredTransition("legs", 4, features=0)),
    BadInput("x", lambda: StructuredTransition("legs", 4)(torch.zeros(2, 5))),
    BadInput("x", lambda: StructuredTransition("legs", 4, features=3).solve(torch.zeros(2, 4), 0.1)),
    BadInput("invertible", lambda: singular().solve(torch.ones(1), 0.5)),
    BadInput("alpha", lambda: singular().advance(torch.ones(1), torch.ones(()), 0.5, 2.0)),
)
BAD_DENSE = (
    BadInput("A", lambda: DenseTransition(torch.zeros(3, 4), torch.zeros(3))),
    BadInput("A", lambda: DenseTransition(torch.zeros(4), torch.zeros(4))),
    BadInput("B", lambda: DenseTransition(torch.zeros(4, 4), torch.zeros(3))),
)
SINGULAR = BadInput("invertible", lambda: gbt(torch.tensor([[2.0]]), torch.ones(1), 1.0))


def case(part, make, inputs, bad_input, **options):
    return ModuleCase(f"provenn.nn.{part}", make, inputs, bad_input=bad_input, **options)


CASES = [
    case("LSSL", small(channels=2), sequences(3), BAD_LSSL, causal_dim=1, forms=WHOLE, label="frozen"),
    case("LSSL", small("shared"), sequences(3), BAD_LSSL, causal_dim=1, forms=WHOLE, label="shared"),
    case("LSSL", small("feature", channels=2), sequences(3), BAD_LSSL, causal_dim=1, forms=WHOLE, label="feature"),
    case("LSSL", small("shared", measure="legt"), with_state, BAD_LSSL, forms=FORMS, label="with a state"),
    case("LSSL", small("feature", measure="random"), sequences(3), BAD_LSSL, causal_dim=1, forms=WHOLE, label="random"),
    case("LinearStateSpace", bank, sequences(3), BAD_BANKS, causal_dim=1, forms=WHOLE),
    case("LinearStateSpace", lambda: bank(1.0, features=3), with_state, BAD_BANKS, forms=FORMS, label="with a state"),
    case("LSSLModel", model(), sequences(2), BAD_MODELS, label="mean"),
    case(
        "LSSLModel", model(pooling="last"), sequences(2), BAD_MODELS, label="last",
        forms=(Form("step by step", last_of_steps),),
    ),
    case(
        "LSSLModel", model(pooling="none"), sequences(2), BAD_MODELS, causal_dim=1, label="each step",
        forms=(Form("step by step", model_steps),),
    ),
    case("StructuredTransition", trained("legs"), vectors, BAD_STRUCTURED, forms=(Form("dense", dense_product),)),
    case(
        "StructuredTransition", trained("legt", 3), vectors, BAD_STRUCTURED, label="LegT, features",
        forms=(Form("dense", dense_product, float32_tolerance=1e-4),),
    ),
    case("DenseTransition", dense, vectors, BAD_DENSE),
    FunctionCase(
        "provenn.nn.hippo", lambda: hippo("legs", 4),
        bad_input=(BadInput("measure", lambda: hippo("cheb", 4)), BadInput("order", lambda: hippo("legs", 0))),
    ),
    FunctionCase(
        "provenn.nn.gbt", lambda: gbt(-torch.eye(2), torch.ones(2), 0.1),
        bad_input=(
            SINGULAR,
            BadInput("alpha", lambda: gbt(-torch.eye(2), torch.ones(2), 0.1, 1.5)),
            BadInput("dt", lambda: gbt(-torch.eye(2), torch.ones(2), 0.0)),
        ),
    ),
    FunctionCase(
        "provenn.nn.krylov", lambda: krylov(3, torch.eye(2), torch.ones(2)),
        bad_input=(BadInput("length", lambda: krylov(0, torch.eye(2), torch.ones(2))),),
    ),
    FunctionCase(
        "provenn.nn.lssl_parameter_groups", lambda: len(lssl_parameter_groups(LSSL(3, 4), 1e-3)),
        bad_input=(
            BadInput("lr", lambda: lssl_parameter_groups(LSSL(3, 4), -1e-3)),
            BadInput("lr_dt", lambda: lssl_parameter_groups(LSSL(3, 4), 1e-3, lr_dt=-1.0)),
        ),
    ),
    FunctionCase(
        "provenn.nn.gated_recurrence", lambda: gated_recurrence(torch.zeros(1, 3, 2), torch.ones(1, 3, 2)),
        bad_input=(BadInput("z", lambda: gated_recurrence(torch.zeros(1, 3, 2), torch.ones(1, 4, 2))),),
    ),
    FunctionCase(
        "provenn.nn.picard_iteration",
        lambda: picard_iteration(lambda u, x: u - x, torch.ones(1, 3, 2), torch.zeros(1, 2), 0.1, 2),
        bad_input=(
            BadInput("dt", lambda: picard_iteration(torch.add, torch.ones(1, 3, 2), torch.zeros(1, 2), 0.0, 2)),
            BadInput("depth", lambda: picard_iteration(torch.add, torch.ones(1, 3, 2), torch.zeros(1, 2), 0.1, 0)),
        ),
    ),
]  # fmt: skip


# The three views.


def by_hand(system, u, state, rate):
    """Walk through one system a feature in NumPy, discretised by an inverse."""
    A, B = (t.detach().numpy() for t in (system.transition.A, system.transition.B))
    C, D, dt = system.C.detach().numpy(), system.D.detach().numpy(), rate * system.log_dt.detach().exp().numpy()
    y, last = np.zeros((*u.shape, C.shape[1])), np.zeros(state.shape)
    for b in range(u.shape[0]):
        for h in range(u.shape[2]):
            Ah, Bh = (A[h], B[h]) if A.ndim == 3 else (A, B)
            left = np.linalg.inv(np.eye(4) - system.alpha * dt[h] * Ah)
            moving, entering = left @ (np.eye(4) + (1 - system.alpha) * dt[h] * Ah), dt[h] * left @ Bh
            x = state[b, h].numpy()
            for t in range(u.shape[1]):
                x = moving @ x + entering * float(u[b, t, h])
                y[b, t, h] = C[h] @ x + D[h] * float(u[b, t, h])
            last[b, h] = x
    return torch.from_numpy(y), torch.from_numpy(last)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 63, 64, 65, 130])
@pytest.mark.parametrize("features", [None, 3])
def test_all_views_equal_a_plain_walk(length, features):
    with seeded(length):
        system = bank(features=features)
    u, state = normal(2, length, 3), normal(2, 3, 4, seed=1)
    expected, last = by_hand(system, u, state, 1.3)
    for y, after in (system(u, state, 1.3), system.recurrent(u, state, 1.3), stepped(system, (u, state, 1.3))):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(after, last, rtol=0, atol=1e-10)
    unforced, _ = by_hand(system, u, torch.zeros_like(state), 1.0)
    torch.testing.assert_close(system(u), unforced, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [1, 5, 16, 33, 200])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_kernel_is_c_times_powers_times_b(length, channels):
    with seeded(0):
        system = bank(channels=channels)
    A, B = gbt(system.transition.A, system.transition.B, system.log_dt.exp())
    column, expected = B, []
    for _ in range(length):
        expected.append((system.C @ column[..., None])[..., 0])
        column = (A @ column[..., None])[..., 0]
    torch.testing.assert_close(system.kernel(length), torch.stack(expected, -1), rtol=0, atol=1e-12)


def test_a_float32_layer_keeps_the_digits_of_long_legs_kernels():
    with seeded(0):
        layer = LSSL(2, 256)
    A, B = (t.numpy() for t in layer.system.transition.dense())
    for h, dt in enumerate(layer.system.log_dt.double().exp().tolist()):
        left = np.linalg.inv(np.eye(256) - dt / 2 * A)
        moving, row = left @ (np.eye(256) + dt / 2 * A), layer.system.C[h, 0].detach().double().numpy()
        column, expected = dt * left @ B, []
        for _ in range(1500):
            expected.append(row @ column)
            column = moving @ column
        kernel = layer.kernel(1500)[h, 0].detach().double().numpy()
        assert np.abs(kernel - expected).max() < 1e-6 * np.abs(expected).max()


def test_no_step_wraps_round():
    """With an impulse at the end and a kernel as long as the sequence, the first outputs stay 0."""
    with seeded(0):
        system = bank()
    u = torch.zeros(1, 64, 3, dtype=F64)
    u[:, -1] = 1
    assert float(system(u).detach()[:, :-1].abs().max()) < 1e-12


def test_the_krylov_matrix_is_never_held():
    """At H = 8, N = 32, L = 4096 it would have 1 048 576 numbers, 8 MiB; forward and backward pass stay below half."""
    system = LSSL(8, 32, learn="shared").system
    krylov_bytes = 8 * 32 * 4096 * 8
    with TensorMemory() as memory:
        system.kernel(4096).square().sum().backward()
    assert memory.peak < krylov_bytes / 2


def test_gradients_through_a_state_are_those_of_the_walk():
    with seeded(0):
        system = bank()
    u, state = normal(2, 40, 3).requires_grad_(), normal(2, 3, 4, seed=1).requires_grad_()
    leaves = (u, state, *system.parameters())
    found = []
    for y, after in (system(u, state), system.recurrent(u, state)):
        found.append(torch.autograd.grad((y.square().sum() + after.pow(3).sum()), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


# What is kept from call to call.


def test_a_frozen_layer_computes_its_factors_once_and_notices_every_change(monkeypatch):
    from provenn.nn import _lssl_system

    calls = []
    plain = _lssl_system.factorize
    monkeypatch.setattr(_lssl_system, "factorize", lambda *given: calls.append(1) or plain(*given))
    with seeded(0):
        layer = LSSL(3, 4).double()
    u = normal(2, 20, 3)

    def fresh(rate=1.0):
        return copy.deepcopy(layer)(u, None, rate)

    first = layer(u)
    assert torch.equal(layer(u), first)
    assert len(calls) == 1
    with torch.no_grad():
        layer.system.C.mul_(2)
    assert torch.equal(layer(u), fresh())  # C is trained, and no part of what is kept
    count = len(calls)
    layer(u)
    assert len(calls) == count
    layer.system.log_dt.data.add_(0.5)
    assert torch.equal(layer(u), fresh())
    layer.system.transition.d.data.mul_(1.1)
    assert torch.equal(layer(u), fresh())
    assert torch.equal(layer(u, None, 2.0), fresh(2.0))
    assert torch.equal(layer(u[:, :7]), copy.deepcopy(layer)(u[:, :7]))
    assert not torch.equal(layer(u), first)


def test_a_trained_layer_computes_anew_and_files_hold_no_cache():
    with seeded(0):
        layer = LSSL(3, 4, learn="shared").double()
    u = normal(2, 20, 3)
    layer(u).sum().backward()
    assert not layer.system._kept
    with torch.no_grad():
        before = layer(u)
        assert layer.system._kept
        layer.system.log_dt.data.add_(0.5)
        assert not torch.equal(layer(u), before)
    empty = io.BytesIO()
    torch.save(copy.deepcopy(layer).state_dict(), empty)
    assert not pickle.loads(pickle.dumps(layer)).system._kept


def test_a_layer_trains_after_inference_mode():
    layer = LSSL(3, 4)
    u = torch.randn(2, 9, 3, generator=generator(0))
    with torch.inference_mode():
        layer(u)
    layer(u).sum().backward()
    assert layer.system.C.grad is not None


def test_what_learns():
    frozen, shared, own = (LSSL(3, 4, learn=learn) for learn in ("none", "shared", "feature"))
    names = {name for name, _ in frozen.named_parameters()}
    assert names == {"system.C", "system.D", "output.weight", "output.bias"}
    assert shared.system.transition.p.shape == (4,)
    assert own.system.transition.p.shape == (3, 4)
    for layer in (shared, own):
        layer(torch.randn(2, 9, 3, generator=generator(0))).square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in layer.parameters())


def test_start_values():
    with seeded(0):
        layer = LSSL(2000, 2, channels=2)
    dt = layer.system.log_dt.exp()
    assert 1e-3 <= dt.min() < 1.1e-3
    assert 0.09 < dt.max() <= 1e-1
    assert abs(dt.log().mean() - math.log(1e-2)) < 0.1  # log-uniform: the middle of the logarithms
    for one in (layer.system.C, layer.system.D):  # 4000 and more draws of N(0, 1)
        assert abs(one.mean()) < 0.08
        assert abs(one.std() - 1) < 0.05


# Discretisation.


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_discretisation_is_scipys(measure, alpha):
    A, B = hippo(measure, 6, dtype=F64)
    system = (A.numpy(), B.numpy()[:, None], np.ones((1, 6)), np.zeros((1, 1)))
    expected = signal.cont2discrete(system, 0.03, method="gbt", alpha=alpha)
    dt = torch.tensor([0.03], dtype=F64)
    structured = StructuredTransition(measure, 6, dtype=F64)
    ours = (gbt(A, B, 0.03, alpha), *(t.discretize(dt, alpha) for t in (structured, DenseTransition(A, B))))
    for moving, entering in ours:
        np.testing.assert_allclose(moving.detach().reshape(6, 6), expected[0], atol=1e-13)
        np.testing.assert_allclose(entering.detach().reshape(6), expected[1][:, 0], atol=1e-13)


@pytest.mark.parametrize(("alpha", "order"), [(0.0, 1), (1.0, 1), (0.5, 2)])
def test_order_of_the_transform(alpha, order):
    """Over a fixed span of time the error against the exponential falls by 2^order when Δ halves."""
    A, B = hippo("legs", 4, dtype=F64)
    exact = linalg.expm(A.numpy())
    errors = []
    for steps in (256, 512, 1024):
        moving, _ = gbt(A, B, 1 / steps, alpha)
        errors.append(np.abs(np.linalg.matrix_power(moving.numpy(), steps) - exact).max())
    for coarse, fine in pairwise(errors):
        assert order - 0.1 < math.log2(coarse / fine) < order + 0.1


def test_the_bilinear_transform_keeps_stability():
    for seed in range(20):
        A = normal(5, 5, seed=seed)
        A = A - (torch.linalg.eigvals(A).real.max() + 1e-3) * torch.eye(5, dtype=F64)
        for dt in (1e-3, 1.0, 1e3):
            assert torch.linalg.eigvals(gbt(A, A[0], dt)[0]).abs().max() < 1
    assert (
        torch.linalg.eigvals(gbt(*hippo("legs", 8, dtype=F64), 1.0, 0.0)[0]).abs().max() > 1
    )  # forward Euler does not


def test_the_rate_scales_the_step():
    with seeded(0):
        layer = LSSL(3, 8).double()
    other = copy.deepcopy(layer)
    other.system.log_dt += math.log(2)
    torch.testing.assert_close(layer.kernel(30, 2.0), other.kernel(30), rtol=0, atol=1e-13)
    torch.testing.assert_close(layer.kernel(30, 0.5), other.kernel(30, 0.25), rtol=0, atol=1e-13)


def test_half_the_samples_at_twice_the_step_give_the_same_function():
    time = torch.arange(1, 1201, dtype=F64) / 1200
    u = torch.stack((torch.sin(9 * time), torch.cos(4 * time), time), -1)[None]
    with seeded(0):
        system = LSSL(3, 8, dt_min=1 / 1200, dt_max=1 / 1200).double().system
    whole, half = system(u)[:, 1::2], system(u[:, 1::2], None, 2.0)
    scale = float(whole.detach().abs().max())
    assert float((whole - half).detach().abs().max()) < 0.02 * scale
    assert float((whole - system(u[:, 1::2])).detach().abs().max()) > 0.15 * scale  # without the rate it is another one


# HiPPO and the structured class.


def test_legs_keeps_the_legendre_coefficients_of_the_past():
    """ẋ = (Ax + Bu)/t, the system that the matrices come from, reconstructs a cubic on [0, t] from four numbers."""
    A, B = (t.numpy() for t in hippo("legs", 4, dtype=F64))

    def u(t):
        return 1 - 3 * t + 2 * t**2 - 0.7 * t**3

    start = np.array([u(0.0), 0, 0, 0])  # all that is known of a moment is its value
    solution = integrate.solve_ivp(
        lambda t, x: (A @ x + B * u(t)) / t, (1e-9, 2.0), start, method="LSODA", rtol=1e-11, atol=1e-13
    )
    s = np.linspace(0, 2, 41)
    basis = [math.sqrt(2 * n + 1) * np.polynomial.legendre.Legendre.basis(n)(s - 1) for n in range(4)]
    np.testing.assert_allclose(solution.y[:, -1] @ np.array(basis), u(s), atol=1e-6)


def test_lagt_by_its_definition():
    A, B = hippo("lagt", 5, dtype=F64)
    expected = [[0.5 if n == k else 0.0 for k in range(5)] for n in range(5)]
    expected = [[expected[n][k] - (1.0 if n >= k else 0.0) for k in range(5)] for n in range(5)]
    assert A.tolist() == expected
    assert B.tolist() == [1.0] * 5


@pytest.mark.parametrize("measure", ["legs", "lagt", "legt"])
@pytest.mark.parametrize("N", [1, 2, 3, 8, 64])
def test_the_structured_class_holds_hippo(measure, N):
    A, B = hippo(measure, N, dtype=F64)
    one = StructuredTransition(measure, N, trainable=False, dtype=F64)
    found, entering = one.dense()
    scale = float(A.abs().max())
    torch.testing.assert_close(found / scale, A / scale, rtol=0, atol=1e-12)
    torch.testing.assert_close(entering, B, rtol=0, atol=1e-12)
    x = normal(7, N)
    torch.testing.assert_close(one(x) / scale, x @ A.T / scale, rtol=0, atol=1e-12)
    for delta in (1e-4, 0.05, 1.0, 30.0):
        expected = torch.linalg.solve(torch.eye(N, dtype=F64) - delta * A, x.T).T
        torch.testing.assert_close(one.solve(x, delta), expected, rtol=0, atol=1e-11)


def test_the_solve_passes_where_i_plus_delta_pdq_vanishes():
    """For LegS 1 + δ p d q = 1 − δn is 0 at n = 20 for δ = 1/20, though I − δA is regular."""
    A, _ = hippo("legs", 32, dtype=F64)
    x = normal(3, 32)
    found = StructuredTransition("legs", 32, dtype=F64).solve(x, 0.05)
    expected = torch.linalg.solve(torch.eye(32, dtype=F64) - 0.05 * A, x.T).T
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("measure", ["legs", "legt", "lagt"])
def test_trained_structured_systems_against_dense_ones(measure):
    """Away from the start values; each of T's bands, P, Q and D counts."""
    with seeded(3):
        one = trained(measure, 3)().double()
    A, B = one.dense()
    dt = torch.tensor([1e-2, 0.1, 0.5], dtype=F64)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        for found, expected in zip(one.discretize(dt, alpha), gbt(A, B, dt, alpha), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        x, u = normal(2, 3, 4), normal(2, 3, seed=1)
        moving, entering = gbt(A, B, dt, alpha)
        expected = (moving @ x[..., None])[..., 0] + entering * u[..., None]
        torch.testing.assert_close(one.advance(x, u, dt, alpha), expected, rtol=1e-10, atol=1e-10)


def test_tridiagonal_solves_and_their_derivatives():
    bands = [0.3 * normal(2, 4), 2 + 0.3 * normal(2, 5, seed=1), 0.3 * normal(2, 4, seed=2)]
    right = normal(3, 2, 5, seed=3)
    T = torch.diag_embed(bands[1]) + torch.diag_embed(bands[0], -1) + torch.diag_embed(bands[2], 1)
    x = tridiagonal_solve(*bands, right)
    torch.testing.assert_close(x, torch.linalg.solve(T, right[..., None])[..., 0], rtol=0, atol=1e-13)
    torch.testing.assert_close(tridiagonal_product(*bands, x), right, rtol=0, atol=1e-13)
    free = [one.requires_grad_() for one in (*bands, right)]
    assert torch.autograd.gradcheck(tridiagonal_solve, free)
    assert torch.autograd.gradgradcheck(tridiagonal_solve, free)


def test_products_and_solves_grow_linearly():
    """The slope of log time over log N, half way to the 2 of dense matrices at most.

    Sizes take turns, and the least of many times counts, as other work on the machine only adds to them.
    """
    sizes = (512, 4096)
    systems = {N: (StructuredTransition("lagt", N, trainable=False), torch.ones(8, N)) for N in sizes}
    times = dict.fromkeys(sizes, math.inf)
    for _ in range(25):
        for N, (one, x) in systems.items():
            began = time.process_time()
            one.solve(one(x), 0.1)
            times[N] = min(times[N], time.process_time() - began)
    assert math.log(times[4096] / times[512]) / math.log(8) < 1.5


# Relations.


def test_the_gate_of_a_scalar_system_is_a_sigmoid():
    for z in (-3.0, 0.0, 1.7):
        moving, entering = gbt(-torch.ones(1, 1, dtype=F64), torch.ones(1, dtype=F64), math.exp(z), alpha=1.0)
        gate = 1 / (1 + math.exp(-z))
        assert moving.item() == pytest.approx(1 - gate, abs=1e-15)
        assert entering.item() == pytest.approx(gate, abs=1e-15)


def test_a_gated_recurrence_is_a_system():
    z, u = normal(3), normal(2, 20, 3, seed=1)
    h, expected = torch.zeros(2, 3, dtype=F64), []
    for u_t in u.unbind(1):
        h = (1 - torch.sigmoid(z)) * h + torch.sigmoid(z) * u_t
        expected.append(h)
    system = LinearStateSpace.from_gate(z)
    torch.testing.assert_close(system(u)[..., 0].detach(), torch.stack(expected, 1), rtol=0, atol=1e-13)
    assert set(system.state_dict()) == {"C", "D", "log_dt", "transition.A", "transition.B"}


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_gates_that_follow_the_input(dtype):
    z, u, h = (3 * normal(2, 20, 3)).to(dtype), normal(2, 20, 3, seed=1).to(dtype), normal(2, 3, seed=2).to(dtype)
    z[0, 3], z[0, 4] = 1e5, -1e5  # e^z has no float, the gate has
    found = gated_recurrence(z, u, h)
    for t in range(20):
        h = (1 - torch.sigmoid(z[:, t])) * h + torch.sigmoid(z[:, t]) * u[:, t]
        torch.testing.assert_close(found[:, t], h, rtol=0, atol=1e-6 if dtype is torch.float32 else 1e-13)


@pytest.mark.parametrize("taps", [1, 2, 5])
def test_a_finite_convolution_is_a_system(taps):
    kernel, u = normal(3, taps), normal(2, 20, 3, seed=1)
    expected = torch.nn.functional.conv1d(nn.functional.pad(u.mT, (taps - 1, 0)), kernel.flip(-1)[:, None], groups=3).mT
    system = LinearStateSpace.from_convolution(kernel)
    torch.testing.assert_close(system(u)[..., 0].detach(), expected, rtol=0, atol=1e-13)
    found = system.kernel(taps + 4)[:, 0].detach()
    torch.testing.assert_close(found, nn.functional.pad(kernel, (0, 4)), rtol=0, atol=1e-14)


def field(u, x):
    return torch.tanh(1.5 * x.flip(-1) + u)


def test_picard_iteration_solves_the_nonlinear_equation():
    dt, steps = 0.01, 200
    u, start = normal(1, steps, 2), normal(1, 2, seed=1)
    x, expected = start, []
    for u_t in u.unbind(1):  # backward Euler, each step's equation by fixed-point iteration
        after = x
        for _ in range(60):
            after = (x + dt * field(u_t, after)) / (1 + dt)
        x = after
        expected.append(x)
    expected = torch.stack(expected, 1)
    errors = [float((picard_iteration(field, u, start, dt, depth) - expected).abs().max()) for depth in (1, 4, 8, 24)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-10


def test_picard_iteration_approaches_the_differential_equation():
    def solve(steps):
        grid = torch.linspace(0, 1, steps + 1, dtype=F64)[1:, None]
        u = torch.cat((torch.sin(3 * grid), torch.cos(2 * grid)), -1)[None]
        return picard_iteration(field, u, torch.tensor([[0.3, -0.5]], dtype=F64), 1 / steps, 30)[0, -1].numpy()

    def slope(t, x):
        return -x + np.tanh(1.5 * x[::-1] + np.array([math.sin(3 * t), math.cos(2 * t)]))

    exact = integrate.solve_ivp(slope, (0, 1), [0.3, -0.5], rtol=1e-10, atol=1e-12).y[:, -1]
    coarse, fine = (np.abs(solve(steps) - exact).max() for steps in (100, 200))
    assert fine < 2e-3
    assert 0.9 < math.log2(coarse / fine) < 1.1


# The rest.


@pytest.mark.parametrize("length", range(1, 18))
def test_krylov_equals_powers_one_by_one(length):
    A, b = normal(2, 4, 4) / 2, normal(2, 4, seed=1)
    expected = torch.stack([(torch.linalg.matrix_power(A, i) @ b[..., None])[..., 0] for i in range(length)], -1)
    torch.testing.assert_close(krylov(length, A, b), expected, rtol=0, atol=1e-12)


def test_a_layer_takes_only_its_width():
    layer = LSSL(12)
    assert layer(torch.randn(2, 30, 12, generator=generator(0))).shape == (2, 30, 12)
    assert layer.system.d_state == 64


def test_the_layer_is_its_system_then_gelu_and_a_linear_map():
    with seeded(0):
        layer = LSSL(3, 4, channels=2).double()
    u = normal(2, 9, 3)
    y = layer.system(u)
    y = (0.5 * y * (1 + torch.erf(y / math.sqrt(2)))).reshape(2, 9, 6)  # all outputs of a feature side by side
    torch.testing.assert_close(layer(u), y @ layer.output.weight.T + layer.output.bias, rtol=0, atol=1e-13)


def test_parameter_groups():
    net = LSSLModel(2, 3, 4, 2, 5, learn="shared")
    groups = lssl_parameter_groups(net, 1e-2)
    assert [group["lr"] for group in groups] == [1e-2, 1e-4, 1e-3]
    assert len(groups[1]["params"]) == 2 * 7
    assert {id(p) for p in groups[2]["params"]} == {id(layer.system.log_dt) for layer in net.layers}
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in net.parameters())
    assert [group["lr"] for group in lssl_parameter_groups(LSSL(3, 4), 1e-2)] == [1e-2]
    torch.optim.Adam(groups)


def test_the_model_is_residual_and_pools():
    with seeded(0):
        net = LSSLModel(2, 3, 4, 2, 5).double()
    u = normal(2, 9, 2)
    x = net.encoder(u)
    for layer, norm in zip(net.layers, net.norms[:2], strict=True):
        x = x + layer(norm(x))
    x = net.norms[2](x)
    for pooling, pooled in (("mean", x.mean(1)), ("last", x[:, -1]), ("none", x)):
        net.pooling = pooling
        torch.testing.assert_close(net(u), net.head(pooled), rtol=0, atol=1e-12)


def test_dropout_acts_in_training_alone():
    with seeded(0):
        layer = LSSL(3, 4, dropout=0.5)
        u = torch.randn(2, 9, 3)
        assert not torch.equal(layer(u), layer(u))
        layer.eval()
        assert torch.equal(layer(u), layer(u))


def test_inference_keeps_states_in_float64_unless_told_otherwise():
    layer = LSSL(3, 4)
    u = torch.randn(2, 3, generator=generator(0))
    assert layer.step(u)[1].dtype == F64
    assert layer.step(u)[0].dtype == torch.float32
    assert layer.step(u, torch.zeros(2, 3, 4))[1].dtype == torch.float32


def test_no_sequences_through_many_blocks():
    layer = LSSL(3, 4).double()
    y, after = layer(torch.zeros(0, 100, 3, dtype=F64), torch.zeros(0, 3, 4, dtype=F64))
    assert y.shape == (0, 100, 3)
    assert after.shape == (0, 3, 4)


def test_a_compiled_system_takes_one_length_after_another():
    with seeded(0):
        system = bank()
    torch.compiler.reset()
    with plain_signatures(), torch.no_grad():
        compiled = torch.compile(system, backend="eager", fullgraph=True)
        for batch, length in ((2, 9), (3, 5)):  # the second makes sizes symbols
            u = normal(batch, length, 3)
            torch.testing.assert_close(compiled(u), system(u), rtol=0, atol=1e-12)
