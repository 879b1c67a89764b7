"""Suggestions for mistyped names."""

import pytest

from provenn.core.nearest import nearest_names, unknown_name_message

KNOWN = ["diffgrad", "sap-pruning", "neural-collapse", "sigmoid-attention", "anyloss", "adam", "adamw"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("difgrad", "diffgrad"),
        ("DiffGrad", "diffgrad"),
        ("dfifgrad", "diffgrad"),
        ("sap_pruning", "sap-pruning"),
        ("pruning", "sap-pruning"),
        ("neural collapse", "neural-collapse"),
        ("atention", "sigmoid-attention"),
        ("any-loss", "anyloss"),
        ("adma", "adam"),
        ("ADAMW", "adamw"),
    ],
)
def test_typos(typed, meant):
    assert nearest_names(typed, KNOWN)[0] == meant


def test_case_of_the_known_is_ignored_and_kept():
    assert nearest_names("diffgrad", ["ADAM", "DIFFGRAD"]) == ["DIFFGRAD", "ADAM"]


def test_ties_are_alphabetical_whatever_the_order_given():
    assert nearest_names("x", ["c", "a", "b", "d"]) == ["a", "b", "c"]
    assert nearest_names("x", ["d", "b", "a", "c"]) == ["a", "b", "c"]
    assert nearest_names("ab", ["ac", "aa"]) == ["aa", "ac"]


def test_best_first():
    assert nearest_names("adam", KNOWN)[:2] == ["adam", "adamw"]


@pytest.mark.parametrize(("known", "count"), [([], 0), (["a"], 1), (["a", "b"], 2), (["a", "b", "c", "d"], 3)])
def test_as_many_as_there_are(known, count):
    assert len(nearest_names("z", known)) == count
    assert len(nearest_names("z", iter(known), count=1)) == min(count, 1)


def test_repeated_names_are_suggested_once():
    assert nearest_names("a", ["a", "a", "b"]) == ["a", "b"]


def test_nothing_typed():
    assert nearest_names("", ["b", "a"]) == ["a", "b"]


def test_message():
    message = unknown_name_message("paper", "difgrad", ["diffgrad", "adam"])
    assert message == "unknown paper 'difgrad'; the nearest are diffgrad, adam"
    assert unknown_name_message("paper", "x", []) == "unknown paper 'x'"
