"""Reports through JSON and back: every value and type, whatever the keys and strings."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from provenn.core.experiment.reports import Report


@dataclass(frozen=True)
class Layer(Report):
    name: str
    norms: tuple[float, ...]


@dataclass(frozen=True)
class Block(Report):
    layers: tuple[Layer, ...]
    nested: ClassVar[dict[str, type[Report]]] = {"layers": Layer}


@dataclass(frozen=True)
class Free(Report):
    value: Any


@dataclass(frozen=True)
class Whole(Report):
    count: int
    loss: float
    best: Layer | None
    blocks: tuple[Block, ...]
    by_name: dict[str, Layer]
    extra: dict[str, Any]
    nested: ClassVar[dict[str, type[Report]]] = {"best": Layer, "blocks": Block, "by_name": Layer}


ONE, OTHER = Layer("fc1", (1.0, 2.5)), Layer("", ())
WHOLE = Whole(3, -0.0, ONE, (Block((ONE, OTHER)), Block(())), {"a": ONE, "name": OTHER}, {"x": (1, (2.0, None, True))})


def again(report):
    return type(report).from_json(report.to_json())


def alike(first, second):
    """Equal in value and type all the way down, NaN being alike to NaN."""
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return set(first) == set(second) and all(alike(first[key], second[key]) for key in first)
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(alike, first, second))
    if isinstance(first, float):
        return first.hex() == second.hex()  # NaN is "nan", and −0 is not 0
    return first == second


def test_equal_after_the_round_trip():
    got = again(WHOLE)
    assert got == WHOLE
    assert math.copysign(1, got.loss) == -1
    assert type(got.blocks[0].layers[1]) is Layer
    assert again(dataclasses.replace(WHOLE, best=None, blocks=(), by_name={})).best is None


def test_entries_whose_names_are_not_fields():
    report = dataclasses.replace(WHOLE, by_name={"name": ONE})
    assert again(report) == report


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_numbers(value):
    report = dataclasses.replace(WHOLE, loss=value, best=Layer("x", (value, 1.0)), extra={"a": {"b": (value,)}})
    json.loads(report.to_json(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    got = again(report)
    for one in (got.loss, got.best.norms[0], got.extra["a"]["b"][0]):
        assert alike(one, value)


keys = st.one_of(st.sampled_from(["float", "\\float", "\\\\float", "name", "NaN"]), st.text(max_size=3))
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.sampled_from(["NaN", "Infinity"])
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
)


@given(values)
def test_any_value_comes_back(value):
    assert alike(again(Free(value)).value, value)


def test_numbers_of_numpy_become_pythons():
    report = Free((np.float64(0.5), np.float32("nan"), np.int64(3), np.float32(0.1), np.float64("-inf")))
    got = again(report).value
    assert [type(one) for one in got] == [float, float, int, float, float]
    assert math.isnan(got[1])
    assert got[2:] == (3, float(np.float32(0.1)), -math.inf)


def test_the_text_depends_on_the_values_alone():
    assert Free({"b": 1, "a": 2}).to_json() == Free({"a": 2, "b": 1}).to_json()


def test_lists_come_back_as_tuples():
    assert again(Free([1, [2]])).value == (1, (2,))


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        WHOLE.count = 4
    assert hash(ONE) == hash(Layer("fc1", (1.0, 2.5)))


def test_the_report_is_left_as_it_was():
    extra = {"a": [math.nan, {"float": 1}]}
    report = Free(extra)
    report.to_json()
    assert report.value is extra
    assert list(extra["a"][1]) == ["float"]


class TestErrors:
    @pytest.mark.parametrize("text", ["", "{", "not json", '{"value": NaN'])
    def test_no_json(self, text):
        with pytest.raises(ValueError, match=r"."):
            Free.from_json(text)

    @pytest.mark.parametrize("text", ["3", "null", "[1]", '"value"', "{}", '{"value": 1, "more": 2}', '{"valu": 1}'])
    def test_other_fields(self, text):
        with pytest.raises(ValueError, match=r"Free has the fields \['value'\], got"):
            Free.from_json(text)

    @pytest.mark.parametrize("layer", [{"name": "x"}, {"name": "x", "norms": [], "more": 1}, 3])
    def test_other_fields_inside(self, layer):
        with pytest.raises(ValueError, match="Layer has the fields"):
            Block.from_json(json.dumps({"layers": [layer]}))
        if isinstance(layer, dict):
            table = json.loads(WHOLE.to_json()) | {"best": layer}
            with pytest.raises(ValueError, match="Layer has the fields"):
                Whole.from_json(json.dumps(table))

    @pytest.mark.parametrize("value", [torch.zeros(2), {1: 2}, {"a": {2.0: 1}}, {3}, 1j])
    def test_what_json_has_no_word_for(self, value):
        with pytest.raises(TypeError, match=r"."):
            Free(value).to_json()

    def test_no_plot(self):
        with pytest.raises(TypeError, match="Free has no plot"):
            Free(1).plot()
