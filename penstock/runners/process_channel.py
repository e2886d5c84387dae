"""Messages between the driver and one worker process: frames over a socket pair.

A message is a tuple of primitives that begins with its kind. The driver's end never blocks: a
worker that is stopped, or whose code holds the interpreter for minutes, must not hold up the
others. The worker's end blocks, since the driver always reads.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
import threading
from collections import OrderedDict, deque
from typing import Any

Message = tuple[Any, ...]

_HEADER = struct.Struct("<Q")
_READ = 1 << 16  # malloc serves more than 128 KiB by a system call each time
_FUNCTIONS = 256


class Channel:
    """One end of the connection.

    Parameters
    ----------
    connection : socket.socket
        One socket of a pair.
    blocking : bool
        Whether to wait for the other side.
    """

    def __init__(self, connection: socket.socket, *, blocking: bool) -> None:
        connection.setblocking(blocking)
        self._socket = connection
        self._received = bytearray()
        self._waiting: deque[memoryview] = deque()  # what the socket did not take
        self._frames: list[bytes] = []
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close this end; the other one reads the end of the stream."""
        self._socket.close()

    # -- out ------------------------------------------------------------------------------
    def send(self, message: Message) -> None:
        """Send a message and wait until the system has taken it (blocking end, any thread).

        The frame leaves in one call into C: an exception that is raised into this thread from
        outside comes before or after it, so it cannot cut a message in two.
        """
        frame = _frame(message)
        with self._sending:
            self._socket.sendall(frame)

    def post(self, message: Message) -> None:
        """Queue a message for the next `flush` (driver's end, under the lock of the pool)."""
        self._frames.append(_frame(message))

    def flush(self) -> bool:
        """Send what is queued, as far as the socket takes it.

        Returns
        -------
        bool
            Whether nothing is left over.
        """
        if self._frames:
            self._waiting.append(memoryview(b"".join(self._frames)))
            self._frames.clear()
        while self._waiting:
            part = self._waiting[0]
            try:
                sent = self._socket.send(part)
            except BlockingIOError:
                return False
            except OSError:  # the worker is gone; its end is noticed elsewhere
                self._waiting.clear()
                return True
            if sent == len(part):
                self._waiting.popleft()
            else:
                self._waiting[0] = part[sent:]
        return True

    # -- in -------------------------------------------------------------------------------
    def receive(self) -> list[Message]:
        """Read what has arrived; the blocking end waits for at least something.

        Raises
        ------
        EOFError
            If the other side is gone.
        """
        self._read()
        return self._messages()

    def drain(self) -> list[Message]:
        """Return what a worker that has died had still sent (driver's end)."""
        with contextlib.suppress(EOFError):
            while self._read():
                pass
        return self._messages()

    def _read(self) -> bool:
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return False
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        self._received += data
        return True

    def _messages(self) -> list[Message]:
        buffer = self._received
        messages: list[Message] = []
        position = 0
        with memoryview(buffer) as view:
            while len(buffer) - position >= _HEADER.size:
                (length,) = _HEADER.unpack_from(view, position)
                start = position + _HEADER.size
                if len(buffer) - start < length:
                    break
                position = start + length
                with view[start:position] as frame:
                    messages.append(pickle.loads(frame))
        del buffer[:position]
        return messages


def _frame(message: Message) -> bytes:
    data = pickle.dumps(message, 5)
    return _HEADER.pack(len(data)) + data


class FunctionsSent:
    """Names the functions that the other side has, so that each one's bytes are sent once.

    It keeps the most recent ones, and so does the `FunctionsReceived` that sees the same
    sequence at the other end: what this one knows is always there.
    """

    def __init__(self) -> None:
        self._numbers: OrderedDict[bytes, int] = OrderedDict()
        self._next = 0

    def pack(self, function: bytes) -> tuple[int, bytes | None]:
        """Return the number of a function, with its bytes if the other side does not have them."""
        number = self._numbers.get(function)
        if number is not None:
            self._numbers.move_to_end(function)
            return number, None
        number = self._numbers[function] = self._next
        self._next += 1
        if len(self._numbers) > _FUNCTIONS:
            self._numbers.popitem(last=False)
        return number, function

    def forget(self) -> None:
        """Send everything again, because it is not known what has arrived."""
        self._numbers.clear()


class FunctionsReceived:
    """The functions that the other side has sent."""

    def __init__(self) -> None:
        self._functions: OrderedDict[int, bytes] = OrderedDict()

    def unpack(self, number: int, data: bytes | None) -> bytes:
        """Return the bytes of a function, as packed by `FunctionsSent.pack`."""
        if data is None:
            self._functions.move_to_end(number)
            return self._functions[number]
        self._functions[number] = data
        if len(self._functions) > _FUNCTIONS:
            self._functions.popitem(last=False)
        return data
