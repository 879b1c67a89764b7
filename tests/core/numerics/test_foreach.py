"""Lists of tensors in groups of one kind."""

import pytest
import torch
from torch import nn

from provenn.core.numerics.foreach import foreach_pays, same_kind


def test_groups_by_type_and_device_in_order():
    kinds = [torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float64, torch.float32]
    first = [torch.full((1,), float(i), dtype=kind) for i, kind in enumerate(kinds)]
    second = [torch.full((2,), 10.0 * i) for i in range(6)]
    first.append(torch.zeros(1, device="meta"))
    second.append(torch.zeros(2))
    groups = [
        [[int(t[0]) if t.device.type == "cpu" else "meta" for t in one] for one in lists]
        for lists in same_kind(first, second)
    ]
    assert groups == [[[0, 2, 5], [0, 20, 50]], [[1, 4], [10, 40]], [[3], [30]], [["meta"], [0]]]


def test_the_tensors_themselves():
    first, second = [torch.zeros(1), torch.zeros(1)], [nn.Parameter(torch.ones(1)), torch.ones(2)]
    ((ones, others),) = same_kind(first, second)
    assert all(one is other for one, other in zip(ones + others, first + second, strict=True))


def test_only_the_first_list_decides():
    ((ones, others),) = same_kind([torch.zeros(1)] * 2, [torch.zeros(1), torch.zeros(1).double()])
    assert (len(ones), len(others)) == (2, 2)


def test_nothing():
    assert list(same_kind([], [])) == []
    assert len(list(same_kind([torch.zeros(1)]))) == 1


def test_pays_on_cuda_only():
    assert not foreach_pays([])
    assert not foreach_pays([torch.zeros(1), nn.Parameter(torch.zeros(1))])
    assert not foreach_pays([torch.zeros(1, device="meta")])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pays_on_cuda():
    class Special(torch.Tensor):
        pass

    plain = [torch.zeros(1, device="cuda"), nn.Parameter(torch.zeros(1, device="cuda"))]
    assert foreach_pays(plain)
    assert not foreach_pays([*plain, torch.zeros(1)])
    assert not foreach_pays([*plain, plain[0].as_subclass(Special)])
