"""Logs of runs: `get_run_logger`, and the road from the standard library's loggers to events."""

from __future__ import annotations

import logging
import time
from collections.abc import MutableMapping
from typing import Any

from penstock import errors
from penstock.engine import context
from penstock.engine.run_context import FlowRunContext, TaskRunContext
from penstock.runners.worker.prints import route_prints, set_outside
from penstock.runners.worker.running import current

FLOW_LOGGER = "penstock.flow_runs"
TASK_LOGGER = "penstock.task_runs"


class RunHandler(logging.Handler):
    """Sends a line to the log of the run that wrote it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the line in the running attempt, or publish it for the flow run."""
        try:
            write_line(record.levelname, record.getMessage())
        except Exception:  # a log line must never fail a run
            self.handleError(record)


def write_line(level: str, text: str) -> None:
    """Add a line to the log of the innermost run around the calling code."""
    running = current()
    scope = context.current()
    if running is not None and (scope is None or scope.running is running or scope.task_run is not None):
        running.log(level, text)
    elif scope is not None and scope.flow_run is not None:
        scope.session.journal.flow_lines(scope.flow_run, [[time.time(), level, text]])


def route_flow_prints() -> None:
    """Send `print` in the driver's own code to the log of the flow run that asked for it."""
    route_prints()
    set_outside(_flow_print)


def _flow_print(text: str) -> bool:
    scope = context.current()
    if scope is None or not scope.log_prints or scope.flow_run is None:
        return False
    write_line("INFO", text)
    return True


class RunLogger(logging.LoggerAdapter[logging.Logger]):
    """A standard logger that knows its run."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        """Pass the run's ids on as `extra`."""
        kwargs["extra"] = {**(self.extra or {}), **kwargs.get("extra", {})}
        return msg, kwargs


def get_run_logger(context: TaskRunContext | FlowRunContext | None = None, **extra: Any) -> RunLogger:
    """Return the logger of the run that calls.

    Its lines go into the record of the run, on every runner, and on to the handlers of the
    standard library's ``logging`` (loggers ``penstock.flow_runs`` and ``penstock.task_runs``).

    Parameters
    ----------
    context : TaskRunContext or FlowRunContext, optional
        Whose ids every record carries; that of the calling code by default.
    **extra : object
        Added to every record, as for `logging.LoggerAdapter`.

    Raises
    ------
    MissingContextError
        Outside of a flow or task run.
    """
    name, ids = _here() if context is None else _of(context)
    logger = logging.getLogger(name)
    if not any(isinstance(handler, RunHandler) for handler in logger.handlers):
        logger.addHandler(RunHandler())
        logger.setLevel(logging.DEBUG if logger.level == logging.NOTSET else logger.level)
    return RunLogger(logger, {**ids, **extra})


def _here() -> tuple[str, dict[str, Any]]:
    running = current()
    if running is not None:
        order = running.order
        return TASK_LOGGER, {"task_run_id": order["run"], "task_run_name": order["name"]}
    scope = context.current()
    if scope is None or scope.flow_run is None:
        message = "There is no active flow or task run; call get_run_logger() inside one."
        raise errors.MissingContextError(message)
    return FLOW_LOGGER, {"flow_run_id": scope.flow_run.id, "flow_run_name": scope.flow_run.name}


def _of(given: TaskRunContext | FlowRunContext) -> tuple[str, dict[str, Any]]:
    if isinstance(given, TaskRunContext):
        return TASK_LOGGER, {"task_run_id": given.task_run.id, "task_run_name": given.task_run.name}
    return FLOW_LOGGER, {"flow_run_id": given.flow_run.id, "flow_run_name": given.flow_run.name}
