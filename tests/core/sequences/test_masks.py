"""Masks against loops over queries and keys."""

import itertools

import pytest
import torch

from provenn.core.sequences.masks import causal_mask, combine_masks, visible_keys


@pytest.mark.parametrize(("queries", "keys"), [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("shape", [None, (1, 1), (3, 1, 1), (2, 1, 1, "keys"), (3, "queries", "keys"), ("keys",)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("additive", [False, True])
def test_counts_what_each_query_sees(queries, keys, shape, causal, additive):
    mask = None
    if shape is not None:
        sizes = [{"queries": queries, "keys": keys}.get(size, size) for size in shape]
        mask = torch.rand(sizes, generator=torch.Generator().manual_seed(0)) > 0.4
    full = torch.ones(2, 3, queries, keys, dtype=torch.bool) if mask is None else mask.expand(2, 3, queries, keys)
    if additive and mask is not None:
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    counts = visible_keys(queries, keys, mask, causal).expand(2, 3, queries, 1)
    for b, h, i in itertools.product(range(2), range(3), range(queries)):
        seen = sum(bool(full[b, h, i, j]) and (not causal or j <= keys - queries + i) for j in range(keys))
        assert counts[b, h, i, 0] == seen


def test_padding_under_causality_needs_no_square():
    padding = torch.ones(2, 1, 1, 5000, dtype=torch.bool)
    counts = visible_keys(5000, 5000, padding, causal=True)
    assert counts.shape == (2, 1, 5000, 1)
    assert counts[0, 0, :, 0].tolist() == list(range(1, 5001))


def test_causal_mask_ends_at_the_last_key():
    assert causal_mask(2, 4, first=2).tolist() == [[True, True, True, False], [True, True, True, True]]


def test_masks_combine_whatever_their_kind():
    visible = torch.tensor([[True, False, True]])
    added = torch.tensor([[0.5, 1.0, float("-inf")]])
    hidden = float("-inf")
    assert combine_masks(None, visible) is visible
    assert combine_masks(added, None) is added
    assert combine_masks(visible, torch.tensor([[True], [False]])).tolist() == [[True, False, True], [False] * 3]
    assert combine_masks(visible, added).tolist() == [[0.5, hidden, hidden]]
    assert combine_masks(added, visible).tolist() == [[0.5, hidden, hidden]]
    assert combine_masks(added, added).tolist() == [[1.0, 2.0, hidden]]
