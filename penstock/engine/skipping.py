"""SKIPPED: the predicate that a task is asked by, and how the reason of a skip goes on to dependants."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine.annotations import TOLERANCE_OF
from penstock.engine.refs import replace

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun

Ask = Callable[[tuple[Any, ...], dict[str, Any]], str | None]
"""Takes the arguments of a call; answers why it is to be skipped, or None."""


def check(on_skip: str) -> None:
    """Refuse what the option cannot be.

    Raises
    ------
    ConfigurationError
        Naming the choices.
    """
    if on_skip not in TOLERANCE_OF:
        message = f"'on_skip' must be 'skip', 'none' or 'run', got {on_skip!r}."
        raise errors.ConfigurationError(message)


def asker(signature: inspect.Signature, predicate: Callable[..., Any] | None) -> Ask | None:
    """Make what asks a predicate about a call.

    Parameters
    ----------
    signature : Signature
        Of the task.
    predicate : callable or None
        Takes some of the task's parameters by their names, or ``parameters``: the dict of all. A true
        answer skips the run; a string is the reason.

    Raises
    ------
    TypeError
        If it is not callable, or has a parameter that the task lacks.
    """
    if predicate is None:
        return None
    if not callable(predicate):
        message = f"Expected 'skip_if' to be callable, got {type(predicate).__name__} instead."
        raise TypeError(message)
    wanted, all_names = _names(signature, predicate)
    # Only what binding needs travels to workers: annotations may name things that exist only here.
    bare = inspect.Signature(
        [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    )
    label = getattr(predicate, "__name__", type(predicate).__name__)

    def ask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        bound = bare.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        chosen = given if all_names else {name: given[name] for name in wanted if name in given}
        if "parameters" in wanted and "parameters" not in given:
            chosen = {**chosen, "parameters": given}
        answer = predicate(**chosen)
        if isinstance(answer, str):
            return answer or None
        return f"skip_if: {label} is true of its parameters" if answer else None

    return ask


def _names(signature: inspect.Signature, predicate: Callable[..., Any]) -> tuple[set[str], bool]:
    """Return the parameters that a predicate names, and whether it takes any others."""
    own = inspect.signature(predicate).parameters.values()
    everything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in own)
    named = [one for one in own if one.kind not in {one.VAR_KEYWORD, one.VAR_POSITIONAL}]
    unknown = [
        one.name
        for one in named
        if one.name not in signature.parameters and one.name != "parameters" and one.default is one.empty
    ]
    if unknown:
        known = ", ".join(signature.parameters)
        message = f"'skip_if' asks for {', '.join(unknown)}; the task has the parameters ({known})."
        raise TypeError(message)
    return {one.name for one in named}, everything


def reason_here(ask: Ask | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Ask in the driver, where all arguments are at hand.

    A predicate that fails is asked again where the run takes place, and fails the run there.
    """
    if ask is None:
        return None
    try:
        return ask(replace(args, _as_it_is), replace(kwargs, _as_it_is))
    except Exception:
        return None


def _as_it_is(value: Any, tolerant: int) -> Any:
    del tolerant
    return value


def passed_on(upstream: TaskRun) -> errors.Skip:
    """Return the reason for which dependants of a skipped run are skipped: that of the first, however far away."""
    if isinstance(upstream.error, errors.Skip):
        return upstream.error
    skip = errors.Skip(f"Upstream task run '{upstream.id}' was skipped: {upstream.message}")
    skip.run_id = upstream.id
    return skip
