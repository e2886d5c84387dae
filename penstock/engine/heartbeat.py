"""The driver's side of liveness: says that it lives, hears what it is asked for, notices what it lost.

One daemon thread asks the store once a second, while there are root flow runs; every fifth time it
renews their leases. For task runs outside of flows it says every five seconds that the driver lives. It is started by the tracking when that loads the store, so that a script of a
second never pays for it. A store that does not answer changes nothing: the driver goes on, and
stops for nobody whom it does not hear.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine import cancelling
from penstock.engine.living import living
from penstock.engine.sender import StoreUnusable
from penstock.engine.tracking import hear

if TYPE_CHECKING:
    from penstock.engine.calls import FlowRun
    from penstock.engine.journal import Journal
    from penstock.engine.sender import Store
    from penstock.engine.tracking import Tracker

logger = logging.getLogger("penstock.tracking")

BEAT = 5.0  # seconds between two renewals of a lease
LISTEN = 0.8  # seconds between two questions
LONGEST = 5.0  # … to a store that does not answer


class Heart:
    """Beats for the runs of this process.

    Parameters
    ----------
    tracker : Tracker
        Whose store it asks, and whose writer holds the leases.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._store: Store | None = None
        self._beat = 0.0
        self._done: set[str] = set()  # requests
        self._stop = threading.Event()

    def start(self) -> None:
        """Beat in the background."""
        threading.Thread(target=self._work, name="penstock-heartbeat", daemon=True).start()

    def stop(self) -> None:
        """Beat no more."""
        self._stop.set()
        living.wake.set()

    def _work(self) -> None:
        pause = LISTEN
        try:
            while not self._stop.is_set():
                living.wake.wait()
                if self._stop.is_set():
                    return
                try:
                    if self._store is None:
                        self._store = self._tracker.open_store()
                    self.round(self._store)
                    pause = LISTEN
                except StoreUnusable:
                    return
                except Exception:  # the store is away; the sender says so
                    pause = min(2 * pause, LONGEST)
                self._stop.wait(pause)
        finally:
            if self._store is not None:
                self._store.close()

    def round(self, store: Store) -> None:
        """Ask once."""
        roots = {root: one for root, one in living.roots.items() if not one.lost}
        writer = self._tracker.writer
        due = time.monotonic() - self._beat >= BEAT
        loose = set(self._tracker.writers) if living.loose and due else set()
        if not writer:
            return
        for holder in {owned.holder or writer for owned in roots.values()} | loose:
            mine = {root: owned for root, owned in roots.items() if (owned.holder or writer) == holder}
            for owned in mine.values():
                owned.holder = holder
            epochs = {root: owned.journal.epoch for root, owned in mine.items()}
            answer = store.ask({"what": "beat" if due else "listen", "holder": holder, "roots": epochs})
            self._hear(store, answer)
        if due:
            self._beat = time.monotonic()

    def _hear(self, store: Store, answer: Mapping[str, Any]) -> None:
        for root in answer["lost"]:
            self._lose(root)
        for root in answer["presumed"]:
            self._own_again(store, root)
        for request in answer["requests"]:
            if request["id"] not in self._done:
                self._obey(request)

    def _lose(self, root: str) -> None:
        message = (
            f"flow run {root} was taken by another driver while this one was not heard of; it stops here."
        )
        error = errors.RunOwnedElsewhere(message)
        error.of_run(root)
        cancelling.lose(root, error)

    def _own_again(self, store: Store, root: str) -> None:
        owned = living.roots.get(root)
        if owned is None or owned.flow_run.type.is_final:
            return  # its last word is on its way
        writer = self._tracker.writer
        question = {"what": "take", "root": root, "holder": writer, "epoch": owned.journal.epoch}
        try:
            epoch = store.ask(question)
        except errors.RunOwnedElsewhere:
            return  # the next answer says so
        logger.warning("Flow run %s was presumed dead; its driver goes on with it.", owned.flow_run.name)
        owned.own_again(epoch, writer)

    def _obey(self, request: Mapping[str, Any]) -> None:
        root, run, kind = request["root"], request["run"], request["kind"]
        owned = living.roots.get(root)
        if owned is None:
            return
        if kind != "cancel":
            outcome = f"a run that is being carried cannot {kind}"
        elif cancelling.cancel_run(run, request["by"] or "somebody"):
            outcome = "asked to stop"
        elif owned.flow_run.position.type is None or owned.flow_run.type.name == "PENDING":
            return  # it has not begun; it will be asked when it has
        else:
            outcome = "it does not run in the driver (any more)"
        self._done.add(request["id"])
        body = {"id": request["id"], "what": kind, "outcome": outcome}
        owned.journal.write("request", run, root, body)


def begin(flow_run: FlowRun, journal: Journal) -> None:
    """A root flow run begins: from now on this process says that it lives."""
    living.own(flow_run, journal)


def begin_loose() -> None:
    """A task is about to run outside of flows: from now on this process says that it lives, until its end."""
    living.begin_loose()


def _start(tracker: Tracker) -> Callable[[], None]:
    heart = Heart(tracker)
    heart.start()
    return heart.stop


hear(_start)
