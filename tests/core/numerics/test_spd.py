"""Functions of symmetric matrices against SciPy, decimals and finite differences."""

import numpy as np
import pytest
import scipy.linalg
import torch

from provenn.contracts.watch import plain_signatures
from provenn.core.numerics.spd import (
    clamp_eigenvalues,
    lyapunov,
    spd_log,
    spd_power,
    symmetric_exp,
    symmetric_function,
)

EXPONENTS = [0.5, -0.5, 0.25, 1.0, 1.5, -1.0, 2.0, 0.0]


def rotation(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def spd(eigenvalues, seed=0):
    U = rotation(len(eigenvalues), seed)
    return U @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ U.T


SPECTRA = {
    "apart": [0.3, 1.0, 2.5, 7.0],
    "equal": [2.0, 2.0, 2.0, 2.0],
    "two pairs": [0.5, 0.5, 3.0, 3.0],
    "close": [1.0, 1.0 + 1e-9, 1.0 + 2e-5, 4.0],
}


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_powers_are_scipys(exponent):
    A = spd(SPECTRA["apart"])
    theirs = scipy.linalg.fractional_matrix_power(A.numpy(), exponent)
    np.testing.assert_allclose(spd_power(A, exponent), theirs, atol=1e-10)


def test_logarithm_and_exponential_are_scipys_and_inverse():
    A = spd(SPECTRA["apart"])
    np.testing.assert_allclose(spd_log(A), scipy.linalg.logm(A.numpy()), atol=1e-12)
    np.testing.assert_allclose(symmetric_exp(A), scipy.linalg.expm(A.numpy()), rtol=1e-12)
    torch.testing.assert_close(symmetric_exp(spd_log(A)), A)


FUNCTIONS = {
    **{f"power {p}": (lambda A, p=p: spd_power(A, p)) for p in EXPONENTS},
    "log": spd_log,
    "exp": symmetric_exp,
    "clamp": lambda A: clamp_eigenvalues(A, 1.7),
}


def symmetric(A):
    return 0.5 * (A + A.mT)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_by_finite_differences_also_at_equal_eigenvalues(name, spectrum):
    A = torch.stack([spd(SPECTRA[spectrum]), spd([1.0, 2.0, 3.0, 4.0], seed=1)]).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: FUNCTIONS[name](symmetric(A)), (A,))


@pytest.mark.parametrize("gap", [1e-14, 1e-11, 1e-8, 1e-6, 1e-4, 2e-3, 0.02, 0.5, 3.0, 50.0, 1e6])
def test_divided_differences_lose_no_digits(gap):
    """Against the same quotients in 50 digits."""
    from decimal import Decimal, getcontext

    getcontext().prec = 60
    low = 0.7
    high = low * (1 + gap)
    a, b = Decimal(high), Decimal(low)
    A = torch.diag(torch.tensor([high, low], dtype=torch.float64)).requires_grad_()
    V = torch.tensor([[0.0, 0.5], [0.5, 0.0]], dtype=torch.float64)
    exact = {"log": (a.ln() - b.ln()) / (a - b)}
    for p in EXPONENTS:
        exact[f"power {p}"] = (a ** Decimal(p) - b ** Decimal(p)) / (a - b)
    if high < 500:
        exact["exp"] = (a.exp() - b.exp()) / (a - b)
    for name, quotient in exact.items():
        # The derivative along an off-diagonal direction of a diagonal matrix is the divided difference itself.
        (grad,) = torch.autograd.grad((FUNCTIONS[name](A) * V).sum(), A)
        got = grad[0, 1].item() + grad[1, 0].item()
        assert got == pytest.approx(float(quotient), rel=2e-13, abs=1e-300), name


@pytest.mark.parametrize("scale", [1e-25, 1e-20, 1e10, 1e22])
def test_float32_gradients_of_tiny_and_huge_matrices(scale):
    """The product of two eigenvalues leaves the range of float32 here, their powers do not."""
    for exponent in (-0.5, 0.25, 0.7):
        single = (scale * torch.diag(torch.tensor([1.0, 1.0, 1.5, 2.0]))).requires_grad_()
        double = single.detach().double().requires_grad_()
        ours, theirs = (torch.autograd.grad(spd_power(A, exponent).sum(), A)[0] for A in (single, double))
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["power 0.5", "power -0.5", "power 0.25", "log"])
def test_float32_over_four_decades_gives_finite_gradients(name):
    A = spd([1e-2, 1e-2, 1.0, 100.0]).float().requires_grad_()
    (grad,) = torch.autograd.grad(FUNCTIONS[name](A).sum(), A)
    exact = A.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad(FUNCTIONS[name](exact).sum(), exact)
    assert (grad.double() - theirs).abs().max() <= 0.05 * theirs.abs().max()


def test_only_the_symmetric_part_is_read_and_the_result_is_symmetric():
    A = spd(SPECTRA["apart"])
    skew = torch.triu(torch.ones(4, 4, dtype=torch.float64), 1)
    torch.testing.assert_close(spd_log(A + skew - skew.T), spd_log(A))
    root = spd_power(A, 0.5)
    assert torch.equal(root, root.T)


