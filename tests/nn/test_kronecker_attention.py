"""Tensor attention: the exact form, the polynomial one, the layer, and the construction for Match3."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from provenn.contracts import BadInput, FunctionCase, ModuleCase, Symmetry
from provenn.contracts.watch import plain_signatures
from provenn.core.experiment.accounting import TensorMemory
from provenn.core.experiment.seeding import seeded
from provenn.nn import KroneckerAttention, _kronecker_attention_fast, match3_layer
from provenn.nn._kronecker_attention_polynomial import monomials, polynomial_plan
from provenn.nn.functional import tensor_attention, tensor_attention_poly


def uniform(*shape, seed=0, size=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return size * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1).to(dtype)


def operands(lead=(), queries=5, lengths=(5, 5), dim=3, value=2, size=1.0, value_size=1.0):
    """q, keys and values, uniform in [−size, size] and [−value_size, value_size]."""
    q = uniform(*lead, queries, dim, seed=1, size=size)
    ks = [uniform(*lead, n, dim, seed=10 + i, size=size) for i, n in enumerate(lengths)]
    vs = [uniform(*lead, n, value, seed=20 + i, size=value_size) for i, n in enumerate(lengths)]
    return q, ks, vs


def dense(q, ks, vs, mask=None, scale=None):
    """Every tuple at once, by einsum and softmax."""
    names = "jkl"[: len(ks)]
    terms = ",".join(f"...{name}d" for name in names)
    scores = torch.einsum(f"...id,{terms}->...i{names}", q, *ks) * (1 / q.shape[-1] if scale is None else scale)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -math.inf)
    elif mask is not None:
        scores = scores + mask
    weights = scores.flatten(-len(ks)).softmax(-1).nan_to_num(0.0).unflatten(-1, scores.shape[-len(ks) :])
    terms = ",".join(f"...{name}e" for name in names)
    return torch.einsum(f"...i{names},{terms}->...ie", weights, *vs)


def pairs_up_to(queries, length):
    """(i, j, k): both factors at or before the query, the last query being the last token."""
    place = torch.arange(length - queries, length)[:, None, None]
    j = torch.arange(length)
    return (j[:, None] <= place) & (j[None, :] <= place)


def gradients(output, q, ks, vs):
    return torch.autograd.grad((output * uniform(*output.shape, seed=99)).sum(), [q, *ks, *vs])


def layer(*arguments, seed=0, **options):
    with seeded(seed):
        return KroneckerAttention(*arguments, **options).double()


# The suites.


def tokens(generator, dtype, batch):
    return (torch.randn(batch, 4, 6, generator=generator, dtype=torch.float64).to(dtype),)


ORDER = torch.tensor([3, 0, 1, 2])
PERMUTATION = Symmetry(
    "permutation of the tokens",
    before=lambda inputs: tuple(x[:, ORDER] for x in inputs),
    after=lambda output: output[:, ORDER],
)


def bad_layer(argument, error=ValueError, **options):
    return BadInput(argument, lambda: KroneckerAttention(**{"d_model": 6, "num_heads": 2, **options}), error)


def bad_call(argument, error=ValueError, *, x=None, mask=None, **options):
    def call():
        with seeded(0):
            module = KroneckerAttention(6, 2, **options)
        module(torch.ones(2, 4, 6) if x is None else x, mask)

    return BadInput(argument, call, error)


POLY = {"method": "poly", "bound": 1.0}
BAD_LAYERS = (
    bad_layer("d_model", d_model=5),
    bad_layer("d_model", d_model=0),
    bad_layer("num_heads", TypeError, num_heads=2.0),
    bad_layer("order", order=1),
    bad_layer("method", method="fast"),
    bad_layer("head_dim", head_dim=0),
    bad_layer("dropout", dropout=1.0),
    bad_layer("normalize_qk", normalize_qk="norm"),
    bad_layer("bound", method="poly"),
    bad_layer("bound", normalize_qk="tanh"),
    bad_layer("bound", bound=-1.0),
    bad_layer("degree", **POLY, degree=0),
    bad_layer("tol", **POLY, tol=0.0),
    bad_layer("basis", **POLY, basis="legendre"),
    bad_layer("max_rank", method="poly", bound=2.0, max_rank=100),
    bad_layer("block", block=0),
    bad_call("x", x=torch.ones(2, 4, 5)),
    bad_call("x", x=torch.ones(4, 6)),
    bad_call("mask", TypeError, mask=torch.ones(4, 4, dtype=torch.int64)),
    bad_call("mask", mask=torch.ones(4, 3, dtype=torch.bool)),
    bad_call("mask", mask=torch.ones(4, 4, dtype=torch.bool), **POLY),
    bad_call("bound", x=100 * torch.ones(2, 4, 6), **POLY),
)


def bad_operands(function, argument, error=ValueError, **changes):
    def call():
        q, ks, vs = operands((2,), lengths=(4, 4), queries=4)
        function(**{"q": q, "ks": ks, "vs": vs, **changes})

    return BadInput(argument, call, error)


def both(function):
    keys = [uniform(2, 4, 3), uniform(2, 4, 3)]
    return (
        bad_operands(function, "vs", vs=keys[:1]),
        bad_operands(function, "ks", ks=[], vs=[]),
        bad_operands(function, "ks", TypeError, ks=uniform(2, 4, 3)),
        bad_operands(function, "ks", ks=[uniform(2, 4, 2), keys[1]]),
        bad_operands(function, "ks", ks=[uniform(1, 4, 3), keys[1]]),
        bad_operands(function, "ks", ks=[uniform(2, 5, 3), keys[1]], vs=keys, causal=True),
        bad_operands(function, "vs", vs=[uniform(2, 5, 2), keys[1]]),
        bad_operands(function, "vs", vs=[uniform(2, 4, 2), keys[1]]),
        bad_operands(function, "vs", TypeError, vs=[one.float() for one in keys]),
        bad_operands(function, "q", q=uniform(3)),
        bad_operands(function, "causal", q=uniform(2, 5, 3), causal=True),
    )


CASES = [
    ModuleCase(
        part="provenn.nn.KroneckerAttention",
        make=lambda **options: KroneckerAttention(6, 2, **options),
        inputs=tokens,
        symmetries=(PERMUTATION,),
        bad_input=BAD_LAYERS,
    ),
    ModuleCase(
        part="provenn.nn.KroneckerAttention",
        label="causal, order 4",
        make=lambda: KroneckerAttention(6, 2, order=4, causal=True, normalize_qk="tanh", bound=2.0, block=64),
        inputs=tokens,
        causal_dim=1,
        bad_input=BAD_LAYERS[:1],
    ),
    ModuleCase(
        part="provenn.nn.KroneckerAttention",
        label="polynomial",
        make=lambda: KroneckerAttention(6, 2, method="poly", normalize_qk="tanh", bound=1.0),
        inputs=tokens,
        symmetries=(PERMUTATION,),
        bad_input=BAD_LAYERS[:1],
    ),
    ModuleCase(
        part="provenn.nn.KroneckerAttention",
        label="polynomial, causal",
        make=lambda: KroneckerAttention(
            6, 3, method="poly", causal=True, normalize_qk="tanh", bound=1.2, basis="chebyshev", bias=False
        ),
        inputs=tokens,
        causal_dim=1,
        bad_input=BAD_LAYERS[:1],
    ),
    FunctionCase(
        part="provenn.nn.functional.tensor_attention",
        call=lambda: tensor_attention(*operands((2, 3)), causal=True),
        bad_input=(
            *both(tensor_attention),
            bad_operands(tensor_attention, "mask", TypeError, mask=torch.ones(4, 4, dtype=torch.int64)),
            bad_operands(tensor_attention, "mask", mask=torch.ones(3, 4, dtype=torch.bool)),
            bad_operands(tensor_attention, "mask", mask=torch.ones(1, 1, 1, 1, 1, dtype=torch.bool)),
            bad_operands(tensor_attention, "mask", mask=torch.zeros(4, 4, requires_grad=True)),
            bad_operands(tensor_attention, "scale", scale=math.nan),
            bad_operands(tensor_attention, "block", block=0),
        ),
    ),
    FunctionCase(
        part="provenn.nn.functional.tensor_attention_poly",
        call=lambda: tensor_attention_poly(*operands((2, 3), size=0.5), causal=True),
        bad_input=(
            *both(tensor_attention_poly),
            bad_operands(tensor_attention_poly, "bound", bound=0.5),
            bad_operands(tensor_attention_poly, "bound", bound=0.0),
            bad_operands(tensor_attention_poly, "bound", q=torch.full((2, 4, 3), math.nan, dtype=torch.float64)),
            bad_operands(tensor_attention_poly, "degree", degree=-1),
            bad_operands(tensor_attention_poly, "degree", TypeError, degree=2.0),
            bad_operands(tensor_attention_poly, "tol", tol=1.0),
            bad_operands(tensor_attention_poly, "tol", tol=1e-15, bound=2.0, basis="chebyshev"),
            bad_operands(tensor_attention_poly, "bound", bound=5.0, degree=2, basis="chebyshev"),
            bad_operands(tensor_attention_poly, "basis", basis="fourier"),
            bad_operands(tensor_attention_poly, "max_rank", max_rank=5),
            bad_operands(tensor_attention_poly, "max_rank", bound=1000.0),
        ),
    ),
    FunctionCase(
        part="provenn.nn.match3_layer",
        call=lambda: match3_layer(5, 20.0)(torch.tensor([[0, 1, 2]])),
        bad_input=(
            BadInput("M", lambda: match3_layer(1, 5.0)),
            BadInput("M", lambda: match3_layer(7.0, 5.0), TypeError),
            BadInput("scale", lambda: match3_layer(7, 0.0)),
            BadInput("tokens", lambda: match3_layer(7, 5.0)(torch.tensor([[0, 7]]))),
        ),
    ),
]


# The exact form.


def test_exact_equals_a_triple_loop():
    n, d, e = 5, 3, 2
    q, (k1, k2), (v1, v2) = operands(size=3.0)
    wanted = torch.zeros(n, e, dtype=torch.float64)
    for i in range(n):
        total, sums = 0.0, [0.0] * e
        for j in range(n):
            for k in range(n):
                weight = math.exp(sum(float(q[i, c] * k1[j, c] * k2[k, c]) for c in range(d)) / d)
                total += weight
                for c in range(e):
                    sums[c] += weight * float(v1[j, c] * v2[k, c])
        wanted[i] = torch.tensor([one / total for one in sums], dtype=torch.float64)
    torch.testing.assert_close(tensor_attention(q, [k1, k2], [v1, v2]), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_order_two_is_ordinary_attention_with_scale_one_over_d(causal):
    q, ks, vs = operands((2, 3), queries=6, lengths=(6,), dim=4, size=3.0)
    wanted = scaled_dot_product_attention(q, ks[0], vs[0], is_causal=causal, scale=1 / 4)
    torch.testing.assert_close(tensor_attention(q, ks, vs, causal=causal), wanted)


@pytest.mark.parametrize("lengths", [(4,), (5, 3), (3, 4, 2)])
@pytest.mark.parametrize("block", [1, 7, 40, 2**20])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_change_neither_output_nor_gradients(lengths, block, masked):
    # More queries, keys and heads than fit in a block, of different numbers, in every direction.
    q, ks, vs = operands((2, 2), queries=6, lengths=lengths, size=4.0)
    for one in (q, *ks, *vs):
        one.requires_grad_()
    mask = uniform(2, 1, 6, *lengths, seed=5) > -0.4 if masked else None
    output, wanted = tensor_attention(q, ks, vs, mask, block=block), dense(q, ks, vs, mask)
    torch.testing.assert_close(output, wanted)
    found = gradients(output, q, ks, vs)
    for one, other in zip(found, gradients(wanted, q, ks, vs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("block", [1, 30, 2**20])
@pytest.mark.parametrize("queries", [3, 6])
def test_causal_pairs_lie_at_or_before_the_query(block, queries):
    q, ks, vs = operands((2,), queries=queries, lengths=(6, 6), size=3.0)
    for one in (q, *ks, *vs):
        one.requires_grad_()
    output = tensor_attention(q, ks, vs, causal=True, block=block)
    wanted = dense(q, ks, vs, pairs_up_to(queries, 6))
    torch.testing.assert_close(output, wanted)
    for one, other in zip(gradients(output, q, ks, vs), gradients(wanted, q, ks, vs), strict=True):
        torch.testing.assert_close(one, other)


def test_causal_of_order_four():
    q, ks, vs = operands(queries=4, lengths=(4, 4, 4), size=3.0)
    place, j = torch.arange(4)[:, None, None, None], torch.arange(4)
    mask = (j[:, None, None] <= place) & (j[:, None] <= place) & (j <= place)
    torch.testing.assert_close(tensor_attention(q, ks, vs, causal=True, block=9), dense(q, ks, vs, mask))


@pytest.mark.parametrize("shape", [(5, 4), (1, 4), (5, 1), (6, 1, 1), (3, 1, 5, 4), (2, 1, 6, 5, 4)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_masks_broadcast_over_pairs_queries_and_heads(shape, kind):
    q, ks, vs = operands((2, 3), queries=6, lengths=(5, 4), size=2.0)
    mask = uniform(*shape, seed=7)
    mask = mask > -0.5 if kind == torch.bool else 3 * mask
    torch.testing.assert_close(tensor_attention(q, ks, vs, mask, block=50), dense(q, ks, vs, mask))


@pytest.mark.parametrize("block", [1, 2**20])
def test_a_query_that_sees_nothing_gets_zero_and_no_gradient(block):
    q, ks, vs = operands()
    for one in (q, *ks, *vs):
        one.requires_grad_()
    mask = torch.ones(5, 5, 5, dtype=torch.bool)
    mask[2] = False
    output = tensor_attention(q, ks, vs, mask, block=block)
    assert output.shape == (5, 2)
    assert not output[2].any()
    assert output[[0, 1, 3, 4]].all()
    found = gradients(output, q, ks, vs)
    assert all(one.isfinite().all() for one in found)
    assert not found[0][2].any()


def test_large_scores_do_not_overflow():
    # Scores reach ±1e6 / 3 in both signs; a softmax without its running maximum gives infinities.
    q, ks, vs = operands(size=100.0)
    for block in (1, 10, 2**20):
        for sign in (1, -1):
            torch.testing.assert_close(tensor_attention(sign * q, ks, vs, block=block), dense(sign * q, ks, vs))


def test_swapping_the_two_factors_changes_nothing():
    q, (k1, k2), (v1, v2) = operands((2,), lengths=(5, 4), size=2.0)
    torch.testing.assert_close(tensor_attention(q, [k1, k2], [v1, v2]), tensor_attention(q, [k2, k1], [v2, v1]))
    assert not torch.allclose(tensor_attention(q, [k1, k1], [v1, v1]), tensor_attention(q, [k1, k2], [v1, v2]))


def test_a_second_factor_of_ones_leaves_ordinary_attention():
    q, ks, vs = operands((2,), size=2.0)
    ones = [torch.ones_like(ks[0])], [torch.ones_like(vs[0])]
    output = tensor_attention(q, [ks[0], *ones[0]], [vs[0], *ones[1]])
    torch.testing.assert_close(output, scaled_dot_product_attention(q, ks[0], vs[0], scale=1 / 3))


def test_rows_sum_to_one():
    q, ks, vs = operands((2,), size=0.9)
    ones = [torch.ones_like(v) for v in vs]
    torch.testing.assert_close(tensor_attention(q, ks, ones), torch.ones_like(vs[0]))
    for causal in (False, True):
        torch.testing.assert_close(tensor_attention_poly(q, ks, ones, causal=causal)[0], torch.ones_like(vs[0]))


def test_scale_is_one_over_d_by_default_and_can_be_given():
    q, ks, vs = operands(dim=4)
    torch.testing.assert_close(tensor_attention(q, ks, vs), tensor_attention(q, ks, vs, scale=0.25))
    torch.testing.assert_close(tensor_attention(q, ks, vs, scale=2.0), dense(q, ks, vs, scale=2.0))


def test_low_precision_is_computed_in_float32():
    q, ks, vs = ([one.bfloat16() for one in part] for part in ([operands()[0]], *operands()[1:]))
    output = tensor_attention(q[0], ks, vs)
    assert output.dtype == torch.bfloat16
    wanted = dense(q[0].double(), [k.double() for k in ks], [v.double() for v in vs])
    torch.testing.assert_close(output.double(), wanted, rtol=2**-8, atol=1e-6)  # one rounding of the result


def test_there_is_no_second_derivative():
    q, ks, vs = operands()
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(tensor_attention(q, ks, vs).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def saved_numbers(n, **options):
    """How many numbers the forward pass keeps for the backward pass."""
    q, ks, vs = operands(queries=n, lengths=(n, n))
    for one in (q, *ks, *vs):
        one.requires_grad_()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = tensor_attention(q, ks, vs, **options)
    return sum(kept.values()), output


def test_training_keeps_numbers_per_token_not_per_triple():
    # Operands (3 + 2·3 + 2·2 a token) and the output with its log-sum-exp (3): 16 a token, where scores are n³.
    for n in (16, 64):
        assert saved_numbers(n)[0] <= 16 * n


def test_training_holds_a_few_blocks_at_its_peak():
    block, n = 2**12, 64
    q, ks, vs = operands(queries=n, lengths=(n, n))
    for one in (q, *ks, *vs):
        one.requires_grad_()
    with TensorMemory() as memory:
        gradients(tensor_attention(q, ks, vs, block=block), q, ks, vs)
    # Weights, slopes and their products with features (a third of a block each at these sizes), beside operands.
    assert memory.peak <= 8 * (6 * block + 60 * n)
    assert memory.peak < 8 * n**3 / 8


# The polynomial form.


def khatri_rao(first, second):
    return (first[:, None, :] * second[None, :, :]).flatten(0, 1)


def test_sums_over_pairs_factorise():
    u2, u3, v1, v2 = (uniform(7, width, seed=seed) for seed, width in enumerate((4, 4, 3, 3)))
    wanted = khatri_rao(u2, u3).T @ khatri_rao(v1, v2)
    found = _kronecker_attention_fast._totals([u2, u3], [v1, v2])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dim", "degree"), [(1, 5), (3, 4), (5, 3)])
def test_monomials_and_weights_expand_the_polynomial(dim, degree):
    # Oracle: every multi-index by brute force, and numpy's evaluation of Σ c_t s^t.
    x = uniform(4, dim)
    alphas = [a for a in itertools.product(range(degree + 1), repeat=dim) if sum(a) <= degree]
    wanted = torch.stack([x.pow(torch.tensor(a)).prod(dim=-1) for a in alphas], dim=-1)
    found = monomials(x, degree)
    assert found.shape[-1] == math.comb(dim + degree, degree) == len(alphas)
    torch.testing.assert_close(found.sort(dim=-1)[0], wanted.sort(dim=-1)[0])
    plan = polynomial_plan(dim, 3, 1.0, degree, 1e-3, "taylor", 10_000)
    u1, u2, u3 = (monomials(uniform(4, dim, seed=seed), degree) for seed in (1, 2, 3))
    entries = torch.einsum("ir,jr,kr,r->ijk", u1, u2, u3, u1.new_tensor(plan.weights))
    scores = torch.einsum("id,jd,kd->ijk", *(uniform(4, dim, seed=seed) for seed in (1, 2, 3))) / dim
    taylor = np.polynomial.Polynomial([1 / math.factorial(t) for t in range(degree + 1)])
    np.testing.assert_allclose(entries.numpy(), taylor(scores.numpy()), rtol=1e-12)


@pytest.mark.parametrize("basis", ["taylor", "chebyshev"])
@pytest.mark.parametrize("reach", [0.125, 1.0, 3.375, 8.0])
def test_certified_errors_are_the_largest_on_a_fine_grid(basis, reach):
    x = np.linspace(-reach, reach, 20_001)
    for degree in (1, 4, 11):
        report = polynomial_plan(1, 3, reach ** (1 / 3), degree, 1e-3, basis, 100).report
        # In one feature the weights are the polynomial's coefficients.
        weights = polynomial_plan(1, 3, reach ** (1 / 3), degree, 1e-3, basis, 100).weights
        worst = np.abs(1 - np.exp(-x) * np.polynomial.Polynomial(weights)(x)).max()
        assert worst == pytest.approx(report.entry_error, rel=1e-4, abs=1e-9)


def test_chebyshev_needs_a_lower_degree():
    degrees = {}
    for basis in ("taylor", "chebyshev"):
        degrees[basis] = [polynomial_plan(4, 3, b, None, 1e-3, basis, 10**6).report.degree for b in (1.0, 1.5, 2.0)]
    assert all(one < other for one, other in zip(degrees["chebyshev"], degrees["taylor"], strict=True))


@pytest.mark.parametrize("basis", ["taylor", "chebyshev"])
def test_the_degree_is_the_smallest_that_keeps_the_tolerance(basis):
    for bound, tol in ((0.3, 1e-2), (1.0, 1e-6), (1.4, 0.5), (1.8, 1e-3)):
        report = polynomial_plan(2, 3, bound, None, tol, basis, 10**6).report
        assert report.entry_error <= tol
        if report.degree:
            below = polynomial_plan(2, 3, bound, report.degree - 1, tol, basis, 10**6).report
            assert below.entry_error > tol


def test_taylor_errors_of_the_card():
    # n = 6, d = 3, entries up to 0.7: the largest errors of an output over twenty draws, and their ranks.
    worst, ranks = np.zeros(4), []
    for seed in range(20):
        q, k1, k2, v1, v2 = (uniform(6, 3, seed=100 * seed + i, size=0.7) for i in range(5))
        wanted = dense(q, [k1, k2], [v1, v2])
        for place, degree in enumerate((1, 2, 3, 4)):
            found, report = tensor_attention_poly(q, [k1, k2], [v1, v2], degree=degree, bound=0.7)
            worst[place] = max(worst[place], (found - wanted).abs().max().item())
            assert (found - wanted).abs().max() <= report.output_error * 0.49  # no value is above 0.7²
            if not seed:
                ranks.append(report.rank)
    assert ranks == [4, 10, 20, 35]
    assert (worst < [4e-4, 2e-5, 6e-7, 2e-8]).all()
    assert (worst > [1e-5, 3e-7, 5e-9, 1e-10]).all()


@pytest.mark.parametrize("basis", ["taylor", "chebyshev"])
@pytest.mark.parametrize("lengths", [(6,), (5, 4), (3, 4, 5)])
@pytest.mark.parametrize("tol", [1e-2, 1e-5])
def test_outputs_keep_the_guarantee_at_the_corners(basis, lengths, tol):
    # Entries ±B with all sign patterns likely: scores reach ±Bᵏ, where the relative error is largest.
    generator = torch.Generator().manual_seed(0)
    q, ks, vs = operands((3,), queries=6, lengths=lengths)
    q, *ks = (0.9 * (torch.rand(one.shape, generator=generator) < 0.5).double().mul(2).sub(1) for one in (q, *ks))
    vs = [v.sign() for v in vs]
    found, report = tensor_attention_poly(q, ks, vs, tol=tol, basis=basis)
    error = (found - dense(q, ks, vs)).abs().max().item()
    assert 0 < error <= report.output_error
    assert report.output_error == pytest.approx(2 * report.entry_error / (1 - report.entry_error))
    assert report.bound == pytest.approx(0.9)


@pytest.mark.parametrize("block", [1, 200, 2**20])
@pytest.mark.parametrize("queries", [4, 7])
def test_causal_running_totals_equal_masked_attention(monkeypatch, block, queries):
    monkeypatch.setattr(_kronecker_attention_fast, "BLOCK", block)
    q, ks, vs = operands((2,), queries=queries, lengths=(7, 7), size=0.8)
    for one in (q, *ks, *vs):
        one.requires_grad_()
    found, report = tensor_attention_poly(q, ks, vs, tol=1e-10, causal=True)
    wanted = dense(q, ks, vs, pairs_up_to(queries, 7))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2 * report.output_error)
    for one, other in zip(gradients(found, q, ks, vs), gradients(wanted, q, ks, vs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_polynomial_gradients_are_those_of_exact_attention():
    q, ks, vs = operands((2,), lengths=(5, 4), size=0.9)
    for one in (q, *ks, *vs):
        one.requires_grad_()
    found = tensor_attention_poly(q, ks, vs, tol=1e-11, basis="chebyshev")[0]
    for one, other in zip(gradients(found, q, ks, vs), gradients(dense(q, ks, vs), q, ks, vs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_no_shift_is_taken_before_the_polynomial():
    # A polynomial of shifted scores has another ratio of weights: degree 1 gives (1 + s_j) / Σ (1 + s_j) as it is.
    q, ks, vs = operands(queries=4, lengths=(4, 4), size=0.8)
    weights = 1 + torch.einsum("id,jd,kd->ijk", q, *ks) / 3
    wanted = torch.einsum("ijk,je,ke->ie", weights / weights.sum((1, 2), keepdim=True), *vs)
    torch.testing.assert_close(tensor_attention_poly(q, ks, vs, degree=1)[0], wanted)


def test_a_denominator_that_is_not_positive_is_refused():
    ones = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="degree = 1 gives denominators"):
        tensor_attention_poly(2 * ones, [-ones, ones], [ones, ones], degree=1)
    output, report = tensor_attention_poly(2 * ones, [-ones, ones], [ones, ones], degree=2)  # even degrees stay above 0
    assert report.entry_error > 1
    assert report.output_error == math.inf
    torch.testing.assert_close(output, ones)


def test_errors_say_the_entry_and_the_rank_needed():
    q, ks, vs = operands(dim=4)
    q[2, 1] = -1.75
    with pytest.raises(ValueError, match=r"bound must be at least the largest entry of q and ks, 1\.75, got 1\.5"):
        tensor_attention_poly(q, ks, vs, bound=1.5)
    with pytest.raises(ValueError, match=r"max_rank must be at least 52360 .*got 20000"):
        tensor_attention_poly(q, ks, vs, bound=2.0)


@pytest.mark.parametrize("basis", ["taylor", "chebyshev"])
def test_float32_operands_keep_the_guarantee_where_terms_cancel(basis):
    # All scores are near −8: terms as large as e⁸ sum to e⁻⁸, of which float32 would leave no digit.
    q = torch.full((4, 1), 2.0)
    k1, k2 = 0.05 * uniform(6, 1, dtype=torch.float32) - 1.95, torch.full((6, 1), 2.0)
    vs = [uniform(6, 2, seed=seed, dtype=torch.float32) for seed in (1, 2)]
    found, report = tensor_attention_poly(q, [k1, k2], vs, bound=2.0, basis=basis)
    assert found.dtype == torch.float32
    wanted = dense(q.double(), [k1.double(), k2.double()], [v.double() for v in vs])
    assert (found - wanted).abs().max() <= report.output_error


def test_a_tolerance_below_rounding_is_refused():
    ones = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"tol = 0\.001 is out of reach for bound = 3"):
        tensor_attention_poly(3 * ones, [ones, ones], [ones, ones])


def test_a_large_bound_with_a_given_degree_has_no_guarantee():
    report = tensor_attention_poly(*operands(dim=1), degree=2, bound=1000.0)[1]
    assert report.entry_error == report.output_error == math.inf


def test_polynomial_memory_grows_as_the_number_of_tokens():
    peaks = []
    for n in (256, 512):
        q, ks, vs = operands(queries=n, lengths=(n, n), dim=4, size=0.5)
        for one in (q, *ks, *vs):
            one.requires_grad_()
        with TensorMemory() as memory:
            gradients(tensor_attention_poly(q, ks, vs)[0], q, ks, vs)
        peaks.append(memory.peak)
    assert peaks[1] <= 2.1 * peaks[0]
    assert peaks[1] < 8 * 512**2


# The layer.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_the_polynomial_layer_approximates_the_exact_one(order, causal):
    options = {"order": order, "normalize_qk": "clip", "bound": 0.8, "causal": causal}
    exact, fast = layer(8, 4, **options), layer(8, 4, method="poly", tol=1e-8, **options)
    fast.load_state_dict(exact.state_dict())
    x = 2 * torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(fast(x), exact(x), rtol=0, atol=1e-6)
    assert not torch.allclose(fast(x), layer(8, 4, order=order, causal=causal)(x), atol=1e-6)  # the bound matters


@pytest.mark.parametrize("normalize", [None, "tanh", "clip"])
def test_the_layer_is_projections_heads_and_attention(normalize):
    module = layer(6, 2, head_dim=4, normalize_qk=normalize, bound=None if normalize is None else 0.3)
    x = uniform(2, 5, 6, size=2.0)
    hold = {None: lambda y: y, "tanh": lambda y: 0.3 * torch.tanh(y / 0.3), "clip": lambda y: y.clip(-0.3, 0.3)}
    heads = []
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        q, k1, k2 = (hold[normalize](x @ p.weight[part].T + p.bias[part]) for p in (module.q_proj, *module.k_projs))
        v1, v2 = (x @ p.weight[part].T + p.bias[part] for p in module.v_projs)
        heads.append(dense(q, [k1, k2], [v1, v2]))
    wanted = torch.cat(heads, dim=-1) @ module.out_proj.weight.T + module.out_proj.bias
    torch.testing.assert_close(module(x), wanted)


def test_a_mask_on_pairs_hides_them_from_every_head():
    module = layer(6, 2)
    x, mask = uniform(2, 5, 6), torch.zeros(5, 5, dtype=torch.bool)
    mask[1:3, 2:4] = True
    changed = x.clone()
    changed[:, 4] += 1  # in no visible pair, so that only its own output may change
    torch.testing.assert_close(module(changed, mask)[:, :4], module(x, mask)[:, :4])
    changed[:, 3] += 1  # a second factor
    assert (module(changed, mask)[:, :4] - module(x, mask)[:, :4]).abs().amax(dim=-1).min() > 1e-6


def test_dropout_falls_on_the_output():
    module = layer(6, 2, dropout=0.5).train()
    x = uniform(1, 50, 6)
    with seeded(0):
        dropped = module(x)
    whole = module.eval()(x)
    zero = dropped == 0
    assert 0.35 < zero.double().mean() < 0.65
    torch.testing.assert_close(dropped[~zero], 2 * whole[~zero])


@pytest.mark.parametrize("options", [{}, {**POLY, "normalize_qk": "tanh"}])
def test_autocast_changes_rounding_alone(options):
    module, x = layer(6, 2, **options).float(), uniform(2, 5, 6, dtype=torch.float32)
    wanted = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = module(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0, atol=0.03)  # a few roundings of 2⁻⁸


# Match3.


def has_match(x, M):
    """(batch, n): whether −x_i is a sum of two tokens, by sets."""
    rows = []
    for row in x.tolist():
        sums = {(a + b) % M for a in row for b in row}
        rows.append([(-a) % M in sums for a in row])
    return torch.tensor(rows)


def test_match3_is_right_on_all_inputs_of_length_six():
    x = torch.cartesian_prod(*[torch.arange(7)] * 6)
    with torch.no_grad():
        module = match3_layer(7, 50.0)
        output = torch.cat([module(part) for part in x.split(4096)])
    wanted = has_match(x, 7)
    assert ((output > 0.5) == wanted).all()
    assert 0.5 < wanted.double().mean() < 1
    assert ((output >= 0) & (output <= 1)).all()


@pytest.mark.parametrize(("M", "n"), [(2, 1), (2, 5), (3, 4), (17, 5), (17, 12), (31, 8)])
def test_match3_is_right_from_the_stated_scale_on(M, n):
    x = torch.randint(M, (200, n), generator=torch.Generator().manual_seed(0))
    x[:20] = x[:20, :1]  # all tokens the same
    x[20:40] = 1  # 1 + 1 + 1 is as near to a match as M = 4 gets, and a match for M = 3
    scale = 2 * (math.log(n**2) + 3) / (1 - math.cos(2 * math.pi / M))
    with torch.no_grad():
        assert ((match3_layer(M, scale).double()(x) > 0.5) == has_match(x, M)).all()
        assert M == 3 or n == 1 or not ((match3_layer(M, scale / 20)(x) > 0.5) == has_match(x, M)).all()


def test_match3_survives_compilation():
    module = match3_layer(7, 50.0)
    x = torch.randint(7, (20, 5), generator=torch.Generator().manual_seed(0))
    with plain_signatures(), torch.no_grad():
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), module(x))


def test_a_layer_of_pairs_is_no_ordinary_attention():
    # With two-factor values the output is not linear in the values: doubling both quadruples it.
    q, ks, vs = operands()
    torch.testing.assert_close(tensor_attention(q, ks, [2 * v for v in vs]), 4 * tensor_attention(q, ks, vs))
    assert isinstance(layer(6, 2).k_projs, nn.ModuleList)
    assert len(layer(6, 2, order=4).k_projs) == len(layer(6, 2, order=4).v_projs) == 3
