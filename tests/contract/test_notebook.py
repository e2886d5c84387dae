"""What a notebook shows of flows, states, futures and lists of futures."""

from typing import Any

from penstock import flow, task
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