def test_clamping_keeps_what_is_large_and_stops_gradients_of_the_rest():
    A = spd([1e-6, 1e-5, 1.0, 2.0]).requires_grad_()
    clamped = clamp_eigenvalues(A, 1e-4)
    eigenvalues = torch.linalg.eigvalsh(clamped)
    torch.testing.assert_close(eigenvalues, torch.tensor([1e-4, 1e-4, 1.0, 2.0], dtype=torch.float64))
    (grad,) = torch.autograd.grad(clamped.trace(), A)
    U = torch.linalg.eigh(A.detach())[1]
    torch.testing.assert_close((U.T @ grad @ U).diagonal(), torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64))


def test_any_function_may_be_given():
    A = spd(SPECTRA["two pairs"]).requires_grad_()
    cube = symmetric_function(A, lambda x: x**3, lambda a, b: a * a + a * b + b * b)
    torch.testing.assert_close(cube, A @ A @ A)
    (ours,) = torch.autograd.grad(cube[0, 1], A)
    (theirs,) = torch.autograd.grad((symmetric(A) @ symmetric(A) @ symmetric(A))[0, 1], A)
    torch.testing.assert_close(ours, theirs)


def test_lyapunov_is_scipys_and_differentiable_twice():
    draws = torch.Generator().manual_seed(3)
    P, V = spd(SPECTRA["two pairs"]), torch.randn(4, 4, generator=draws, dtype=torch.float64)
    np.testing.assert_allclose(
        lyapunov(P, V), scipy.linalg.solve_sylvester(P.numpy(), P.numpy(), V.numpy()), atol=1e-12
    )
    P, V = spd([1.0, 1.0, 2.0]).requires_grad_(), V[:3, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda P, V: lyapunov(symmetric(P), V), (P, V))
    assert torch.autograd.gradgradcheck(lambda P, V: lyapunov(symmetric(P), V), (P, V))
    many = lyapunov(torch.stack([P, 2 * P]), V)
    torch.testing.assert_close(many[1], many[0] / 2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_torch_func_maps_and_differentiates(name):
    function = FUNCTIONS[name]
    many = torch.stack([spd(SPECTRA["two pairs"]), spd(SPECTRA["apart"], seed=1)])
    torch.testing.assert_close(torch.func.vmap(function, in_dims=2)(many.movedim(0, 2)), function(many))
    by_A = torch.func.grad(lambda A: function(A).square().sum())
    torch.testing.assert_close(torch.func.vmap(by_A)(many), torch.stack([by_A(A) for A in many]))
    jacobian = torch.func.jacrev(function)(many[0])
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(function, many[0]))


def test_torch_func_maps_lyapunov_over_either_side_and_both():
    P = torch.stack([spd(SPECTRA["two pairs"]), spd(SPECTRA["apart"], seed=1)])
    V = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    map_over = torch.func.vmap
    torch.testing.assert_close(map_over(lyapunov)(P, V), lyapunov(P[:, None], V))
    torch.testing.assert_close(map_over(lyapunov, (None, 1))(P[0], V), lyapunov(P[0], V.movedim(1, 0)))
    torch.testing.assert_close(map_over(lyapunov, (0, None))(P, V), lyapunov(P[:, None, None], V))
    by_P = torch.func.jacrev(lambda P: lyapunov(P, V[0, 0]))(P[0])
    torch.testing.assert_close(by_P, torch.autograd.functional.jacobian(lambda P: lyapunov(P, V[0, 0]), P[0]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_derivative_is_refused_and_never_taken_for_zero(name):
    """Also where the gradient that enters is a constant, which once_differentiable would let pass."""
    A = spd(SPECTRA["apart"]).requires_grad_()
    (grad,) = torch.autograd.grad(FUNCTIONS[name](A).sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        (grad.square().sum() + A.sum()).backward()


def test_autocast_does_not_narrow_the_arithmetic():
    A = spd(SPECTRA["apart"]).float()
    for function in (*FUNCTIONS.values(), lambda A: lyapunov(A, A)):
        with torch.autocast("cpu", torch.bfloat16):
            inside = function(A)
        assert torch.equal(inside, function(A))


def test_bad_input():
    A = spd([-0.5, 1.0, 2.0])
    for function in (spd_log, lambda A: spd_power(A, 0.5), lambda A: lyapunov(A, A)):
        with pytest.raises(ValueError, match=r"positive definite, got the eigenvalue -0\.(5|49)"):
            function(A)
    with pytest.raises(ValueError, match="exponent"):
        spd_power(A, float("nan"))
    with pytest.raises(TypeError, match="minimum"):
        clamp_eigenvalues(A, "small")


def test_compiled_and_exported_programs_are_the_same_functions():
    A = spd(SPECTRA["two pairs"]).requires_grad_()

    class Chain(torch.nn.Module):
        def forward(self, A):
            return symmetric_exp(0.1 * spd_log(A)) @ spd_power(A, 0.5)

    chain = Chain()
    results = []
    with plain_signatures():
        for forward in (chain, torch.compile(chain, backend="eager", fullgraph=True)):
            out = forward(A)
            results.append((out, *torch.autograd.grad(out.square().sum(), A)))
        with torch.no_grad():
            exported = torch.export.export(chain, (A.detach(),)).module()(A)
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(exported, results[0][0].detach())
