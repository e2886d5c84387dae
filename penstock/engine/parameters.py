"""Parameters of flows: bound to the signature, validated and coerced from annotations."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

from penstock import errors
from penstock.engine.futures import PenstockFuture, run_of
from penstock.engine.states import State

_OF_ALL: dict[Any, Callable[[Any], Any]] = {  # such a parameter annotates each of its values
    inspect.Parameter.VAR_POSITIONAL: lambda hint: types.GenericAlias(tuple, (hint, ...)),
    inspect.Parameter.VAR_KEYWORD: lambda hint: types.GenericAlias(dict, (str, hint)),
}


def bind(
    signature: inspect.Signature, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by the names of the parameters, defaults included.

    Raises
    ------
    ParameterBindError
        If they do not fit the signature.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        message = f"flow {name!r}: {error}"
        raise errors.ParameterBindError(message) from None
    bound.apply_defaults()
    return dict(bound.arguments)


def unbind(signature: inspect.Signature, arguments: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return ``(args, kwargs)`` for a call with these arguments."""
    bound = inspect.BoundArguments(signature, dict(arguments))
    return bound.args, bound.kwargs


def validate(
    function: Callable[..., Any], signature: inspect.Signature, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Check and coerce arguments by the annotations of the function, values of any size.

    Parameters
    ----------
    function : callable
        The user's.
    signature : Signature
        Of the function.
    arguments : dict
        As `bind` returns them; a future is left alone.

    Returns
    -------
    dict
        With coerced values; an object that an annotation only names is the same object.

    Raises
    ------
    ParameterTypeError
        Naming each parameter that does not fit and why.
    """
    hints = type_hints(function)
    wanted = {
        name: _OF_ALL.get(parameter.kind, lambda hint: hint)(hints[name])
        for name, parameter in signature.parameters.items()
        if name in hints and name in arguments and run_of(arguments[name]) is None
    }
    if not wanted:
        return arguments
    import pydantic

    config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    problems: list[str] = []
    checked = dict(arguments)
    for name, hint in wanted.items():
        try:
            checked[name] = _adapter(pydantic, hint, config).validate_python(arguments[name])
        except pydantic.ValidationError as error:
            problems.extend(_sentence(name, detail) for detail in error.errors(include_url=False))
        except pydantic.errors.PydanticUserError:
            continue  # an annotation that pydantic does not understand checks nothing
    if problems:
        raise errors.ParameterTypeError("invalid parameters: " + "; ".join(problems))
    return checked


def _adapter(pydantic: Any, hint: Any, config: Any) -> Any:
    try:
        return pydantic.TypeAdapter(hint, config=config)
    except pydantic.errors.PydanticUserError:  # models and dataclasses bring their own configuration
        return pydantic.TypeAdapter(hint)


def _sentence(name: str, detail: Any) -> str:
    path = "".join(f"[{part!r}]" for part in detail["loc"])
    got = repr(detail.get("input"))
    shown = got if len(got) <= 60 else type(detail.get("input")).__name__
    return f"{name}{path}: {detail['msg']}, got {shown}"


def type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a function, those that can be evaluated."""
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # one name that only a type checker knows must not disable the rest
        hints = {}
        for name, hint in getattr(function, "__annotations__", {}).items():
            if not isinstance(hint, str):
                hints[name] = hint
                continue
            try:
                hints[name] = eval(hint, getattr(function, "__globals__", {}))  # noqa: S307 - as the typing module does
            except Exception:
                continue
        return hints


def takes_reference(hint: Any) -> bool:
    """Whether a parameter with this annotation gets a future itself instead of its value."""
    if hint is None or hint is Any or hint is inspect.Parameter.empty:
        return True
    origin = typing.get_origin(hint) or hint
    return isinstance(origin, type) and issubclass(origin, (PenstockFuture, State))
