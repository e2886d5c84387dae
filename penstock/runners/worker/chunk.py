"""Execute many elements of a map in one go."""

from __future__ import annotations

import contextlib
import pickle
import time
from typing import Any

from .arguments import filled, load_function, maker_of, opened
from .attempt import finished
from .call import SIMPLE, ask, name_from, settled
from .commit import stored_before, stored_under
from .element import ElementOrder
from .errors import describe_error
from .failure import Failed
from .guard import Guard, guarded, nothing_in
from .interruption import enter, is_signal, leave
from .prints import route_prints
from .record import place_and_peak
from .running import RUNNING, Running
from .sizes import size_of
from .starts import Start, start_of


class _Stage:
    """One task of a chunk: makes the calls of its elements and keeps what they tell.

    Parameters
    ----------
    order : dict
        ``map, task, indices, attempts, inputs, prints, context, ordinal``, perhaps ``names``, ``naming``,
        ``scopes`` and ``commits``.
    function : bytes or callable
        What to call.
    arguments : list
        A pair of keyword (or None) and entry for each argument; see `maker_of`.
    values : sequence
        Upstream values of the chunk.
    earlier : list of _Stage
        The stages before.
    """

    def __init__(self, order: Any, function: Any, arguments: Any, values: Any, earlier: Any) -> None:
        self.order = order
        self.call = load_function(function)
        self.indices, self.attempts = order["indices"], order["attempts"]
        self.names, self.scopes = order.get("names"), order.get("scopes")
        self.naming = order.get("naming")  # makes the names that are None
        self.common = {
            name: order[name] for name in ("map", "task", "inputs", "prints", "context", "ordinal")
        }
        self.skip_if = order.get("skip_if")
        self.commits = order.get("commits")  # one for all elements, or a list with one for each
        mode = self.mode = order["inputs"]
        self.private = isinstance(function, bytes)  # the arguments were unpickled for this chunk

        def maker(entry: Any) -> Any:
            if entry[0] == "stage":
                made = earlier[entry[1]].values
                return lambda number: guarded(made[number], mode)
            if entry[0] == "fill":
                makers = [maker(upstream) for upstream in entry[2]]
                return lambda number: filled(entry[1], [make(number) for make in makers])
            if entry[0] == "mixed":
                some = [maker(one) for one in entry[1]]
                return lambda number: some[number](number)
            return maker_of(entry, values, mode)

        self.args = [maker(entry) for keyword, entry in arguments if keyword is None]
        self.kwargs = {keyword: maker(entry) for keyword, entry in arguments if keyword is not None}
        self.values: list[Any] = []
        self.started: list[float] = []
        self.seconds: list[float] = []
        self.nbytes: list[int] = []
        if order["prints"]:
            route_prints()

    def running(self, number: int, key: Any) -> Running:
        """Make what the user's code sees of its own run."""
        attempts = self.attempts
        order = ElementOrder(self.common)
        order["index"] = self.indices[number]
        order["attempt"] = attempts if isinstance(attempts, int) else attempts[number]
        if self.commits is not None:
            order["commit"] = self.commits if isinstance(self.commits, dict) else self.commits[number]
        if "tags" in self.order:
            order["tags"] = self.order["tags"]
        if self.names is not None and self.names[number] is not None:
            order["name"] = self.names[number]
        elif self.naming is not None:
            order["naming"] = self.naming
        found = Running(order)
        found.key = key
        if self.scopes is not None:
            found.scope = self.scopes[number]
        return found

    def invoke(self, number: int, running: Running, note: Start, place: int) -> Any:
        """Call the function for one element; a `Failed` means that it was not called."""
        args = [make(number) for make in self.args]
        kwargs = {keyword: make(number) for keyword, make in self.kwargs.items()} if self.kwargs else {}
        for value in args:
            if type(value) is Failed:
                return value
        for value in kwargs.values():
            if type(value) is Failed:
                return value
        if not (nothing_in(args) and nothing_in(kwargs.values())):
            args, kwargs = Guard(self.mode).arguments(args, kwargs, private=self.private)
        if "naming" in running.order:
            running.order["name"] = name_from(self.naming, self.call, args, kwargs)
        if self.skip_if is not None:
            ask(self.skip_if, args, kwargs)
        if self.commits is not None and stored_under(running, self.call, args, kwargs):
            return running.found
        running.called = (self.call, args, kwargs)
        note.called(place)
        value = self.call(*args, **kwargs)
        return value if type(value) in SIMPLE else settled(running, value)


class _Interrupted(Exception):
    """The chunk ends here: it was asked to, or the process was."""


