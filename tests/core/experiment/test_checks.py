"""What counts as a number, where bounds lie, and that a message says which argument was what."""

import decimal
import fractions
import math

import numpy as np
import pytest
import torch

from provenn.core.experiment.checks import check_choice, check_integer, check_number, check_one_kind

INTEGERS = [0, -3, 10**400, np.int64(2), np.uint8(2), np.int8(-1)]
REALS = [0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), fractions.Fraction(1, 3)]
NEITHER = [True, False, np.True_, "1", None, 1j, [1], (1,), torch.tensor(1.0), torch.tensor(1), np.array(1.0)]
NEITHER += [decimal.Decimal(1)]


@pytest.mark.parametrize("value", INTEGERS + REALS, ids=repr)
def test_numbers(value):
    assert check_number("lr", value) is None


@pytest.mark.parametrize("value", INTEGERS, ids=repr)
def test_integers(value):
    assert check_integer("rounds", value) is None


@pytest.mark.parametrize("value", NEITHER, ids=repr)
def test_no_numbers(value):
    with pytest.raises(TypeError) as error:
        check_number("lr", value)
    assert str(error.value) == f"lr must be a number, got {value!r}"


@pytest.mark.parametrize("value", [*REALS, 1.0, math.nan, *NEITHER], ids=repr)
def test_no_integers(value):
    with pytest.raises(TypeError) as error:
        check_integer("rounds", value)
    assert str(error.value) == f"rounds must be an integer, got {value!r}"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")], ids=repr)
@pytest.mark.parametrize("bounds", [{}, {"above": 0}, {"at_most": 1}])
def test_not_finite(value, bounds):
    with pytest.raises(ValueError, match="lr must be a finite number") as error:
        check_number("lr", value, **bounds)
    assert str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "words"),
    [
        ({"above": 0}, [1e-300, 1], [0, 0.0, -1], "> 0"),
        ({"at_least": 0}, [0, 0.0, 1], [-1e-300, -1], "≥ 0"),
        ({"below": 1}, [0.999, -5], [1, 1.0, 2], "< 1"),
        ({"at_most": 1}, [1, 1.0, -5], [1.0001, 2], "≤ 1"),
        ({"above": 0, "below": 1}, [0.5], [0, 1], "> 0 and < 1"),
        ({"at_least": 0, "at_most": 1}, [0, 1], [-0.1, 1.1], "≥ 0 and ≤ 1"),
    ],
)
def test_bounds(bounds, inside, outside, words):
    for value in inside:
        check_number("beta", value, **bounds)
    for value in outside:
        with pytest.raises(ValueError, match="beta") as error:
            check_number("beta", value, **bounds)
        assert str(error.value) == f"beta must be a finite number {words}, got {value!r}"


def test_bounds_of_integers():
    check_integer("rounds", 1, at_least=1, at_most=1)
    check_integer("seed", 10**400, at_least=0)
    for value in (0, 2, np.int64(2)):
        with pytest.raises(ValueError, match=r"rounds must be .*≥ 1 and ≤ 1, got") as error:
            check_integer("rounds", value, at_least=1, at_most=1)
        assert str(error.value).endswith(f"got {value!r}")


def test_choices():
    check_choice("reduction", "mean", ("mean", "sum"))
    check_choice("reduction", None, iter(["mean", None]))
    with pytest.raises(ValueError, match="reduction") as error:
        check_choice("reduction", "Mean", iter(["mean", None, 2]))
    assert str(error.value) == "reduction must be one of 'mean', None, 2, got 'Mean'"
    for value in ([1], {"a": 1}, torch.zeros(2)):
        with pytest.raises(ValueError, match="reduction"):
            check_choice("reduction", value, ("mean", "sum"))


def test_tensors_of_one_kind():
    pair = [torch.zeros(2, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)]
    for tensors in ([], [torch.zeros(2, dtype=torch.bfloat16)], pair, iter(pair)):
        assert check_one_kind("params", tensors) is None


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_tensors_that_are_not_real_floating_point(dtype):
    with pytest.raises(TypeError) as error:
        check_one_kind("params", iter([torch.zeros(2), torch.zeros(2, dtype=dtype)]))
    assert str(error.value) == f"params must be real floating-point (complex ones are not supported), got {dtype}"


def test_tensors_of_several_kinds():
    with pytest.raises(TypeError) as error:
        check_one_kind("weights", [torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)])
    assert str(error.value) == "weights must share one type, got torch.bfloat16, torch.float32"
    with pytest.raises(ValueError, match="weights") as error:
        check_one_kind("weights", [torch.zeros(2), torch.zeros(2, device="meta")])
    assert str(error.value) == "weights must share one device, got cpu, meta"
