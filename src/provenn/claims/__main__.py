"""``python -m provenn.claims run SLUG``: the two commands of this package alone."""

import typer

from provenn.claims.commands import report, run

app = typer.Typer(add_completion=False)
app.command()(run)
app.command()(report)

if __name__ == "__main__":
    app()
