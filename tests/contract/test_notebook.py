"""What a notebook shows of flows, states, futures and lists of futures."""

from typing import Any

from penstock import flow, get_run_context, task
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow


@task
def make(x: int) -> int:
    if x == 3:
        raise ValueError("<b>three</b>")
    return x


def test_what_a_notebook_shows(in_flow: InFlow, runner: TaskRunner) -> None:
    @flow(name="night", description="Calibrate & image", tags=["a<b"], retries=2, task_runner=runner)
    def night(x: int = 1) -> None: ...

    shown = night._repr_html_()
    assert "night" in shown
    assert "Calibrate &amp; image" in shown
    assert "a&lt;b" in shown
    assert "(x: int = 1)" in shown

    def body() -> Any:
        futures = make.map(range(20))
        futures.wait()
        return [
            futures._repr_html_(),
            futures[0]._repr_html_(),
            futures[3]._repr_html_(),
            futures[3].state._repr_html_(),
            repr(futures[0]),
        ]

    found = in_flow(body)
    many, good, bad, state, text = found
    assert "20 in all" in many
    assert "10 more" in many
    assert ">Completed</span>" in good
    assert "make-0" in good
    for page in (bad, state):
        assert "&lt;b&gt;three" in page
        assert "<b>three" not in page
    assert text.startswith("<PenstockFuture make-0 Completed")
    assert all(len(page) < 6000 for page in found)


def test_what_a_notebook_shows_of_a_run(runner: TaskRunner) -> None:
    @task(tags=["a<b"])
    def within(x: Any) -> str:
        around: Any = get_run_context()
        return str(around.task_run._repr_html_())

    @flow(name="night", task_runner=runner)
    def night(data: list[int], star: str = "<b>sun</b>") -> list[str]:
        around: Any = get_run_context()
        return [around.flow_run._repr_html_(), within.submit(data).result()]

    of_flow, of_task = night(list(range(100_000)))
    assert "Flow run" in of_flow
    assert "night" in of_flow
    assert "Task run" in of_task
    assert "a&lt;b" in of_task
    for page in (of_flow, of_task):
        assert "<b>sun" not in page
        assert len(page) < 4000
