"""Two back ends for the ledger, and the command line as a person meets it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

TESTS = Path(__file__).parent.parent
PROVENN = [sys.executable, "-c", "from provenn.cli import main; main()"]


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test its own folder and its own ledger, none of the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROVENN_DB", str(tmp_path / "ledger.sqlite"))
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{TESTS.parent}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def provenn() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a caller of the command line in a process of its own."""

    def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PROVENN, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
        )

    return call


def _postgres_program(name: str) -> str | None:
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(debian[-1]) if debian else None)


def _account() -> dict[str, object]:
    """Postgres refuses root: run it as another user there."""
    if os.geteuid() != 0:
        return {}
    import pwd

    known = {entry.pw_name for entry in pwd.getpwall()}
    name = next((name for name in ("postgres", "nobody") if name in known), None)
    if name is None:
        pytest.skip("PostgreSQL refuses root, and there is no user postgres or nobody")
    return {"user": name, "group": pwd.getpwnam(name).pw_gid, "extra_groups": []}


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Start a private PostgreSQL server on loopback, and return its URL without a database."""
    initdb, server = _postgres_program("initdb"), _postgres_program("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL's initdb and postgres are not installed")
    account = _account()
    folder = Path(tempfile.mkdtemp(prefix="provenn-postgres-"))
    try:
        if account:
            shutil.chown(folder, account["user"], account["group"])
        common = {"cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **account}
        data = str(folder / "data")
        subprocess.run([initdb, "-D", data, "-A", "trust", "-U", "provenn", "--no-sync"], check=True, **common)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = ["-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", "", "-F"]
        process = subprocess.Popen([server, *options], **common)
        try:
            url = f"postgresql+psycopg://provenn@127.0.0.1:{port}/"
            _wait_until_it_answers(url, process)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    engine = sa.create_engine(url + "postgres")
    for _ in range(300):
        try:
            with engine.connect():
                break
        except sa.exc.OperationalError:
            if process.poll() is not None:
                pytest.fail(f"postgres ended with exit code {process.returncode}")
            time.sleep(0.1)
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the address of an empty ledger, on each back end."""
    if request.param == "sqlite":
        return str(tmp_path / "made" / "ledger.sqlite")
    server = request.getfixturevalue("postgres")
    name = f"ledger_{uuid.uuid4().hex}"
    engine = sa.create_engine(server + "postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return f"{server}{name}"
