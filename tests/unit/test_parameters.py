"""Parameters of flows: bound, validated, coerced."""

import dataclasses
import inspect
from typing import Any

import numpy as np
import pydantic
import pytest

from penstock import ParameterBindError, ParameterTypeError, PenstockFuture
from penstock.engine.parameters import bind, takes_reference, type_hints, unbind, validate


class Model(pydantic.BaseModel):
    number: int


@dataclasses.dataclass
class Window:
    start: int
    stop: int


def sample(a: int, /, b: str, *rest: float, c: list[int], d: Any = None, **others: bool) -> None: ...


def through(function: Any, *args: Any, **kwargs: Any) -> Any:
    signature = inspect.signature(function)
    return unbind(signature, validate(function, signature, bind(signature, "sample", args, kwargs)))


def test_there_and_back_again() -> None:
    args, kwargs = through(sample, "1", "x", "2.5", 3, c=("4",), e="yes")
    assert args == (1, "x", 2.5, 3.0)
    assert kwargs == {"c": [4], "d": None, "e": True}


def test_models_and_dataclasses() -> None:
    def models(model: Model, window: Window) -> None: ...

    args, kwargs = through(models, {"number": "3"}, window={"start": "1", "stop": 2})
    assert [*args, *kwargs.values()] == [Model(number=3), Window(1, 2)]


def test_arbitrary_types_are_checked_and_not_copied() -> None:
    def arrays(x: np.ndarray, y: "np.ndarray | None" = None) -> None: ...

    array = np.zeros(3)
    args, kwargs = through(arrays, array, y=array)
    assert all(value is array for value in [*args, *kwargs.values()])
    with pytest.raises(ParameterTypeError, match="x"):
        through(arrays, [1, 2, 3])


def test_the_sentence_names_the_place() -> None:
    with pytest.raises(ParameterTypeError) as caught:
        through(sample, 1, "x", c=[1, "two"])
    assert "c[1]: Input should be a valid integer" in str(caught.value)
    assert "got 'two'" in str(caught.value)


def test_long_values_are_not_shown() -> None:
    with pytest.raises(ParameterTypeError) as caught:
        through(sample, 1, "x", c="y" * 10_000)
    assert len(str(caught.value)) < 500


def test_what_does_not_fit_the_signature() -> None:
    with pytest.raises(ParameterBindError, match="flow 'sample': missing a required"):
        bind(inspect.signature(sample), "sample", (1,), {})


def test_hints_that_only_a_type_checker_knows() -> None:
    def odd(a: int, b: "Unknown", c: "list[int]") -> None: ...  # type: ignore[name-defined] # noqa: F821

    assert type_hints(odd) == {"a": int, "c": list[int], "return": None}
    args, kwargs = through(odd, "1", object, ["2"])
    assert [*args, *kwargs.values()][0] == 1
    assert [*args, *kwargs.values()][2] == [2]


@pytest.mark.parametrize(
    ("hint", "answer"),
    [
        (None, True),
        (Any, True),
        (inspect.Parameter.empty, True),
        (PenstockFuture, True),
        (PenstockFuture[int], True),
        (int, False),
        (np.ndarray, False),
        (list[int], False),
        (int | None, False),
    ],
)
def test_who_gets_the_reference(hint: Any, answer: bool) -> None:
    assert takes_reference(hint) is answer
