"""Say in words what a database refused, and what to do about it."""

from __future__ import annotations

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

import sqlalchemy as sa

from provenn.claims.errors import (
    LedgerAddressError,
    LedgerCorruptError,
    LedgerError,
    LedgerFullError,
    LedgerLockedError,
    LedgerReadOnlyError,
    LedgerUnreachableError,
)

KEPT = "the cells finished so far are kept"
_SQLITE: dict[int, type[LedgerError]] = {
    sqlite3.SQLITE_BUSY: LedgerLockedError,
    sqlite3.SQLITE_LOCKED: LedgerLockedError,
    sqlite3.SQLITE_READONLY: LedgerReadOnlyError,
    sqlite3.SQLITE_PERM: LedgerReadOnlyError,
    sqlite3.SQLITE_CANTOPEN: LedgerReadOnlyError,
    sqlite3.SQLITE_CORRUPT: LedgerCorruptError,
    sqlite3.SQLITE_NOTADB: LedgerCorruptError,
    sqlite3.SQLITE_FULL: LedgerFullError,
    sqlite3.SQLITE_IOERR: LedgerFullError,
}
_POSTGRES: dict[str, type[LedgerError]] = {
    "55P03": LedgerLockedError,
    "25006": LedgerReadOnlyError,
    "42501": LedgerReadOnlyError,
    "53100": LedgerFullError,
    "XX001": LedgerCorruptError,
    "XX002": LedgerCorruptError,
}
_ADVICE: dict[type[LedgerError], str] = {
    LedgerLockedError: "the ledger {name} is locked by another process; {kept}, try again when it is done",
    LedgerReadOnlyError: "the ledger {name} cannot be opened for writing: check the permissions of the file and its"
    " folder, or set PROVENN_DB to another file",
    LedgerCorruptError: "the ledger {name} is damaged or is not a ledger. Nothing was deleted: move it away"
    " (mv '{name}' '{name}.damaged') to begin a new one, or restore it from a backup",
    LedgerFullError: "the disk did not take a write to the ledger {name}: it is full, over its quota or failing;"
    " {kept}. Make room, and the same command continues",
    LedgerUnreachableError: "the ledger {name} does not answer; {kept}, and the same command continues once it does",
}


@contextmanager
def in_words(name: str) -> Iterator[None]:
    """Turn what the database raises into a :class:`LedgerError` that names the ledger and the way out."""
    try:
        yield
    except sa.exc.NoSuchModuleError as error:
        raise LedgerAddressError(f"PROVENN_DB names a database that SQLAlchemy does not know: {error}") from error
    except ImportError as error:
        hint = "; pip install 'provenn[postgres]'" if "psycopg" in str(error) else ""
        raise LedgerAddressError(f"the driver of the ledger {name} is not installed ({error}){hint}") from error
    except sa.exc.DBAPIError as error:
        cause = _cause(error)
        raise cause(f"{_advice(cause, name)} ({_one_line(error.orig)})") from error
    except OSError as error:
        cause = LedgerFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else LedgerReadOnlyError
        raise cause(f"{_advice(cause, name)} ({error})") from error


def _cause(error: sa.exc.DBAPIError) -> type[LedgerError]:
    origin = error.orig
    if isinstance(origin, sqlite3.Error):
        # An extended code keeps the primary one in its low byte.
        code = getattr(origin, "sqlite_errorcode", None)
        return _SQLITE.get((code or 0) & 0xFF, LedgerCorruptError)
    state = getattr(origin, "sqlstate", None)
    return _POSTGRES.get(state or "", LedgerUnreachableError)


def _advice(cause: type[LedgerError], name: str) -> str:
    return _ADVICE[cause].format(name=name, kept=KEPT)


def _one_line(error: BaseException | None) -> str:
    return " ".join(str(error).split())
