"""Signatures are checked at run time, after the call, and stand aside while torch traces."""

import importlib
import pickle
from types import SimpleNamespace

import jaxtyping
import pytest
import signatures
import torch

from provenn.contracts.watch import plain_signatures
from provenn.core.nearest import unknown_name_message

SOURCE = """
from __future__ import annotations

from typing import Protocol

from jaxtyping import Float
from torch import Tensor, nn


class Named(Protocol):
    name: str


def total(x: Float[Tensor, "batch features"], scale: float = 1.0, keep: bool = False) -> Float[Tensor, "batch"]:
    if scale < 0:
        raise ValueError(f"scale must be >= 0, got {scale}")
    return x if keep else x.sum(-1) * scale


def same_length(x: Float[Tensor, "n"], y: Float[Tensor, "n"]) -> None:
    pass


def name_of(thing: Named) -> str:
    return thing.name


class Layer(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features)

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch"]:
        return total(self.linear(x), 2)
"""


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signatures")
    (folder / "made_up_signatures.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        hook = signatures.install("made_up_signatures")
        yield importlib.import_module("made_up_signatures")
        hook.uninstall()


def test_the_package_is_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        unknown_name_message(3, "adam", ["Adam"])


def test_wrong_shapes_and_types_are_found(made_up):
    assert made_up.total(torch.ones(2, 3)).tolist() == [3, 3]
    with pytest.raises(jaxtyping.TypeCheckError, match="same_length"):
        made_up.same_length(torch.ones(2), torch.ones(3))
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        made_up.total(torch.ones(2, 3), keep=True)
    with pytest.raises(jaxtyping.TypeCheckError):
        made_up.total(torch.ones(2, 3), keep=1)
    with pytest.raises(jaxtyping.TypeCheckError):
        made_up.total(torch.ones(2, 3, dtype=torch.int64))


def test_an_int_is_a_float(made_up):
    assert made_up.total(torch.ones(1, 3), 2).item() == 6


def test_the_functions_own_error_comes_first(made_up):
    with pytest.raises(ValueError, match="scale must be"):
        made_up.total(torch.ones(3), -1)


def test_a_hint_that_no_run_can_check_is_left_alone(made_up):
    assert made_up.name_of(SimpleNamespace(name="a")) == "a"


def test_plain_signatures_switch_it_off_and_on_again(made_up):
    with plain_signatures():
        assert made_up.total(torch.ones(2, 3), keep=True).shape == (2, 3)
    with pytest.raises(jaxtyping.TypeCheckError):
        made_up.total(torch.ones(2, 3), keep=True)


def test_compile_export_and_pickle_work_with_it(made_up):
    layer, x = made_up.Layer(3), torch.randn(2, 3)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    program = torch.export.export(layer, (x,)).module()
    copy = pickle.loads(pickle.dumps(layer))
    for other in (compiled, program, copy):
        assert torch.equal(other(x), layer(x))
