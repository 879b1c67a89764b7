"""Lay out a paper's files from its card: module, claim, test and benchmark, which beside the card make five."""

from __future__ import annotations

import textwrap
from pathlib import Path
from string import Template

from provenn.catalog.card import Card

TEMPLATES = Path(__file__).parent / "templates"
WIDTH = 116
DOCSTRING = ("What it does, in one sentence.", "Args:", "Shape:", "Returns:", "Raises:", "Cost:", "Source:")


def checkout() -> Path:
    """Return the root of the source checkout that this package runs from.

    Raises:
        FileNotFoundError: The package is installed without its sources, so that there is no place for a paper's files.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "pyproject.toml").is_file():
        raise FileNotFoundError(f"no source checkout at {root}: install provenn editable to add a paper")
    return root


def places(card: Card) -> dict[str, str]:
    """Map each template to the place of the file it makes, relative to the checkout."""
    name, area = card.module_name, card.area
    return {
        "module": f"src/provenn/{area}/{name}.py",
        "claim": f"src/provenn/claims/{area}/{name}.py",
        "test": f"tests/{area}/test_{name}.py",
        "benchmark": f"benchmarks/{area}/{name}.py",
    }


def lay_out(card: Card, root: Path) -> list[Path]:
    """Write the skeletons that are not there yet, and return the files written. A file that exists is left as it is.

    The skeletons say what the card says and define nothing, so the paper stays "not built yet" until they are filled.
    """
    words = _words(card)
    written = []
    for kind, place in places(card).items():
        text = Template((TEMPLATES / f"{kind}.txt").read_text(encoding="utf-8")).substitute(words)
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            continue
        written.append(path)
    return written


def _words(card: Card) -> dict[str, str]:
    source = [f"arXiv {card.arxiv}"] if card.arxiv else []
    source += [place for place in (card.venue, card.code) if place]
    return {
        "title": _wrapped(f"{card.title} ({card.year})."),
        "source": _wrapped(f"Source: {', '.join(source)}."),
        "summary": _wrapped(card.summary),
        "statement": _wrapped(card.claim),
        "rule": _wrapped(card.rule or ""),
        "peer": _wrapped(card.peer.text if card.peer else "None."),
        "parts": "\n#\n".join(_heading(part.name, part.kind) for part in card.parts),
        "slug": card.slug,
        "module": card.module,
        "names": "\n".join(f"# {part.name} ({part.kind})" for part in card.parts),
    }


def _heading(name: str, kind: str) -> str:
    return "\n".join([f"# {name} ({kind})", "#", *(f"#     {heading}" for heading in DOCSTRING)])


def _wrapped(text: str) -> str:
    safe = text.replace("\\", "\\\\").replace('"""', "'''")
    return textwrap.fill(" ".join(safe.split()), WIDTH, break_long_words=False, break_on_hyphens=False)
