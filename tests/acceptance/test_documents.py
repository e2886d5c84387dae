"""The flows that guides to Prefect teach, with the import line changed: every file in examples/ but the radio demo.

Data are made here, servers listen on the loopback interface only.
"""

import asyncio
import gc
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest

from penstock import PenstockFuture, flow, get_run_logger, quote, runtime, task, wait
from penstock.runners import runner_class
from penstock.runners.base import TaskRunner
from penstock.task_runners import ThreadPoolTaskRunner
from penstock.tasks import task_input_hash
from tests.conftest import Bench
from tests.record import Record

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"


# What urllib raises for a refusal holds the answer, and its socket, until somebody collects it.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket.socket:ResourceWarning")


@pytest.fixture(autouse=True)
def answers_that_nobody_reads() -> Iterator[None]:
    """Collect them before the next test, which may mind."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def over(*names: str) -> pytest.MarkDecorator:
    """Run a test on these runners."""
    params = [pytest.param(name, marks=getattr(pytest.mark, name)) for name in names]
    return pytest.mark.parametrize("runner_name", params, indirect=True, scope="session")


anywhere = over("threads", "dask", "ray")
on_clusters = over("dask", "ray")


def example(path: str) -> ModuleType:
    """Load a file of examples/ afresh, as its user's script."""
    name = "example_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def script(path: str, *arguments: object, folder: Path) -> str:
    """Run a file of examples/ as its user would, and return what it prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / path), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------- servers


class Server:
    """A web server on the loopback interface, with what it was asked for."""

    def __init__(self, handler: Callable[..., BaseHTTPRequestHandler]) -> None:
        self.asked: list[str] = []
        self.refuse = 0  # so many requests are answered with 503
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.owner = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def running(self) -> Iterator["Server"]:
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


class Files(SimpleHTTPRequestHandler):
    """The files of a folder."""

    def do_GET(self) -> None:
        owner: Server = self.server.owner  # type: ignore[attr-defined]
        owner.asked.append(self.path)
        if owner.refuse > 0:
            owner.refuse -= 1
            self.send_error(503)
            return
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    with Server(partial(Files, directory=str(folder))).running() as server:
        yield server


# --------------------------------------------------------------------------- the elevator, concurrent runner


def test_the_elevator_with_its_concurrent_runner(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    example("elevator/elevator.py").elevator()
    rows = record.tasks("stop_at_floor")
    assert [row.type for row in rows] == ["COMPLETED"] * 10
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "elevator moving to floor 10"  # the first one that was asked for
    assert lines.index("elevator moving to floor 9") < lines.index("elevator stops on floor 10")
    assert sorted(lines) == sorted(
        text.format(floor)
        for floor in range(1, 11)
        for text in ("elevator moving to floor {}", "elevator stops on floor {}")
    )
    assert record.flow().type == "COMPLETED"  # the flow has waited for what it did not wait for


@on_clusters
def test_the_elevator_on_a_cluster(runner: TaskRunner, record: Record) -> None:
    example("elevator/elevator.py").elevator.with_options(task_runner=runner)()
    assert record.types("stop_at_floor") == ["COMPLETED"] * 10


def test_the_elevator_one_floor_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    module = example("elevator/elevator.py")
    module.elevator.with_options(task_runner="sequential")()
    stops = [line for line in capsys.readouterr().out.splitlines() if "stops" in line]
    assert stops == [f"elevator stops on floor {floor}" for floor in range(10, 0, -1)]


# ---------------------------------------------------------------------------------- the API flow in two steps


def test_the_api_flow_as_a_script_and_called(
    tmp_path: Path, record: Record, capsys: pytest.CaptureFixture[str]
) -> None:
    fact = json.loads((EXAMPLES / "http_api" / "fact.json").read_text())["fact"]
    with serving(EXAMPLES / "http_api") as server:
        url = f"{server.url}/fact.json"
        assert script("http_api/facts.py", url, folder=tmp_path).splitlines() == ["200", fact]
        assert example("http_api/facts.py").api_flow(url) == fact
    assert capsys.readouterr().out.splitlines() == ["200", fact]
    assert [(row.task, row.type) for row in record.tasks()] == [
        ("call_api", "COMPLETED"),
        ("parse_fact", "COMPLETED"),
    ]
    assert record.flow().body["flow"] == "api-flow"


def test_an_api_that_does_not_know_the_page_fails_the_flow(record: Record) -> None:
    module = example("http_api/facts.py")
    with serving(EXAMPLES / "http_api") as server, pytest.raises(ValueError, match="Expecting value"):
        module.api_flow(f"{server.url}/nothing.json")
    assert record.types() == ["FAILED"]
    assert record.flow().type == "FAILED"


@anywhere
def test_the_api_flow_with_futures(runner: TaskRunner, record: Record) -> None:
    module = example("http_api/facts.py")

    @flow(task_runner=runner)
    def submitted(url: str) -> Any:
        return module.parse_fact.submit(module.call_api.submit(url))

    with serving(EXAMPLES / "http_api") as server:
        assert submitted(f"{server.url}/fact.json").startswith("A cat")
    assert record.types() == ["COMPLETED", "COMPLETED"]


# ----------------------------------------------------------------------- CSV → frame → Parquet, cache, retries


@pytest.fixture
def months(tmp_path: Path) -> Path:
    """Three months of trips."""
    make = example("trips/make_data.py").make
    for month in (1, 2, 3):
        make(tmp_path / "web", 2021, month, rows=500)
    return tmp_path / "web"


def test_a_month_of_trips(months: Path, tmp_path: Path, record: Record) -> None:
    module = example("trips/trips.py")
    with serving(months) as server:
        server.refuse = 2
        path = module.month_flow(server.url, "yellow", "2021", 1, str(tmp_path))
        assert len(server.asked) == 3
        assert record.task("ingest_data").attempt == 3
        assert record.task("ingest_data").names.count("Retrying") == 1
        again = module.month_flow(server.url, "yellow", 2021, 1, str(tmp_path))
        assert len(server.asked) == 3  # nothing was fetched again
    assert path == again == f"{tmp_path}/yellow_tripdata_2021-01.parquet"
    frame = pd.read_parquet(path)
    assert len(frame) == 500
    assert frame.tpep_pickup_datetime.dtype.kind == frame.tpep_dropoff_datetime.dtype.kind == "M"
    assert [row.state["name"] for row in record.tasks("ingest_data")] == ["Completed", "Cached"]
    for row in record.tasks("clean_it"):
        assert any("rows: 500" in line for line in row.logs)
        assert any("tpep_pickup_datetime" in line for line in row.logs)


def test_a_month_that_cannot_be_fetched_fails_after_four_attempts(months: Path, record: Record) -> None:
    module = example("trips/trips.py")
    with serving(months) as server:
        with pytest.raises(Exception, match="404"):
            module.month_flow(server.url, "yellow", 2021, 9)
        assert len(server.asked) == 4
    assert record.types() == ["FAILED"]


def test_months_of_trips_are_flows_in_a_flow(months: Path, tmp_path: Path, record: Record) -> None:
    module = example("trips/trips.py")
    with serving(months) as server:
        module.gather_flow(server.url, "yellow", 2021, ["1", 2, 3], str(tmp_path))
    assert len(list(tmp_path.glob("*.parquet"))) == 3
    assert [row.body["flow"] for row in record.flows()] == ["Months of trips"] + 3 * ["Month of trips"]
    assert [row.body["parent_flow_run"] for row in record.flows()] == [None, *3 * [record.flow().id]]
    assert len(record.tasks("ingest_data")) == 3


def test_the_script_of_the_trips(months: Path, tmp_path: Path) -> None:
    with serving(months) as server:
        script("trips/trips.py", server.url, folder=tmp_path)
        script("trips/trips.py", server.url, folder=tmp_path)
        assert len(server.asked) == 3  # another process finds what this one has stored
    assert len(list((tmp_path / "data").glob("*.parquet"))) == 3


@anywhere
def test_trips_with_futures(months: Path, tmp_path: Path, runner: TaskRunner, record: Record) -> None:
    module = example("trips/trips.py")

    @flow(task_runner=runner)
    def submitted(base: str) -> Any:
        raw = module.ingest_data.submit(f"{base}/yellow/yellow_tripdata_2021-02.csv.gz")
        return module.save_data_local.submit(module.clean_it.submit(raw), f"{tmp_path}/two")

    with serving(months) as server:
        assert submitted(server.url) == submitted(server.url)
        assert len(server.asked) == 1
    assert pd.read_parquet(tmp_path / "two.parquet").tpep_pickup_datetime.dtype.kind == "M"
    assert [row.state["name"] for row in record.tasks("ingest_data")] == ["Completed", "Cached"]
    assert any("rows: 500" in line for line in record.tasks("clean_it")[0].logs)


# --------------------------------------------------------------------------- one large frame, two consumers


def census(folder: Path, nbytes: int) -> tuple[Path, float, int]:
    """A CSV of about this size, with the mean age and the number of wrong rows in it."""
    path = folder / "census.csv"
    rows = example("census/make_data.py").make(path, nbytes)
    ages = pd.read_csv(path, usecols=["Age"])["Age"]
    assert len(ages) == rows
    return path, float(ages.mean()), int((ages > 120).sum())


def wrong_rows(record: Record) -> list[str]:
    return [line for line in record.flow().logs if line.startswith("Wrong rows")]


def test_the_census_as_it_is_written(tmp_path: Path, record: Record) -> None:
    path, mean, wrong = census(tmp_path, 2_000_000)
    assert example("census/census.py").DataFrame_processing(str(path)) == pytest.approx(mean)
    assert wrong_rows(record) == [f"Wrong rows in the dataset based on the Age column: {wrong}"]
    assert [row.task for row in record.tasks()] == [
        "read_the_DataFrame",
        "get_average_age",
        "count_wrong_values",
    ]


@anywhere
def test_the_census_on_a_cluster(tmp_path: Path, runner: TaskRunner, record: Record) -> None:
    path, mean, wrong = census(tmp_path, 5_000_000)
    found = example("census/census.py").on_a_cluster.with_options(task_runner=runner)(str(path))
    assert found == (pytest.approx(mean), wrong)
    assert len(wrong_rows(record)) == 1
    assert record.task("read_the_DataFrame").state["nbytes"] > 5_000_000


FULL = 857_700_000  # bytes of the original


def roomy(name: str) -> TaskRunner:
    """A runner whose workers have room for the frame, which is twice as large as its file."""
    options: dict[str, dict[str, Any]] = {
        "ThreadPoolTaskRunner": {},
        "DaskTaskRunner": {
            "cluster_kwargs": {"n_workers": 2, "memory_limit": "8GB", "dashboard_address": None}
        },
        "RayTaskRunner": {
            "init_kwargs": {"num_cpus": 2, "object_store_memory": 5 << 30, "include_dashboard": False}
        },
    }
    return runner_class(name)(**options[name])


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("ThreadPoolTaskRunner", marks=pytest.mark.threads),
        pytest.param("DaskTaskRunner", marks=pytest.mark.dask),
        pytest.param("RayTaskRunner", marks=pytest.mark.ray),
    ],
)
def test_the_census_at_full_size(name: str, bench: Bench, tmp_path: Path, record: Record) -> None:
    bench.close()
    path, mean, wrong = census(tmp_path, FULL)
    assert path.stat().st_size > 0.95 * FULL
    runner = roomy(name)
    gc.collect()
    before, begun = psutil.Process().memory_info().rss, time.monotonic()
    found = example("census/census.py").on_a_cluster.with_options(task_runner=runner)(str(path))
    seconds = time.monotonic() - begun
    assert found == (pytest.approx(mean), wrong)
    grown = psutil.Process().memory_info().rss - before
    nbytes = record.task("read_the_DataFrame").state["nbytes"]
    print(f"{name}: frame of {nbytes:,} bytes, driver grew by {grown:,} bytes, {seconds:.1f} s")
    assert nbytes > FULL
    if not runner.in_process:
        assert grown < nbytes / 10  # the frame has not been here


# ------------------------------------------------------------------------------------ coroutines, gathered


def test_tasks_are_gathered(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(example("async_gather/gather.py").async_flow())
    said = capsys.readouterr().out.split()
    assert said[:2] == ["1", "2"]
    assert said[2:] == ["a", "6", "b", "7", "c", "8", "d", "9"]  # side by side, not one after the other
    assert record.types("print_values") == ["COMPLETED"] * 3


@anywhere
def test_tasks_are_gathered_on_workers(runner: TaskRunner, record: Record) -> None:
    module = example("async_gather/gather.py")

    @flow(task_runner=runner)
    async def on_workers() -> None:
        async def awaited(future: PenstockFuture[None]) -> None:
            await future

        await module.print_values([1, 2])
        await asyncio.gather(*[awaited(module.print_values.submit(text)) for text in ("abcd", "6789")])

    asyncio.run(on_workers())
    assert record.types("print_values") == ["COMPLETED"] * 3


# ------------------------------------------------------------------------------ a condition, and two branches


@pytest.mark.parametrize(
    ("rows", "arm", "says"),
    [
        (3, "if_not_skip_do_something_func", "finish: processed"),
        (0, "if_skip_do_something", "finish: skipped"),
    ],
)
def test_a_branch_on_the_status(rows: int, arm: str, says: str, record: Record) -> None:
    module = example("branch/branch.py")
    assert module.db_data_process_flow(rows) == says
    waited = record.task("wait_for_db_record")
    assert (waited.attempt, waited.type) == (3, "COMPLETED")  # the sensor of the guides
    assert waited.logs == ["Run number 1", "Run number 2", "Run number 3"]
    assert [row.task for row in record.tasks()] == [
        "wait_for_db_record",
        "get_data",
        "process_or_skip_func",
        arm,
        "report_the_finish",
    ]
    assert record.task(arm).logs == [f"Task {arm}"]
    assert record.flow().body["flow"] == "db-data-process-flow"


@anywhere
def test_the_arm_not_taken_is_on_record(runner: TaskRunner, record: Record) -> None:
    flow_ = example("branch/branch.py").branches_on_record.with_options(task_runner=runner)
    assert flow_(0) == "finish: skipped"
    assert record.task("if_not_skip_do_something_func").type == "SKIPPED"
    assert record.task("if_skip_do_something").type == "COMPLETED"


def test_a_task_that_raises_nothing_in_particular(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide breaks the flow by a bare `raise`, and shows what the error looks like."""
    module = example("branch/branch.py")

    @task
    def broken() -> None:
        raise  # noqa: PLE0704 - as there

    monkeypatch.setattr(module, "if_not_skip_do_something_func", broken)
    with pytest.raises(RuntimeError, match="No active exception to reraise") as caught:
        module.db_data_process_flow()
    files = {Path(str(entry.path)).name for entry in caught.traceback}
    assert files == {"test_documents.py", "branch.py"}  # their own lines, none of ours
    assert record.task("broken").type == record.flow().type == "FAILED"


