"""Positions against closed forms."""

import cmath

import pytest
import torch

from provenn.core.sequences.positions import alibi_slopes, rotate


def test_slopes_of_a_power_of_two():
    assert alibi_slopes(8).tolist() == [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]
    assert alibi_slopes(1).tolist() == [2**-8]


def test_other_slopes_come_between():
    # Four heads' slopes, then every second one of eight heads'.
    torch.testing.assert_close(alibi_slopes(6), torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]))
    assert len(alibi_slopes(12).unique()) == 12


def test_no_heads_are_refused():
    with pytest.raises(ValueError, match="num_heads"):
        alibi_slopes(0)


def test_rotation_multiplies_pairs_as_complex_numbers():
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, offset=4, base=100.0)
    for b in range(2):
        for p in range(3):
            for m in range(3):
                pair = complex(*x[b, p, 2 * m : 2 * m + 2].tolist())
                wanted = pair * cmath.exp(1j * (p + 4) * 100.0 ** (-2 * m / 6))
                assert complex(*turned[b, p, 2 * m : 2 * m + 2].tolist()) == pytest.approx(wanted, abs=1e-12)


def test_products_depend_on_the_difference_of_positions():
    draws = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 8, dtype=torch.float64, generator=draws) for _ in range(2))
    products = [(rotate(q, offset=start) * rotate(k, offset=start + 5)).sum() for start in (0, 3, 1000)]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3))
    assert not torch.isclose(products[0], (q * k).sum())


def test_late_positions_keep_their_precision():
    # In float32 an angle of 100 003 radians is off by 0.004.
    x = torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(rotate(x, offset=100_003), rotate(x.double(), offset=100_003).float())


def test_an_odd_head_is_refused():
    with pytest.raises(ValueError, match="even"):
        rotate(torch.zeros(2, 3))
