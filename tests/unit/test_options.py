"""Options: what is refused, and what makes a name."""

import datetime as dt
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock import ConfigurationError, ReservedArgumentError, ResultStorage, flow, task
from penstock.engine.options import (
    NOT_GIVEN,
    backend_options,
    check_choices,
    check_signature,
    retry_policy,
    run_name,
)
from penstock.engine.results import read_options, unpack


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"inputs": "writable"}, "'inputs' must be 'readonly', 'copy' or 'shared', got 'writable'"),
        ({"chunk_size": 0}, "'chunk_size' must be 'auto' or a positive integer, got 0"),
        ({"chunk_size": "all"}, "'chunk_size' must be 'auto' or a positive integer, got 'all'"),
        ({"timeout_seconds": 0}, "'timeout_seconds' must be positive, got 0"),
        ({"retries": -1}, "'retries' and 'crash_retries' must not be negative"),
        ({"crash_retries": -1}, "'retries' and 'crash_retries' must not be negative"),
    ],
)
def test_wrong_options(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        task(**options)(lambda: None)
    with pytest.raises(ConfigurationError, match=sentence):
        task(lambda: None).with_options(**options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"retry_condition_fn": "yes"}, "Expected `retry_condition_fn` to be callable, got str instead"),
        ({"task_run_name": 3}, "Expected string or callable for 'task_run_name'; got int instead"),
        ({"retry_delay_seconds": "3"}, "must be a number, a list or a callable"),
    ],
)
def test_options_of_a_wrong_type(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        task(**options)(lambda: None)


def test_decorators_need_a_function() -> None:
    with pytest.raises(TypeError, match="@task needs a function, got int"):
        task(3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="@flow needs a function, got str"):
        flow("name")  # type: ignore[call-overload]


def test_choices_that_are_fine() -> None:
    check_choices("copy", 5, 0.1)
    check_choices("shared", "auto", None)


def test_a_policy_and_its_defaults() -> None:
    assert retry_policy(None, None, None, 1, default_retries=3).retries == 3
    policy = retry_policy(2, [1, 2], 0.5, 0)
    assert (policy.retries, policy.delays, policy.jitter, policy.crash_retries) == (2, (1.0, 2.0), 0.5, 0)


def test_placement() -> None:
    placed = backend_options({"GPU": 1, "A": 2.0}, 4, "one")
    assert placed.resources == (("A", 2.0), ("GPU", 1))
    assert (placed.threads, placed.workers) == (4, ("one",))
    assert backend_options(None, 1, None) == backend_options({}, 1, [])


def test_run_names() -> None:
    parameters = {"date": dt.date(2026, 1, 5), "input": {"number": 3}}
    assert run_name(None, "default", parameters) == "default"
    assert run_name("{date:%A}-{input[number]:02}", "", parameters) == "Monday-03"
    assert run_name(lambda: "fixed", "", parameters) == "fixed"
    assert run_name(lambda parameters: str(parameters["input"]), "", parameters) == "{'number': 3}"
    with pytest.raises(TypeError, match="returned type int but a string is required"):
        run_name(lambda: 3, "", parameters)  # type: ignore[arg-type, return-value]
    with pytest.raises(KeyError):
        run_name("{missing}", "", parameters)


@pytest.mark.parametrize("name", ["return_state", "wait_for"])
def test_reserved_parameters(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def takes(x, *, {name}=None): ...", namespace)
    with pytest.raises(ReservedArgumentError, match=f"'{name}' is a reserved argument name"):
        check_signature(namespace["takes"])


def test_with_options_changes_what_is_given_and_nothing_else() -> None:
    @task(retries=3, retry_delay_seconds=2, tags=["a"], timeout_seconds=5.0, description="one")
    def work() -> None: ...

    other = work.with_options(retries=0, timeout_seconds=None, tags=["b"])
    assert (other.retries, other.options.timeout_seconds, set(other.tags)) == (0, None, {"b"})
    assert (work.retries, work.options.timeout_seconds, set(work.tags)) == (3, 5.0, {"a"})
    assert other.options.description == "one"
    assert other.options.retry.delays == (2.0,)
    assert other.fn is work.fn
    assert work.with_options().options == work.options
    assert repr(NOT_GIVEN) == "NOT_GIVEN"


def test_the_signatures_agree() -> None:
    import inspect

    from penstock import Flow, Task

    for kind, decorator in ((Task, task), (Flow, flow)):
        made = set(inspect.signature(kind.__init__).parameters) - {"self", "fn"}
        assert set(inspect.signature(kind.with_options).parameters) - {"self"} == made
        assert decorator is not None


def test_a_task_that_must_not_run_twice_has_no_crash_retries() -> None:
    once = task(idempotent=False, crash_retries=5)(lambda: None)
    assert once.options.retry.crash_retries == 0
    assert task(lambda: None).options.retry.crash_retries == 1


def test_where_results_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("kept", Path("kept"), f"file://{tmp_path}/kept", ResultStorage("kept"), tmp_path / "kept"):
        options = read_options(None, given)
        assert options.storage is not None
        assert options.storage.url == str(tmp_path / "kept")
        assert options.wish is True
    assert read_options(None, "s3://bucket/x").storage == ResultStorage("s3://bucket/x")
    assert "secret" not in repr(ResultStorage("s3://bucket/x", {"key": "secret"}))


def test_what_is_said_of_results_inside_wins() -> None:
    inner, outer = read_options(None, None, None, "json"), read_options("large", "/outer", None, "npy")
    merged = inner.over(outer)
    assert (merged.wish, merged.serializer) == (True, "json")
    assert merged.storage == outer.storage
    unpacked = unpack(merged.pack())
    assert unpacked.switches == (False, False, False, None)
    assert replace(unpacked, switches=None) == merged
    assert read_options(False, None).over(outer).wish is False
    assert read_options(None, None).over(outer).wish == "large"
