"""`penstock db`: the schema of the record, folding it anew, forgetting runs."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from penstock.cli.layout import clean, stop

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

PATIENCE = 30.0  # seconds that another process may take to let go of the store


@app.callback()
def db() -> None:
    """Look after the database of the record."""


@app.command("upgrade")
def upgrade() -> None:
    """Bring the database to the schema of this penstock."""
    from penstock.api.embedded import writing
    from penstock.api.upkeep import upgrade as bring_up

    with writing(patience=PATIENCE, prepared=False) as store:
        before, after = bring_up(store.database)
        name = store.database.name
    if before == after:
        print(f"{clean(name)} has schema {after} already")
    else:
        print(f"{clean(name)}: schema {before or 'none'} → {after}")


@app.command("rebuild")
def rebuild() -> None:
    """Fold all events anew into the current state of every run."""
    from penstock.api.embedded import writing
    from penstock.api.upkeep import rebuild as fold

    began = time.monotonic()
    with writing(patience=PATIENCE) as store:
        count = fold(store.database)
    print(f"folded {count:,} events anew in {time.monotonic() - began:.1f} s")


@app.command("reset")
def reset(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Forget every run: empty the database."""
    from penstock.api.embedded import writing
    from penstock.api.upkeep import reset as forget

    with writing(patience=PATIENCE, prepared=False) as store:
        name = store.database.name
        if not yes and not _confirmed(f"Forget every run in {clean(name)}?"):
            stop("nothing was removed.")
        store.commit_first()
        aside = forget(store.database)
    print(f"{clean(name)} is empty")
    if aside is not None:
        print(f"the damaged file is {clean(aside)}")


def _confirmed(question: str) -> bool:
    try:
        return typer.confirm(question)
    except typer.Abort:  # nobody there to answer
        stop("nothing was removed; --yes does it without a question.")


@app.command("prune")
def prune(
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="SPAN", help="Such as 30d, 36h or 2w.")
    ] = None,
) -> None:
    """Forget runs that ended long ago, with their tasks, logs and events."""
    from penstock.api.embedded import writing
    from penstock.api.upkeep import DAY, give_back_space
    from penstock.api.upkeep import prune as forget
    from penstock.settings import settings, span_days

    span = settings().retention if older_than is None else older_than
    if span == "never":
        stop("PENSTOCK_RETENTION is never: say how old, such as --older-than 30d.", 2)
    try:
        days = span_days(span)
    except ValueError as error:
        stop(f"--older-than {error}.", 2)
    with writing(patience=PATIENCE) as store:
        done = forget(store.database, time.time() - days * DAY)
        give_back_space(store.database, thoroughly=True)
    print(f"forgot {done.runs:,} run{'' if done.runs == 1 else 's'} that ended more than {span} ago")
