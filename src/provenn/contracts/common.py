"""The common checks: what every part promises, whatever its kind."""

from __future__ import annotations

import enum
import importlib
import inspect
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from provenn.contracts.case import Case
from provenn.contracts.suite import ContractError, expect, suite_of
from provenn.contracts.watch import captured_output, differences, global_state, plain_signatures, same, seeded


def resolve(part: str) -> Any:
    """Return the object that a dotted public name stands for.

    Raises:
        ContractError: There is none.
    """
    names = part.split(".")
    for split in range(len(names) - 1, 0, -1):
        namespace = ".".join(names[:split])
        try:
            found = importlib.import_module(namespace)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{namespace}.".startswith(f"{error.name}."):
                raise
            continue
        for name in names[split:]:
            if not hasattr(found, name):
                raise ContractError(f"{namespace} has no {name!r}")
            found = getattr(found, name)
        return found
    raise ContractError(f"no module of {part!r} can be imported")


def check_public_name(case: Case) -> None:
    """The part is imported under its public name, and knows where it is defined, so that it pickles by reference."""
    found = resolve(case.part)
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return
    attribute = case.part.rpartition(".")[2]
    expect(found.__name__ == attribute, f"its __name__ is {found.__name__!r}, not {attribute!r}")
    home = sys.modules.get(found.__module__)
    expect(home is not None, f"its __module__ {found.__module__!r} is not imported")
    expect(
        getattr(home, found.__qualname__, None) is found,
        f"{found.__module__}.{found.__qualname__} is not the same object",
    )
    expect(pickle.loads(pickle.dumps(found)) is found, "pickle gives another object back")


def check_bad_input(case: Case) -> None:
    """Each bad input is refused by the named error, whose message names the argument."""
    expect(
        case.bad_input or case.bad_input_reason.strip(),
        "the case has no bad_input, and no bad_input_reason that says why nothing can be bad",
    )
    with plain_signatures():
        for bad in case.bad_input:
            _check_refused(bad.argument, bad.call, bad.error)


def _check_refused(argument: str, call: Callable[[], object], wanted: type[Exception]) -> None:
    try:
        call()
    except Exception as error:
        seen = f"a bad {argument!r} raised {type(error).__name__}: {error}"
        expect(isinstance(error, wanted), f"{seen}; wanted {wanted.__name__}")
        expect(re.search(rf"(?<!\w){re.escape(argument)}(?!\w)", str(error)), f"{seen}; {argument!r} is not named")
    else:
        raise ContractError(f"a bad {argument!r} was accepted; wanted {wanted.__name__}")


_CHANGED_BY_LATE_IMPORTS = {
    "warning filters",
    "environment variables",
    "numpy's random state",
    "Python's random state",
}


def check_global_state(case: Case) -> None:
    """Global state is left alone: random number generators, default dtype, threads, modes, filters, environment."""
    act = suite_of(case.kind).exercise(case)
    first, one_end = _changed_by(act, seed=1)
    again, other_end = _changed_by(act, seed=2)
    changed = sorted(set(again) | set(first) - _CHANGED_BY_LATE_IMPORTS)
    expect(not changed, f"using the part changed {', '.join(changed)}")
    expect(
        not same(one_end, other_end),
        "torch's global generator ended in the same state from two seeds: the part seeds it",
    )


def _changed_by(act: Callable[[], object], seed: int) -> tuple[list[str], Tensor]:
    """Return what a call changed, and torch's random state after it; filters and environment are put back."""
    environment = dict(os.environ)
    with plain_signatures(), warnings.catch_warnings(), seeded(seed):
        before = global_state()
        act()
        found = differences(before, global_state()), torch.random.get_rng_state()
    os.environ.clear()
    os.environ.update(environment)
    return found


def check_silence(case: Case) -> None:
    """Nothing is printed."""
    act = suite_of(case.kind).exercise(case)
    with captured_output() as texts, seeded(0):
        act()
    expect(not texts[0], f"it printed {texts[0][:200]!r}")


def check_docstring(case: Case) -> None:
    """The docstring has a summary, Args, Returns, Raises, the Shape of tensors, and the source."""
    part = resolve(case.part)
    own = (part.__doc__ or "").strip()
    expect(own, "no docstring")
    expect(own.split("\n\n")[0].rstrip().endswith("."), f"the summary {own.split(chr(10))[0]!r} is no sentence")
    home = inspect.getdoc(inspect.getmodule(part)) or ""
    expect(re.search(r"\bSource:|arXiv|doi\.org", own + home), "no source (Source: ...) in it or in its module's")
    if inspect.isclass(part) or inspect.isfunction(part):
        _check_sections(case, part)


def _check_sections(case: Case, part: Any) -> None:
    callables = _documented(part)
    text = "\n".join([part.__doc__ or "", *(one.__doc__ or "" for one in callables.values())])
    described = _described_names(text)
    missing = [name for name in _parameters(case, part, callables) if name not in described]
    expect(not missing, f"Args: {', '.join(missing)} not described")
    for bad in case.bad_input:
        expect("Raises:" in text, "no Raises:, though bad input is refused")
        expect(bad.error.__name__ in text, f"Raises: {bad.error.__name__} for {bad.argument!r} not described")
    main = callables.get("forward", part)
    if inspect.isfunction(main):
        annotations = {name: str(value) for name, value in main.__annotations__.items()}
        if annotations.get("return", "None") != "None" or case.kind in ("module", "loss"):
            expect(re.search(r"\b(Returns|Yields):", text), "no Returns:")
        if any(re.search(r"Tensor\b|\bTensor", value) for value in annotations.values()):
            expect("Shape:" in text, "no Shape:, though there are tensors")


def _documented(part: Any) -> dict[str, Any]:
    if not inspect.isclass(part):
        return {}
    return {
        name: value
        for name, value in vars(part).items()
        if inspect.isfunction(value) and (name in ("__init__", "__call__") or not name.startswith("_"))
    }


def _parameters(case: Case, part: Any, callables: Mapping[str, Any]) -> Iterable[str]:
    if inspect.isclass(part) and issubclass(part, (enum.Enum, BaseException)):
        return []
    signatures = [part]
    if case.kind in ("module", "loss") and "forward" in callables and issubclass(part, nn.Module):
        signatures.append(callables["forward"])
    found: dict[str, None] = {}
    for one in signatures:
        for parameter in inspect.signature(one).parameters.values():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                found[parameter.name] = None
    return [name for name in found if name != "self" and not name.startswith("_")]


def _described_names(text: str) -> set[str]:
    """Return the names that sections "Args" and "Attributes" describe: "name:", "name (type):", "one, other:"."""
    names: set[str] = set()
    margin = None
    for line in text.split("\n"):
        depth = len(line) - len(line.lstrip())
        if line.strip() in ("Args:", "Attributes:"):
            margin = depth
        elif line.strip() and margin is not None and depth <= margin:
            margin = None
        elif margin is not None and (head := re.match(r"\s+([`*\w, /]+?)\s*(?:\([^)]*\))?:(?:\s|$)", line)):
            names.update(name.strip(" `*") for name in re.split(r",|/|\band\b", head[1]))
    return names


CHECKS: dict[str, Callable[[Any], None]] = {
    "public_name": check_public_name,
    "bad_input": check_bad_input,
    "global_state": check_global_state,
    "silence": check_silence,
    "docstring": check_docstring,
}
