"""Hooks: what a user wants called when a run starts or ends, as options say it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from penstock.engine.states import StateType

Hook = Callable[..., Any]
H = TypeVar("H", bound=Hook)

OF_TASKS = ("on_completion", "on_failure", "on_running", "on_skipped")
OF_FLOWS = (*OF_TASKS, "on_cancellation", "on_crashed")


@dataclass(frozen=True, slots=True)
class Hooks:
    """The hooks of one task or flow, each kind in the order in which they are called.

    Attributes
    ----------
    on_completion, on_failure, on_running, on_skipped, on_cancellation, on_crashed : tuple of callable
        Each takes ``(task, task_run, state)``, of a flow ``(flow, flow_run, state)``; may be a
        coroutine function.
    on_commit, on_rollback : tuple of callable
        Of a task: each takes ``(transaction)``; may be a coroutine function, too.
    """

    on_completion: tuple[Hook, ...] = ()
    on_failure: tuple[Hook, ...] = ()
    on_running: tuple[Hook, ...] = ()
    on_skipped: tuple[Hook, ...] = ()
    on_cancellation: tuple[Hook, ...] = ()
    on_crashed: tuple[Hook, ...] = ()
    on_commit: tuple[Hook, ...] = ()
    on_rollback: tuple[Hook, ...] = ()

    def __bool__(self) -> bool:
        """Whether there is any."""
        return self is not NO_HOOKS and self != NO_HOOKS  # asked at the end of every run

    @property
    def of_transactions(self) -> bool:
        """Whether any is about transactions."""
        return bool(self.on_commit or self.on_rollback)

    def of_task(self, type_: StateType) -> tuple[Hook, ...]:
        """Return what is called when a task run reaches a state; a crash is a failure, too."""
        if type_ in {StateType.FAILED, StateType.CRASHED}:
            return self.on_failure
        return self._by_type(type_)

    def of_flow(self, type_: StateType) -> tuple[Hook, ...]:
        """Return what is called when a flow run reaches a state."""
        if type_ is StateType.FAILED:
            return self.on_failure
        if type_ is StateType.CRASHED:
            return self.on_crashed
        if type_ is StateType.CANCELLED:
            return self.on_cancellation
        return self._by_type(type_)

    def _by_type(self, type_: StateType) -> tuple[Hook, ...]:
        found = {
            StateType.COMPLETED: self.on_completion,
            StateType.RUNNING: self.on_running,
            StateType.SKIPPED: self.on_skipped,
        }
        return found.get(type_, ())

    def and_also(self, kind: str, hook: Hook, owner: str) -> Hooks:
        """Return these hooks and one more, as the decorators ``@t.on_completion`` say it."""
        return replace(self, **{kind: (*getattr(self, kind), *_checked(kind, [hook], owner))})

    def changed(self, given: Mapping[str, Any], owner: str) -> Hooks:
        """Return these hooks with the kinds that were given in the place of those that were there."""
        new = {kind: _checked(kind, hooks, owner) for kind, hooks in given.items()}
        return replace(self, **new) if new else self


NO_HOOKS = Hooks()


def read_hooks(owner: str, **given: Iterable[Hook] | None) -> Hooks:
    """Check what a user writes about hooks.

    Parameters
    ----------
    owner : {"task", "flow"}
        For the message.
    **given : list of callable or None
        By the name of the option.

    Raises
    ------
    TypeError
        If an option is no list, or holds something that cannot be called.
    """
    if not any(given.values()) and all(hooks is None for hooks in given.values()):
        return NO_HOOKS
    return NO_HOOKS.changed(given, owner)


def _checked(kind: str, hooks: Any, owner: str) -> tuple[Hook, ...]:
    if hooks is None:
        return ()
    example = f"@{owner}({kind}=[hook1, hook2])\ndef my_{owner}():\n\tpass"
    try:
        found = tuple(hooks)
    except TypeError:
        message = (
            f"Expected iterable for '{kind}'; got {type(hooks).__name__} instead. Please provide a "
            f"list of hooks to '{kind}':\n\n{example}"
        )
        raise TypeError(message) from None
    for hook in found:
        if not callable(hook):
            message = (
                f"Expected callables in '{kind}'; got {type(hook).__name__} instead. Please provide a "
                f"list of hooks to '{kind}':\n\n{example}"
            )
            raise TypeError(message)
    return found


def name_of(hook: Hook) -> str:
    """Return how a log line calls a hook; partials and callable objects have no name of their own."""
    inner = getattr(hook, "func", hook)
    return getattr(inner, "__qualname__", None) or type(inner).__name__
