"""Futures in structures: resolved to values or states, searched for, or left alone."""

from dataclasses import dataclass
from typing import Any

import pytest

from penstock import (
    PenstockFuture,
    State,
    allow_failure,
    freeze,
    opaque,
    quote,
    resolve_futures_to_results,
    resolve_futures_to_states,
    task,
)
from tests.conftest import InFlow


@task
def add(x: Any, y: int = 1) -> Any:
    return x + y


@task
def fail() -> int:
    raise ValueError("no data")


@task
def kind(x: Any) -> str:
    inside = x[0] if isinstance(x, (list, tuple)) else x
    return f"{type(x).__name__} of {type(inside).__name__}"


@dataclass
class Box:
    inside: Any


def test_structures_are_resolved(in_flow: InFlow) -> None:
    def body() -> Any:
        expr = {"a": [add.submit(1)], "b": (add.submit(2), 5), "c": Box(add.submit(3)), "d": quote("x")}
        values = resolve_futures_to_results(expr)
        states = resolve_futures_to_states(expr)
        assert isinstance(states["a"][0], State)
        assert states["c"].inside.is_completed()
        with pytest.raises(ValueError, match="no data"):
            resolve_futures_to_results([fail.submit()])
        (error,) = resolve_futures_to_results([allow_failure(fail.submit())])
        assert isinstance(error, ValueError)
        assert resolve_futures_to_states([fail.submit()])[0].is_failed()
        return values["a"], values["b"], values["c"].inside, values["d"]

    assert in_flow(body) == ([2], (3, 5), 4, "x")


def test_opaque_and_freeze(in_flow: InFlow) -> None:
    def body() -> Any:
        future = add.submit(1)
        assert isinstance(future, PenstockFuture)
        return [
            kind.submit(opaque(future)),
            kind.submit(opaque([1, 2])),
            kind.submit(freeze([1, 2])),
            kind.submit([future]),
            *kind.map(opaque([[1], [2]])),
        ]

    assert in_flow(body) == ["int of int", "list of int", "list of int", "list of int"] + ["list of int"] * 2
    assert freeze({"a": 1}).unfreeze() == {"a": 1}
    with pytest.raises(TypeError, match="JSON"):
        freeze(object())
