"""The ledger: every finished cell as one row, in SQLite or any database that SQLAlchemy reaches.

A cell is stored in one transaction as soon as it ends, with the strictest durability the database has, so that
losing power at any moment loses at most the cells in flight.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
import sqlalchemy as sa
from sqlalchemy import Engine, event
from sqlalchemy.engine import URL, make_url

from provenn.claims.errors import LedgerAddressError, LedgerCorruptError, LedgerNewerError
from provenn.claims.ledger_errors import in_words

SCHEMA_VERSION = 1
Curves = Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class CellKey:
    """Which cell of a run it is. ``settings`` is canonical JSON, see :func:`canonical`."""

    study: str
    arm: str
    settings: str
    seed: int
    tuning: bool

    def __str__(self) -> str:
        tried = f", tuning {self.settings}" if self.tuning else ""
        return f"study {self.study}, arm {self.arm}, seed {self.seed}{tried}"


@dataclass(frozen=True)
class RunKey:
    """Which run a cell belongs to: claim, tier, and the fingerprint of code, torch and device type."""

    slug: str
    tier: str
    fingerprint: str


@dataclass(frozen=True)
class Record:
    """What a finished cell left.

    Args:
        metrics: Its figures.
        curves: Its curves, as points (x, y).
        started: When it began, ISO 8601 in UTC.
        seconds: How long it ran.
        peak_memory: High-water mark of the worker's resident memory during the cell, in bytes.
        peak_cuda: High-water mark of CUDA memory, in bytes; None without CUDA.
        environment: Versions, hardware, threads, platform and device of the worker.
    """

    metrics: Mapping[str, float]
    curves: Curves = field(default_factory=dict)
    started: str = ""
    seconds: float = 0.0
    peak_memory: int = 0
    peak_cuda: int | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)


def canonical(value: Any) -> str:
    """Return JSON with sorted keys and no spaces: equal values, equal text; floats keep every bit."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


_METADATA = sa.MetaData()
_VERSION = sa.Table("provenn_schema", _METADATA, sa.Column("version", sa.Integer, primary_key=True))
_CELLS = sa.Table(
    "provenn_cells",
    _METADATA,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("slug", sa.String(200), nullable=False),
    sa.Column("tier", sa.String(20), nullable=False),
    sa.Column("fingerprint", sa.String(64), nullable=False),
    sa.Column("study", sa.String(200), nullable=False),
    sa.Column("arm", sa.String(200), nullable=False),
    sa.Column("settings", sa.Text, nullable=False),
    sa.Column("settings_digest", sa.String(64), nullable=False),
    sa.Column("seed", sa.Integer, nullable=False),
    sa.Column("tuning", sa.Boolean, nullable=False),
    sa.Column("metrics", sa.Text, nullable=False),
    sa.Column("curves", sa.Text, nullable=False),
    sa.Column("started", sa.String(40), nullable=False),
    sa.Column("seconds", sa.Double, nullable=False),
    sa.Column("peak_memory", sa.BigInteger, nullable=False),
    sa.Column("peak_cuda", sa.BigInteger),
    sa.Column("environment", sa.Text, nullable=False),
    sa.UniqueConstraint(
        "slug", "tier", "fingerprint", "study", "arm", "settings_digest", "seed", "tuning", name="provenn_one_cell"
    ),
)


def ledger_address() -> str:
    """Return ``$PROVENN_DB``, or the file ``ledger.sqlite`` in the platform's data folder."""
    return os.environ.get("PROVENN_DB") or str(Path(platformdirs.user_data_dir("provenn")) / "ledger.sqlite")


