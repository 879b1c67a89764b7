"""Convolutions by FFT against sums over all pairs."""

import pytest
import torch

from provenn.core.sequences.fft_convolution import _fast_length, fft_convolution


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def direct(u, k, back=None):
    y = torch.zeros(*torch.broadcast_shapes(u.shape[:-1], k.shape[:-1]), u.shape[-1], dtype=u.dtype)
    for t in range(u.shape[-1]):
        for s in range(u.shape[-1]):
            if s <= t < s + k.shape[-1]:
                y[..., t] += k[..., t - s] * u[..., s]
            if back is not None and s > t and s - t - 1 < back.shape[-1]:
                y[..., t] += back[..., s - t - 1] * u[..., s]
    return y


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("taps", [1, 2, 7, 20])
def test_causal(length, taps):
    u, k = randn(2, 3, length, seed=1), randn(3, taps, seed=2)
    torch.testing.assert_close(fft_convolution(u, k), direct(u, k), rtol=0, atol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
@pytest.mark.parametrize(("taps", "more"), [(1, 1), (3, 7), (20, 2), (13, 13), (20, 20)])
def test_both_ways(length, taps, more):
    u, k, back = randn(2, 3, length, seed=1), randn(3, taps, seed=2), randn(1, more, seed=3)
    torch.testing.assert_close(fft_convolution(u, k, back), direct(u, k, back), rtol=0, atol=1e-12)


def test_a_change_never_reaches_back_in_time_beyond_rounding():
    u, k = randn(1, 100, seed=1), randn(1, 100, seed=2)
    changed = u.clone()
    changed[0, 60:] += 5
    torch.testing.assert_close(fft_convolution(u, k)[0, :60], fft_convolution(changed, k)[0, :60], rtol=0, atol=1e-12)


def test_gradients_and_types():
    leaves = [randn(2, 6, seed=seed).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(fft_convolution, leaves)
    half = [leaf.detach().bfloat16() for leaf in leaves]
    assert fft_convolution(*half).dtype == torch.bfloat16
    assert fft_convolution(*(leaf.detach().float() for leaf in leaves)).dtype == torch.float32


def test_no_sequences_give_no_sequences():
    kernel = torch.ones(3, 4, requires_grad=True)
    convolved = fft_convolution(torch.zeros(0, 3, 7), kernel)
    assert convolved.shape == (0, 3, 7)
    convolved.sum().backward()
    assert torch.equal(kernel.grad, torch.zeros(3, 4))


def test_an_empty_sequence_is_refused():
    with pytest.raises(ValueError, match="kernel must be at least one step long"):
        fft_convolution(torch.ones(2, 3), torch.ones(2, 0))


def test_fast_lengths_are_the_least_products_of_two_three_and_five():
    smooth = sorted(2**a * 3**b * 5**c for a in range(12) for b in range(8) for c in range(6))
    for length in [*range(1, 200), 1000, 1025]:
        assert _fast_length(length) == next(size for size in smooth if size >= length)
