"""Whether to run again, and when."""

from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from penstock import task
from penstock.engine.retry import RetryPolicy, exponential_backoff, read_delays, read_jitter

SECONDS = st.floats(0, 1000, allow_nan=False)


def test_the_budget() -> None:
    policy = RetryPolicy(retries=2, crash_retries=1)
    assert [policy.after_failure(n) for n in (1, 2, 3)] == [0.0, 0.0, None]
    assert [policy.after_crash(n) for n in (1, 2)] == [0.0, None]
    assert RetryPolicy().after_failure(1) is None
    assert RetryPolicy().after_crash(1) is None


def test_what_ran_out_of_memory_runs_again_only_if_asked_for() -> None:
    @task
    def large() -> None: ...

    asked = large.with_options(crash_retries=1)
    assert (large.options.retry.crash_retries, large.options.retry.memory_retries) == (1, 0)
    assert (asked.options.retry.crash_retries, asked.options.retry.memory_retries) == (1, 1)
    assert large.with_options(name="other").options.retry.memory_retries == 0
    assert asked.with_options(name="other").options.retry.memory_retries == 1
    assert large.with_options(idempotent=False).options.retry.memory_retries == 0


def test_the_last_delay_repeats() -> None:
    policy = RetryPolicy(retries=9, delays=(1.0, 5.0))
    assert [policy.delay(n) for n in (1, 2, 3, 9)] == [1.0, 5.0, 5.0, 5.0]


@hypothesis.given(SECONDS, st.floats(0, 10), st.integers(1, 5))
def test_jitter_only_adds(delay: float, jitter: float, failures: int) -> None:
    policy = RetryPolicy(retries=5, delays=(delay,), jitter=jitter)
    assert delay <= policy.delay(failures) <= delay * (1 + jitter) + 1e-9


@pytest.mark.parametrize(
    ("option", "delays"),
    [
        (None, ()),
        (3, (3.0,)),
        (0.5, (0.5,)),
        ([1, 2], (1.0, 2.0)),
        ((1, 2), (1.0, 2.0)),
        (lambda retries: [retries] * 2, (4.0, 4.0)),
        (lambda retries: 7, (7.0,)),
        (exponential_backoff(10), (10.0, 20.0, 40.0, 80.0)),
    ],
)
def test_delays(option: Any, delays: tuple[float, ...]) -> None:
    assert read_delays(option, 4) == delays


def test_wrong_delays() -> None:
    with pytest.raises(TypeError, match="must be a number, a list or a callable, got str"):
        read_delays("1", 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Can not configure more than 50 retry delays per task\."):
        read_delays([1.0] * 51, 51)
    with pytest.raises(ValueError, match="must not be negative"):
        read_delays(-1, 1)


def test_backoff_stays_within_the_limit() -> None:
    assert len(read_delays(exponential_backoff(1), 80)) == 50


def test_jitter() -> None:
    assert read_jitter(None) is None
    assert read_jitter(0.5) == 0.5
    with pytest.raises(ValueError, match=r"`retry_jitter_factor` must be >= 0\."):
        read_jitter(-0.1)
