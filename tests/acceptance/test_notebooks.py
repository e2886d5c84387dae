"""Notebooks, executed on a real kernel: flows in cells, functions that change, progress, interrupts, what is shown."""

from __future__ import annotations

import asyncio
import os
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent.parent

RUNNERS = {
    "threads": "ThreadPoolTaskRunner(max_workers=4)",
    "dask": (
        "DaskTaskRunner(cluster_kwargs={'n_workers': 1, 'threads_per_worker': 2, 'memory_limit': '1GB', "
        "'dashboard_address': None})"
    ),
    "ray": (
        "RayTaskRunner(init_kwargs={'num_cpus': 2, 'object_store_memory': 100 << 20, "
        "'include_dashboard': False})"
    ),
}

PRELUDE = """
import asyncio, os, pathlib, time
from penstock import (
    DaskTaskRunner, RayTaskRunner, ThreadPoolTaskRunner, flow, get_run_logger, task, unmapped, wait
)
runner = {runner}

@task
def double(x):
    return 2 * x

@flow(task_runner=runner)
def doubled(n):
    return double.map(range(n))

print(doubled(3))
"""


make_book: Any = nbformat.v4.new_notebook
make_cell: Any = nbformat.v4.new_code_cell


class Notebook:
    """A notebook whose cells are executed one after the other, on a kernel that stays."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._book = make_book()
        self._client = NotebookClient(self._book, timeout=100, kernel_name="python3", allow_errors=True)
        self._client.create_kernel_manager()
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")},
            "PENSTOCK_HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "IPYTHONDIR": str(home / "ipython"),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        self._client.start_new_kernel(env=environment, cwd=str(home))
        self._client.start_new_kernel_client()

    def run(self, code: str) -> Outputs:
        """Execute a cell."""
        cell = make_cell(textwrap.dedent(code))
        self._book.cells.append(cell)
        self._client.execute_cell(cell, len(self._book.cells) - 1)
        return Outputs(cell.outputs)

    def shows(self, code: str) -> str:
        """Execute a cell that must not fail, and return what it prints."""
        outputs = self.run(code)
        assert outputs.error is None, outputs.error
        return outputs.text.strip()

    def interrupt(self) -> None:
        """What the stop button does: SIGINT for the kernel and everything that it has started."""
        manager: Any = self._client.km
        asyncio.run(manager.interrupt_kernel())

    def interrupted(self, code: str, mark: Path, times: int = 1) -> Outputs:
        """Execute a cell, and press the button when a file has appeared."""
        pressed = threading.Event()

        def press() -> None:
            eventually(mark.exists)
            for _ in range(times):
                self.interrupt()
                time.sleep(0.1)  # work: of a finger
            pressed.set()

        finger = threading.Thread(target=press)
        finger.start()
        outputs = self.run(code)
        finger.join()
        assert pressed.is_set()
        return outputs

    def close(self) -> None:
        self._client._cleanup_kernel()


class Outputs:
    """What a cell has left below it."""

    def __init__(self, outputs: list[Any]) -> None:
        self.all = outputs

    @property
    def error(self) -> str | None:
        found = [f"{one.ename}: {one.evalue}" for one in self.all if one.output_type == "error"]
        return found[0] if found else None

    @property
    def text(self) -> str:
        """What was printed."""
        return "".join(one.text for one in self.all if one.output_type == "stream" and one.name == "stdout")

    def data(self, kind: str) -> list[str]:
        """Representations of one kind, in their order."""
        return [one.data[kind] for one in self.all if kind in one.get("data", {})]


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Look again until something holds; whoever gives up lets the test end."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture(
    scope="session", params=[pytest.param(name, marks=getattr(pytest.mark, name)) for name in RUNNERS]
)
def notebook(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, nothing_left_behind: None
) -> Iterator[Notebook]:
    """A notebook with a runner of a kind, `double` and `doubled`."""
    found = Notebook(tmp_path_factory.mktemp("notebook"))
    try:
        assert found.shows(PRELUDE.format(runner=RUNNERS[request.param])).endswith("[0, 2, 4]")
        yield found
    finally:
        found.close()


def test_sync_and_async_flows_where_a_loop_runs_already(notebook: Notebook) -> None:
    code = """
    def loop_is_running():
        try:
            return asyncio.get_running_loop().is_running()
        except RuntimeError:
            return asyncio.get_event_loop_policy().get_event_loop().is_running()

    @task
    async def later(x):
        await asyncio.sleep(0.01)
        return x + 1

    @flow(task_runner=runner)
    async def gathered(n):
        here = await asyncio.gather(*[later(x) for x in range(n)])
        there = [await future for future in later.map(here)]
        return there, double.submit(there[0])

    @flow(task_runner=runner)
    def plain(x):
        return later.submit(double.submit(x))

    print(doubled(2), plain(3))
    """
    assert notebook.shows(code) == "[0, 2] 7"
    assert notebook.shows("print(await gathered(3))") == "([2, 3, 4], 4)"
    assert (
        notebook.shows("print(await asyncio.gather(gathered(1), gathered(2)))") == "[([2], 4), ([2, 3], 4)]"
    )
    assert notebook.shows("print(double(4), await later(4))") == "8 5"  # tasks, without a flow


def test_what_is_redefined_in_a_cell_runs_on_the_workers(notebook: Notebook) -> None:
    notebook.shows("""
    FACTOR = 10

    def scaled(x):
        return FACTOR * x

    @task
    def scale(x):
        return scaled(x)

    @flow(task_runner=runner)
    def scales():
        return scale.map([1, 2])
    """)
    assert notebook.shows("print(scales())") == "[10, 20]"
    assert notebook.shows("FACTOR = 100\nprint(scales())") == "[100, 200]"
    assert notebook.shows("def scaled(x):\n    return -x\nprint(scales())") == "[-1, -2]"
    assert notebook.shows("@task\ndef scale(x):\n    return scaled(x) - 1\nprint(scales())") == "[-2, -3]"
    redefined = "@flow(task_runner=runner)\ndef scales():\n    return scale.submit(5)\nprint(scales())"
    assert notebook.shows(redefined) == "-6"


def test_a_redefined_function_makes_a_cached_result_again(notebook: Notebook) -> None:
    notebook.shows("""
    from penstock.cache_policies import INPUTS, TASK_SOURCE

    @task(cache_policy=INPUTS + TASK_SOURCE)
    def slow(x):
        return x, 1

    @flow(task_runner=runner)
    def once():
        future = slow.submit(3)
        return future.result(), future.state.name
    """)
    assert notebook.shows("print(once())") == "((3, 1), 'Completed')"
    assert notebook.shows("print(once())") == "((3, 1), 'Cached')"
    changed = "@task(cache_policy=INPUTS + TASK_SOURCE)\ndef slow(x):\n    return x, 2\nprint(once())"
    assert notebook.shows(changed) == "((3, 2), 'Completed')"


def test_progress_is_one_output_whatever_the_number_of_tasks(notebook: Notebook) -> None:
    outputs = notebook.run("""
    @task(name="nap <and> rest")
    def nap(x):
        time.sleep(0.02)
        return x

    @task
    def odd(x):
        if x % 2:
            raise ValueError("odd")

    @flow(task_runner=runner)
    def many():
        naps = nap.map(range(300))
        oddities = odd.map(range(4))
        wait(naps)
        wait(oddities)

    many()
    """)
    assert outputs.error is None
    assert len(outputs.all) == 1, outputs.all  # updated in its place, and nothing besides
    (page,) = outputs.data("text/html")
    assert "nap &lt;and&gt; rest" in page
    assert "300/300" in page
    assert "2 failed" in page
    assert "Completed" in page
    assert len(page) < 10_000
    assert len(outputs.data("text/plain")[0].splitlines()) == 1


def test_short_flows_leave_no_trail(notebook: Notebook) -> None:
    outputs = notebook.run("for _ in range(20):\n    doubled(2)").all
    assert len(outputs) < 3  # none; on a busy machine one or the other of them takes longer than a moment


def test_progress_can_be_turned_off(notebook: Notebook) -> None:
    switch = "from penstock import settings\nos.environ['PENSTOCK_PROGRESS'] = {!r}\nsettings.refresh();"
    notebook.shows(switch.format("off"))
    try:
        slow = "@flow(task_runner=runner)\ndef slowly():\n    time.sleep(1.2)\nslowly()"
        assert notebook.run(slow).all == []
    finally:
        notebook.shows(switch.format("auto"))
    assert len(notebook.run("slowly()").data("text/html")) == 1


INTERRUPTED = """
ends = []