# ------------------------------------------------------------------------------------------- names and tags


def test_names_of_flows_tasks_and_runs(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GIT_COMMIT_SHA", raising=False)
    found = example("names/names.py").my_flow("marvin", "2021-05-07")
    tags = ["greeting", "tag-test", "tutorial"]
    assert found == ("marvin-on-Friday", ("hello-marvin-on-Friday", tags))
    row, run = record.task("My Example Task"), record.flow()
    assert (run.body["flow"], run.name) == ("My Example Flow", "marvin-on-Friday")
    assert (row.name, row.body["tags"]) == ("hello-marvin-on-Friday", tags)
    assert run.body["version"]  # found by itself


def test_a_version_from_the_environment(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_COMMIT_SHA", "0f3c2a1")
    example("names/names.py").my_flow("marvin", "2021-05-07")
    assert record.flow().body["version"] == "0f3c2a1"


# -------------------------------------------------------------------------------- extract, transform, load


@anywhere
def test_extract_transform_load(tmp_path: Path, runner: TaskRunner, record: Record) -> None:
    with serving(EXAMPLES / "etl") as server:
        server.refuse = 1
        example("etl/aircraft.py").etl.with_options(task_runner=runner)(server.url, str(tmp_path))
    aircraft = json.loads((tmp_path / "aircraft.json").read_text())
    assert [(one["callsign"], one["airline"]) for one in aircraft] == [
        ("UAL12", "United Airlines"),
        ("DLH418", "Lufthansa"),
    ]
    assert set(json.loads((tmp_path / "airlines.json").read_text())) == {"AAL", "DLH", "UAL"}
    assert record.types() == ["COMPLETED"] * 5
    made = {row.id: row.task for row in record.tasks()}
    upstream = {made[run] for _, run in record.task("transform").body["upstream"]}
    assert upstream == {"extract_live_data", "extract_reference_data"}


# ------------------------------------------------------------------------------------------------ nesting


@pytest.mark.dask
def test_maps_in_maps_and_dask_in_tasks(bench: Bench, clean_environment: Path, record: Record) -> None:
    runner = bench.open("dask")
    nested = example("nested_maps/nested.py").nested.with_options(task_runner=runner)
    assert nested([2, 3, 4]) == ([1, 5, 14], [2, 6, 12], [3, 4, 5])
    assert record.types("square") == ["COMPLETED"] * 9


@anywhere
def test_maps_in_maps(runner: TaskRunner) -> None:
    pytest.importorskip("dask")
    module = example("nested_maps/nested.py")
    assert flow(task_runner=runner)(lambda: module.sum_of_squares.map([2, 3, 4]))() == [1, 5, 14]


@anywhere
def test_a_task_calls_tasks_and_flows(runner: TaskRunner, record: Record) -> None:
    """What the guides show as an error: a task that uses another task, for a connection to a data base."""

    @task
    def query(text: str) -> int:
        return len(text)

    @flow
    def count(text: str) -> int:
        return query(text) + 1

    @task
    def wait_for_record(text: str) -> tuple[int, int, int]:
        return query(text), query.submit(text).result(), count(text)

    assert flow(task_runner=runner)(lambda: wait_for_record.submit("select"))() == (6, 6, 7)
    assert record.types() == ["COMPLETED"] * len(record.tasks())


# --------------------------------------------------------------- what the evaluation of astronomers asks for


@anywhere
def test_parameters_of_any_size(runner: TaskRunner, record: Record) -> None:
    """Elsewhere the parameters of a flow cannot exceed 512 kB."""

    @task
    def total(x: Any) -> float:
        return float(x.sum())

    @flow
    def inner(x: Any) -> Any:
        return total.submit(x)

    @flow(task_runner=runner)
    def outer(x: Any) -> Any:
        return inner(x), total.submit(x)

    assert outer(np.ones(1_000_000)) == (1e6, 1e6)
    assert all(len(json.dumps(row.body["parameters"])) < 4096 for row in record.flows())


@anywhere
def test_a_future_has_an_id_and_a_state_and_orders_what_waits_for_it(
    runner: TaskRunner, record: Record, tmp_path: Path
) -> None:
    @task
    def write(path: Path) -> None:
        path.write_text("written")

    @task
    def read(path: Path) -> str:
        return path.read_text()

    @flow(task_runner=runner)
    def ordered() -> Any:
        first = write.submit(tmp_path / "file")
        assert first.task_run_id
        second = read.submit(tmp_path / "file", wait_for=[first])
        done, not_done = wait([first, second])
        assert (len(done), len(not_done)) == (2, 0)
        assert second.state.is_completed()
        return second

    assert ordered() == "written"


@anywhere
def test_quote_disables_the_search_for_futures(runner: TaskRunner) -> None:
    @task
    def kind(x: Any) -> str:
        return type(x["rows"][0]).__name__

    assert flow(task_runner=runner)(lambda: kind.submit(quote({"rows": [1.5]})))() == "float"


@anywhere
def test_conditions_and_loops_in_nested_flows(runner: TaskRunner, record: Record) -> None:
    """Tasks that run only under a condition, grouped into a flow that is called under it."""

    @task
    def residual(x: float) -> float:
        return x / 4

    @flow
    def clean(x: float) -> float:
        return residual.submit(x).result()

    @flow(task_runner=runner)
    def deconvolve(x: float) -> float:
        while x > 0.1:
            x = clean(x)
        return x

    assert deconvolve(16.0) == 0.0625
    assert len(record.flows()) == 5


@anywhere
def test_a_nested_flow_alone_is_cancelled(runner: TaskRunner) -> None:
    """Elsewhere a nested flow run cannot be cancelled without its parent."""

    @task
    def nap() -> None:
        import time

        for _ in range(2000):
            time.sleep(0.01)

    @flow
    def child() -> None:
        nap.submit().result()

    @flow(task_runner=runner)
    def parent() -> str:
        future = child.submit()
        future.cancel()
        future.wait()
        return str(future.state.name)

    assert parent() == "Cancelled"


def test_tasks_outside_of_flows() -> None:
    @task
    def add(x: int, y: int) -> int:
        return x + y

    assert add(1, 2) == 3
    with ThreadPoolTaskRunner(max_workers=2):
        assert add.submit(1, 2).result() == 3
        assert add.map([1, 2], [3, 4]).result() == [4, 6]


def test_a_flow_that_cannot_even_start_is_on_record(tmp_path: Path) -> None:
    """Elsewhere "if a flow doesn't even start, it doesn't register"."""
    file = tmp_path / "broken.py"
    file.write_text("import no_such_module\nfrom penstock import flow\n@flow\ndef f(): ...\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = "from penstock.cli import main; main()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        [*command, "run", f"{file}:f"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 1
    listed = subprocess.run(
        [*command, "runs", "--json"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=tmp_path,
    )
    (row,) = json.loads(listed.stdout)
    assert row["state"]["type"] == "FAILED"
    assert "no_such_module" in row["state"]["message"]


def test_the_older_cache_option_takes_any_function(record: Record, tmp_path: Path) -> None:
    """`cache_key_fn` by hand, as guides older than policies have it."""
    calls = []

    def by_day(context: Any, parameters: dict[str, Any]) -> str:
        return f"{context.task.name}-{parameters['day']}"

    @task(cache_key_fn=by_day)
    def load(day: str, verbose: bool) -> int:
        calls.append(day)
        return len(calls)

    @task(cache_key_fn=task_input_hash, log_prints=True)
    def shown(x: int) -> int:
        print(f"{runtime.task_run.name}")
        get_run_logger().info("done")
        return x

    @flow
    def days() -> list[int]:
        return [load("mon", True), load("mon", False), load("tue", True), shown(1), shown(1)]

    assert days() == [1, 1, 2, 1, 1]
    assert [row.state["name"] for row in record.tasks()] == [
        "Completed",
        "Cached",
        "Completed",
        "Completed",
        "Cached",
    ]


# ------------------------------------------------------------------------------------------ the folder itself


def test_every_example_is_named_in_the_list_and_explained() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    here = Path(__file__).read_text()
    for folder in sorted(path for path in EXAMPLES.iterdir() if path.is_dir() and any(path.glob("*.py"))):
        assert f"({folder.name}/README.md)" in listed
        assert (folder / "README.md").is_file()
        for file in folder.glob("*.py"):
            assert folder.name == "radio" or f"{folder.name}/{file.name}" in here


def test_the_scripts_run_as_they_are(tmp_path: Path) -> None:
    assert len(script("elevator/elevator.py", folder=tmp_path).splitlines()) == 20
    assert script("async_gather/gather.py", folder=tmp_path).split()[-1] == "9"
    assert script("branch/branch.py", 0, folder=tmp_path).split("\n")[:2] == 2 * ["finish: skipped"]
    said = script("rollback/rollback.py", folder=tmp_path).splitlines()
    assert said == ["True", "pipeline: the file is gone again", "'half-written' is too short", "False"]
    assert script("names/names.py", folder=tmp_path).startswith("('marvin-on-Friday'")
    csv = tmp_path / "small.csv"
    script("census/make_data.py", csv, 0.1, folder=tmp_path)
    assert script("census/census.py", csv, folder=tmp_path).startswith("(")
    script("trips/make_data.py", tmp_path / "web", folder=tmp_path)
    with gzip.open(tmp_path / "web" / "yellow" / "yellow_tripdata_2021-03.csv.gz", "rt") as file:
        assert file.readline().startswith("VendorID,")
