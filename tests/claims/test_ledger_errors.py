"""Every way a ledger can refuse has its message and its exit code, and costs no finished cell."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from claims.test_ledger import KEY, RECORD, RUN

from provenn.claims.errors import (
    ExitCode,
    LedgerAddressError,
    LedgerCorruptError,
    LedgerFullError,
    LedgerLockedError,
    LedgerNewerError,
    LedgerReadOnlyError,
    LedgerUnreachableError,
)
from provenn.claims.ledger import Ledger


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    path = tmp_path / "filled.sqlite"
    with Ledger(str(path)) as ledger:
        for seed in range(20):
            ledger.store(RUN, replace(KEY, seed=seed), RECORD)
    return path


def test_locked(filled):
    with Ledger(str(filled), patience=0.1) as ledger:
        holder = sqlite3.connect(filled, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerLockedError, match=r"filled.sqlite is locked by another process; .* are kept"):
            ledger.store(RUN, replace(KEY, seed=99), RECORD)
        holder.execute("ROLLBACK")
        holder.close()
        assert ledger.store(RUN, replace(KEY, seed=99), RECORD)
        assert len(ledger.finished(RUN)) == 21


@pytest.mark.parametrize("address", ["postgresql"], indirect=True)
def test_locked_postgres(address):
    with Ledger(address, patience=0.2) as ledger:
        ledger.store(RUN, KEY, RECORD)
        engine = sa.create_engine(address)
        with engine.begin() as holder:
            holder.execute(sa.text("LOCK TABLE provenn_cells IN EXCLUSIVE MODE"))
            with pytest.raises(LedgerLockedError, match="locked by another process"):
                ledger.store(RUN, replace(KEY, seed=1), RECORD)
        engine.dispose()
        assert set(ledger.finished(RUN)) == {KEY}


def test_opened_for_reading_only(filled):
    with (
        Ledger(f"sqlite:///file:{filled}?mode=ro&uri=true") as ledger,
        pytest.raises(LedgerReadOnlyError, match="PROVENN_DB"),
    ):
        ledger.store(RUN, replace(KEY, seed=99), RECORD)


READ_ONLY = """
import os, sys
from claims.test_ledger import KEY, RECORD, RUN
from provenn.claims.errors import LedgerReadOnlyError
from provenn.claims.ledger import Ledger
import sqlite3, sqlalchemy.dialects.sqlite
Ledger(":memory:")  # whatever is imported late, before this user may not read it
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    with Ledger(sys.argv[1]) as ledger:
        ledger.store(RUN, KEY, RECORD)
except LedgerReadOnlyError as error:
    print(error)