@task
def hold(x, mark):
    pathlib.Path(mark).write_text("here")
    for _ in range(6000):
        time.sleep(0.01)

def note(flow, run, state):
    ends.append(state.name)

@flow(task_runner=runner, on_cancellation=[note])
def long(mark):
    wait(hold.map(range(3), unmapped(mark)))

@flow(task_runner=runner, on_cancellation=[note])
async def long_async(mark):
    for future in hold.map(range(3), unmapped(mark)):
        await future
"""


@pytest.mark.parametrize(
    "call", ["long({mark!r})", "await long_async({mark!r})", "await asyncio.sleep(0)\nlong({mark!r})"]
)
def test_an_interrupt_cancels_the_flow_and_spares_the_kernel(
    notebook: Notebook, tmp_path: Path, call: str
) -> None:
    notebook.shows(INTERRUPTED)
    process = notebook.shows("print(os.getpid())")
    mark = tmp_path / "mark"
    begun = time.monotonic()
    outputs = notebook.interrupted(call.format(mark=str(mark)), mark)
    assert time.monotonic() - begun < 40
    assert outputs.error is not None
    assert outputs.error.startswith(("KeyboardInterrupt", "CancelledError"))
    assert notebook.shows("print(ends)") == "['Cancelled']"
    assert notebook.shows(
        "print(doubled(3), await gathered(1) if 'gathered' in globals() else '')"
    ).startswith("[0, 2, 4]")
    assert notebook.shows("print(os.getpid())") == process


def test_an_interrupt_pressed_twice_spares_the_kernel(notebook: Notebook, tmp_path: Path) -> None:
    notebook.shows(INTERRUPTED)
    notebook.shows("""
    @task
    def stubborn(mark):
        try:
            hold.fn(1, mark)
        finally:
            time.sleep(1)

    @flow(task_runner=runner, on_cancellation=[note])
    def reluctant(mark):
        stubborn.submit(mark).result()
    """)
    process = notebook.shows("print(os.getpid())")
    mark = tmp_path / "mark"
    assert notebook.interrupted(f"reluctant({str(mark)!r})", mark, times=2).error is not None
    assert notebook.shows("print(doubled(3))") == "[0, 2, 4]"
    assert notebook.shows("print(os.getpid(), ends)") == f"{process} ['Cancelled']"


def test_the_runner_stays_open_after_an_interrupt(notebook: Notebook, tmp_path: Path) -> None:
    notebook.shows(INTERRUPTED)
    workers = """
    @task
    def where(x):
        time.sleep(0.05)
        return os.getpid()

    @flow(task_runner=runner)
    def processes():
        return sorted(set(where.map(range(8)).result()))

    print(runner.is_open, *processes())
    """
    before = notebook.shows(workers).split()
    mark = tmp_path / "mark"
    assert notebook.interrupted(f"long({str(mark)!r})", mark).error is not None
    after = notebook.shows("print(runner.is_open, *processes())").split()
    assert after[0] == before[0]


def test_what_cells_show(notebook: Notebook) -> None:
    def page(code: str) -> str:
        outputs = notebook.run(code)
        assert outputs.error is None
        return outputs.data("text/html")[-1]

    assert "doubled" in page("doubled")
    assert ">Completed</span>" in page("doubled(2, return_state=True)")
    kept = (
        "@flow(task_runner=runner)\ndef keeps():\n    global futures\n    futures = double.map(range(30))\n"
    )
    assert "30 in all" in page(kept + "    wait(futures)\nkeeps()\nfutures")
    assert "double-3" in page("futures[3]")
    assert ">Completed</span>" in page("futures[3].state")
    failing = "@task\ndef fail():\n    raise ValueError('<b>no</b>')\nfail(return_state=True)"
    assert "&lt;b&gt;no" in page(failing)


def test_an_error_shows_the_lines_of_the_cell_only(notebook: Notebook) -> None:
    outputs = notebook.run("""
    @task
    def broken(x):
        raise ValueError("no data")

    @flow(task_runner=runner)
    def breaks():
        return broken.submit(1).result()

    breaks()
    """)
    (error,) = [one for one in outputs.all if one.output_type == "error"]
    trace = "\n".join(error.traceback)
    assert outputs.error is not None
    assert outputs.error.startswith("ValueError: no data")
    assert str(ROOT / "penstock") not in trace
    assert "broken" in trace
