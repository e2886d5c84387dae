"""What a worker process of the process pool executes.

The main thread runs one task after the other. A second thread reads what the driver sends, so
that a request to stop arrives while a task runs, and ends the process when the driver is gone.

Importing this file is most of what the start of a worker costs: it loads nothing that a task
without nested submissions does not need.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import pickle
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from penstock.runners import shared_memory
from penstock.runners.process_channel import Channel, FunctionsReceived, Message
from penstock.runners.worker.execution import execute
from penstock.runners.worker.failure import Failed
from penstock.runners.worker.interruption import TimedOut, cancel
from penstock.runners.worker.record import refuse, set_worker
from penstock.runners.worker.starts import starts

if TYPE_CHECKING:
    from penstock.runners.process_nested import WorkerProcessRunner

_PR_SET_PDEATHSIG = 1

_worker: Worker | None = None


def main(descriptor: int, driver: int) -> None:
    """Run a worker until the driver sends "stop".

    Parameters
    ----------
    descriptor : int
        The inherited socket.
    driver : int
        Process that started this one.
    """
    global _worker
    _die_with(driver)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which stops us
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.set_inheritable(descriptor, False)
    channel = Channel(socket.socket(fileno=descriptor), blocking=True)
    try:
        messages = channel.receive()
        while not messages:
            messages = channel.receive()
    except EOFError:
        os._exit(1)
    _worker = Worker(channel, messages[0][1])
    _worker.serve(messages[1:])


def current_worker_runner() -> WorkerProcessRunner | None:
    """Return the runner for what a task submits, or None outside a worker process."""
    return None if _worker is None else _worker.runner()


def _die_with(driver: int) -> None:
    """Have the kernel end this process when the driver dies; on macOS the closed socket does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != driver:
        os._exit(1)


