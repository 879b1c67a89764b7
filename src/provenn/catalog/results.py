"""Results that ship: ``results/<area>/<slug>.json``, one file a paper, written only by the tools that measure.

A file has up to three sections. ``claim`` maps a tier to its verdict and figures; ``conformance`` holds what the
contract suites said of each part; ``peer`` holds the agreement with, and the speed ratio to, another implementation.
Conformance and peer carry the digest of the module they were measured on, so a later edit makes them stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from provenn.catalog.card import PACKAGE, Card

RESULTS = PACKAGE / "catalog" / "results"
SECTIONS = ("claim", "conformance", "peer")


def result_path(card: Card) -> Path:
    """Return where a paper's results ship."""
    return RESULTS / card.area / f"{card.slug}.json"


def read_results(card: Card) -> dict[str, Any]:
    """Return a paper's results by section; empty if none ship.

    Raises:
        ValueError: The file is not JSON; the message names it.
    """
    path = result_path(card)
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"results {path}: {error}") from error
    return found


def write_section(card: Card, section: str, value: Any) -> Path:
    """Replace one section of a paper's results, leaving the others; the file changes at once or not at all.

    Raises:
        ValueError: There is no such section.
    """
    if section not in SECTIONS:
        raise ValueError(f"section must be one of {', '.join(SECTIONS)}, got {section!r}")
    results = read_results(card)
    results[section] = value
    path = result_path(card)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(results, file, indent=1, sort_keys=True, ensure_ascii=False)
        file.write("\n")
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
    return path


def module_digest(card: Card) -> str:
    """Return the digest of a paper's module and of its private siblings, ``_<slug>_*.py``.

    Raises:
        FileNotFoundError: The paper is not built.
    """
    folder = PACKAGE / card.area
    files = [folder / f"{card.module_name}.py", *sorted(folder.glob(f"_{card.module_name}_*.py"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()
