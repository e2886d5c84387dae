"""Which worker process gets which work, and what follows from the messages of the workers.

Starts no process and waits for nothing; the pool calls it under its lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

from penstock import errors
from penstock.runners.base import Key, Ref, Report
from penstock.runners.process_channel import Message
from penstock.runners.process_child import Child
from penstock.runners.process_work import Backlog, Handle, Value, Work
from penstock.runners.shared_memory import Packed
from penstock.runners.worker.starts import start_name

_FUNCTIONS = 1024
_UNKNOWN = 1.0  # seconds: nothing is sent ahead behind a function that has not run yet


class Schedule:
    """Who does what.

    Parameters
    ----------
    workers : int
        How many tasks may run at a time, those that wait for others not counted.

    Attributes
    ----------
    children : dict
        All worker processes, by number.
    files : set of str
        The files of all values that somebody holds.
    reports : list of Report
        For the driver's sessions, to be delivered without the lock.
    dropped : list
        What is no longer needed. Freeing large values takes time: without the lock.
    clogged : set of Child
        Workers whose socket is full.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.children: dict[int, Child] = {}
        self.files: set[str] = set()
        self.reports: list[Report] = []
        self.dropped: list[Any] = []
        self.clogged: set[Child] = set()
        self._backlog = Backlog()
        self._works: dict[Key, Work] = {}
        self._seconds: OrderedDict[bytes, float] = OrderedDict()
        self._touched: set[Child] = set()

    def __len__(self) -> int:
        return len(self._works)

    def keys(self) -> list[Key]:
        """Return the keys of all work that has not ended."""
        return list(self._works)

    # -- from whoever submits -------------------------------------------------------------
    def admit(self, work: Work, upstream: Sequence[Handle | None]) -> None:
        """Queue work, unless a value it needs does not exist.

        Parameters
        ----------
        work : Work
            Without its values.
        upstream : sequence of Handle or None
            Where they are; None is a reference that this pool does not know.
        """
        values = [handle.value for handle in upstream if handle is not None and handle.value is not None]
        if len(values) == len(upstream):
            work.values = tuple(values)
            self._works[work.key] = work
            if work.origin is not None:
                work.origin.sent[work.key] = work
            self._backlog.push(work)
            return
        work.handle.finish(None)
        if any(handle is not None and handle.pending for handle in upstream):
            cause = errors.ResultLost(f"{work.task} was sent before the work that it depends on had ended")
            self._report(work, "lost", cause=cause)
        else:
            self._report(work, "upstream")

    def cancel(self, keys: Iterable[Key], *, force: bool, told: bool = True) -> list[Key]:
        """Stop work.

        Parameters
        ----------
        keys : iterable of Key
            What to stop.
        force : bool
            End the processes that run it.
        told : bool
            The caller gets to know the answer; otherwise each key gets a report.

        Returns
        -------
        list of Key
            What had not started; it will not run.
        """
        removed = []
        requests: dict[Child, list[Key]] = {}
        for key in keys:
            work = self._works.get(key)
            if work is None:
                continue
            work.is_cancelled = True
            if work.child is None:
                removed.append(key)
                self._withdraw(work)
                if not told:
                    self._end(work, "lost", cause=_cancelled(work))
                continue
            if force and work.child.current is work:
                work.child.victim = work
                work.child.kill()
            else:
                requests.setdefault(work.child, []).append(key)
        for child, wanted in requests.items():
            self._post(child, ("cancel", wanted))
        return removed

    def take_back(self, key: Key) -> bool:
        """Withdraw work that no worker has."""
        work = self._works.get(key)
        if work is None or work.child is not None:
            return False
        self._withdraw(work)
        return True

    def end_all(self, cause: Exception) -> None:
        """Report all work as lost."""
        for work in list(self._works.values()):
            if work.child is not None:
                work.child.take(work.key)
            else:
                self._backlog.withdraw(work)
            self._end(work, "lost", cause=cause)

    # -- from the workers -----------------------------------------------------------------
    def started(self, child: Child, key: Key) -> None:
        """User code begins."""
        work = child.running.get(key)
        if work is not None:
            self._report(work, "started", worker=child.name)

    def yielded(self, child: Child, key: Key, number: int, packed: Packed, nbytes: int) -> None:
        """A generator has handed an item on."""
        value = Value(packed, nbytes, self.files)
        self.dropped.append(value)
        work = child.running.get(key)
        if work is not None:
            ref = Ref((f"{key[0]}-{key[1]}-items", number), Handle(value), nbytes, child.name)
            self._report(work, "item", nbytes=nbytes, worker=child.name, number=number, ref=ref)

    def ended(
        self, child: Child, key: Key, record: bytes, packed: Packed | None, nbytes: int, seconds: float
    ) -> None:
        """User code has ended; `packed` is its value, None if it failed."""
        value = Value(("failed", record) if packed is None else packed, nbytes, self.files)
        self.dropped.append(value)
        child.is_blocked = child.is_presumed_blocked = False
        work = child.take(key)
        if work is not None:
            self._learn(work.function, seconds)
            work.handle.finish(value)
            self._end(work, "ended", record=record, nbytes=nbytes, worker=child.name)

    def missing(self, child: Child, key: Key, path: str) -> None:
        """The file of an input is gone."""
        work = child.take(key)
        if work is not None:
            cause = errors.ResultLost(f"an input of {work.task} no longer exists: {path}")
            cause.began = False
            self._end(work, "lost", cause=cause, worker=child.name)

    def returned(self, child: Child, keys: Iterable[Key]) -> None:
        """A worker hands back what it has not started."""
        child.was_asked = False
        for key in keys:
            work = child.take(key)
            if work is not None:
                self._requeue(work)

    def lost(self, child: Child, end: str, *, by_oom: bool = False) -> None:
        """A worker has died: the work that it ran is lost, and nothing else.

        Parameters
        ----------
        child : Child
            The worker.
        end : str
            How it ended, in words.
        by_oom : bool
            The kernel has killed a process for lack of memory meanwhile.
        """
        del self.children[child.number]
        self._touched.discard(child)
        self.clogged.discard(child)
        work = child.current
        if work is not None:
            child.take(work.key)
            began = None if child.begun is None else start_name(work.key) in child.begun
            when = "before it began" if began is False else "while running"
            message = f"worker process pid {child.pid} {end} {when} {work.task!r}"
            cause: Exception = errors.WorkerLost(message)
            if by_oom:
                cause = errors.OutOfMemory(f"{message}: the host had run out of memory")
            assert isinstance(cause, errors.CrashedRun)
            cause.began = began
            if began:
                assert child.begun is not None
                cause.element, cause.called, _ = child.begun[start_name(work.key)]
            if child.victim is work:
                cancelled = _cancelled(work)
                cancelled.began, cancelled.called, cancelled.element = began, cause.called, cause.element
                cause = cancelled
            elif child.victim is not None:  # it had ended when we killed its process
                cause.add_note(f"The process was killed to cancel {child.victim.task!r}.")
            self._end(work, "lost", cause=cause, worker=child.name)
        for key in list(child.running):
            ahead = child.take(key)
            if ahead is not None:
                self._requeue(ahead)
        for nested in list(child.sent.values()):
            self._abandon(nested)
        self.dropped.append(child.owned)
        child.owned = {}

    def _requeue(self, work: Work) -> None:
        if work.is_orphan or work.is_cancelled:
            self._end(work, "lost", cause=_cancelled(work))
        else:
            self._backlog.push(work)

    def _abandon(self, work: Work) -> None:
        """Stop work that nobody waits for any more, and what it has submitted itself."""
        child = work.child
        work.is_orphan = work.is_cancelled = True
        if child is None:
            self._withdraw(work)
            self._end(work, "lost")
            return
        self._post(child, ("cancel", [work.key]))
        for nested in list(child.sent.values()):
            if nested.parent is work and not nested.is_orphan:
                # Its parent may be waiting for this very report.
                self._report(nested, "lost", cause=_cancelled(nested))
                self._abandon(nested)

    # -- bookkeeping ----------------------------------------------------------------------
    def _withdraw(self, work: Work) -> None:
        self._backlog.withdraw(work)
        self._forget(work)

    def _forget(self, work: Work) -> None:
        self._works.pop(work.key, None)
        origin = work.origin
        if origin is not None:
            origin.sent.pop(work.key, None)
            if origin.is_presumed_blocked and not origin.awaits:
                origin.is_blocked = origin.is_presumed_blocked = False
        self.dropped.append(work)

    def _end(self, work: Work, kind: Any, **details: Any) -> None:
        self._forget(work)
        if work.handle.pending:
            work.handle.finish(None)
        self._report(work, kind, **details)

    def _report(self, work: Work, kind: Any, **details: Any) -> None:
        if work.is_orphan:
            return
        report = Report(work.key, kind, **details)
        if work.origin is None:
            self.reports.append(report)
        else:
            work.origin.outbox.append(
                (report.key, kind, report.record, report.cause, report.nbytes, report.worker)
            )
            self._touched.add(work.origin)

    def _learn(self, function: bytes, seconds: float) -> None:
        known = self._seconds.get(function, seconds)
        # A slow run counts at once, a quick one little by little.
        self._seconds[function] = seconds if seconds > known else 0.8 * known + 0.2 * seconds
        if len(self._seconds) > _FUNCTIONS:
            self._seconds.popitem(last=False)

    def _post(self, child: Child, message: Message) -> None:
        child.channel.post(message)
        self._touched.add(child)

    def answer(self, child: Child, number: int, answer: Any) -> None:
        """Answer a question of a worker."""
        self._post(child, ("answer", number, answer))

    # -- who gets what --------------------------------------------------------------------
    def settle(self) -> None:
        """Give work to workers that can take some, and send what is queued for them."""
        if self._backlog:
            self._assign()
        else:
            self._share()
        for child in self._touched:
            if child.outbox:
                child.channel.post(("reports", child.outbox))
                child.outbox = []
            if not child.channel.flush():
                self.clogged.add(child)
        self._touched.clear()

    def _able(self) -> list[Child]:
        return [
            child
            for child in self.children.values()
            if child.is_ready and not child.is_leaving and not child.is_blocked
        ]

    def _assign(self) -> None:
        able = self._able()
        free = self.workers - sum(bool(child.running) for child in able)
        for child in able:
            if free > 0 and not child.running and self._give(child):
                free -= 1
        able = [child for child in able if child.running and child.has_room]
        while able and self._backlog:
            able = [child for child in able if self._give(child) and child.has_room]

    def _give(self, child: Child) -> bool:
        work = self._backlog.pop()
        if work is None:
            return False
        work.seconds = self._seconds.get(work.function, _UNKNOWN)
        child.give(work)
        self._touched.add(child)
        return True

    def _share(self) -> None:
        """Nothing is queued: have a worker that was sent work ahead hand it back for an idle one."""
        able = self._able()
        running = sum(bool(child.running) for child in able)
        if running == 0 or running >= min(self.workers, len(able)):
            return
        fullest = max(able, key=lambda child: len(child.running))
        if len(fullest.running) > 1 and not fullest.was_asked:
            fullest.was_asked = True
            self._post(fullest, ("return", len(fullest.running) // 2))

    @property
    def may_be_stuck(self) -> bool:
        """Whether work that tasks have submitted waits for slots that these tasks hold."""
        if not self._backlog.holds_nested:
            return False
        busy = [child for child in self._able() if child.running]
        return len(busy) >= self.workers and all(child.awaits for child in busy)

    def presume_blocked(self) -> None:
        """Let one more process run, since a task may wait in a way that we are not told of."""
        for child in self._able():
            if child.awaits:
                child.is_blocked = child.is_presumed_blocked = True
                self._post(child, ("return", len(child.running)))
                return

    def missing_workers(self) -> int:
        """How many processes should be started: up to the full number, more if tasks are blocked."""
        staying = [child for child in self.children.values() if not child.is_leaving]
        free = [child for child in staying if not child.is_blocked]
        busy = sum(bool(child.running) for child in free)
        wanted = min(self.workers, busy + len(self._backlog)) - len(free)
        return max(0, wanted, self.workers - len(staying))

    def spare_workers(self) -> list[Child]:
        """Idle processes beyond the full number, which blocked tasks had called for."""
        free = [child for child in self.children.values() if not child.is_leaving and not child.is_blocked]
        idle = [child for child in free if child.is_ready and not child.running and not child.sent]
        return idle[::-1][: max(0, len(free) - self.workers)]


def _cancelled(work: Work) -> errors.CancelledRun:
    return errors.CancelledRun(f"{work.task} was cancelled")
