"""The parts of the process pool that decide: the order of work, functions that are sent once."""

import random

from penstock.runners import process_channel
from penstock.runners.process_channel import FunctionsReceived, FunctionsSent
from penstock.runners.process_work import Backlog, Handle, Work


def work(number: int, priority: int = 0, parent: Work | None = None) -> Work:
    made = Work(("w-tag", number), b"", b"", b"", handle=Handle(), priority=priority, parent=parent)
    if parent is not None:
        made.level = parent.level + 1
        made.rank = (-made.level, *made.rank[1:])
    return made


def order(backlog: Backlog) -> list[int]:
    found = []
    while (item := backlog.pop()) is not None:
        found.append(item.key[1])
    return found


def test_the_backlog_goes_by_level_priority_and_time() -> None:
    backlog = Backlog()
    parent = work(0)
    for item in (work(1), work(2, 5), work(3), work(4, 5), work(5, -1, parent), work(6, 0, parent)):
        backlog.push(item)
    assert order(backlog) == [6, 5, 2, 4, 1, 3]


def test_work_that_comes_back_gets_its_old_place() -> None:
    backlog = Backlog()
    items = [work(number) for number in range(4)]
    for item in items:
        backlog.push(item)
    first = backlog.pop()
    assert first is not None
    backlog.push(first)
    assert order(backlog) == [0, 1, 2, 3]


def test_withdrawn_work_is_skipped_and_does_not_pile_up() -> None:
    backlog = Backlog()
    items = [work(number) for number in range(5000)]
    for item in items:
        backlog.push(item)
    for item in items[:-1]:
        backlog.withdraw(item)
    assert len(backlog) == 1
    assert len(backlog._heap) < 3000
    assert order(backlog) == [4999]
    assert len(backlog) == 0
    assert backlog.pop() is None


def test_what_the_sender_leaves_out_the_receiver_has() -> None:
    chance = random.Random(5)
    sent, received = FunctionsSent(), FunctionsReceived()
    functions = [bytes([number % 256, number // 256]) for number in range(process_channel._FUNCTIONS * 2)]
    left_out = 0
    for step in range(20_000):
        function = functions[int(chance.betavariate(1, 4) * len(functions))]
        number, data = sent.pack(function)
        left_out += data is None
        if step % 997 == 0:  # interrupted: the message may not have left
            sent.forget()
            continue
        assert received.unpack(number, data) == function
    assert left_out > 10_000
    assert len(received._functions) == process_channel._FUNCTIONS
