"""The command line: ``provenn list``, ``show``, ``search``, ``cite``, ``status``, ``new``, and commands kept elsewhere.

The catalogue's commands stand here and load neither torch nor the areas. Every other command lives in a module of its
own, which is imported when the command is called: ``ELSEWHERE`` maps the command's name to that module and to one
line of help, and the module has a plain typed function of the command's name, with Typer's annotations and a
docstring, that is registered here when it is loaded. A command whose module is not in the tree says so.

On a terminal the output is laid out for people; piped, it is one record a line, fields parted by tabs, nothing cut.
Exit codes: 0 done, 1 something is wrong with the files, 2 no such paper, part or option, 3 not built yet.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from provenn.catalog.card import AREAS, Card, UnknownSlugError, card, cards, paper
from provenn.catalog.namespace import NotBuiltError
from provenn.core.nearest import unknown_name_message

if TYPE_CHECKING:
    from provenn.catalog.status import Status

ELSEWHERE: dict[str, tuple[str, str]] = {
    "run": ("provenn.claims.commands", "Check a paper's claim: method against baseline."),
    "report": ("provenn.claims.commands", "Write a claim's figures as one HTML page."),
    "conform": ("provenn.contracts.commands", "Hold a paper's parts to their contracts."),
    "compare": ("provenn.compare.commands", "Line up parts that do the same job on one task."),
    "serve": ("provenn.site.commands", "Show the catalogue in a browser."),
}
FILES_WRONG, USAGE, NOT_BUILT = 1, 2, 3


class _Elsewhere(TyperCommand):
    """A command whose module is imported when it is called."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        return self._load().make_context(*args, **kwargs)

    def _load(self) -> Any:
        module = ELSEWHERE[str(self.name)][0]
        try:
            function = getattr(importlib.import_module(module), str(self.name))
        except (ModuleNotFoundError, AttributeError) as error:
            if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
                raise
            raise NotBuiltError(f"{self.name} is not built yet") from error
        alone = typer.Typer(add_completion=False, rich_markup_mode=None)
        alone.command(self.name)(function)
        return typer.main.get_command(alone)


