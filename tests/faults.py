"""What the fault tests of all back ends share: ways to die, and a ledger that counts executions."""

import mmap
import os
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from penstock import task
from tests.record import Record, Row

WAYS = ["SIGSEGV", "SIGKILL", "SIGABRT", "exit 0", "exit 1"]


def perish(way: str) -> None:
    """End this process."""
    kind, _, code = way.partition(" ")
    if kind == "exit":
        os._exit(int(code))
    if kind == "SIGABRT":
        os.abort()
    os.kill(os.getpid(), getattr(signal, kind))


def enter(ledger: Path, name: object) -> int:
    """Write one execution down; answer how many there were of this name."""
    line = f"{name}\n".encode()
    descriptor = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(descriptor, line)
    os.close(descriptor)
    return ledger.read_bytes().split(b"\n").count(str(name).encode())


def executions(ledger: Path) -> Counter[str]:
    """Count the lines of a ledger."""
    return Counter(ledger.read_text().split("\n")[:-1]) if ledger.exists() else Counter()


class Tally:
    """A ledger for tasks that run beside a killer in one process: a byte for each number.

    A line in a file is written with the interpreter's lock given away, and the killer may strike just
    then; a byte is counted within a microsecond of the call. The file is open before the task is called.
    """

    def __init__(self, path: Path, count: int = 0) -> None:
        self.path = path
        if count:
            path.write_bytes(bytes(count))
        with path.open("r+b") as file:
            self.cells = mmap.mmap(file.fileno(), 0)

    def __reduce__(self) -> Any:
        return Tally, (self.path,)

    def executions(self) -> list[int]:
        """How often each number was executed."""
        return list(self.cells[:])


@task
def tallies(tally: Tally, number: int, seconds: float) -> int:
    """Count an execution, and take a time."""
    tally.cells[number] += 1
    time.sleep(seconds)  # work: what the task does
    return number


@task
def dies(ledger: Path, way: str, times: int, name: str = "dies") -> str:
    """Die as often as asked, then live."""
    if enter(ledger, name) <= times:
        perish(way)
    return "alive"


@task
def works(ledger: Path, number: int, seconds: float = 0.0) -> int:
    """Take a time."""
    enter(ledger, number)
    time.sleep(seconds)  # work: what the task does
    return number


@task
def follows(value: Any) -> Any:
    """Hand a value on."""
    return value


def began(row: Row) -> list[str]:
    """Say of each loss whether user code had begun."""
    return [body["began"] for _, body in sorted(row.history, key=lambda entry: entry[0]) if "began" in body]


def check_count(record: Record, row: Row, executed: int) -> None:
    """The record counts every execution, and no more than those that may have been."""
    losses = began(row)
    if "unknown" in losses:
        assert executed <= row.attempt
    else:
        assert executed == row.attempt, (executed, row.names, row.history)


def check_random(record: Record, executed: Counter[str]) -> None:
    """After kills from outside: every execution is counted.

    A kill may strike between the note that an attempt begins and the first line of its code, so
    there may be one attempt more than executions for each task that ran then.
    """
    rows = record.tasks("works")
    assert {row.type for row in rows} == {"COMPLETED"}
    for number, row in enumerate(rows):
        losses = len([one for one in began(row) if one != "no"])
        assert row.attempt - losses <= executed[str(number)] <= row.attempt, (row.names, executed)