"""


@pytest.mark.parametrize("exists", [True, False])
def test_read_only_folder(tmp_path, filled, exists):
    folder = tmp_path / "locked"
    folder.mkdir()
    if exists:
        filled.rename(folder / "ledger.sqlite")
        (folder / "ledger.sqlite").chmod(0o444)
    folder.chmod(0o555)
    for parent in list(folder.parents)[:3]:  # pytest keeps its folders to their owner
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    call = [sys.executable, "-c", READ_ONLY, str(folder / "ledger.sqlite")]
    said = subprocess.run(call, capture_output=True, text=True, timeout=60)
    folder.chmod(0o755)
    assert "cannot be opened for writing: check the permissions" in said.stdout, said.stderr


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerReadOnlyError, match="file"):
        Ledger(str(tmp_path / "file" / "ledger.sqlite"))


def test_not_a_ledger(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("Dear diary, today I learnt about databases. " * 50)
    before = path.read_bytes()
    with pytest.raises(
        LedgerCorruptError, match=rf"Nothing was deleted: move it away \(mv '{path}' '{path}.damaged'\)"
    ):
        Ledger(str(path))
    assert path.read_bytes() == before


def test_damaged_pages(filled):
    whole = filled.read_bytes()
    filled.write_bytes(whole[:4096] + b"\xa5" * (len(whole) - 4096))
    damaged = filled.read_bytes()
    with pytest.raises(LedgerCorruptError, match="is damaged"), Ledger(str(filled)) as ledger:
        ledger.finished(RUN)
    assert filled.read_bytes() == damaged


def test_truncated_file(filled):
    filled.write_bytes(filled.read_bytes()[:9000])
    with pytest.raises(LedgerCorruptError, match="is damaged"), Ledger(str(filled)) as ledger:
        ledger.finished(RUN)


def test_a_row_that_is_not_json(filled):
    with sqlite3.connect(filled) as connection:
        connection.execute("UPDATE provenn_cells SET metrics = 'nonsense' WHERE seed = 3")
    connection.close()
    with Ledger(str(filled)) as ledger, pytest.raises(LedgerCorruptError, match="cell 4 cannot be read"):
        ledger.finished(RUN)


def test_newer_version(address):
    with Ledger(address) as ledger:
        ledger.store(RUN, KEY, RECORD)
        with ledger._engine.begin() as connection:
            connection.execute(sa.text("INSERT INTO provenn_schema (version) VALUES (2)"))
    with pytest.raises(LedgerNewerError, match=r"version 2, and this provenn knows versions up to 1: update provenn"):
        Ledger(address)


def test_a_ledger_whose_making_was_cut_short_is_made_whole(address):
    with Ledger(address) as ledger:
        ledger.store(RUN, KEY, RECORD)
        with ledger._engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM provenn_schema"))
    with Ledger(address) as ledger, ledger._engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version FROM provenn_schema")).scalars().all() == [1]
        assert set(ledger.finished(RUN)) == {KEY}


def test_no_room_left(filled):
    with Ledger(str(filled)) as ledger:
        with ledger._engine.connect() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        large = replace(RECORD, curves={"loss": tuple((float(step), 0.1) for step in range(5000))})
        with pytest.raises(LedgerFullError, match=r"full, over its quota or failing; .* are kept"):
            ledger.store(RUN, replace(KEY, seed=99), large)
        assert len(ledger.finished(RUN)) == 20


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_fills_up(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        stored = 0
        with Ledger(str(disk / "ledger.sqlite")) as ledger:
            with contextlib.suppress(LedgerFullError):
                for seed in range(1000):
                    ledger.store(RUN, replace(KEY, seed=seed), RECORD)
                    stored += 1
            assert 0 < stored < 1000
            with pytest.raises(LedgerFullError, match="Make room"):
                ledger.store(RUN, replace(KEY, seed=stored), RECORD)
            assert {key.seed for key in ledger.finished(RUN)} == set(range(stored))
        with Ledger(str(disk / "ledger.sqlite")) as ledger:
            assert len(ledger.finished(RUN)) == stored
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("nosuchdatabase://host/name", "does not know"),
        ("postgresql://[::1/", "neither a path nor a URL"),
        ("://", "neither a path nor a URL"),
    ],
)
def test_addresses_that_make_no_sense(address, words):
    with pytest.raises(LedgerAddressError, match=words):
        Ledger(address)


def test_driver_missing_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(LedgerAddressError, match=r"pip install 'provenn\[postgres\]'"):
        Ledger("postgresql://provenn@127.0.0.1/ledger")


def test_server_down_hides_the_password():
    with pytest.raises(LedgerUnreachableError, match="does not answer") as caught:
        Ledger("postgresql://provenn:secret@127.0.0.1:9/ledger", patience=2)
    assert "secret" not in str(caught.value)


def test_every_cause_has_its_own_exit_code(provenn, filled, tmp_path):
    codes = [one.value for one in ExitCode]
    assert len(codes) == len(set(codes))
    filled.write_text("not a database at all, I am afraid" * 100)
    said = provenn("run", "claims.fake_claims:QUICK", PROVENN_DB=str(filled))
    assert said.returncode == ExitCode.LEDGER_CORRUPT
    assert "Traceback" not in said.stderr
    assert f"mv '{filled}' '{filled}.damaged'" in said.stderr