class Worker:
    """The worker's side of the connection.

    Parameters
    ----------
    channel : Channel
        The connection to the driver.
    settings : dict
        What the driver says first: see `Child.start`.
    """

    def __init__(self, channel: Channel, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.send = channel.send
        self.memory = shared_memory.SharedMemory(settings["directories"], str(settings["number"]))
        self._channel = channel
        self._functions = FunctionsReceived()
        self._jobs: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._queued: dict[Any, bool] = {}  # keys of the jobs that can still be handed back
        self._blocked = 0
        self._interrupted = False
        self._lock = threading.Lock()
        self._answers: dict[int, queue.SimpleQueue[Any]] = {}
        self._questions = itertools.count()
        self._runner: WorkerProcessRunner | None = None
        set_worker(settings["name"])
        sys.argv[:] = settings["argv"]

    def serve(self, messages: list[Message]) -> None:
        """Run tasks until there are no more to come."""
        try:
            if self.settings["initializer"] is not None:
                self.send(("alive",))  # from here on it takes as long as it takes
                function, args = pickle.loads(self.settings["initializer"])
                function(*args)
        except BaseException:
            self.send(("unready", traceback.format_exc()))
            raise SystemExit(1) from None
        receiver = threading.Thread(
            target=self._receive, args=(messages,), name="penstock-receiver", daemon=True
        )
        receiver.start()
        starts().open()
        self.send(("ready",))
        while (job := self._jobs.get()) is not None:
            with self._lock:
                if self._queued.pop(job[1], None) is None:
                    continue  # handed back
            self._perform(job)
            del job  # it may hold values

    # -- the receiving thread -------------------------------------------------------------
    def _receive(self, messages: list[Message]) -> None:
        try:
            while True:
                for message in messages:
                    self._handle(message)
                messages = self._channel.receive()
        except EOFError:  # the driver is gone, and with it everybody who could want a result
            os._exit(1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _handle(self, message: Message) -> None:
        kind = message[0]
        if kind == "run":
            self._accept(message)
        elif kind == "cancel":
            if cancel(message[1]):
                self._interrupted = True
        elif kind == "return":
            self.send(("returned", self._hand_back(message[1])))
        elif kind == "reports":
            self.runner().arrived(message[1])
        elif kind == "answer":
            box = self._answers.get(message[1])
            if box is not None:
                box.put(message[2])
        elif kind == "stop":
            self._jobs.put(None)

    def _accept(self, message: Message) -> None:
        _, key, order, number, data, *rest = message
        function = self._functions.unpack(number, data)
        with self._lock:
            accepted = not self._blocked
            if accepted:
                self._queued[key] = True
        if accepted:
            self._jobs.put(("run", key, order, function, *rest))
        else:
            self.send(("returned", [key]))

    def _hand_back(self, count: int) -> list[Any]:
        with self._lock:
            return [self._queued.popitem()[0] for _ in range(min(count, len(self._queued)))]

    # -- one task -------------------------------------------------------------------------
    def _perform(self, job: Message) -> None:
        _, key, order, function, arguments, inputs, announce = job
        clock = time.perf_counter()
        start = starts().begin(key)
        values: list[Any] = []
        try:
            values = [_input(packed) for packed in inputs]
        except shared_memory.Vanished as error:
            self.send(("missing", key, str(error)))
            start.end()
            return
        except BaseException as error:  # it cannot be unpickled here: the task's failure, not ours
            function, arguments = _raiser(error), _no_arguments
        on_start = (lambda: self.send(("started", key))) if announce else None
        value, record = execute(
            order, function, arguments, values, key, on_start, on_item=functools.partial(self._hand_on, key)
        )
        del values
        packed, nbytes = None, 0
        if isinstance(value, Failed):
            self._interrupted |= isinstance(value.error, TimedOut)
        else:
            try:
                packed, nbytes = self.memory.export(value)
            except BaseException as error:
                value, record = refuse(record, value, error)
                if not isinstance(value, Failed):  # of a chunk the rest can travel
                    packed, nbytes = self.memory.export(value)
        del value
        with contextlib.suppress(Exception):  # what was printed must not wait for the next task
            sys.stdout.flush()
        with self._lock:
            # An exception from outside may have struck in an import, or between a lock and its
            # release: after that the process takes nothing new, and the driver replaces it.
            self._blocked = int(self._interrupted)
        if self._interrupted:
            self.send(("returned", self._hand_back(len(self._queued))))
        seconds = time.perf_counter() - clock
        self.send(("ended", key, record, packed, nbytes, seconds, self._interrupted))
        start.end()

    def _hand_on(self, key: Any, number: int, item: Any) -> None:
        """Send what a generator has yielded; a large item as the name of its file."""
        packed, nbytes = self.memory.export(item)
        self.send(("item", key, number, packed, nbytes))

    # -- for the nested runner ------------------------------------------------------------
    def runner(self) -> WorkerProcessRunner:
        """Return the runner for nested submissions, made when the first task needs it."""
        if self._runner is None:
            from penstock.runners.process_nested import WorkerProcessRunner

            with self._lock:
                if self._runner is None:
                    self._runner = WorkerProcessRunner(self)
        return self._runner

    def ask(self, kind: str, *details: Any) -> Any:
        """Send a question to the driver and wait for the answer."""
        number = next(self._questions)
        box = self._answers[number] = queue.SimpleQueue()
        try:
            self.send((kind, number, *details))
            return box.get()
        finally:
            self._answers.pop(number, None)

    def block(self) -> None:
        """Tell the driver that the task waits, and hand back what was sent ahead."""
        with self._lock:
            self._blocked += 1
            first = self._blocked == 1
        if first:
            self.send(("blocked", True, self._hand_back(len(self._queued))))

    def unblock(self) -> None:
        """Tell the driver that the task goes on."""
        with self._lock:
            self._blocked = max(0, self._blocked - 1)
            last = self._blocked == 0
        if last:
            self.send(("blocked", False, []))


def _input(packed: shared_memory.Packed) -> Any:
    if packed[0] == "failed":
        return Failed(packed[1])
    return shared_memory.load(packed)


def _raiser(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def _no_arguments(values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {}