class Ledger:
    """An open ledger. Use it as a context manager.

    Args:
        address: A SQLAlchemy URL, or the path of a SQLite file, made with its folder if it does not exist.
        patience: Seconds to wait for another process that is writing.

    Raises:
        LedgerError: It cannot be used; each cause has its class, message and exit code.
    """

    def __init__(self, address: str | None = None, patience: float = 30.0) -> None:
        self._url = _url(address or ledger_address())
        self.name = self._url.render_as_string(hide_password=True)
        if self._url.get_backend_name() == "sqlite" and self._url.database:
            self.name = self._url.database
        with in_words(self.name):
            if self._is_plain_file:
                Path(str(self._url.database)).parent.mkdir(parents=True, exist_ok=True)
            self._engine = _engine(self._url, patience)
            try:
                self._prepare()
            except BaseException:
                self._engine.dispose()
                raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.dispose()

    def finished(self, run: RunKey) -> dict[CellKey, Record]:
        """Return every finished cell of a run."""
        query = sa.select(_CELLS).where(*_of(run)).order_by(_CELLS.c.id)
        with in_words(self.name), self._engine.connect() as connection:
            rows = [row._asdict() for row in connection.execute(query)]
        return {_key(row): _record(row, self.name) for row in rows}

    def has(self, run: RunKey, key: CellKey) -> bool:
        """Return whether a cell is finished, by this process or another."""
        query = sa.select(_CELLS.c.id).where(*_of(run), *_of_cell(key))
        with in_words(self.name), self._engine.connect() as connection:
            return connection.execute(query).first() is not None

    def store(self, run: RunKey, key: CellKey, record: Record) -> bool:
        """Store a finished cell, durably when this returns.

        Returns:
            False if the cell was there already, which changes nothing.
        """
        row = {
            "slug": run.slug,
            "tier": run.tier,
            "fingerprint": run.fingerprint,
            "study": key.study,
            "arm": key.arm,
            "settings": key.settings,
            "settings_digest": _digest(key.settings),
            "seed": key.seed,
            "tuning": key.tuning,
            "metrics": canonical(dict(record.metrics)),
            "curves": canonical({name: list(points) for name, points in record.curves.items()}),
            "started": record.started,
            "seconds": record.seconds,
            "peak_memory": record.peak_memory,
            "peak_cuda": record.peak_cuda,
            "environment": canonical(record.environment),
        }
        with in_words(self.name):
            try:
                with self._engine.begin() as connection:
                    connection.execute(_CELLS.insert().values(row))
            except sa.exc.IntegrityError:
                return False
        return True

    def forget(self, run: RunKey, studies: Sequence[str]) -> int:
        """Delete the finished cells of a run's studies, and return how many there were."""
        query = _CELLS.delete().where(*_of(run), _CELLS.c.study.in_(list(studies)))
        with in_words(self.name), self._engine.begin() as connection:
            return connection.execute(query).rowcount

    @property
    def _is_plain_file(self) -> bool:
        database = self._url.database
        return (
            self._url.get_backend_name() == "sqlite" and bool(database) and not str(database).startswith(("file:", ":"))
        )

    def _prepare(self) -> None:
        version = self._version()
        if version is None:  # new, or its making was cut short
            self._create()
        elif version > SCHEMA_VERSION:
            raise LedgerNewerError(
                f"the ledger {self.name} has schema version {version}, and this provenn knows versions up to"
                f" {SCHEMA_VERSION}: update provenn, or set PROVENN_DB to another file"
            )

    def _version(self) -> int | None:
        if not sa.inspect(self._engine).has_table(_VERSION.name):
            return None
        with self._engine.connect() as connection:
            return connection.execute(sa.select(sa.func.max(_VERSION.c.version))).scalar()

    def _create(self) -> None:
        """Make the tables; safe when several processes do so at once."""
        with self._engine.begin() as connection:
            if self._engine.dialect.name == "postgresql":
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(7076686)"))
            for table in (_CELLS, _VERSION):
                connection.execute(sa.schema.CreateTable(table, if_not_exists=True))
            have = sa.select(_VERSION.c.version).where(_VERSION.c.version == SCHEMA_VERSION)
            fresh = sa.select(sa.literal(SCHEMA_VERSION)).where(~sa.exists(have))
            connection.execute(_VERSION.insert().from_select(["version"], fresh))


def _url(address: str) -> URL:
    if "://" not in address:
        return URL.create("sqlite", database=str(Path(address).expanduser()))
    try:
        url = make_url(address)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise LedgerAddressError(f"PROVENN_DB {address!r} is neither a path nor a URL: {error}") from error
    if url.drivername in ("postgresql", "postgres"):
        url = url.set(drivername="postgresql+psycopg")
    return url


def _engine(url: URL, patience: float) -> Engine:
    if url.get_backend_name() != "sqlite":
        wait = {"connect_timeout": max(2, round(patience))} if url.drivername == "postgresql+psycopg" else {}
        engine = sa.create_engine(url, connect_args=wait, pool_pre_ping=True)
        if engine.dialect.name == "postgresql":
            event.listen(engine, "connect", _strict_postgres(patience))
        return engine
    engine = sa.create_engine(url, connect_args={"timeout": patience})
    event.listen(engine, "connect", _strict_sqlite)
    return engine


def _strict_sqlite(connection: Any, _: object) -> None:
    """Write-ahead log where the file system allows, and every commit on the disk before it returns."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=EXTRA")
    cursor.close()


def _strict_postgres(patience: float) -> Any:
    def listen(connection: Any, _: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute("SET synchronous_commit = on")
            cursor.execute(f"SET lock_timeout = {round(patience * 1000)}")
        connection.commit()

    return listen


def _of(run: RunKey) -> Iterator[sa.ColumnElement[bool]]:
    yield _CELLS.c.slug == run.slug
    yield _CELLS.c.tier == run.tier
    yield _CELLS.c.fingerprint == run.fingerprint


def _of_cell(key: CellKey) -> Iterator[sa.ColumnElement[bool]]:
    yield _CELLS.c.study == key.study
    yield _CELLS.c.arm == key.arm
    yield _CELLS.c.settings_digest == _digest(key.settings)
    yield _CELLS.c.seed == key.seed
    yield _CELLS.c.tuning == key.tuning


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _key(row: Mapping[str, Any]) -> CellKey:
    return CellKey(row["study"], row["arm"], row["settings"], row["seed"], bool(row["tuning"]))


def _record(row: Mapping[str, Any], name: str) -> Record:
    try:
        curves = {curve: tuple((x, y) for x, y in points) for curve, points in json.loads(row["curves"]).items()}
        return Record(
            json.loads(row["metrics"]),
            curves,
            row["started"],
            row["seconds"],
            row["peak_memory"],
            row["peak_cuda"],
            json.loads(row["environment"]),
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise LedgerCorruptError(f"the ledger {name} is damaged: cell {row['id']} cannot be read ({error})") from error
