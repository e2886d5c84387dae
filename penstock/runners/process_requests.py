"""What tasks in worker processes ask the driver for: to run tasks of their own, and to keep values."""

from __future__ import annotations

from typing import Any

from penstock.runners.base import Key
from penstock.runners.process_child import Child
from penstock.runners.process_schedule import Schedule
from penstock.runners.process_work import Handle, Value, Work


def serve(schedule: Schedule, child: Child, kind: str, details: list[Any]) -> None:
    """Do what the task of a worker asks for; see `process_nested` for the other side.

    Parameters
    ----------
    schedule : Schedule
        Of the pool.
    child : Child
        Who asks.
    kind : str
        "send", "put", "release", "fetch", "cancel" or "take".
    details : list
        The rest of the message.
    """
    if kind == "send":
        for item in details[0]:
            _submit(schedule, child, *item)
    elif kind == "put":
        number, packed, nbytes = details
        child.owned[number] = Handle(Value(packed, nbytes, schedule.files))
    elif kind == "release":
        for handle in [child.owned.pop(number, None) for number in details[0]]:
            if handle is not None:
                schedule.dropped.append(handle.value)
                handle.release()
    elif kind == "fetch":
        number, wanted = details
        handles = [child.owned.get(one) for one in wanted]
        values = [None if handle is None else handle.value for handle in handles]
        schedule.answer(child, number, [None if value is None else value.packed for value in values])
    elif kind == "cancel":
        number, keys, force = details
        schedule.answer(child, number, schedule.cancel(keys, force=force))
    elif kind == "take":
        number, key = details
        schedule.answer(child, number, schedule.take_back(key))


def _submit(
    schedule: Schedule,
    child: Child,
    number: int,
    key: Key,
    order: bytes,
    function: int,
    data: bytes | None,
    arguments: bytes,
    upstream: list[int],
    priority: int,
    announce: bool,
) -> None:
    handle = child.owned[number] = Handle()
    work = Work(
        key,
        order,
        child.nested_functions.unpack(function, data),
        arguments,
        handle=handle,
        priority=priority,
        announce=announce,
        parent=child.current,
        origin=child,
    )
    schedule.admit(work, [child.owned.get(one) for one in upstream])
