"""What is slow to make from many small files, kept in the platform's cache folder until one of the files changes.

The folder only ever saves time: a file there that cannot be read, does not match its digest, or was made from other
sources is made anew, and a folder that cannot be written is left alone.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from provenn import __version__


def cache_folder() -> Path:
    """Return the folder of the compiled files; it need not exist."""
    import platformdirs

    return platformdirs.user_cache_path("provenn") / "catalog"


def compiled(name: str, sources: Iterable[Path], make: Callable[[], bytes]) -> bytes:
    """Return what ``make`` makes from ``sources``, from the cache if no source has changed since.

    Args:
        name: What is made; with the place of the package it names the file.
        sources: The files it is made from. A path, size or modification time that differs makes it anew.
        make: Makes it. What it raises is not caught.
    """
    state = _state(name, sources)
    place = hashlib.sha256(str(Path(__file__).parent).encode()).hexdigest()[:12]
    path = cache_folder() / f"{name}-{place}"
    kept = _read(path, state)
    if kept is not None:
        return kept
    made = make()
    _write(path, state, made)
    return made


def _state(name: str, sources: Iterable[Path]) -> bytes:
    digest = hashlib.sha256(f"{name} {__version__}".encode())
    for source in sorted(sources):
        at = source.stat()
        digest.update(f"\n{source} {at.st_mtime_ns} {at.st_size}".encode())
    return digest.digest()


def _read(path: Path, state: bytes) -> bytes | None:
    try:
        found = path.read_bytes()
    except OSError:
        return None
    header = len(state) + hashlib.sha256().digest_size
    payload = found[header:]
    good = found[:header] == state + hashlib.sha256(payload).digest()
    return payload if good else None


def _write(path: Path, state: bytes, payload: bytes) -> None:
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(state + hashlib.sha256(payload).digest() + payload)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            if temporary:
                os.unlink(temporary)
