"""Each common check catches a part that is broken in that way; cases, suites and tables hold together."""

import os
import random
import sys
import types
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from contracts.broken import assert_caught, broken_runs, good_runs, own_checks

from provenn.catalog.card import PART_KINDS
from provenn.contracts import (
    BadInput,
    Case,
    ContractError,
    FunctionCase,
    ModuleCase,
    OptimizerCase,
    check_function,
    check_optimizer,
    checks_of,
    exclusions_of,
)
from provenn.contracts.common import CHECKS as COMMON
from provenn.contracts.suite import has_suite, table_of

HERE = types.ModuleType("provenn_made_up", "Parts made up for this test.")
sys.modules["provenn_made_up"] = HERE


def part(text, *, name="distance", module="provenn_made_up"):
    """Define a function with this docstring in the made-up module; return its dotted name."""

    def distance(first: torch.Tensor, second: torch.Tensor, p: float = 2.0) -> torch.Tensor:
        if p <= 0:
            raise ValueError(f"p must be > 0, got {p!r}")
        return torch.linalg.vector_norm(first - second, p)

    distance.__doc__ = text
    distance.__module__ = module
    distance.__name__ = distance.__qualname__ = name
    return distance


def publish(attribute, value):
    setattr(HERE, attribute, value)
    return f"provenn_made_up.{attribute}"


FULL = """Return the distance of two points.

    Args:
        first: One point.
        second: The other.
        p: The order of the norm, > 0.

    Shape:
        first, second: (features,).

    Returns:
        A scalar.

    Raises:
        ValueError: ``p`` is not positive.

    Source: Minkowski, Geometrie der Zahlen (1896).
    """
DISTANCE = part(FULL)
GOOD = FunctionCase(
    publish("distance", DISTANCE),
    lambda: DISTANCE(torch.ones(3), torch.randn(3)),
    bad_input=(BadInput("p", lambda: DISTANCE(torch.ones(3), torch.ones(3), p=-1.0)),),
    label="good",
)


def broken(label, **options):
    return replace(GOOD, label=label, **options)


def without(section):
    """The full docstring without one section."""
    kept, skip = [], False
    for line in FULL.split("\n"):
        if line.strip().startswith(section):
            skip = True
        elif skip and line.startswith("    ") and not line.startswith("     "):
            skip = False
        if not skip:
            kept.append(line)
    return "\n".join(kept)


def documented(label, text, **options):
    name = publish(f"documented_{label}", part(text, name=f"documented_{label}"))
    return broken(label, part=name, **options)


def refusing(error):
    def call():
        raise error

    return call


def accept_anything():
    return None


