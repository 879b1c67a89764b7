"""Cards: what the catalogue says of each paper, read from ``cards/<area>/<slug>.toml``.

The file's place gives the paper's area and slug; nothing in the file repeats them. Asking for one paper reads
one small file; asking for all of them reads one compiled file, made anew when a card changes.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from provenn.catalog.compiled import compiled
from provenn.core.nearest import unknown_name_message

PACKAGE = Path(__file__).parent.parent
CARDS = PACKAGE / "catalog" / "cards"

AREAS: dict[str, str] = {
    "nn": "layers and attention",
    "optim": "optimizers and step-size rules",
    "losses": "loss functions",
    "training": "ways to train",
    "models": "whole architectures",
    "graphs": "graph networks",
    "compress": "pruning, quantization, factorisation",
    "search": "architecture and black-box search",
    "hyper": "networks that make networks",
    "generative": "diffusion, GANs, samplers",
    "science": "operators, PDEs, inverse problems",
    "scenes": "3-D scenes and meshes",
    "stats": "survival, priors, predictive inference",
    "decisions": "control and combinatorial optimisation",
    "inspect": "probes of trained networks",
    "theory": "theory that can be run",
    "robust": "attacks and defences",
    "runtime": "pipelines, data paths, distribution",
    "agents": "language-model agents",
}

PART_KINDS = (
    "module", "loss", "optimizer", "init", "trainer", "compressor", "searcher", "probe",
    "attack", "solver", "sampler", "estimator", "runtime", "agent", "function", "class",
)  # fmt: skip
"""The fourteen kinds of the design, and two for what stands beside a part: plain functions and classes."""


class UnknownSlugError(KeyError):
    """No paper has this slug; the message names the three nearest."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Part:
    """A public name of a paper: ``provenn.<area>.<name>``, and the contract it keeps."""

    name: str
    kind: str

    @property
    def attribute(self) -> str:
        """The last component of the public name."""
        return self.name.rpartition(".")[2]

    @property
    def namespace(self) -> str:
        """The module the part is imported from."""
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Peer:
    """Another implementation to agree with. ``package`` is set when pip installs it here."""

    text: str
    package: str | None = None


@dataclass(frozen=True)
class Card:
    """What the catalogue says of one paper."""

    slug: str
    area: str
    title: str
    date: str
    kind: str
    summary: str
    parts: tuple[Part, ...]
    claim: str
    arxiv: str | None = None
    authors: tuple[str, ...] = ()
    venue: str | None = None
    code: str | None = None
    rule: str | None = None
    peer: Peer | None = None
    keywords: tuple[str, ...] = field(default=())

    @property
    def module_name(self) -> str:
        """The slug as a Python module name: ``sap-pruning`` → ``sap_pruning``."""
        return self.slug.replace("-", "_")

    @property
    def module(self) -> str:
        """Dotted path of the module that holds the paper's parts."""
        return f"provenn.{self.area}.{self.module_name}"

    @property
    def claim_module(self) -> str:
        """Dotted path of the module that holds the paper's claim."""
        return f"provenn.claims.{self.area}.{self.module_name}"

    @property
    def built(self) -> bool:
        """Whether the paper's module is in the tree (which parts it holds: :mod:`provenn.catalog.tree`)."""
        return (PACKAGE / self.area / f"{self.module_name}.py").is_file()

    @property
    def year(self) -> str:
        return self.date[:4]


def paths() -> dict[str, Path]:
    """Map every slug to its card's file."""
    return {path.stem: path for path in sorted(CARDS.glob("*/*.toml"))}


@cache
def card(slug: str) -> Card:
    """Return the card of a paper.

    Args:
        slug: The paper's slug; underscores count as hyphens.

    Raises:
        UnknownSlugError: No such paper; the message names the three nearest slugs.
    """
    known = paths()
    path = known.get(slug) or known.get(slug.replace("_", "-"))
    if path is None:
        raise UnknownSlugError(unknown_name_message("paper", slug, known))
    return read_card(path)


def paper(name: str) -> Card:
    """Return the card that a name belongs to: a slug, a part's public name, or its last component if no other has it.

    Raises:
        UnknownSlugError: No paper and no part has this name, or several parts do; the message names the nearest three.
    """
    known = paths()
    if name in known or name.replace("_", "-") in known:
        return card(name)
    owners = {part.name: one for one in cards() for part in one.parts}
    if name in owners:
        return owners[name]
    same = [full for full in owners if full.endswith(f".{name}")]
    if len(same) == 1:
        return owners[same[0]]
    what = "name" if same else "paper or part"
    raise UnknownSlugError(
        unknown_name_message(what, name, same or [*known, *owners, *(o.rpartition(".")[2] for o in owners)])
    )


def cards() -> list[Card]:
    """Return every card, by area in the catalogue's order and then by slug."""
    return list(_every_card())


@cache
def _every_card() -> tuple[Card, ...]:
    files = paths()
    kept = compiled("cards", [*files.values(), Path(__file__)], lambda: _pack(files.values()))
    every = [_made(table) for table in json.loads(kept)]
    order = list(AREAS)
    return tuple(sorted(every, key=lambda one: (order.index(one.area), one.slug)))


def _pack(files: Iterable[Path]) -> bytes:
    # ``vars`` makes no copies, as ``asdict`` would of every string.
    return json.dumps([read_card(file) for file in files], default=vars, ensure_ascii=False).encode()


def read_card(path: Path) -> Card:
    """Read one card's file.

    Raises:
        ValueError: A key is missing or unknown, or the area or a kind is not one of the design's; the
            message names the file and the key.
    """
    area, slug = path.parent.name, path.stem
    with path.open("rb") as file:
        table = tomllib.load(file)
    try:
        made = _made({**table, "slug": slug, "area": area})
    except (TypeError, KeyError) as error:
        raise ValueError(f"card {path}: {error}") from error
    if area not in AREAS:
        raise ValueError(f"card {path}: unknown area {area!r}")
    for kind in (made.kind, *(part.kind for part in made.parts)):
        if kind not in PART_KINDS:
            raise ValueError(f"card {path}: unknown kind {kind!r}; one of {', '.join(PART_KINDS)}")
    return made


def _made(table: dict[str, Any]) -> Card:
    parts = tuple(Part(**part) for part in table.pop("parts"))
    peer = table.pop("peer", None)
    for key in ("authors", "keywords"):
        table[key] = tuple(table.get(key, ()))
    return Card(parts=parts, peer=Peer(**peer) if peer else None, **table)
