"""The tools that measure beside a peer: turns, medians, peaks, the table, what they keep."""

from __future__ import annotations

import functools
import sys
import time
import types

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks.timing import alternate, peak_memory
from provenn.catalog import results
from provenn.catalog.card import card


def test_functions_take_turns_and_every_second_round_goes_backwards():
    calls = []
    alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"


def test_the_median_is_of_the_timed_rounds(monkeypatch):
    clock = [0.0]
    costs = iter([100.0, 1.0, 9.0, 2.0])  # the first is the warm-up

    def work():
        clock[0] += next(costs)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert alternate({"work": work}, rounds=3) == {"work": 2.0}


@pytest.mark.parametrize(("functions", "rounds"), [({}, 1), ({"a": int}, 0)])
def test_nothing_to_time_is_refused(functions, rounds):
    with pytest.raises(ValueError, match="at least one function and one round"):
        alternate(functions, rounds)


def test_peak_memory_is_the_rise_of_a_fresh_process():
    rise = peak_memory(functools.partial(bytearray, 300_000_000))
    assert 290e6 < rise < 330e6
    # The rise of this process, which may have peaked before, plays no part.
    held = bytearray(400_000_000)
    assert peak_memory(functools.partial(bytearray, 1000)) < 50e6
    assert len(held) == 400_000_000


def test_peak_memory_of_a_process_that_dies():
    with pytest.raises(RuntimeError, match="died with exit code 3"):
        peak_memory(functools.partial(sys.exit, 3))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Put a made-up benchmark in diffgrad's place."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(command, "benchmarks", lambda: {"diffgrad": "made_up_benchmark"})
    figures = {
        "peer": "peer 1.0",
        "agrees": True,
        "largest_difference": 1e-9,
        "speed_ratio": 1.5,
        "growth": {"size ×8, time ×": 8.1},
    }
    module = types.ModuleType("made_up_benchmark")
    module.measure = lambda: figures
    monkeypatch.setitem(sys.modules, "made_up_benchmark", module)
    return figures


def test_figures_are_shown_and_not_kept_unless_asked(fake, capsys):
    assert command.main(["diffgrad"]) == 0
    said = capsys.readouterr().out
    assert ["diffgrad", "peer", "1.0", "yes", "1e-09", "1.5"] in [line.split() for line in said.splitlines()]
    assert "growth size ×8, time × 8.1" in said
    assert results.read_results(card("diffgrad")) == {}


def test_record_keeps_figures_with_the_module_and_the_versions(fake, capsys):
    assert command.main(["--record"]) == 0
    kept = results.read_results(card("diffgrad"))["peer"]
    assert {name: kept[name] for name in fake} == fake
    assert kept["digest"] == results.module_digest(card("diffgrad"))
    assert {"python", "torch", "numpy", "provenn"} == set(kept["versions"])


def test_disagreement_is_a_failure(fake, capsys):
    fake["agrees"] = False
    assert command.main([]) == 1
    assert "NO" in capsys.readouterr().out


def test_without_a_peer_nothing_disagrees(fake, capsys):
    fake.update(peer=None, agrees=None, largest_difference=None, speed_ratio=None)
    assert command.main([]) == 0


def test_a_figure_left_out_is_a_failure(fake, capsys):
    del fake["speed_ratio"]
    assert command.main([]) == 1
    assert "left out speed_ratio" in capsys.readouterr().err


def test_what_a_benchmark_draws_is_the_same_every_time(fake, monkeypatch):
    drawn = []
    module = types.ModuleType("drawing_benchmark")
    module.measure = lambda: drawn.append(torch.rand(3)) or fake
    monkeypatch.setitem(sys.modules, "drawing_benchmark", module)
    monkeypatch.setattr(command, "benchmarks", lambda: {"diffgrad": "drawing_benchmark"})
    state = torch.get_rng_state()
    assert command.main([]) == command.main([]) == 0
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_unknown_slug_names_the_nearest(capsys):
    assert command.main(["difgrad"]) == command.USAGE
    assert "unknown benchmark 'difgrad'; the nearest are diffgrad" in capsys.readouterr().err


def test_every_benchmark_is_a_papers():
    assert all(card(slug).slug == slug for slug in command.benchmarks())
