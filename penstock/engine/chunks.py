"""Chunks: many elements of a map in one unit of work, and how many of them go together.

Every element keeps its own run: id, state, attempt, times, logs, error and future. Only the way to
the worker and back is shared. A chunk that takes longer than it should, because its elements turned
out slow or large, ends early and hands the rest back (`worker.chunk.run_chunk`), so that a wrong
guess costs one element and not a thousand.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from penstock.runners.base import Key, Ref

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun
    from penstock.engine.graph import Edge
    from penstock.engine.mapped import Mapped
    from penstock.engine.options import TaskOptions

TARGET = 0.1
"""Seconds that a chunk of tiny elements should take: a hundred times what a message costs."""
SHORTEST = 0.02
"""Seconds below which a chunk is not cut for the sake of balance."""
BOX = (0.3, 8 << 20)
"""Seconds and bytes of results after which a chunk ends, whatever is left of it."""
WORTH = 4
"""Elements from which a chunk is worth the trouble."""
LARGE = 1 << 20
"""Bytes of a result above which elements go alone: a value of its own can be moved and freed by itself."""
AHEAD = 4
"""Chunks for each thread that are with the back end at a time."""


class Chunk:
    """One unit of work for some elements: one stage, or a fused chain of stages one to one.

    Parameters
    ----------
    key : Key
        The attempt, as the back end knows it.
    stages : list of list of TaskRun
        For each task the runs of the same elements, in the same order.

    Attributes
    ----------
    ref : Ref
        Of the list of all values, stage after stage.
    open : int
        Runs that wait for its report.
    packer : Packer or None
        Counts it among those that are with the back end.
    refusals : dict of str to str
        By the id of a map that takes its elements: why it does not go along.
    """

    __slots__ = ("key", "open", "packer", "ref", "refusals", "stages")

    def __init__(self, key: Key, runs: list[TaskRun]) -> None:
        self.key = key
        self.stages = [runs]
        self.ref = Ref(key, None)
        self.open = 0
        self.packer = runs[0].mapped.packer if runs[0].mapped is not None else None
        self.refusals: dict[str, str] = {}

    @property
    def count(self) -> int:
        """How many elements it has."""
        return len(self.stages[0])

    @property
    def runs(self) -> Iterator[TaskRun]:
        """All runs, in the order of their places."""
        for stage in self.stages:
            yield from stage

    def address(self, ref: Ref) -> None:
        """Tell every run where its value will be."""
        self.ref = ref
        place = 0
        for stage in self.stages:
            for run in stage:
                run.key, run.ref, run.place = self.key, ref, place
                place += 1
        self.open = place

    def moved(self, ref: Ref) -> None:
        """The back end has taken the chunk, and this is its reference."""
        self.ref = ref
        for run in self.runs:
            if run.key is self.key:
                run.ref = ref


class Packer:
    """The elements of one map that wait to be sent, and the decision how many go together.

    With ``chunk_size="auto"`` the first elements go alone, two for each thread; what they tell
    decides about the others. A consumer of whole chunks of another map follows those without a
    pilot of its own.

    Parameters
    ----------
    options : TaskOptions
        Of the task.
    threads : int
        Tasks that the back end runs at once.
    window : int
        Units of work that may be with the back end at a time.
    alone : bool
        Never pack; only the window counts.

    Attributes
    ----------
    ready : ordered dict of TaskRun
        Wait to be sent, in order.
    flying : int
        Units of this map that are with the back end.
    seconds : float or None
        What one element takes, None until enough of them have told.
    nbytes : float
        What one result takes, at most so far.
    """

    def __init__(self, options: TaskOptions, threads: int, window: int, *, alone: bool = False) -> None:
        self.size: int | str = 1 if alone else options.chunk_size
        self.threads = max(threads, 1)
        self.window = window
        self.ready: OrderedDict[TaskRun, None] = OrderedDict()  # a dict is slow where its front goes first
        self.flying = 0
        self.seconds: float | None = None
        self.nbytes = 0.0
        self._told: list[float] = []

    # -- what goes next -------------------------------------------------------------------------
    def take(self) -> Iterator[list[TaskRun]]:
        """Yield what goes now: lists of one for a run that goes alone."""
        while self.ready:
            count = self._next()
            if not count:
                return
            self.flying += 1
            first = self._pop()
            together = [first]
            while len(together) < count and next(iter(self.ready)).mapped is first.mapped:
                together.append(self._pop())
            yield together

    @property
    def has_room(self) -> bool:
        """Whether anything would go now."""
        return bool(self.ready) and self._next() > 0

    def _pop(self) -> TaskRun:
        return self.ready.popitem(last=False)[0]

    def _next(self) -> int:
        """How many elements go together now; 0 if they have to wait."""
        left = len(self.ready)
        if isinstance(self.size, int):
            room = self.window if self.size == 1 else AHEAD * self.threads
            return min(self.size, left) if self.flying < room else 0
        if self.seconds is None:
            together = self._together()
            if together > 1:
                return together if self.flying < AHEAD * self.threads else 0
            return int(self.flying < 2 * self.threads)
        count = self._by_time(left)
        return min(count, left) if self.flying < (self.window if count == 1 else AHEAD * self.threads) else 0

    def _by_time(self, left: int) -> int:
        seconds = max(self.seconds or 0.0, 1e-7)
        most = int(TARGET / seconds)
        if self.nbytes:
            most = min(most, int(BOX[1] / self.nbytes))
        if most < WORTH or self.nbytes > LARGE:
            return 1
        fair = -(-left // (AHEAD * self.threads))
        return max(1, min(most, max(fair, int(SHORTEST / seconds))))

    def _together(self) -> int:
        """Count the first runs whose upstream values come out of one and the same chunk."""
        home: Key | None = None
        count = 0
        for run in self.ready:
            key = home_of(run)
            if key is None or (count and key is not home):
                break
            home = key
            count += 1
        return count

    def forecast(self, count: int, seconds: float) -> tuple[int, int]:
        """Return in how many units so many elements would go, and how many there are in the largest.

        Parameters
        ----------
        count : int
            Elements.
        seconds : float
            What one of them takes, if the size of chunks is automatic.
        """
        if isinstance(self.size, int):
            return -(-count // self.size), min(self.size, count)
        self.seconds = seconds
        units = largest = 0
        while count:
            together = min(self._by_time(count), count)
            units, largest, count = units + 1, max(largest, together), count - together
        return units, largest

    def part(self) -> None:
        """Let every element go alone from now on: one of them kills its worker, and nobody knows which."""
        self.size = 1

    # -- what is learned ------------------------------------------------------------------------
    def learn(self, seconds: float, nbytes: float, *, together: bool) -> None:
        """Hear what an element took.

        Parameters
        ----------
        seconds : float
            One that went alone, or the mean of a chunk with all that it costs on the worker.
        nbytes : float
            Size of its result, the mean in a chunk.
        together : bool
            It is a mean.
        """
        self.nbytes = max(self.nbytes, nbytes)
        if together:
            self.seconds = seconds if self.seconds is None else (self.seconds + seconds) / 2
            return
        if self.size != "auto" or (self.seconds is not None and self.seconds * TARGET > 1):
            return
        # The first call in each worker loads the function, and whatever that imports: the fastest
        # of the pilot knows best. If it is wrong the chunks end early and say so.
        self._told.append(seconds)
        if len(self._told) >= self.threads or not self.ready:
            self.seconds = min(self._told)


def home_of(run: TaskRun) -> Key | None:
    """Return the chunk out of which the mapped arguments of a run come, None for any other run."""
    mapped = run.mapped
    if mapped is None:
        return None
    number = run.index - mapped.start
    for _, argument in mapped.arguments:
        if argument.kind == "upstream" and hasattr(argument, "tolerant"):
            upstream: TaskRun = argument.content[number]
            return upstream.key if upstream.place >= 0 else None
    return None


# -- fusing -------------------------------------------------------------------------------------


def fuse(chunk: Chunk) -> None:
    """Append every map that takes the elements of the chunk one to one, and nothing that is not there.

    The runs of a stage that is appended are marked as handed out; their values are made where those
    of the stage before lie, and no message is sent for them.
    """
    while (stage := _next_stage(chunk)) is not None:
        chunk.stages.append(stage)


def _next_stage(chunk: Chunk) -> list[TaskRun] | None:
    tried = {id(stage[0].mapped) for stage in chunk.stages}
    for stage in chunk.stages:
        for edge in stage[0].dependants or ():
            mapped = edge.run.mapped
            if mapped is None or id(mapped) in tried:
                continue
            tried.add(id(mapped))
            found = _followers(chunk, stage, mapped)
            if isinstance(found, list):
                return found
            chunk.refusals[str(edge.run.map_id)] = found
    return None


def _followers(chunk: Chunk, stage: Sequence[TaskRun], mapped: Mapped) -> list[TaskRun] | str:
    """Return the runs of a map that can go along, one for each element; or why they cannot."""
    reason = _obstacle(mapped, chunk)
    if reason:
        return reason
    runs: list[TaskRun] = []
    edges: list[Edge] = []
    for number, upstream in enumerate(stage):
        mine = {edge.run: None for edge in upstream.dependants or () if edge.run.mapped is mapped}
        if len(mine) != 1:
            return "it does not take the elements one to one"
        (follower,) = mine
        if follower.done or follower.released or follower.cancelling:
            return "some of its elements are on their way already"
        if follower.hit is not None:
            return "some of its elements have a stored result"
        held = [
            edge
            for other in chunk.stages
            for edge in other[number].dependants or ()
            if edge.run is follower and not edge.satisfied
        ]
        if any(edge.tolerant for edge in held):
            return "allow_failure waits for the end of each element"
        if not held or follower.waiting != len(held):
            return "its elements wait for others, too"
        runs.append(follower)
        edges.extend(held)
    for edge in edges:
        edge.satisfied = True
        edge.run.waiting -= 1
    return runs


def _obstacle(mapped: Mapped, chunk: Chunk) -> str:
    """Say why no element of a map can go along with a chunk; empty if nothing speaks against it."""
    packer = mapped.packer
    if mapped.reason or packer is None:
        return mapped.reason or "its elements go alone"
    if mapped.task.options.backend != chunk.stages[0][0].task.options.backend:
        return "it asks for other resources, threads or workers"
    if isinstance(packer.size, int) and packer.size < chunk.count:
        return f"its chunk_size of {packer.size} is smaller"
    # What all its elements get has to be there, or the chunk would wait for what waits for it.
    if any(
        source.run is not None and not source.run.done for source in (*mapped.shared_sources, *mapped.after)
    ):
        return "what all its elements need, or wait for, is not there yet"
    if packer.nbytes > LARGE:
        return "its results are large"
    if packer.seconds is not None and packer.seconds * chunk.count > 3 * TARGET:
        return "its elements take too long"
    return ""
