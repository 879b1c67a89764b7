"""The ledger keeps every finished cell exactly, on SQLite and on PostgreSQL alike."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from provenn.claims.ledger import CellKey, Ledger, Record, RunKey, canonical

RUN = RunKey("paper", "small", "f" * 64)
KEY = CellKey("main", "method", canonical({"lr": 1e-3, "name": "ä"}), 0, False)
FIGURES = {"third": 1 / 3, "least": 5e-324, "most": 1.7976931348623157e308, "minus nought": -0.0, "tenth": 0.1}
RECORD = Record(
    FIGURES,
    {"loss": ((0.0, 1 / 7), (1.0, math.pi)), "one point": ((0.5, math.inf),)},
    "2024-05-06T07:08:09.123+00:00",
    1 / 9,
    2**40 + 1,
    2**41,
    {"versions": {"torch": "2"}, "threads": 1},
)


def test_a_cell_comes_back_bit_for_bit(address):
    with Ledger(address) as ledger:
        assert ledger.store(RUN, KEY, RECORD)
    with Ledger(address) as ledger:
        assert ledger.finished(RUN) == {KEY: RECORD}
        found = ledger.finished(RUN)[KEY]
    assert {name: value.hex() for name, value in found.metrics.items()} == {
        name: value.hex() for name, value in FIGURES.items()
    }


def test_a_setting_that_diverged_is_kept(address):
    with Ledger(address) as ledger:
        ledger.store(RUN, KEY, replace(RECORD, metrics={"validation": math.nan}, peak_cuda=None))
        found = ledger.finished(RUN)[KEY]
    assert math.isnan(found.metrics["validation"])
    assert found.peak_cuda is None


def test_storing_a_cell_twice_changes_nothing(address):
    with Ledger(address) as ledger:
        assert ledger.store(RUN, KEY, RECORD)
        assert not ledger.store(RUN, KEY, replace(RECORD, seconds=99.0))
        assert ledger.finished(RUN) == {KEY: RECORD}


@pytest.mark.parametrize(
    ("run", "key"),
    [
        (replace(RUN, slug="other"), KEY),
        (replace(RUN, tier="full"), KEY),
        (replace(RUN, fingerprint="e" * 64), KEY),
        (RUN, replace(KEY, study="other")),
        (RUN, replace(KEY, arm="other")),
        (RUN, replace(KEY, settings=canonical({"lr": 2e-3, "name": "ä"}))),
        (RUN, replace(KEY, seed=1)),
        (RUN, replace(KEY, tuning=True)),
    ],
)
def test_cells_that_differ_in_any_part_of_the_key_are_apart(address, run, key):
    with Ledger(address) as ledger:
        assert ledger.store(RUN, KEY, RECORD)
        assert not ledger.has(run, key)
        assert ledger.store(run, key, replace(RECORD, seconds=99.0))
        assert ledger.has(run, key)
        assert ledger.finished(RUN)[KEY] == RECORD
        assert ledger.finished(run)[key].seconds == 99.0


def test_forget_takes_the_named_studies_of_the_run_alone(address):
    other, elsewhere = replace(KEY, study="other"), replace(RUN, fingerprint="e" * 64)
    with Ledger(address) as ledger:
        for run, key in [(RUN, KEY), (RUN, other), (elsewhere, KEY)]:
            ledger.store(run, key, RECORD)
        assert ledger.forget(RUN, ["main"]) == 1
        assert set(ledger.finished(RUN)) == {other}
        assert set(ledger.finished(elsewhere)) == {KEY}


def test_settings_longer_than_an_index_allows(address):
    key = replace(KEY, settings=canonical({"text": "x" * 20_000}))
    with Ledger(address) as ledger:
        assert ledger.store(RUN, key, RECORD)
        assert set(ledger.finished(RUN)) == {key}


def test_many_may_open_a_new_ledger_at_once(address):
    faults = []

    def open_it(seed):
        try:
            with Ledger(address) as ledger:
                ledger.store(RUN, replace(KEY, seed=seed), RECORD)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=open_it, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    with Ledger(address) as ledger:
        assert {key.seed for key in ledger.finished(RUN)} == set(range(8))


WRITER = """
import sys
from claims.test_ledger import KEY, RECORD, RUN
from dataclasses import replace
from provenn.claims.ledger import Ledger
with Ledger(sys.argv[1]) as ledger:
    print(sum(ledger.store(RUN, replace(KEY, seed=seed), RECORD) for seed in range(60)))
"""


def test_two_processes_write_the_same_cells(address):
    with Ledger(address):
        pass
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, address], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    stored = [int(writer.communicate(timeout=60)[0]) for writer in writers]
    assert sum(stored) == 60
    with Ledger(address) as ledger:
        assert {key.seed for key in ledger.finished(RUN)} == set(range(60))


def test_sqlite_commits_reach_the_disk(tmp_path):
    with Ledger(str(tmp_path / "ledger.sqlite")) as ledger, ledger._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 3  # EXTRA


def test_canonical_json_does_not_depend_on_order():
    assert canonical({"b": 1, "a": 0.1}) == canonical({"a": 0.1, "b": 1}) == '{"a":0.1,"b":1}'
