"""Attention by plain operations and in blocks against one number at a time."""

import itertools
import math

import pytest
import torch

from provenn.contracts.watch import plain_signatures
from provenn.core.experiment.accounting import TensorMemory
from provenn.core.sequences._blocks import blocks
from provenn.core.sequences.attention import ScoreTerms, reference_attention
from provenn.core.sequences.streaming import streaming_attention

PHI = {"sigmoid": lambda s: 1 / (1 + math.exp(-s)), "relu": lambda s: max(s, 0.0)}


def operands(*lead, queries=5, keys=7, head=3, value=4, dtype=torch.float64, seed=0):
    draws = torch.Generator().manual_seed(seed)
    shapes = (queries, head), (keys, head), (keys, value)
    return tuple(
        torch.randn(*lead, *shape, generator=draws, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )


def by_hand(q, k, v, phi, scale, bias, additive, visible, causal, slopes):
    """Every output as a sum of numbers; operands are (batch, heads, tokens, features), terms are full tensors."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    output = torch.zeros(batch, heads, queries, v.shape[3], dtype=torch.float64)
    for b, h, i, j in itertools.product(range(batch), range(heads), range(queries), range(keys)):
        place = keys - queries + i
        if (causal and j > place) or not visible[b, h, i, j]:
            continue
        product = sum(x * y for x, y in zip(q[b, h, i].tolist(), k[b, h, j].tolist(), strict=True))
        score = scale * product - slopes[h].item() * abs(place - j) + additive[b, h, i, j].item() + bias[b, h, i].item()
        output[b, h, i] += phi(score) * v[b, h, j].detach()
    return output


def attend_reference(q, k, v, activation, terms):
    return reference_attention(q, k, v, activation, terms)[0]


def in_blocks(size):
    return lambda *arguments: streaming_attention(*arguments, block=size)


WAYS = {"reference": attend_reference, **{f"blocks of {size}": in_blocks(size) for size in (1, 6, 20, 10**6)}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (7, 5), (6, 6)])
def test_equals_a_sum_of_numbers(way, causal, activation, queries, keys):
    draws = torch.Generator().manual_seed(1)
    q, k, v = operands(2, 3, queries=queries, keys=keys)
    full = (2, 3, queries, keys)
    slopes = torch.rand(3, generator=draws, dtype=torch.float64)
    nothing, all_visible = torch.zeros(full), torch.ones(full, dtype=torch.bool)
    constant = torch.full((2, 3, queries), -0.7, dtype=torch.float64)
    by_row = torch.randn(3, queries, 1, generator=draws, dtype=torch.float64)
    additive = torch.randn(2, 1, 1, keys, generator=draws, dtype=torch.float64)
    hidden = torch.rand(2, 1, queries, keys, generator=draws) > 0.5
    for terms, expected in (
        (ScoreTerms(0.4, -0.7, None, causal, slopes), (constant, nothing, all_visible, slopes)),
        (
            ScoreTerms(0.4, by_row, additive, causal),
            (by_row[..., 0].expand(full[:3]), additive.expand(full), all_visible, torch.zeros(3)),
        ),
        (ScoreTerms(0.4, -0.7, hidden, causal), (constant, nothing, hidden.expand(full), torch.zeros(3))),
    ):
        bias, added, visible, slope = expected
        wanted = by_hand(q, k, v, PHI[activation], 0.4, bias, added, visible, causal, slope)
        torch.testing.assert_close(WAYS[way](q, k, v, activation, terms), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [6, 10**6])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(), (2, 3, 1), (2, 1, 1, 1)])
def test_gradients_agree_with_finite_differences(size, causal, shape):
    draws = torch.Generator().manual_seed(2)
    q, k, v = operands(2, 2, queries=3, keys=4, head=2, value=2)
    bias = torch.randn(shape, generator=draws, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(2, 1, 4, generator=draws, dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, bias, mask):
        return streaming_attention(q, k, v, "sigmoid", ScoreTerms(0.4, bias, mask, causal), block=size)

    assert torch.autograd.gradcheck(attend, (q, k, v, bias, mask))


@pytest.mark.parametrize("head", [32, 64, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("causal", [False, True])
def test_narrow_types_agree_with_float64(head, dtype, tolerance, causal):
    # 77 tokens in blocks of 1024 scores: the last block of rows and of columns is cut short.
    q, k, v = operands(1, 2, queries=77, keys=77, head=head, value=head, dtype=dtype)
    terms = ScoreTerms(head**-0.5, -math.log(77), None, causal)
    output = streaming_attention(q, k, v, "sigmoid", terms, block=1024)
    exact = [one.detach().double().requires_grad_() for one in (q, k, v)]
    wanted = attend_reference(*exact, "sigmoid", terms)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = torch.autograd.grad(output, (q, k, v), weight.to(dtype))
    expected = torch.autograd.grad(wanted, exact, weight)
    for one, other in zip((output, *found), (wanted, *expected), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def test_maps_and_their_gradients_by_torch_func():
    q, k, v = operands(4, 2)
    mask = torch.randn(4, 2, 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    bias = torch.tensor(-1.0, dtype=torch.float64)

    def loss(way):
        return lambda q, k, v, mask, bias: way(q, k, v, "sigmoid", ScoreTerms(0.4, bias, mask, True)).square().sum()

    dims = (0, 0, None, 0, None)
    shared = v[0]
    found, wanted = (
        torch.func.vmap(torch.func.grad_and_value(loss(way), argnums=(0, 1, 2, 3, 4)), dims)(q, k, shared, mask, bias)
        for way in (in_blocks(9), attend_reference)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_maps_over_any_dimension():
    q, k, v = operands(2, 3)
    mask = torch.rand(5, 7, 4, generator=torch.Generator().manual_seed(5)) > 0.4

    def attend(mask):
        return streaming_attention(q, k, v, "sigmoid", ScoreTerms(0.4, -1.0, mask), block=9)

    found = torch.func.vmap(attend, in_dims=2)(mask)
    torch.testing.assert_close(found, torch.stack([attend(mask[..., index]) for index in range(4)]))


def test_second_derivative_is_refused_by_name():
    q, k, v = operands()
    output = streaming_attention(q, k, v, "sigmoid", ScoreTerms(0.4), block=9)
    (gradient,) = torch.autograd.grad(output.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"blocked.*reference"):
        gradient.sum().backward()


def test_compiles_to_one_opaque_operator():
    q, k, v = operands(2)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def attend(q, k, v):
        return streaming_attention(q, k, v, "sigmoid", ScoreTerms(0.4, -1.0, None, True), block=2)

    torch.compiler.reset()
    with plain_signatures():
        compiled = torch.compile(attend, backend=backend, fullgraph=True)
        output, wanted = compiled(q, k, v), attend(q, k, v)
    torch.testing.assert_close(output, wanted)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (output, wanted)), strict=True):
        torch.testing.assert_close(one, other)
    products = [node for graph in graphs for node in graph.graph.nodes if "bmm" in str(node.target)]
    assert not products


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("count", "queries", "keys"), [(1, 9, 9), (3, 4, 11), (2, 11, 4), (2, 300, 310), (0, 3, 3)])
@pytest.mark.parametrize("size", [1, 7, 64, 5000])
def test_blocks_cover_every_visible_score_once(causal, count, queries, keys, size):
    seen = torch.zeros(count, queries, keys, dtype=torch.int64)
    for heads, rows, columns in blocks(count, queries, keys, causal, size):
        part = seen[heads, rows, columns]
        assert 0 < part.numel() <= size
        part += 1
    assert seen.max() <= 1 if count else seen.numel() == 0
    visible = torch.ones(queries, keys).tril(keys - queries).bool() if causal else torch.ones(queries, keys).bool()
    assert (seen[:, visible] == 1).all()


def test_causality_saves_work():
    area = sum((rows.stop - rows.start) * (columns.stop - columns.start) for _, rows, columns in
               blocks(1, 2048, 2048, True, 2**20))  # fmt: skip
    assert area < 0.6 * 2048**2


def peak(length):
    q, k, v = operands(1, 2, queries=length, keys=length, head=32, value=32, dtype=torch.float32)
    with TensorMemory() as memory:
        output = streaming_attention(q, k, v, "sigmoid", ScoreTerms(0.2, -math.log(length)), block=2**18)
        torch.autograd.grad(output.sum(), (q, k, v))
    return memory.peak


def test_memory_grows_with_the_length_and_not_with_its_square():
    operand, block = 4 * 2 * 8192 * 32, 4 * 2**18
    most = peak(8192)
    # Forward: output. Backward: three gradients, and the output's. Two blocks of scores and a mask's worth beside them.
    assert most < 12 * operand + 6 * block
    assert most < 4 * 2 * 8192**2 / 10
    assert most < 2 * peak(4096)
