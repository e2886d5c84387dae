"""Units of work on their way: what goes when, under which key, and how it is taken back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from penstock import errors
from penstock.engine import compile  # noqa: A004 - the house's word
from penstock.engine.calls import TaskRun
from penstock.engine.chunks import Chunk, fuse
from penstock.engine.states import Position, StateType, advance
from penstock.runners.base import UNSENT, Key, Ref, Report

if TYPE_CHECKING:
    from penstock.engine.session import Session


class Dispatch:
    """Hands units of work of one session to its runner, and knows which are there.

    Parameters
    ----------
    session : Session
        Whose runs they are.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.sent: dict[Key, TaskRun | Chunk] = {}
        self._counter = itertools.count()

    def send(self) -> None:
        """Send what goes now."""
        session = self._session
        with session.changing():
            submissions = compile.submissions(self.take(), session, session.fail)
        if not submissions:
            return
        try:
            sent = session.runner.send(submissions)
        except Exception as error:  # the backend is gone, or refuses: nothing was started
            session.inbox.append(
                [
                    Report(s.key, "lost", cause=errors.CrashedRun(f"could not be sent: {error}"))
                    for s in submissions
                ]
            )
            return
        session.lookout.watch(submissions)
        unwanted = []
        with session.lock:
            for ref in sent:
                owner = self.sent.get(ref.key)
                if owner is None:  # cancelled while it was on its way
                    unwanted.append(ref)
                elif isinstance(owner, Chunk):
                    owner.moved(ref)
                else:
                    owner.ref = ref
        if unwanted:
            session.runner.cancel(unwanted)

    def take(self) -> list[TaskRun | Chunk]:
        """Take what goes now out of the buffer; where the backend knows dependencies, what hangs on it too."""
        units: list[TaskRun | Chunk] = []
        for run in self._session.quarantine.take():
            if not run.done:
                run.released = True
                units.append(self._address(run))
        if units:
            return units
        while taken := self._session.buffer.take():
            for unit in taken:
                # What waited to be sent again may have ended meanwhile, if news of it were late.
                runs = [run for run in (unit if isinstance(unit, list) else [unit]) if not run.done]
                if len(runs) > 1:
                    units.append(self._pack(runs))
                elif runs:
                    self._hand_out(runs[0])
                    units.append(self._address(runs[0]))
        return units

    def _address(self, run: TaskRun) -> TaskRun:
        self._submitting([run])
        run.key = (f"{run.task.name}-{self._session.tag}", next(self._counter))
        run.ref, run.place = Ref(run.key, UNSENT), -1
        self.sent[run.key] = run
        return run

    def _pack(self, runs: list[TaskRun]) -> Chunk:
        key = (f"{runs[0].task.name}-{self._session.tag}", next(self._counter))
        chunk = Chunk(key, runs)
        fuse(chunk)
        if len(chunk.stages) > 1:
            names = "+".join(stage[0].task.name for stage in chunk.stages[:4])
            chunk.key = (f"{names}-{self._session.tag}", key[1])
        chunk.address(Ref(chunk.key, UNSENT))
        self.sent[chunk.key] = chunk
        for stage in chunk.stages:
            self._submitting(stage)
            for run in stage:
                self._hand_out(run)
        return chunk

    def _hand_out(self, run: TaskRun) -> None:
        if run.released:
            return
        run.released = True
        for dependant in self._session.graph.released(run):
            self._session.release(dependant)

    @staticmethod
    def _submitting(runs: Sequence[TaskRun]) -> None:
        """Bring runs into the state of being sent; neighbours mostly come from one and the same."""
        before: Position | None = None
        after = runs[0].position
        for run in runs:
            if run.position is not before or run.failures or run.crashes or run.excuses:
                before = run.position
                after = advance(before, StateType.PENDING, "Submitting", run.next_attempt)
            run.position = after

    def landed(self, unit: TaskRun | Chunk | None) -> None:
        """A unit of work is with the backend no more."""
        if isinstance(unit, Chunk):
            packer = unit.packer
            self.sent.pop(unit.key, None)
        elif unit is not None and unit.key is not None and self.sent.pop(unit.key, None) is not None:
            packer = unit.mapped.packer if unit.mapped is not None else None
        else:
            return
        if packer is not None:
            packer.flying -= 1

    def detach(self, run: TaskRun) -> None:
        """Expect nothing more of the present attempt of a run; a chunk without any such run is withdrawn."""
        unit = self.sent.get(run.key) if run.key is not None else None
        if not isinstance(unit, Chunk):
            self.landed(unit)
        else:
            unit.open -= 1
            if unit.open == 0:
                self.landed(unit)
                if unit.ref.handle is not UNSENT:
                    self._session.runner.release([unit.ref])

    def give_up(self, key: Key) -> None:
        """A chunk will certainly not run: those of its elements that nobody cancelled wait again."""
        chunk = self.sent.get(key)
        if not isinstance(chunk, Chunk):
            return
        self.landed(chunk)
        for run in chunk.runs:
            if run.key is chunk.key and not run.done and not run.cancelling:
                self.put_back(run)

    def put_back(self, run: TaskRun) -> None:
        """An element was not run by its chunk: it waits again, and what was sent ahead on it with it."""
        run.key, run.ref, run.place, run.released = None, None, -1, False
        for dependant in self._session.graph.recalled(run):
            self.withdraw(dependant)
        if not run.done and run.waiting == 0:
            self._session.release(run)

    def withdraw(self, run: TaskRun) -> None:
        """Take a run back from buffer and backend without touching its state."""
        run.released = False
        self._session.buffer.discard(run)
        self._session.quarantine.discard(run)
        if run.key is None:
            return
        ref = run.ref if run.place < 0 and run.key in self.sent else None
        self.detach(run)
        run.key, run.ref, run.place = None, None, -1
        if ref is not None and ref.handle is not UNSENT:
            self._session.runner.release([ref])

    def forget(self, run: TaskRun) -> None:
        """Hear no more of the present attempt: it is over, whatever its code still does."""
        self.detach(run)
        run.key, run.ref, run.place = None, None, -1
