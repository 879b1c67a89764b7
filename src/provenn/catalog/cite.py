"""BibTeX of papers, from their cards."""

from __future__ import annotations

from provenn.catalog.card import Card

_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    }
)  # fmt: skip


def escaped(text: str) -> str:
    """Return the text with the characters that TeX reads as commands escaped; letters of any script stay."""
    return text.translate(_ESCAPES)


def bibtex(card: Card) -> str:
    """Return the paper's BibTeX entry; a field that the card does not know is left out.

    The key is the slug and the year. The title stands in double braces, so that styles keep its capitals. An author
    list that ends in ``others`` prints as "et al.".
    """
    fields = {
        "title": f"{{{escaped(card.title)}}}",
        "author": " and ".join(escaped(author) for author in card.authors),
        "year": card.year,
        "note": escaped(card.venue or ""),
        "eprint": card.arxiv or "",
        "archivePrefix": "arXiv" if card.arxiv else "",
        "url": f"https://arxiv.org/abs/{card.arxiv}" if card.arxiv else card.code or "",
    }
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@misc{{{card.slug}-{card.year},", *lines, "}"])
