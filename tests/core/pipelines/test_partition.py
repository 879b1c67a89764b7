"""Cuts of sequences against brute force over all cuts."""

import itertools

import pytest
import torch

from provenn.core.pipelines.partition import even_blocks, optimal_blocks


def sums(costs, lengths):
    ends = [0, *itertools.accumulate(lengths)]
    return [sum(costs[start:stop]) for start, stop in itertools.pairwise(ends)]


def all_cuts(length, k):
    for cuts in itertools.combinations(range(1, length), k - 1):
        yield [stop - start for start, stop in itertools.pairwise([0, *cuts, length])]


def random_costs(count, draws):
    kind = int(torch.randint(0, 3, (), generator=draws))
    if kind == 0:  # many ties, zeros too
        return torch.randint(0, 4, (count,), generator=draws).tolist()
    if kind == 1:
        return torch.rand(count, generator=draws, dtype=torch.float64).tolist()
    return (torch.rand(count, generator=draws, dtype=torch.float64) ** 6 * 1e9).tolist()


def test_optimum_equals_brute_force_over_all_cuts():
    draws = torch.Generator().manual_seed(0)
    for _ in range(150):
        count = int(torch.randint(1, 13, (), generator=draws))
        k = int(torch.randint(1, count + 1, (), generator=draws))
        costs = random_costs(count, draws)
        found = optimal_blocks(costs, k)
        assert len(found) == k
        assert sum(found) == count
        assert min(found) >= 1
        every = [sums(costs, lengths) for lengths in all_cuts(count, k)]
        best = min(max(one) for one in every)
        assert max(sums(costs, found)) == pytest.approx(best, rel=1e-9)
        # of those with the least maximum, the evenest
        squares = min(sum(size**2 for size in one) for one in every if max(one) <= best * (1 + 1e-9))
        assert sum(size**2 for size in sums(costs, found)) == pytest.approx(squares, rel=1e-6)


def test_even_blocks_keep_their_bound():
    draws = torch.Generator().manual_seed(1)
    for _ in range(200):
        count = int(torch.randint(1, 30, (), generator=draws))
        k = int(torch.randint(1, count + 1, (), generator=draws))
        costs = random_costs(count, draws)
        found = even_blocks(costs, k)
        assert len(found) == k
        assert sum(found) == count
        assert min(found) >= 1


def test_even_blocks_differ_by_the_largest_cost_at_most_once_costs_start_at_zero():
    draws = torch.Generator().manual_seed(2)
    for _ in range(200):
        costs = [0.0, *torch.rand(20, generator=draws, dtype=torch.float64).tolist(), 0.0]
        of_blocks = sums(costs, even_blocks(costs, 4))
        assert max(of_blocks) - min(of_blocks) <= max(costs) + 1e-9


def test_the_optimum_is_no_heuristic():
    costs = [1, 1, 1, 9, 1, 1, 1, 1, 1, 9]
    assert max(sums(costs, optimal_blocks(costs, 3))) <= max(sums(costs, even_blocks(costs, 3)))
    assert optimal_blocks([5, 1, 1, 1, 1, 1], 2) == [1, 5]


@pytest.mark.parametrize("cut", [optimal_blocks, even_blocks])
def test_bad_input_is_refused_by_name(cut):
    for costs, k, name in (([1.0], 2, "k"), ([1.0], 0, "k"), ([1.0, -1.0], 1, r"costs\[1\]")):
        with pytest.raises(ValueError, match=name):
            cut(costs, k)
