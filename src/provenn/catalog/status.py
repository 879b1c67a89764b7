"""Where every paper stands, derived from the tree and from the results that ship; nothing here is typed by hand."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from provenn.catalog.card import Card, cards
from provenn.catalog.results import module_digest, read_results, result_path
from provenn.catalog.tree import built, built_slugs

FEWEST_SEEDS = 3
"""A ``small`` result of fewer seeds gives no verdict."""

Outcome = Literal["reproduced", "partly", "not reproduced"]


class PeerStatus(TypedDict):
    """What the comparison with another implementation found."""

    agrees: bool
    speed_ratio: float


class Status(TypedDict):
    """Where a paper stands."""

    slug: str
    area: str
    kind: str
    built: bool
    conforms: bool
    verdict: Outcome | None
    peer: PeerStatus | None
    works: bool


def statuses() -> list[Status]:
    """Return where every paper stands, in the catalogue's order."""
    there = built_slugs()
    return [_status(card, card.slug in there) for card in cards()]


def status(card: Card) -> Status:
    """Return where a paper stands.

    ``built``: its module and claim are in the tree with every part of the card. ``conforms``: the shipped conformance
    was measured on this very module, covers every part and has no failure. ``verdict``: that of the ``small`` tier
    over three seeds or more. ``peer``: measured on this very module. ``works``: built, conforms, has a verdict, and
    agrees with the peer if the card names one that pip installs.

    Raises:
        ValueError: The paper's results are not JSON, or lack a key; the message names the file.
    """
    return _status(card, built(card))


def _status(card: Card, is_built: bool) -> Status:
    results = read_results(card)
    digest = module_digest(card) if card.built else None
    try:
        conforms = _conforms(card, results.get("conformance"), digest)
        verdict = _verdict(results.get("claim", {}).get("small"))
        peer = _peer(results.get("peer"), digest)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"results {result_path(card)}: not as the tools write them: {error!r}") from error
    agrees = card.peer is None or card.peer.package is None or (peer is not None and peer["agrees"])
    return Status(
        slug=card.slug,
        area=card.area,
        kind=card.kind,
        built=is_built,
        conforms=conforms,
        verdict=verdict,
        peer=peer,
        works=is_built and conforms and verdict is not None and agrees,
    )


def _conforms(card: Card, section: dict[str, Any] | None, digest: str | None) -> bool:
    if section is None or digest is None or section["digest"] != digest:
        return False
    checked = section["parts"]
    return all(
        part.name in checked and checked[part.name]["checks"] > 0 and not checked[part.name]["failed"]
        for part in card.parts
    )


def _verdict(small: dict[str, Any] | None) -> Outcome | None:
    if small is None or small["seeds"] < FEWEST_SEEDS:
        return None
    outcome: Outcome = small["outcome"]
    return outcome


def _peer(section: dict[str, Any] | None, digest: str | None) -> PeerStatus | None:
    if section is None or digest is None or section["digest"] != digest:
        return None
    return PeerStatus(agrees=section["agrees"], speed_ratio=section["speed_ratio"])
