"""Results in object storage: a real S3 endpoint on this machine, spoken to by the workers."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

import s3fs
from moto.server import ThreadedMotoServer

import penstock
from penstock import MissingResult, ResultCorrupt, ResultStorage, StorageRefused, flow, load_result, task
from penstock.engine import results
from penstock.runners.worker import result_store
from tests.record import Record

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),  # aiohttp and werkzeug forget some
]

PART = 5 << 20  # bytes of the smallest part that S3 takes


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def storage(endpoint: str, request: pytest.FixtureRequest) -> Iterator[ResultStorage]:
    """An empty bucket."""
    options = {
        "endpoint_url": endpoint,
        "key": "night",
        "secret": "shift",
        "default_block_size": PART,
    }
    storage = ResultStorage("s3://penstock-results/nightly", options)
    files = s3fs.S3FileSystem(**options)
    files.mkdir("penstock-results")
    yield storage
    files.invalidate_cache()
    files.rm("penstock-results", recursive=True)


def objects(storage: ResultStorage) -> list[str]:
    files = s3fs.S3FileSystem(**storage.options)
    files.invalidate_cache()
    return sorted(path.rpartition("/")[2] for path in files.find("penstock-results"))


@task
def ramp(count: int) -> Any:
    return np.arange(count, dtype="f8")


@task
def pid() -> int:
    return os.getpid()


def on_processes(body: Any, storage: ResultStorage, **options: Any) -> Any:
    runner = penstock.ProcessPoolTaskRunner(2)
    return flow(task_runner=runner, result_storage=storage, **options)(body)()


def order(storage: ResultStorage) -> dict[str, Any]:
    return {
        "storage": storage.url,
        "options": dict(storage.options),
        "key": "f/{run}",
        "format": "auto",
        "over": 0,
    }


def test_workers_write_to_the_bucket_and_results_outlive_them(storage: ResultStorage, record: Record) -> None:
    futures: list[Any] = []

    def body() -> None:
        futures.extend([ramp.submit(10), ramp.submit(3 * PART // 8), pid.submit()])  # … and in three parts
        for future in futures:
            future.wait()

    on_processes(body, storage)
    assert record.flow().state["driver_bytes"] == 0
    small, large, who = (results.load(future._run) for future in futures)
    assert (
        [future.result().shape for future in futures[:2]]
        == [small.shape, large.shape]
        == [(10,), (3 * PART // 8,)]
    )
    assert np.array_equal(large, np.arange(3 * PART // 8))
    assert who != os.getpid()
    where = [row.state["stored"] for row in record.tasks()]
    flow_run = record.flow().id
    folder = f"s3://penstock-results/nightly/{flow_run}/"
    assert len(set(where)) == 3
    assert all(place.startswith(folder) and place.endswith(".result") for place in where)
    assert load_result(where[0], storage.options).shape == (10,)
    assert len(objects(storage)) == 4
    assert "shift" not in repr([event.body for event in record.events]), "credentials stay out of the record"


def test_the_first_commit_wins(storage: ResultStorage) -> None:
    value, _ = result_store.commit("first", order(storage), "aa", 1)
    again, said = result_store.commit(np.zeros(PART // 8), order(storage), "aa", 2)
    assert (value, again, said["duplicate"]) == ("first", "first", True)
    assert objects(storage) == ["aa.result"]


def test_what_a_killed_writer_left_is_removed_by_the_next_attempt(storage: ResultStorage) -> None:
    files = s3fs.S3FileSystem(**storage.options)
    files.pipe_file("penstock-results/nightly/f/aa-1-dead.npy", b"half")
    result_store.commit(5, order(storage), "aa", 2)
    assert objects(storage) == ["aa.result"]


def test_a_damaged_object_is_set_aside(storage: ResultStorage) -> None:
    _, said = result_store.commit(np.zeros(PART // 8), order(storage), "aa", 1)
    (data,) = [name for name in objects(storage) if name.endswith(".npy")]
    files = s3fs.S3FileSystem(**storage.options)
    whole = files.cat_file(f"penstock-results/nightly/f/{data}")
    files.pipe_file(f"penstock-results/nightly/f/{data}", whole[:-1] + b"\1")
    where = results.location(said)
    with pytest.raises(ResultCorrupt, match=r"its checksum is wrong; it was set aside"):
        load_result(where, storage.options)
    assert objects(storage) == [f"{data}.corrupt", "aa.result.corrupt"]
    with pytest.raises(MissingResult, match="there is no s3://"):
        load_result(where, storage.options)


def test_a_bucket_that_is_not_there_fails_the_run_alone(storage: ResultStorage, record: Record) -> None:
    absent = ramp.with_options(
        result_storage=ResultStorage("s3://no-such-bucket/x", storage.options), retries=1, name="absent"
    )

    def body() -> Any:
        bad, large, good = absent.submit(3), absent.submit(PART), ramp.submit(4)
        for future in (bad, large):
            with pytest.raises(
                StorageRefused, match=r"the result storage s3://no-such-bucket/x refuses: \w+: .*bucket"
            ):
                future.result()
        return good.result().shape

    assert on_processes(body, storage) == (4,)
    rows = record.tasks("absent")
    assert [(row.type, row.attempt, row.state["cause"]) for row in rows] == [
        ("FAILED", 2, "StorageRefused")
    ] * 2


def test_without_credentials_the_run_fails_in_one_sentence(
    endpoint: str, storage: ResultStorage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    bare = ResultStorage("s3://penstock-results/x", {"endpoint_url": endpoint})

    def body() -> None:
        ramp.submit(3).result()

    with pytest.raises(StorageRefused, match="refuses: NoCredentialsError: Unable to locate credentials"):
        on_processes(body, bare)


def test_an_endpoint_that_does_not_answer_hangs_nobody(storage: ResultStorage) -> None:
    options = {
        **storage.options,
        "endpoint_url": "http://127.0.0.1:9",
        "config_kwargs": {"retries": {"max_attempts": 1}},
    }

    def body() -> None:
        ramp.submit(3).result()

    with pytest.raises(StorageRefused, match="refuses: "):
        on_processes(body, ResultStorage("s3://penstock-results/x", options))


def test_cached_results_are_found_in_a_bucket(storage: ResultStorage, record: Record) -> None:
    cached = ramp.with_options(cache_policy=penstock.INPUTS)

    def body() -> float:
        made = cached.map([10, 200_000])
        return float(sum(value.sum() for value in made.result()))

    assert on_processes(body, storage) == on_processes(body, storage) == 45.0 + 199_999 * 100_000
    names = [row.state["name"] for row in record.tasks("ramp")]
    assert names == ["Completed"] * 2 + ["Cached"] * 2


def test_a_bucket_has_the_results_of_a_transaction_after_its_commit(
    storage: ResultStorage, record: Record
) -> None:
    cached = ramp.with_options(cache_policy=penstock.INPUTS)

    def body(stop: bool) -> list[str]:
        with penstock.transaction():
            cached.map([10, 200_000, 30]).wait()
            before = objects(storage)
            if stop:
                raise KeyError
        return before

    with pytest.raises(KeyError):
        on_processes(lambda: body(True), storage)
    assert objects(storage) == []
    before = on_processes(lambda: body(False), storage)
    assert all(".staged-" in name for name in before)
    after = [name for name in objects(storage) if name.endswith(".result")]
    assert len(after) == 3
    assert not any(".staged-" in name for name in after)
    on_processes(lambda: body(False), storage)
    assert [row.state["name"] for row in record.tasks("ramp")] == [
        *["RolledBack"] * 3,
        *["Completed"] * 3,
        *["Cached"] * 3,
    ]
