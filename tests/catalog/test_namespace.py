"""Areas offer the parts that are built, and say "not built yet" of the others, never an import error."""

from __future__ import annotations

import ast
import importlib
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest

import provenn
from provenn.catalog.card import AREAS, cards
from provenn.catalog.namespace import NotBuiltError, _Namespace
from provenn.catalog.tree import holds, module_path

BUILT = [(one, part) for one in cards() for part in one.parts if holds(one, part.name)]
UNBUILT = [(one, part) for one in cards() for part in one.parts if not holds(one, part.name)]


@pytest.mark.parametrize("area", AREAS)
def test_areas_are_lazy(area: str):
    source = (Path(provenn.__file__).parent / area / "__init__.py").read_text()
    lines = [ast.unparse(statement) for statement in ast.parse(source).body[1:]]
    assert lines == [
        "from provenn.catalog.namespace import lazy_parts",
        "__getattr__, __dir__ = lazy_parts(__name__)",
    ]


def test_every_unbuilt_part_says_so():
    for one, part in UNBUILT:
        with pytest.raises(NotBuiltError, match="not built yet") as caught:
            exec(f"from {part.namespace} import {part.attribute}")
        assert one.slug in str(caught.value)
        if module_path(part.namespace) is not None:
            with pytest.raises(NotBuiltError, match=f"{part.name} is not built yet"):
                getattr(importlib.import_module(part.namespace), part.attribute)


def test_every_unbuilt_module_says_so():
    for one in cards():
        if not one.built:
            with pytest.raises(NotBuiltError, match="not built yet"):
                importlib.import_module(one.module)


def test_not_built_is_neither_an_import_nor_an_attribute_error():
    """``hasattr`` and ``from … import`` would replace the words of these."""
    assert not issubclass(NotBuiltError, ImportError | AttributeError)


def test_every_built_part_is_in_dir_and_the_others_are_not():
    for area in AREAS:
        namespace = f"provenn.{area}"
        expected = {part.attribute for _, part in BUILT if part.namespace == namespace}
        assert set(dir(importlib.import_module(namespace))) == expected


@pytest.mark.parametrize(
    ("namespace", "name", "nearest"),
    [
        ("provenn.optim", "DiffGrd", "provenn.optim.DiffGrad"),
        ("provenn.nn", "SigmoidAttn", "provenn.nn.SigmoidAttention"),
        ("provenn.nn.functional", "sigmoid_atention", "provenn.nn.functional.sigmoid_attention"),
    ],
)
def test_unknown_names_get_the_nearest_three(namespace: str, name: str, nearest: str):
    with pytest.raises(AttributeError) as caught:
        getattr(importlib.import_module(namespace), name)
    message = str(caught.value)
    assert f"unknown part '{namespace}.{name}'; the nearest are {nearest}" in message
    assert message.count(",") == 2 if namespace != "provenn.nn.functional" else message.count(",") >= 1


@pytest.mark.parametrize("name", ["_private", "__path_to_nothing__"])
def test_private_names_are_plainly_missing(name: str):
    with pytest.raises(AttributeError, match="has no attribute"):
        getattr(importlib.import_module("provenn.optim"), name)


def test_modules_that_no_card_speaks_of_are_missing_as_usual():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("provenn.optim.nonsense")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("provenn.nonsense")


def test_a_part_in_another_area_than_its_paper():
    with pytest.raises(NotBuiltError, match=r"provenn\.optim\.mup_param_groups .*infinite-width-features"):
        importlib.import_module("provenn.optim").mup_param_groups  # noqa: B018


def test_a_part_keeps_its_name_when_its_module_of_that_name_is_imported(monkeypatch: pytest.MonkeyPatch):
    """``provenn.optim.tract`` is a function, and the module that holds it has the same name."""
    area = _Namespace("provenn.optim")
    module = types.ModuleType("provenn.optim.tract")
    module.tract = part = object()
    area.tract = module
    assert area.tract is part
    other = types.ModuleType("provenn.optim.diffgrad")
    area.diffgrad = other
    assert area.diffgrad is other


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_areas_load_no_torch_before_a_part_is_asked_for():
    areas = ", ".join(f"provenn.{area}" for area in AREAS)
    code = f"import sys, {areas}, provenn.nn.functional\nfor a in ({areas}): dir(a)\nprint('torch' in sys.modules)"
    assert run(code) == "False"


@pytest.mark.skipif(not BUILT, reason="no part is built")
def test_a_built_part_loads_its_paper_alone():
    one, part = BUILT[0]
    others = {other.module for other, _ in BUILT} - {one.module}
    code = f"""
import sys
from {part.namespace} import {part.attribute} as found
import {part.namespace} as area
assert area.{part.attribute} is found
assert vars(area)["{part.attribute}"] is found, "the next look-up is direct"
print(sorted(set({sorted(others)!r}) & set(sys.modules)))
"""
    assert run(code) == "[]"


@pytest.mark.skipif(not BUILT, reason="no part is built")
def test_star_import_gives_what_is_built():
    _, part = BUILT[0]
    names = {other.attribute for _, other in BUILT if other.namespace == part.namespace}
    assert run(f"from {part.namespace} import *\nprint(sorted(set(dir()) & {names!r}) == sorted({names!r}))") == "True"


def test_every_built_part_imports_and_pickles_by_its_module():
    for one, part in BUILT:
        value = getattr(importlib.import_module(part.namespace), part.attribute)
        assert value is getattr(sys.modules[one.module], part.attribute)
        if isinstance(value, type | types.FunctionType):
            assert pickle.loads(pickle.dumps(value)) is value
