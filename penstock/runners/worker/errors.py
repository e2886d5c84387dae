"""Turn an exception into primitives that always unpickle, without our own frames."""

from __future__ import annotations

import contextlib
import inspect
import os
import pickle
import traceback
import types
from typing import Any

from .pickling import dumps
from .running import Running

ERROR_TEXT = 20_000  # characters of a traceback that travel
_FOLDER = os.path.join(os.path.dirname(__file__), "")
_hidden: set[str] = set()


def hide(file: str) -> None:
    """Leave the frames of a file out of the tracebacks of users, as those of this folder are."""
    _hidden.add(file)


def _is_ours(file: str) -> bool:
    return file.startswith(_FOLDER) or file in _hidden


def spelled(kind: str, message: str) -> dict[str, Any]:
    """Describe an error of `penstock.errors`, which need not exist where this runs."""
    text = message.encode("utf-8", "replace")
    spelled = b"cpenstock.errors\n" + kind.encode() + b"\nX" + len(text).to_bytes(4, "little") + text
    return {
        "type": kind,
        "module": "penstock.errors",
        "message": message,
        "text": f"penstock.errors.{kind}: {message}\n",
        "frames": [],
        "pickle": b"\x80\x02" + spelled + b"\x85R.",
    }


def describe_error(error: BaseException) -> dict[str, Any]:
    """Turn an exception into primitives that always unpickle.

    Returns
    -------
    dict
        ``type`` and ``module`` of the class, ``message``, ``text`` (the traceback as text),
        ``frames`` (list of ``(file, line, function)``, the user's only) and ``pickle`` (the
        exception itself, None if it cannot be pickled).
    """
    frames = [
        (frame.filename, frame.lineno or 0, frame.name)
        for frame in traceback.extract_tb(error.__traceback__)
        if not _is_ours(frame.filename)
    ]
    _strip(error)
    ours = getattr(error, "_penstock_error", None)
    if isinstance(ours, str):
        return spelled(ours, str(error))
    if isinstance(error, ValueError) and "read-only" in str(error):
        error.add_note(
            "penstock hands arrays over as read-only views, since others may see them too; "
            "use @task(inputs='copy') for a copy of your own, or inputs='shared' to share it."
        )
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # an odd __str__ must not hide the failure
        text = f"{type(error).__name__}: (its message cannot be shown)"
    try:
        message = str(error)
    except Exception:
        message = "(its message cannot be shown)"
    return {
        "type": type(error).__qualname__,
        "module": type(error).__module__,
        "message": message[:ERROR_TEXT],
        "text": text[-ERROR_TEXT:],
        "frames": frames,
        "pickle": _pickle_error(error),
    }


INPUTS_NOTED = 12  # arguments of a call that a note names


def note_inputs(error: BaseException, running: Running) -> None:
    """Add to an error what the call got: types, shapes and dtypes, and of values only plain numbers."""
    called, running.called = running.called, None
    if called is None or getattr(error, "_penstock_error", None) is not None:
        return
    function, args, kwargs = called
    try:
        bound = inspect.signature(function).bind(*args, **kwargs).arguments
        named = list(bound.items())
    except Exception:  # a function of C tells no names
        named = [*((f"#{place}", value) for place, value in enumerate(args)), *kwargs.items()]
    if not named:
        return
    texts = [f"{name}: {_outline(value)}" for name, value in named[:INPUTS_NOTED]]
    if len(named) > INPUTS_NOTED:
        texts.append(f"{len(named) - INPUTS_NOTED} more")
    note = f"inputs of {running.order.get('name') or 'the task'!r}: {', '.join(texts)}"
    if note not in getattr(error, "__notes__", ()):
        with contextlib.suppress(Exception):  # an odd class must not hide the failure
            error.add_note(note)


def _outline(value: Any, depth: int = 0) -> str:
    """Tell what a value is without its content, which may be secret or large."""
    kind = type(value).__name__
    if value is None or isinstance(value, (bool, int, float, complex)):
        text = repr(value)
        return text if len(text) <= 24 else kind
    try:
        shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
        if isinstance(shape, tuple):
            return f"{kind}{shape}" + (f" {dtype}" if dtype is not None else "")
        if isinstance(value, (str, bytes, bytearray)):
            return f"{kind} of {len(value)} {'characters' if isinstance(value, str) else 'bytes'}"
        if isinstance(value, (list, tuple, set, frozenset, dict)):
            inner = ""
            if depth == 0 and isinstance(value, (list, tuple)) and value:
                inner = f", the first {_outline(value[0], 1)}"
            return f"{kind} of {len(value)}{inner}"
    except Exception:  # an odd class must not hide the failure
        return kind
    return kind


def _strip(error: BaseException | None) -> None:
    """Drop our frames from the traceback of an error and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        kept, step = [], error.__traceback__
        while step is not None:
            if not _is_ours(step.tb_frame.f_code.co_filename):
                kept.append(step)
            step = step.tb_next
        head: types.TracebackType | None = None
        for frame in reversed(kept):
            head = types.TracebackType(head, frame.tb_frame, frame.tb_lasti, frame.tb_lineno or 0)
        error.__traceback__ = head
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _pickle_error(error: BaseException) -> bytes | None:
    """Pickle an exception so that it loads again, also where its __init__ is odd."""
    for form in (error, _Rebuilt(error)):
        try:
            data = dumps(form)
            loaded = pickle.loads(data)
        except Exception:
            continue
        if isinstance(loaded, BaseException):
            return data
    return None


class _Rebuilt:
    """Pickles an exception as class, args and attributes, without calling its __init__."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        state = {}
        for name, value in vars(self.error).items():
            try:
                dumps(value)
            except Exception:
                value = repr(value)
            state[name] = value
        args = []
        for value in self.error.args:
            try:
                dumps(value)
            except Exception:
                value = repr(value)
            args.append(value)
        return (_exception_of, (type(self.error), tuple(args), state))


def _exception_of(kind: Any, args: Any, state: Any) -> Any:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error
