"""Find a claim: by a paper's slug, or by dotted path for a claim of one's own."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from provenn.catalog.card import Card, UnknownSlugError, card, paths
from provenn.catalog.results import module_digest
from provenn.claims.claim import Claim
from provenn.claims.errors import ClaimBrokenError, NotBuiltError, UsageError


@dataclass(frozen=True)
class Found:
    """A claim, with what the harness must know of its origin.

    Args:
        claim: The claim.
        reference: ``module:attribute``, by which a worker process imports it.
        card: The paper's card; None for a claim of one's own.
        sources: The files of the claim itself.
    """

    claim: Claim
    reference: str
    card: Card | None
    sources: tuple[Path, ...]

    def fingerprint(self, device: str) -> str:
        """Return the digest of what decides a cell's figures; cells that differ in it never mix.

        It covers the claim's files, the paper's module with its private siblings, torch's version and the type of
        device.
        """
        digest = hashlib.sha256()
        for path in self.sources:
            digest.update(path.name.encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
        paper = module_digest(self.card) if self.card is not None and self.card.built else ""
        digest.update(
            f"paper {paper}\0torch {importlib.metadata.version('torch')}\0device {device.partition(':')[0]}".encode()
        )
        return digest.hexdigest()


def find(name: str) -> Found:
    """Find a claim.

    Args:
        name: A paper's slug; or ``package.module`` or ``module:NAME`` for a claim of one's own (NAME is ``CLAIM``
            unless given), imported with the current folder on the path.

    Raises:
        UsageError: No such paper or module; for a paper the message names the three nearest.
        NotBuiltError: The paper has no claim yet.
        ClaimBrokenError: The module fails to import, or defines no claim.
    """
    if "." in name or ":" in name:
        return _find_dotted(name)
    try:
        paper = card(name)
    except UnknownSlugError as error:
        raise UsageError(str(error)) from error
    if _spec(paper.claim_module) is None:
        raise NotBuiltError(f"the claim of {paper.slug} is not built yet: there is no {paper.claim_module}")
    module = _import(paper.claim_module)
    claim = _claim_of(module, "CLAIM")
    return Found(claim, f"{paper.claim_module}:CLAIM", paper, _with_siblings(module, paper.module_name))


def built() -> list[str]:
    """Return the slugs of the papers whose claims are built, without importing any."""
    folder = Path(__file__).parent
    return [
        slug for slug, path in paths().items() if (folder / path.parent.name / f"{_module_name(slug)}.py").is_file()
    ]


def _find_dotted(name: str) -> Found:
    path, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if _spec(path) is None:
        raise UsageError(f"there is no module {path!r} to take a claim from")
    module = _import(path)
    attribute = attribute or "CLAIM"
    return Found(
        _claim_of(module, attribute), f"{path}:{attribute}", None, _with_siblings(module, path.rpartition(".")[2])
    )


def _spec(path: str) -> object | None:
    try:
        return importlib.util.find_spec(path)
    except (ModuleNotFoundError, ValueError):
        return None


def _import(path: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except Exception as error:
        raise ClaimBrokenError(f"{path} does not import: {type(error).__name__}: {error}") from error


def _claim_of(module: ModuleType, attribute: str) -> Claim:
    claim = getattr(module, attribute, None)
    if not isinstance(claim, Claim):
        raise ClaimBrokenError(f"{module.__name__} defines no provenn.claims.Claim named {attribute}")
    return claim


def _module_name(slug: str) -> str:
    return slug.replace("-", "_")


def _with_siblings(module: ModuleType, name: str) -> tuple[Path, ...]:
    path = Path(str(module.__file__))
    return (path, *sorted(path.parent.glob(f"_{name}_*.py")))
