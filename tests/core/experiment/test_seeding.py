"""Seeds that derive from names: pinned, apart from one another, and without a trace in the global state."""

import ast
import enum
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import provenn
from provenn.catalog.card import AREAS
from provenn.core.experiment.seeding import derive_seed, generator, seeded


def test_stable_values():
    """Recorded results rest on these."""
    assert derive_seed(0, "weights") == 5808594629991019556
    assert derive_seed(3, "order", 1) == 6049389963279928427


def test_first_63_bits_of_sha256():
    digest = hashlib.sha256(b"int:3\x1fstr:order").hexdigest()
    assert derive_seed(3, "order") == int(digest, 16) >> (256 - 63)


def test_alike_keys_differ():
    keys = [(1, "2"), ("1", 2), (1, 2), ("1", "2"), (12,), ("12",), ("ab", "c"), ("a", "bc"), ("abc",), ("abc", "")]
    keys += [("", "abc"), (), ("",), (-1,), (1,), ("a\x1fstr:b",), ("a", "b"), ("a\x1f", "b"), ("a", "\x1fb"), (0,)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


words = st.lists(st.one_of(st.integers(-2, 12), st.text("a:\x1fintsr1", max_size=6)), max_size=4).map(tuple)


@given(words, words)
def test_equal_only_for_equal_keys(first, second):
    assert (derive_seed(*first) == derive_seed(*second)) == (first == second)


@given(words)
def test_a_seed_that_torch_and_numpy_take(keys):
    seed = derive_seed(*keys)
    assert 0 <= seed < 2**63
    assert torch.Generator().manual_seed(seed).initial_seed() == seed
    np.random.default_rng(seed)


def test_numbers_and_strings_by_value():
    class Word(enum.StrEnum):
        ORDER = "order"

    assert derive_seed(np.int64(3), np.str_("order")) == derive_seed(3, "order") == derive_seed(3, Word.ORDER)


@pytest.mark.parametrize("key", [1.0, None, np.float64(2), ("a",), b"a"])
def test_other_keys(key):
    with pytest.raises(TypeError, match=r"keys must be integers or strings, got"):
        derive_seed("a", key)


def test_generators_are_fresh():
    draws = [torch.rand(4, generator=generator(*keys)) for keys in [(1, "a"), (1, "a"), (1, "b"), (2, "a")]]
    assert torch.equal(draws[0], draws[1])
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(draws[1:], 2))
    assert generator(1, device="cpu").initial_seed() == derive_seed(1)


class TestSeeded:
    def test_same_weights_whatever_ran_before(self):
        weights = []
        for turn in range(3):
            torch.manual_seed(turn)
            with seeded(5, "weights") if turn < 2 else seeded(6, "weights"):
                weights.append(nn.Linear(3, 3).weight)
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    @pytest.mark.parametrize("fails", [False, True])
    def test_global_state_is_put_back(self, fails):
        torch.manual_seed(7)
        torch.rand(3)
        expected = torch.get_rng_state()
        following = torch.rand(3)
        torch.set_rng_state(expected)
        try:
            with seeded(1):
                torch.rand(10)
                if fails:
                    raise KeyError
        except KeyError:
            pass
        assert torch.initial_seed() == 7
        assert torch.equal(torch.rand(3), following)

    def test_nested(self):
        with seeded(1):
            first = torch.rand(2)
            second = torch.rand(2)
        with seeded(1):
            assert torch.equal(torch.rand(2), first)
            with seeded(2):
                torch.rand(5)
            assert torch.equal(torch.rand(2), second)

    def test_a_bad_key_touches_nothing(self):
        before = torch.get_rng_state()
        with pytest.raises(TypeError, match="keys"), seeded(1.5):
            pass
        assert torch.equal(torch.get_rng_state(), before)

    def test_cuda_that_starts_later_starts_from_the_callers_seed(self, monkeypatch):
        """Before CUDA is up, seeds for it wait in a queue: the block's must not be the last there."""
        if torch.cuda.is_initialized():
            pytest.skip("CUDA is up")
        torch.manual_seed(7)
        waiting = []
        monkeypatch.setattr(torch.cuda, "manual_seed_all", waiting.append)
        with seeded("block"):
            pass
        assert waiting[-1] == 7


DRAWS = {"rand", "randn", "randint", "randperm", "normal"}


def draws_without_a_place(source):
    """Return the lines of factories that draw from a generator, on whatever device is torch's default one."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    factories = [call for call in calls if ast.unparse(call.func) in {f"torch.{name}" for name in DRAWS}]
    given = [(call.lineno, {keyword.arg for keyword in call.keywords}) for call in factories]
    return [line for line, names in given if "generator" in names and not names & {"device", None}]


def test_draws_without_a_place_are_found():
    assert draws_without_a_place("torch.randn(3, generator=g)\ntorch.rand(\n    2, generator=g)") == [1, 2]
    assert not draws_without_a_place("torch.randn(3, generator=g, device=g.device)\ntorch.rand(2, **p)\ntorch.rand(2)")


@pytest.mark.parametrize("area", ["core", "data", *AREAS])
def test_what_draws_from_a_generator_says_where(area):
    """Else, after ``torch.set_default_device("cuda")``, torch refuses a generator on the CPU."""
    root = Path(provenn.__file__).parent / area
    found = {path.name: draws_without_a_place(path.read_text(encoding="utf-8")) for path in root.rglob("*.py")}
    assert not {name: lines for name, lines in found.items() if lines}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_state_is_put_back():
    torch.cuda.manual_seed(3)
    torch.rand(2, device="cuda")
    before = torch.cuda.get_rng_state()
    with seeded(1):
        first = torch.rand(4, device="cuda")
    assert torch.equal(torch.cuda.get_rng_state(), before)
    with seeded(1):
        assert torch.equal(torch.rand(4, device="cuda"), first)
    assert generator(1, device="cuda").device.type == "cuda"