def run_chunk(
    order: Any, function: Any, arguments: Any, values: Any, key: Any, on_start: Any
) -> tuple[Any, bytes]:
    """Execute the elements of a chunk, one after the other, each through all stages.

    The order has ``stages`` (see `_Stage`), ``count`` (of elements) and ``box``: seconds and bytes
    of results after which the rest is left alone, or None. With ``kept`` exactly those places are run:
    the others have ended elsewhere meanwhile, or without a value.

    Returns
    -------
    tuple
        The list of all values, stage after stage, and the record: ``status`` "chunk", ``count``,
        ``done`` (how many elements were run), ``stages`` (for each its columns ``started, seconds, nbytes``),
        ``odd`` (by place what an element's own record would say besides, if anything), and what
        every record says.
    """
    begun, clock = time.time(), time.perf_counter()
    whole = Running({"attempt": 1}, key)
    token = RUNNING.set(whole)
    count, kept = order["count"], order.get("kept")
    box = order["box"] if kept is None else None
    wanted = None if kept is None or kept is True else set(kept)
    odd: dict[int, dict[str, Any]] = {}
    stages: list[_Stage] = []
    done = filled = 0
    try:
        enter(whole)
        if whole.cancelled:
            raise _Interrupted
        functions = (
            pickle.loads(function) if isinstance(function, bytes) and len(order["stages"]) > 1 else None
        )
        functions = functions or (function if isinstance(function, list) else [function])
        if isinstance(arguments, bytes):
            arguments = pickle.loads(arguments)
        values = [opened(value) for value in values]
        for part, one, some in zip(order["stages"], functions, arguments, strict=True):
            stages.append(_Stage(part, one, some, values, stages[:]))
        if on_start is not None:
            on_start()
        note = start_of(key)
        while done < count:
            _run_element(stages, done, count, odd, whole, note, wanted)
            done += 1
            if box is not None:
                filled += sum(stage.nbytes[-1] for stage in stages)
                if filled > box[1] or time.perf_counter() - clock > box[0]:
                    break
    except _Interrupted:
        done = min((len(stage.nbytes) for stage in stages), default=0)
    except BaseException as error:  # asked to stop between two elements, or it cannot even begin
        done = min((len(stage.nbytes) for stage in stages), default=0)
        if not whole.cancelled and done < count:
            _blame(error, stages, done, count, odd, order)
            done += 1
    while not whole.over:
        with contextlib.suppress(BaseException):  # a request to stop that came in the last moment
            leave(whole)
    RUNNING.reset(token)
    return _chunk_outcome(order, stages, done, odd, begun, clock)


def _run_element(
    stages: list[_Stage],
    number: int,
    count: int,
    odd: dict[int, dict[str, Any]],
    whole: Running,
    note: Start,
    wanted: set[int] | None,
) -> None:
    """Run one element through all stages, or through those of its places that are wanted."""
    for at, stage in enumerate(stages):
        place = at * count + number
        if wanted is not None and place not in wanted:
            _leave_out(stage, place, odd)
            continue
        note.element(place)
        running = stage.running(number, whole.key)
        RUNNING.set(running)
        value: Any = None
        error: BaseException | None = None
        started, clock = time.time(), time.perf_counter()
        try:
            if stage.commits is not None and stored_before(running):
                value = running.found
            else:
                value = stage.invoke(number, running, note, place)
        except BaseException as raised:
            error = raised
        if type(value) is Failed:
            odd[place] = {"status": "upstream"}
        elif (
            error is not None
            or running.logs
            or running.nested is not None
            or stage.commits is not None
            or stage.naming is not None
            or type(value) not in SIMPLE
        ):
            running.cancelled = running.cancelled or whole.cancelled
            value, error, details = finished(running, value, error)
            if error is not None:
                value = Failed(b"", error)
            if len(details) > 1 or error is not None:
                odd[place] = details
        stage.started.append(started)
        stage.seconds.append(time.perf_counter() - clock)
        stage.values.append(value)
        stage.nbytes.append(0 if error is not None else size_of(value))
        if error is not None and (running.cancelled or whole.cancelled or is_signal(error)):
            _fill_up(stages[at + 1 :], number, at + 1, count, odd)
            raise _Interrupted


def _fill_up(
    stages: list[_Stage], number: int, first: int, count: int, odd: dict[int, dict[str, Any]]
) -> None:
    """Note of the later stages of an element that they were not reached."""
    for at, stage in enumerate(stages, first):
        _leave_out(stage, at * count + number, odd)


def _leave_out(stage: _Stage, place: int, odd: dict[int, dict[str, Any]]) -> None:
    odd[place] = {"status": "upstream"}
    stage.started.append(0.0)
    stage.seconds.append(0.0)
    stage.values.append(Failed(b""))
    stage.nbytes.append(0)


def kept_of(values: list[Any]) -> Any:
    """Return which places of a chunk have a value, True for all: what ``kept`` is if it is to be made again."""
    kept = [place for place, value in enumerate(values) if type(value) is not Failed]
    return True if len(kept) == len(values) else kept


def _blame(error: BaseException, stages: Any, done: int, count: int, odd: Any, order: Any) -> None:
    """The chunk cannot be set up, say because its function does not load: the next element has failed."""
    for part in order["stages"][len(stages) :]:
        stage = object.__new__(_Stage)
        stage.order, stage.values, stage.started, stage.seconds, stage.nbytes = part, [], [], [], []
        stages.append(stage)
    for at, stage in enumerate(stages):
        if len(stage.nbytes) > done:
            continue
        failed = at == 0 or at * count + done - count not in odd
        odd[at * count + done] = (
            {"status": "failed", "error": describe_error(error)} if failed else {"status": "upstream"}
        )
        stage.started.append(time.time())
        stage.seconds.append(0.0)
        stage.values.append(Failed(b"", error))
        stage.nbytes.append(0)


def _chunk_outcome(
    order: Any, stages: list[_Stage], done: int, odd: Any, begun: float, clock: float
) -> tuple[Any, bytes]:
    count = order["count"]
    values: list[Any] = []
    for stage in stages:
        values.extend(stage.values[:done])
        values.extend([Failed(b"")] * (count - done))
    columns: list[Any] = [
        [stage.started[:done], stage.seconds[:done], stage.nbytes[:done]] for stage in stages
    ]
    seconds = time.perf_counter() - clock
    record: dict[str, Any] = {
        "status": "chunk",
        "attempt": 1,
        "count": count,
        "done": done,
        "stages": columns or [[[], [], []] for _ in order["stages"]],
        "odd": odd,
        "started": begun,
        "ended": begun + seconds,
        "seconds": seconds,
        "nbytes": sum(sum(column[2]) for column in columns),
        **place_and_peak(),
    }
    if not stages:
        values = [Failed(b"")] * (count * len(order["stages"]))
    return values, pickle.dumps(record, 4)
