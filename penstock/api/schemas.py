"""What travels over HTTP, as types: the API describes itself with them, and checks what comes in."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

RunId = Annotated[str, StringConstraints(pattern="^[0-9a-f]{32}$")]
"""Id of a flow run, task run or map."""

Text = Annotated[str, StringConstraints(min_length=1, max_length=255, pattern=r"^[^\x00]*$")]
"""Text that every database takes."""

Counts = dict[str, int]
"""How many runs are in each type of state."""


class StateType(str, Enum):
    """Types of state."""

    SCHEDULED = "SCHEDULED"
    PENDING = "PENDING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    CANCELLING = "CANCELLING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CRASHED = "CRASHED"
    CANCELLED = "CANCELLED"
    SKIPPED = "SKIPPED"


class Level(str, Enum):
    """Levels of log lines, the lowest first."""

    DEBUG = "DEBUG"
    INFO = "INFO"
    WARNING = "WARNING"
    ERROR = "ERROR"
    CRITICAL = "CRITICAL"


class Action(str, Enum):
    """What a run can be asked for."""

    CANCEL = "cancel"
    RESUME = "resume"
    RETRY = "retry"
    PAUSE = "pause"


class Problem(BaseModel):
    """Why a request was refused, in one sentence."""

    detail: str


class _Open(BaseModel):
    """A model to which later versions add."""

    model_config = ConfigDict(extra="allow")


class State(_Open):
    """What a run is up to."""

    type: str
    name: str
    message: str | None
    cause: str | None
    time: float | None = Field(description="Seconds since 1970.")


class Failure(_Open):
    """The exception that ended a run."""

    type: str | None
    message: str | None
    text: str | None = Field(description="The traceback.")


class Edge(_Open):
    """A run that another one depends on."""

    parameter: str
    run: str
    name: str | None = None


class _Run(_Open):
    id: str
    root: str
    name: str | None
    tags: list[str]
    parameters: dict[str, Any] = Field(description="What the arguments were, in a few words each.")
    created: float | None
    state: State
    attempt: int
    started: float | None
    ended: float | None
    seconds: float | None
    error: Failure | None


class FlowRun(_Run):
    """One run of a flow."""

    kind: Literal["flow"]
    flow: str | None
    version: str | None
    parent_flow_run: str | None
    parent_task_run: str | None
    runner: str | None
    host: str | None
    pid: int | None
    python: str | None
    penstock: str | None
    backend: dict[str, Any]
    tasks: Counts = Field(description="Its task runs by type of state.")
    flows: list[str] = Field(
        default=[], description="Ids of flow runs directly within it; only of a single run."
    )


class TaskRun(_Run):
    """One run of a task."""

    kind: Literal["task"]
    task: str | None
    flow_run: str | None
    parent: str | None
    map: str | None
    element: int | None
    child_flow_run: str | None
    nbytes: int | None
    peak: int | None
    worker: str | None
    stored: str | None
    upstream: list[Edge]


class MapEdge(_Open):
    """A map that another one depends on, element for element."""

    parameter: str
    map: str
    offset: int


class MapRun(_Open):
    """All runs of one `.map`, as numbers."""

    kind: Literal["map"]
    id: str
    root: str
    flow_run: str | None
    parent: str | None
    task: str | None
    name: str | None
    tags: list[str]
    parameters: dict[str, Any]
    created: float | None
    count: int
    states: Counts
    ranges: dict[str, list[tuple[int, int]]] = Field(
        description="First and last element of each stretch in a state; at most 1000 stretches."
    )
    started: float | None
    ended: float | None
    seconds: float = Field(description="Of all elements together.")
    nbytes: int
    peak: int | None
    upstream: list[Edge]
    upstream_maps: list[MapEdge]


class Flow(BaseModel):
    """A flow, as far as it has run."""

    name: str
    runs: int
    latest: float | None = Field(description="When its latest run was made.")
    states: Counts


class _Page(BaseModel):
    following: str | None = Field(description="The `cursor` of the next page; null on the last.")


class Flows(_Page):
    """A page of flows."""

    items: list[Flow]


class FlowRuns(_Page):
    """A page of flow runs."""

    items: list[FlowRun]


class TaskRuns(_Page):
    """A page of task runs."""

    items: list[TaskRun]


class MapRuns(_Page):
    """A page of maps."""

    items: list[MapRun]


class Node(_Open):
    """A task run, a map or a flow run in a graph."""

    id: str
    kind: Literal["task", "map", "flow"]
    name: str | None
    task: str | None
    state: str | None
    states: Counts
    count: int
    parent: str | None
    child_flow_run: str | None
    started: float | None
    seconds: float | None


class Link(BaseModel):
    """A dependency in a graph."""

    source: str
    target: str
    parameter: str


class Graph(BaseModel):
    """What a flow run consists of, and what depends on what in it."""

    nodes: list[Node]
    edges: list[Link]
    complete: bool = Field(description="False if there was more than fits.")


class Step(_Open):
    """One state in the history of a run."""

    time: float
    type: str
    name: str
    message: str | None
    cause: str | None
    attempt: int
    epoch: int
    started: float | None
    seconds: float | None
    nbytes: int | None
    peak: int | None
    worker: str | None
    error: Failure | None
    stale: bool
    derived: bool


class Line(BaseModel):
    """A line of a log."""

    time: float
    level: str
    text: str
    run: str
    name: str | None


class Lines(BaseModel):
    """Lines of a log."""

    lines: list[Line]
    dropped: int = Field(description="Lines that were not kept when they were written.")
    following: str = Field(description="A `cursor` for the lines that come after these.")


class Activity(BaseModel):
    """Starts and ends of task runs in equal stretches of time."""

    begin: float
    width: float
    started: list[int]
    ended: list[int]
    failed: list[int]
    running: list[int]


class Durations(BaseModel):
    """How long the runs of one task took."""

    task: str | None
    count: int
    total: float
    shortest: float
    longest: float
    edges: list[float]
    counts: list[int]


class Acknowledged(BaseModel):
    """Up to which event everything of a writer is committed."""

    writer: str
    last: int = Field(description="The last event of the batch that this answers.")
    acked_seq: int


class Question(BaseModel):
    """A question about the record: its name, and its arguments beside it."""

    model_config = ConfigDict(extra="allow")

    what: Text


class Answer(BaseModel):
    """The answer to a question."""

    answer: Any


class Wish(BaseModel):
    """What is asked of a run."""

    model_config = ConfigDict(extra="forbid")

    action: Action
    by: Text = Field(default="API", description="Who asks, as people will read it.")


class Granted(BaseModel):
    """A request that was written down: the run has to be reached yet, or its process has been started."""

    request: str
    run: str
    action: Action
    pid: int | None = Field(default=None, description="Process on the server's machine that resumes the run.")
    log: str | None = Field(default=None, description="File in PENSTOCK_HOME to which its output goes.")


class Health(BaseModel):
    """Whether the server is up."""

    status: Literal["ok", "failing"]
    detail: str


class Version(BaseModel):
    """What answers."""

    penstock: str
    api: int
    schema_: str = Field(alias="schema", description="Of the database.")
    database: Literal["sqlite", "postgresql"]
    python: str
    local_runs: bool = Field(description="Whether this server resumes runs when it is asked to.")
