"""Download a data set's official files, check them, convert them, and put the archive in place at once."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from provenn.data.archives import write_archive
from provenn.data.sources import RemoteFile, Source

ATTEMPTS = 3
TIMEOUT = 30.0
"""Seconds without a byte after which an attempt is given up."""
PAUSE = 1.0
"""Seconds between attempts."""
LOCK_TIMEOUT = 3600.0
"""Seconds to wait for another process that fetches the same set."""


class DataUnavailableError(OSError):
    """A data set is not on disk and cannot be fetched; the message names the file, the folder and the command."""


def fetch(name: str, source: Source, path: Path) -> None:
    """Make the archive ``path`` of a set, unless another process makes it first.

    Args:
        name: The set's name.
        source: Its official files and their conversion.
        path: The archive to write; its folder is made if need be.

    Raises:
        DataUnavailableError: The folder cannot be written, a file cannot be had or is not what it should be, or
            another process holds the set's lock for an hour.
    """
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / f".{name}.lock", timeout=LOCK_TIMEOUT):
            if path.exists():
                return
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{name}.") as folder:
                for file in source.files:
                    download(file, Path(folder))
                write_archive(path, source.convert(Path(folder)))
    except Timeout:
        raise DataUnavailableError(_message(name, path, "another process has been fetching it for too long")) from None
    except (OSError, ValueError) as error:
        raise DataUnavailableError(_message(name, path, str(error))) from error


def download(file: RemoteFile, folder: Path) -> None:
    """Download one file into a folder: its addresses in turn, each set of them up to three times.

    Raises:
        OSError: No address gave the file with the right checksum; the message has the last reason of each.
    """
    import pooch
    import requests

    reasons: dict[str, str] = {}
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(PAUSE)
        for address in file.addresses:
            try:
                pooch.retrieve(
                    address,
                    known_hash=file.checksum,
                    fname=file.name,
                    path=folder,
                    downloader=pooch.HTTPDownloader(timeout=TIMEOUT),
                )
                return
            except (requests.RequestException, ValueError) as error:
                reasons[address] = str(error)
    raise OSError("; ".join(f"{address}: {reason}" for address, reason in reasons.items()))


def _message(name: str, path: Path, reason: str) -> str:
    return (
        f"data set {name!r} needs the file {path.name} in the folder {path.parent}, and it could not be fetched: "
        f"{reason}. With a network, fetch it by: python -m provenn.data {name} --root {path.parent}"
    )
