"""Tables of the store.

`events` keeps what drivers sent, as it came; everything else is folded from it and could be
rebuilt. A map of 10,000 elements is a handful of events, one row in `maps` and 10,000 rows in
`task_runs`.

The columns ``epoch, attempt, rank, rseq`` of a run are the order key of its current state; an
event with a smaller key changes nothing. ``made`` is the order key of the event that created the
row; it is NULL while only states of the run have arrived.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    }
)

# Ids and ties between states are compared byte by byte, whatever language the database speaks.
RUN_ID = String(32).with_variant(String(32, collation="C"), "postgresql")
WORD = Text().with_variant(Text(collation="C"), "postgresql")

FINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED", "SKIPPED"})
"""Types of state in which a run ends."""

PRESUMED = 1
"""Rank of a state that a reaper presumes; 2 is that of a last state which the owner of the run tells."""

# Verdicts on an event, kept with it because they depend on when it arrived.
ACCEPTED = 0
STALE = 1  # its sender no longer owned the run
UNREADABLE = 2  # kept as it came, folded into nothing


writers = Table(
    "writers",
    metadata,
    Column("number", Integer, primary_key=True),  # stands for the writer in `events`, which has many rows
    Column("writer", RUN_ID, nullable=False),
    Column("acknowledged", BigInteger, nullable=False),  # events 1 to this one are all here
    Column("seen", Float, nullable=False),
    UniqueConstraint("writer"),
)

events = Table(
    "events",
    metadata,
    Column("writer", Integer, primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("run", RUN_ID, nullable=False),
    Column("root", RUN_ID, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("rank", SmallInteger, nullable=False),
    Column("rseq", BigInteger, nullable=False),
    Column("verdict", SmallInteger, nullable=False),
    Column("data", LargeBinary, nullable=False),  # the packed event: engine.events.unpack
    sqlite_with_rowid=False,
)
Index(None, events.c.run)
Index(None, events.c.root, events.c.kind)  # logs of a run with all that is in it; forgetting it

leases = Table(
    "leases",
    metadata,
    Column("root", RUN_ID, primary_key=True),
    Column("epoch", Integer, nullable=False),
    Column("holder", RUN_ID, nullable=False),  # the writer that owns the run
    Column("renewed", Float, nullable=False),
    sqlite_with_rowid=False,
)


requests = Table(
    "requests",
    metadata,
    Column("id", RUN_ID, primary_key=True),
    Column("root", RUN_ID, nullable=False),
    Column("run", RUN_ID, nullable=False),  # what it is about: a flow run, task run or map of the root
    Column("kind", String(16), nullable=False),  # cancel, resume, retry
    Column("by", Text),
    Column("made", Float),
    Column("settled", Float),
    Column("outcome", Text),
    sqlite_with_rowid=False,
)
_is_open = requests.c.settled.is_(None)
Index("ix_requests_open", requests.c.root, sqlite_where=_is_open, postgresql_where=_is_open)


def _state_columns() -> list[Column[object]]:
    """Return what flow runs and task runs have in common: their current state."""
    return [
        Column("epoch", Integer, nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("rank", SmallInteger, nullable=False),
        Column("rseq", BigInteger, nullable=False),
        Column("state_name", WORD, nullable=False),
        Column("state_type", String(16), nullable=False),
        Column("message", Text),
        Column("cause", Text),
        Column("state_time", Float),
        Column("started", Float),
        Column("seconds", Float),
        Column("error_type", Text),
        Column("error_message", Text),
        Column("error_text", Text),
    ]


flow_runs = Table(
    "flow_runs",
    metadata,
    Column("id", RUN_ID, primary_key=True),
    Column("root", RUN_ID, nullable=False),
    Column("parent_flow_run", RUN_ID),
    Column("parent_task_run", RUN_ID),
    Column("flow", Text),
    Column("name", Text),
    Column("version", Text),
    Column("tags", Text),  # JSON list
    Column("parameters", Text),  # JSON object of descriptions, at most 4 KB
    Column("runner", Text),
    Column("host", Text),
    Column("pid", Integer),
    Column("python", Text),
    Column("penstock", Text),
    Column("created", Float),
    Column("made", BigInteger),
    Column("backend", Text),  # JSON: what the runner turned out to be; of root runs
    Column("backend_order", BigInteger),
    *_state_columns(),
    sqlite_with_rowid=False,
)
Index(None, flow_runs.c.root)
_not_over = flow_runs.c.rank < 2  # those a reaper has to look at, and those that one took for dead
Index("ix_flow_runs_rank", flow_runs.c.rank, sqlite_where=_not_over, postgresql_where=_not_over)

task_runs = Table(
    "task_runs",
    metadata,
    Column("id", RUN_ID, primary_key=True),
    Column("root", RUN_ID, nullable=False),
    Column("flow_run", RUN_ID),  # NULL outside of flows
    Column("parent", RUN_ID),  # the task run that submitted it
    Column("map", RUN_ID),
    Column("element", Integer),  # position in the map
    Column("task", Text),
    Column("name", Text),
    Column("tags", Text),
    Column("parameters", Text),  # of an element: in `maps`
    Column("upstream", Text),  # JSON list of [parameter, run id]; what all elements share: in `maps`
    Column("child_flow_run", RUN_ID),
    Column("created", Float),
    Column("made", BigInteger),
    *_state_columns(),
    Column("nbytes", BigInteger),
    Column("peak", BigInteger),
    Column("worker", Text),
    Column("stored", Text),  # where the result was stored
    sqlite_with_rowid=False,
)
Index(None, task_runs.c.flow_run, task_runs.c.state_type)  # counts by state are read from it alone

maps = Table(
    "maps",
    metadata,
    Column("id", RUN_ID, primary_key=True),
    Column("start", Integer, primary_key=True),  # a generator's elements come in pieces
    Column("count", Integer, nullable=False),
    Column("root", RUN_ID, nullable=False),
    Column("flow_run", RUN_ID),
    Column("parent", RUN_ID),
    Column("task", Text),
    Column("name", Text),
    Column("tags", Text),
    Column("parameters", Text),
    Column("upstream", Text),  # JSON list of [parameter, run id]: every element depends on it
    Column("upstream_maps", Text),  # JSON list of [parameter, map id, offset]: element i on i + offset
    Column("created", Float),
    Column("made", BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
Index(None, maps.c.flow_run)

dropped_lines = Table(
    "dropped_lines",
    metadata,
    Column("root", RUN_ID, primary_key=True),
    Column("lines", BigInteger, nullable=False),  # of the log that were not kept, in all runs below the root
    sqlite_with_rowid=False,
)

upkeep = Table(
    "upkeep",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("done", Float, nullable=False),
    sqlite_with_rowid=False,
)
