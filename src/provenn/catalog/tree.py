"""What is in the tree, read from the source without importing it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from provenn.catalog.card import PACKAGE, Card, cards, paths
from provenn.catalog.compiled import compiled


def module_path(dotted: str) -> Path | None:
    """Return the file of a module or package of provenn; ``None`` if it is not in the tree."""
    place = PACKAGE.joinpath(*dotted.split(".")[1:])
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


@cache
def public_names(dotted: str) -> frozenset[str]:
    """Return the names a module offers: those of its ``__all__`` that it binds, else what it defines itself.

    Without ``__all__``, names that begin with an underscore and names that are imported are not offered. A module
    that is not in the tree, or is not Python, offers nothing.

    Raises:
        ValueError: ``__all__`` is not a list written out.
    """
    path = module_path(dotted)
    if path is None:
        return frozenset()
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError):
        return frozenset()
    defined, imported, listed = set[str](), set[str](), None
    for statement in _top_level(body):
        match statement:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                listed = set(ast.literal_eval(value))
            case ast.Assign(targets=targets):
                defined.update(node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name), value=value) if value is not None:
                defined.add(name)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                imported.update(alias.asname or alias.name for alias in names)
    if listed is None:
        return frozenset(name for name in defined if not name.startswith("_"))
    return frozenset(listed & (defined | imported))


def _top_level(body: Iterable[ast.AST]) -> Iterator[ast.AST]:
    for statement in body:
        yield statement
        for block in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(statement, ast.If | ast.Try | ast.ExceptHandler):
                yield from _top_level(getattr(statement, block, []))


def binds(dotted: str, name: str) -> bool:
    """Whether a module assigns a name at its top level, or offers it in another way.

    The plain assignment is found in the text, since parsing the claims of all papers would take longer than all else.

    Raises:
        ValueError: As :func:`public_names`.
    """
    path = module_path(dotted)
    if path is None:
        return False
    assigned = re.search(rf"^{re.escape(name)}(: \w+)? = \w+\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    return assigned is not None or name in public_names(dotted)


_ALL = re.compile(r"^__all__ = \[([^\]]*)\]", re.MULTILINE)
_BOUND = re.compile(r"^(?:class|def) (\w+)|^from [\w.]+ import (?:\(([^)]*)\)|(.*))", re.MULTILINE)


@cache
def _plainly_public(dotted: str) -> frozenset[str]:
    """Names of ``__all__`` that a plain class, function or import at the top level binds, found in the text.

    Every name here is in :func:`public_names` too, which takes ten times as long.
    """
    path = module_path(dotted)
    text = path.read_text(encoding="utf-8") if path is not None else ""
    listed = _ALL.search(text)
    if listed is None:
        return frozenset()
    bound = {word for found in _BOUND.findall(text) for word in re.findall(r"\w+", " ".join(found))}
    return frozenset(re.findall(r"\"(\w+)\"", listed[1])) & bound


def holds(card: Card, name: str) -> bool:
    """Whether the paper's module holds the part of this public name, and its namespace can be imported."""
    namespace, _, attribute = name.rpartition(".")
    held = attribute in _plainly_public(card.module) or attribute in public_names(card.module)
    return held and module_path(namespace) is not None


def built(card: Card) -> bool:
    """Whether every part of the card and its claim are in the tree."""
    return all(holds(card, part.name) for part in card.parts) and binds(card.claim_module, "CLAIM")


def built_slugs() -> frozenset[str]:
    """Return the slugs of the papers that are built, from the compiled list if no file of theirs has changed."""
    every = cards()
    modules = {
        name for one in every for name in (one.module, one.claim_module, *(part.namespace for part in one.parts))
    }
    files = {path for path in map(module_path, modules) if path is not None}
    kept = compiled(
        "built",
        [*paths().values(), *files, Path(__file__)],
        lambda: json.dumps([o.slug for o in every if built(o)]).encode(),
    )
    return frozenset(json.loads(kept))