BROKEN = {
    "public_name": [
        broken("absent", part="provenn_made_up.absent"),
        broken("no module", part="provenn_nowhere.distance"),
        broken("renamed", part=publish("other", DISTANCE)),
        broken("elsewhere", part=publish("distance_2", part(FULL, name="distance_2", module="math"))),
        broken("nowhere", part=publish("distance_3", part(FULL, name="distance_3", module="provenn_nowhere"))),
    ],
    "bad_input": [
        broken("none", bad_input=()),
        broken("accepts", bad_input=(BadInput("p", accept_anything),)),
        broken("another error", bad_input=(BadInput("p", refusing(RuntimeError("p is bad"))),)),
        broken("not named", bad_input=(BadInput("p", refusing(ValueError("expected a positive power"))),)),
        broken("a part of a word", bad_input=(BadInput("p", refusing(ValueError("input is bad"))),)),
        broken("the second", bad_input=(*GOOD.bad_input, BadInput("p", refusing(ValueError("p")), error=TypeError))),
    ],
    "global_state": [
        broken("default dtype", call=lambda: torch.set_default_dtype(torch.float64)),
        broken("default device", call=lambda: torch.set_default_device("meta")),
        broken("threads", call=lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
        broken("gradient mode", call=lambda: torch.set_grad_enabled(False)),
        broken("determinism", call=lambda: torch.use_deterministic_algorithms(True)),
        broken("anomaly mode", call=lambda: torch.autograd.set_detect_anomaly(True)),
        broken("precision", call=lambda: torch.set_float32_matmul_precision("medium")),
        broken("seeds torch", call=lambda: torch.manual_seed(3)),
        broken("numpy", call=lambda: np.random.rand()),  # noqa: NPY002 - the fault to catch
        broken("python", call=random.random),
        broken("errors", call=lambda: np.seterr(all="ignore")),
        broken("filters", call=lambda: warnings.simplefilter("ignore", SyntaxWarning)),
        broken("environment", call=lambda: os.environ.update(PROVENN_MADE_UP=str(random.getrandbits(8)))),
        broken("folder", call=lambda: os.chdir("/" if os.getcwd() != "/" else "/tmp")),
    ],
    "silence": [
        broken("print", call=lambda: print("done")),
        broken("stderr", call=lambda: sys.stderr.write("done")),
        broken("below Python", call=lambda: os.write(1, b"done")),
    ],
    "docstring": [
        documented("none", None),
        documented("no_sentence", FULL.replace("points.", "points")),
        documented("no_args", without("Args:")),
        documented("one_arg_missing", FULL.replace("second: The other.", "")),
        documented("no_shape", without("Shape:")),
        documented("no_returns", without("Returns:")),
        documented("no_raises", without("Raises:")),
        documented("another_error", FULL.replace("ValueError", "TypeError")),
        documented("no_source", FULL.replace("Source: Minkowski, Geometrie der Zahlen (1896).", "")),
    ],
}


@pytest.fixture(autouse=True)
def _global_state_restored():
    """Undo what the broken parts leave behind, after each test."""
    seed, numpy_state, python_state = torch.random.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    threads, errors, folder, precision = (
        torch.get_num_threads(), np.geterr(), os.getcwd(), torch.get_float32_matmul_precision(),
    )  # fmt: skip
    with warnings.catch_warnings():
        yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
    torch.set_float32_matmul_precision(precision)
    torch.random.set_rng_state(seed)
    np.random.set_state(numpy_state)  # noqa: NPY002
    random.setstate(python_state)
    np.seterr(**errors)
    os.chdir(folder)
    os.environ.pop("PROVENN_MADE_UP", None)


@pytest.mark.parametrize("check", good_runs(GOOD))
def test_good_part_passes(check):
    check()


@pytest.mark.parametrize(("name", "case"), broken_runs(BROKEN))
def test_broken_parts_are_caught(name, case):
    assert_caught(name, case)


def test_every_common_check_has_a_broken_part():
    assert set(BROKEN) == set(COMMON)
    assert own_checks("function") == set()


@pytest.mark.parametrize("kind", [kind for kind in PART_KINDS if has_suite(kind)])
def test_every_check_says_what_is_promised(kind):
    for name, check in table_of(kind).items():
        assert check.__doc__, name
        assert check.__doc__.split("\n")[0].endswith("."), name


def test_the_suites_there_are():
    found = {kind for kind in PART_KINDS if has_suite(kind)}
    assert found >= set(PART_KINDS) - {"agent", "class"}
    assert not has_suite("no such kind")


def test_errors_of_inner_imports_are_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "provenn_needs_more.py").write_text("import provenn_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ContractError, match="ModuleNotFoundError: No module named 'provenn_not_installed'"):
        checks_of(broken("inner", part="provenn_needs_more.thing"))["public_name"]()


def test_a_type_checkers_error_is_not_the_parts_own():
    """Bad input is called as a user calls it, with no checking of signatures at run time."""
    import jaxtyping

    seen = []
    case = broken("watched", bad_input=(BadInput("p", lambda: seen.append(jaxtyping.config.jaxtyping_disable)),))
    with pytest.raises(ContractError):
        checks_of(case)["bad_input"]()
    assert seen == [True]
    assert jaxtyping.config.jaxtyping_disable is False


def test_check_function_lists_every_failure():
    with pytest.raises(ContractError) as caught:
        check_function(broken("two", call=lambda: print(random.random())))
    assert "'silence'" in str(caught.value)
    assert "'global_state'" in str(caught.value)
    assert "2 of the checks" in str(caught.value)


def test_check_function_takes_a_call_and_options():
    check_function(GOOD.call, part=GOOD.part, bad_input=GOOD.bad_input)


def test_options_do_not_go_with_a_case():
    with pytest.raises(TypeError, match="case_or_make"):
        check_function(GOOD, label="again")
    with pytest.raises(TypeError, match="case_or_make"):
        check_optimizer(GOOD)


class TestCases:
    def test_an_option_declared_away_needs_a_reason(self):
        with pytest.raises(ValueError, match="compile_reason"):
            ModuleCase("a.B", make=int, inputs=int, compile=False)

    def test_an_exclusion_needs_a_reason(self):
        with pytest.raises(ValueError, match="silence"):
            FunctionCase("a.b", print, excluded={"silence": " "})

    def test_a_part_needs_a_dotted_name(self):
        with pytest.raises(ValueError, match="part"):
            FunctionCase("b", print)

    def test_options_without_a_reason_field_may_be_false(self):
        assert OptimizerCase("a.B", make=int, foreach=False).declared_away == {}

    def test_what_is_declared_away_is_not_run_and_is_shown_with_its_reason(self):
        case = ModuleCase(
            "a.B", make=int, inputs=int, export=False, export_reason="data decide", excluded={"bfloat16": "range"}
        )
        assert exclusions_of(case) == {"export": "data decide", "bfloat16": "range"}
        assert set(table_of("module")) - set(checks_of(case)) == {"export", "bfloat16"}

    @pytest.mark.parametrize("option", ["compile", "export", "autocast", "empty_batch", "independent_samples"])
    def test_every_option_that_can_be_declared_away_is_a_check(self, option):
        case = ModuleCase("a.B", make=int, inputs=int, **{option: False, f"{option}_reason": "because"})
        assert option not in checks_of(case)
        assert option in table_of("module")

    def test_an_unknown_check_cannot_be_excluded(self):
        with pytest.raises(ValueError, match="unknown checks \\['noise'\\]"):
            checks_of(broken("unknown", excluded={"noise": "there is none"}))

    def test_every_declared_reason_belongs_to_a_check(self):
        for kind in filter(has_suite, PART_KINDS):
            case_type = next(one for one in Case.__subclasses__() if one.kind == kind)
            names = [name.removesuffix("_reason") for name in case_type.__dataclass_fields__ if "_reason" in name]
            assert set(names) <= set(table_of(kind)), kind
