"""`penstock spool`: events on this machine that the record does not have yet."""

from __future__ import annotations

from typing import Annotated

import typer

from penstock.cli.layout import clean, columns, human_bytes, moment, print_json, stop

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

HEAD = ("writer", "process", "events", "unsent", "bytes", "oldest unsent", "set aside", "goes to")
PATIENCE = 60.0  # seconds


@app.callback()
def spool() -> None:
    """Look after the events that drivers have written down and the record does not have yet."""


@app.command("status")
def status(json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False) -> None:
    """List the spools of this machine: whose they are, and what is not sent yet."""
    from penstock.engine.backlog import survey
    from penstock.engine.home import usable_home
    from penstock.settings import settings

    home = usable_home(settings().home)
    found = survey(home.spool)
    if json:
        print_json([one.as_dict() for one in found])
        return
    if not found:
        print(f"no events wait in {clean(home.spool)}")
        return
    rows = [
        (
            one.writer[:8],
            f"pid {one.pid}" if one.pid else ("alive" if one.alive else "dead"),
            f"{one.events:,}",
            f"{one.unsent:,}",
            human_bytes(one.size),
            moment(one.oldest) if one.oldest is not None else "",
            human_bytes(one.rejected) if one.rejected else "",
            clean(one.destination) or "this home",
        )
        for one in found
    ]
    for line in columns(rows, head=HEAD):
        print(line)


@app.command("drain")
def drain() -> None:
    """Send everything that drivers on this machine have written down so far, each to where it is to go."""
    from penstock.engine.backlog import survey
    from penstock.engine.home import usable_home
    from penstock.engine.tracking import drain_spools
    from penstock.settings import settings

    home = usable_home(settings().home)
    before = survey(home.spool)
    if not drain_spools(home, PATIENCE):
        stop(
            "not all is sent: another process is writing to the store and sends the rest, or it is too much."
        )
    left = {one.writer: one for one in survey(home.spool) if not one.alive and one.events}
    sent = [one for one in before if one.writer not in left]
    unsent = sum(one.unsent for one in sent)
    for place in sorted({one.destination for one in left.values()}):
        print(f"what is for {clean(place)} stays: it is sent with that in PENSTOCK_DATABASE_URL")
    print(f"sent what was unsent in {len(sent)} spools ({unsent:,} events)" if sent else "no events wait")