class _Commands(TyperGroup):
    """The commands of this file and those elsewhere; turns the catalogue's errors into messages and exit codes."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *ELSEWHERE]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in ELSEWHERE:
            return _Elsewhere(name=cmd_name, help=ELSEWHERE[cmd_name][1], rich_markup_mode=None)
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UnknownSlugError as error:
            raise _exit(str(error), USAGE) from error
        except NotBuiltError as error:
            raise _exit(str(error), NOT_BUILT) from error


app = typer.Typer(
    cls=_Commands,
    help="Published neural-network methods as tested PyTorch parts, each with its paper's claim as an experiment.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app(prog_name="provenn")


def _exit(message: str, code: int) -> typer.Exit:
    typer.echo(f"provenn: {message}", err=True)
    return typer.Exit(code)


def _for_people() -> bool:
    return sys.stdout.isatty()


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows: a table on a terminal, else fields parted by tabs without a head."""
    if not _for_people():
        for row in rows:
            typer.echo("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


@app.command("list")
def list_papers(
    area: Annotated[str | None, typer.Option(help="Only papers of this area.")] = None,
    built: Annotated[bool, typer.Option("--built", help="Only papers that are built.")] = False,
) -> None:
    """List the papers.

    Prints slug, area, kind, whether it is built, and title.
    """
    from provenn.catalog.tree import built_slugs

    if area is not None and area not in AREAS:
        raise _exit(unknown_name_message("area", area, AREAS), USAGE)
    there = built_slugs()
    chosen = [one for one in cards() if area in (None, one.area) and (one.slug in there or not built)]
    rows = [
        (one.slug, one.area, one.kind, "built" if one.slug in there else "not built yet", one.title) for one in chosen
    ]
    _table(("slug", "area", "kind", "built", "title"), rows)


@app.command()
def show(name: Annotated[str, typer.Argument(metavar="SLUG", help="A paper's slug, or a part's name.")]) -> None:
    """Show a paper: its parts, claim and standing."""
    one = paper(name)
    if not _for_people():
        for key, value in _facts(one):
            typer.echo(f"{key}\t{value}")
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console()
    console.print(Text(one.title, style="bold"))
    for key, value in _facts(one)[1:]:
        console.print(Text(key, style="dim"))
        console.print(Padding(Text(value), (0, 0, 0, 2)))


def _facts(one: Card) -> list[tuple[str, str]]:
    from provenn.catalog.tree import holds

    facts = [
        ("title", one.title), ("slug", one.slug), ("area", one.area), ("kind", one.kind), ("date", one.date),
        ("authors", "; ".join(one.authors)), ("venue", one.venue),
        ("arxiv", f"https://arxiv.org/abs/{one.arxiv}" if one.arxiv else None), ("code", one.code),
        ("summary", _line(one.summary)),
    ]  # fmt: skip
    facts += [("part", f"{p.name} ({p.kind}{'' if holds(one, p.name) else ', not built yet'})") for p in one.parts]
    facts += [("claim", _line(one.claim)), ("rule", _line(one.rule or ""))]
    facts += [("peer", _line(one.peer.text))] if one.peer else []
    facts += [("status", _standing(_status_of(one)))]
    return [(key, value) for key, value in facts if value]


def _line(text: str) -> str:
    return " ".join(text.split())


def _status_of(one: Card) -> Status:
    from provenn.catalog.status import status

    try:
        return status(one)
    except ValueError as error:
        raise _exit(str(error), FILES_WRONG) from error


def _standing(row: Status) -> str:
    if not row["built"]:
        return "not built yet"
    said = ["conforms" if row["conforms"] else "conformance not recorded", row["verdict"] or "no verdict yet"]
    if row["peer"]:
        said.append(f"peer {'agrees' if row['peer']['agrees'] else 'differs'}, speed ×{row['peer']['speed_ratio']:.2f}")
    return ", ".join(["works" if row["works"] else "built", *said])


@app.command()
def search(
    words: Annotated[list[str], typer.Argument(help="What you look for, in your own words.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many papers to show at most.")] = 10,
) -> None:
    """Search the papers by words and by meaning.

    Prints slug, area and title, best first.
    """
    # before NumPy loads: on matrices this small, BLAS threads only spin
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from provenn.catalog.search import search as find

    hits = find(" ".join(words), count)
    if not hits:
        typer.echo("provenn: no paper has any of these words", err=True)
        return
    _table(("slug", "area", "title"), [(hit.card.slug, hit.card.area, hit.card.title) for hit in hits])


@app.command()
def cite(names: Annotated[list[str], typer.Argument(metavar="SLUG...", help="Slugs, or parts' names.")]) -> None:
    """Print the papers' BibTeX entries."""
    from provenn.catalog.cite import bibtex

    typer.echo("\n\n".join(bibtex(one) for one in dict.fromkeys(map(paper, names))))


@app.command()
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print every paper as JSON.")] = False,
    every: Annotated[bool, typer.Option("--all", help="Show the papers that are not built, too.")] = False,
) -> None:
    """Show where the papers stand.

    Derived from the tree and from the results that ship.
    """
    from provenn.catalog.status import statuses

    try:
        rows = statuses()
    except ValueError as error:
        raise _exit(str(error), FILES_WRONG) from error
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    totals = {key: Counter(row["area"] for row in rows if row.get(key, key == "papers")) for key in _TOTALS}
    lines = [(area, *(str(totals[key][area]) for key in _TOTALS)) for area in AREAS]
    _table(("area", *_TOTALS), [*lines, ("all", *(str(totals[key].total()) for key in _TOTALS))])
    typer.echo()
    _table(("paper", "area", "status"), [(r["slug"], r["area"], _standing(r)) for r in rows if every or r["built"]])


_TOTALS = ("papers", "built", "conforms", "verdict", "peer", "works")


@app.command()
def new(slug: Annotated[str, typer.Argument(help="The slug of a card.")]) -> None:
    """Lay out a paper's files from its card.

    Module, claim, test and benchmark; files that exist are left as they are.
    """
    from provenn.catalog.scaffold import checkout, lay_out, places

    one = card(slug)
    try:
        root = checkout()
    except FileNotFoundError as error:
        raise _exit(str(error), FILES_WRONG) from error
    written = lay_out(one, root)
    for place in places(one).values():
        typer.echo(f"{'wrote' if root / place in written else 'kept'}\t{place}")
