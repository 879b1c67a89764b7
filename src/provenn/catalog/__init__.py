"""The catalogue: one card a paper, the results that ship, and search over them. Loads no torch."""

from provenn.catalog.card import Card, Part, Peer, UnknownSlugError, card, cards

__all__ = ["Card", "Part", "Peer", "UnknownSlugError", "card", "cards"]
