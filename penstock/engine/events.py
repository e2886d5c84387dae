"""Events: everything that penstock remembers of a run, as small records in a fixed order.

The owner of a run (its driver) makes events; the spool keeps them; the store folds them into
the current state of each run and keeps them as its history. Workers make events too, for the
tasks that a task submits; these travel to the driver inside the record of the outer task.

Kinds and their bodies
----------------------
``flow_run``
    A flow run exists. ``name, flow, version, parent_flow_run, parent_task_run, tags,
    parameters, runner, host, pid, python, penstock``.
``task_run``
    A task run exists. ``flow_run, parent`` (the task run that submitted it, or None), ``task,
    name, tags, parameters, upstream`` (list of ``[parameter, run id]``), ``child_flow_run``
    (only for the row that stands for a nested flow). Outside of flows also ``host, pid`` of its driver.
``task``
    A task is used for the first time in a session; ``run`` is the root run. ``task, key`` (name of its
    code), ``version, description``.
``map_run``
    ``count`` task runs exist; the ids follow from the id of the map (`element_id`). ``flow_run,
    parent, task, name, tags, parameters, upstream, start, count``: elements ``start`` to
    ``start + count - 1``, named ``"<name>-<index>"``; ``upstream_maps`` is a list of
    ``[parameter, map id, offset]``: element i depends on element i + offset of that map;
    ``upstream_elements`` a list of ``[parameter, run ids]``: element start + j depends on the
    j-th of them, which may be None.
    ``names`` (optional) is a list with a name for each element.
``state``
    A run reached a state. ``of`` ("flow" or "task"), ``type, name, message, cause, worker,
    started, seconds, nbytes, peak, error``. `started` in a terminal state means that the run
    was RUNNING from then on; the history shows that too. ``error`` is ``{type, message, text}``.
    ``stored`` (optional) is where the result was stored. ``again`` (optional): no other end of the run, but
    what its transaction has made of the one that was told before.
``states``
    Elements of one map reached the same type and name of state; ``run`` is the map. Columns of
    equal length: ``index, attempt, time, started, seconds, nbytes, peak, worker`` (positions in
    ``workers``), and ``stored`` if any was; besides ``type, name, workers``, perhaps ``again``.
``log``
    Lines of a run: ``lines`` is a list of ``[time, level, text]``, ``dropped`` a count.
``runner``
    What a runner turned out to be: ``name, address, dashboard, workers, threads, memory,
    versions``. ``run`` is the root flow run.
``request``
    The driver has done what somebody asked it for, or has not: ``id, what, outcome``.

Order
-----
``(epoch, attempt, rank, rseq)`` orders the states of a run: `rank` is 0 for a state that is not
terminal, 1 for one presumed by a reaper, 2 for a terminal one by the owner; `rseq` counts the
events of one root run. No clock decides anything.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack

from penstock.runners.worker.element import element_id

__all__ = ["HOST", "Bus", "Event", "bus", "element_id", "new_id", "pack", "unpack"]

HOST = os.uname().nodename


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to a run.

    Attributes
    ----------
    kind : str
        See the module's docstring.
    run : str
        The run or map that the event is about, 32 hexadecimal digits.
    root : str
        The root flow run it belongs to; the run itself for tasks outside of flows.
    time : float
        Wall clock in seconds since 1970, to be shown, never to decide.
    body : dict
        Primitives only.
    epoch, attempt, rank, rseq : int
        Order of the run's states.
    """

    kind: str
    run: str
    root: str
    time: float
    body: dict[str, Any] = field(default_factory=dict)
    epoch: int = 1
    attempt: int = 0
    rank: int = 0
    rseq: int = 0


def pack(event: Event) -> bytes:
    """Turn an event into bytes for the spool and the wire."""
    row = (
        event.kind,
        event.run,
        event.root,
        event.time,
        event.body,
        event.epoch,
        event.attempt,
        event.rank,
        event.rseq,
    )
    packed: bytes = msgpack.packb(row, use_bin_type=True, default=str)
    return packed


def unpack(data: bytes) -> Event:
    """Read what `pack` wrote; fields that a newer writer appended are ignored."""
    row = msgpack.unpackb(data, raw=False, strict_map_key=False)
    return Event(*row[:9])


# -- identities -----------------------------------------------------------------------------

_last_stamp = 0
_stamp_lock = threading.Lock()


def new_id() -> str:
    """Make the id of a run: a UUIDv7 as 32 hexadecimal digits, so that ids sort by time.

    Layout after RFC 9562, section 5.7: 48 bits of milliseconds, then random bits.
    """
    global _last_stamp
    millis = time.time_ns() // 1_000_000
    with _stamp_lock:  # a clock that steps back must not reorder the ids of one process
        millis = _last_stamp = max(millis, _last_stamp)
    tail = int.from_bytes(os.urandom(10), "big")
    value = millis << 80 | 0x7 << 76 | (tail >> 68 & 0xFFF) << 64 | 0b10 << 62 | tail & (1 << 62) - 1
    return f"{value:032x}"


class Bus:
    """Hands events to whoever subscribed, in the order in which they are made.

    The engine knows no feature: tracking, progress displays and tests subscribe.
    """

    def __init__(self) -> None:
        self._subscribers: list[Callable[[Event], None]] = []
        self._lock = threading.Lock()

    def subscribe(self, receive: Callable[[Event], None]) -> Callable[[], None]:
        """Call `receive` with each event from now on; return a function that ends this."""
        with self._lock:
            self._subscribers = [*self._subscribers, receive]

        def unsubscribe() -> None:
            with self._lock:
                self._subscribers = [one for one in self._subscribers if one is not receive]

        return unsubscribe

    def publish(self, event: Event) -> None:
        """Give one event to every subscriber."""
        for receive in self._subscribers:
            receive(event)


bus = Bus()
"""The bus of this process."""
