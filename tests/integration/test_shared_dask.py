"""Large values that the worker processes of one host share on Dask: copies, files, deaths, fallbacks."""

from __future__ import annotations

import contextlib
import gc
import glob
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import psutil
import pytest

pytest.importorskip("distributed")

from penstock import flow, task, unmapped
from penstock.runners import dask_runtime, shared_memory
from penstock.runners.base import Submission
from penstock.runners.dask import DaskTaskRunner
from penstock.runners.dask_put import is_file

pytestmark = [
    pytest.mark.dask,
    pytest.mark.skipif(not shared_memory.memory_roots(), reason="needs /dev/shm"),
]

MIB = 1 << 20
LENGTH = 2 * MIB  # numbers of eight bytes


# ------------------------------------------------------------------------------------------------- what is looked at


def names_of(pids: set[int]) -> list[Path]:
    """Files of values that processes have in shared memory."""
    found = []
    for path in glob.glob(f"/dev/shm/{shared_memory._PREFIX}*/*"):
        if int(Path(path).parent.name.split("-")[1]) in pids and not path.endswith("proof"):
            found.append(Path(path))
    return found


def inodes(pids: set[int]) -> set[int]:
    found = set()
    for path in names_of(pids):
        with contextlib.suppress(OSError):
            found.add(path.stat().st_ino)
    return found


def received() -> int:
    """Bytes that the open TCP connections of this process have received, by the kernel's count."""
    import os
    import socket

    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            one = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue
        try:
            total += int.from_bytes(
                one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)[128:136], "little"
            )
        except OSError:
            pass
        finally:
            one.close()
    return total


def mapped_memory() -> dict[str, int]:
    """Kilobytes of this process in files of shared memory, by kind."""
    found: dict[str, int] = {}
    ours = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first, _, rest = line.partition(" ")
            if "-" in first and not first.endswith(":"):
                ours = "/dev/shm/penstock-" in line
            elif ours and rest.strip().endswith("kB"):
                found[first] = found.get(first, 0) + int(rest.split()[0])
    return found


@task
def make(length: int, *, form: str = "array") -> Any:
    array = np.arange(length, dtype=float)
    if form == "dict":
        return {"numbers": array, "text": "hello"}
    if form == "list":
        return list(range(length // 8))
    return array[::2] if form == "strided" else array


def seen_in(value: Any) -> dict[str, Any]:
    array = value["numbers"] if isinstance(value, dict) else np.asarray(value)
    return {
        "sum": float(array.sum()),
        "writeable": array.flags.writeable,
        "memory": mapped_memory(),
        "pid": os.getpid(),
    }


@task
def look(value: Any) -> dict[str, Any]:
    return seen_in(value)


@task(inputs="shared")
def scribble(value: Any) -> float:
    value["numbers"][:] = -1.0
    return float(value["numbers"].sum())


def expected(length: int) -> float:
    return length * (length - 1) / 2


class Cluster:
    """A runner, and its workers."""

    def __init__(self, runner: DaskTaskRunner) -> None:
        self.runner = runner

    @property
    def workers(self) -> list[str]:
        return sorted(self.runner.client.run(os.getpid))

    @property
    def pids(self) -> set[int]:
        return set(self.runner.client.run(os.getpid).values())

    def pid_of(self, address: str) -> int:
        return int(self.runner.client.run(os.getpid, workers=[address])[address])

    def received(self) -> dict[str, int]:
        return dict(self.runner.client.run(received))


@pytest.fixture(scope="module", autouse=True)
def small_values_are_shared() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr(dask_runtime, "SHARED_FROM", MIB)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # to workers that cannot import tests
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    patch.undo()


@pytest.fixture(scope="module")
def cluster(small_values_are_shared: None) -> Iterator[Cluster]:
    runner = DaskTaskRunner(
        cluster_kwargs={"n_workers": 4, "threads_per_worker": 1, "memory_limit": "2GB"}
    ).open()
    yield Cluster(runner)
    pids = Cluster(runner).pids | {os.getpid()}
    runner.close()
    runner.shutdown()
    assert not [one for one in glob.glob("/dev/shm/penstock-*") if int(one.split("-")[1]) in pids]


def on(worker: str) -> dict[str, Any]:
    return {"workers": [worker]}


def hand_over(cluster: Cluster, form: str = "array", runner: DaskTaskRunner | None = None) -> dict[str, Any]:
    """Make a value on the first worker and look at it on each."""

    @flow(task_runner=runner or cluster.runner)
    def run() -> dict[str, Any]:
        workers, pids = cluster.workers, cluster.pids
        made = make.with_options(**on(workers[0])).submit(LENGTH, form=form)
        made.wait()
        before = cluster.received()
        others = [look.with_options(**on(one)).submit(made) for one in workers[1:]]
        seen = [one.result() for one in others]
        after = cluster.received()
        seen += [look.with_options(**on(workers[0])).submit(made).result()]
        return {
            "seen": seen,
            "names": len(names_of(pids)),
            "inodes": len(inodes(pids)),
            "received": [after[one] - before[one] for one in workers[1:]],
        }

    found: dict[str, Any] = run()
    return found


# ------------------------------------------------------------------------------------------------- results


def test_consumers_in_other_processes_map_one_file(cluster: Cluster, wait_until: Callable[..., None]) -> None:
    found = hand_over(cluster)
    assert [one["sum"] for one in found["seen"]] == [expected(LENGTH)] * 4
    assert len({one["pid"] for one in found["seen"]}) == 4
    assert (found["inodes"], found["names"]) == (1, 4)
    assert max(found["received"]) < MIB
    assert not any(one["writeable"] for one in found["seen"])  # a view that refuses, as everywhere
    last = found["seen"][-1]["memory"]  # the producer has given its own copy up
    assert last["Rss:"] >= LENGTH * 8 / 1024
    assert last["Anonymous:"] == 0
    assert last["Pss:"] <= LENGTH * 8 / 1024 / 3
    wait_until(lambda: not names_of(cluster.pids))


def test_arrays_inside_of_a_value_are_shared_and_a_write_stays_in_its_process(cluster: Cluster) -> None:
    @flow(task_runner=cluster.runner)
    def run() -> Any:
        first, second, third, _ = cluster.workers
        made = make.with_options(**on(first)).submit(LENGTH, form="dict")
        before = look.with_options(**on(second)).submit(made).result()
        written = scribble.with_options(inputs="shared", **on(second)).submit(made).result()
        after = [look.with_options(**on(one)).submit(made).result() for one in (first, third)]
        return before, written, after

    before, written, after = run()
    assert not before["writeable"]
    assert written == -LENGTH
    assert [one["sum"] for one in (before, *after)] == [expected(LENGTH)] * 3


@pytest.mark.parametrize("form", ["list", "strided"])
def test_what_is_no_buffer_goes_the_ordinary_way(cluster: Cluster, form: str) -> None:
    found = hand_over(cluster, form)
    assert len({one["sum"] for one in found["seen"]}) == 1
    # TCP makes a strided array contiguous: who has received it may share it.
    assert form == "strided" or found["names"] == 0
    assert found["inodes"] < 4


def test_it_can_be_turned_off(cluster: Cluster) -> None:
    runner = DaskTaskRunner(cluster=cluster.runner.client.cluster, shared_memory="off")
    with runner:
        found = hand_over(cluster, runner=runner)
        assert runner._placement is None
    assert [one["sum"] for one in found["seen"]] == [expected(LENGTH)] * 4
    assert found["names"] == 0
    assert min(found["received"]) > LENGTH * 4
    with pytest.raises(ValueError, match="'shared_memory' must be 'auto' or 'off'"):
        DaskTaskRunner(shared_memory="perhaps")


def test_a_value_that_was_spilled_is_the_same_and_can_be_shared_anew(cluster: Cluster) -> None:
    def spill(dask_worker: Any) -> int:
        while dask_worker.data.memory:
            dask_worker.data.evict()
        return len(dask_worker.data.disk)

    @flow(task_runner=cluster.runner)
    def run() -> Any:
        first, second, third, fourth = cluster.workers
        made = make.with_options(**on(first)).submit(LENGTH)
        sums = [look.with_options(**on(second)).submit(made).result()["sum"]]
        files = [inodes({cluster.pid_of(one)}) for one in (first, second)]
        spilled = cluster.runner.client.run(spill, workers=[first, second])
        files += [inodes({cluster.pid_of(one)}) for one in (first, second)]
        sums += [look.with_options(**on(one)).submit(made).result()["sum"] for one in (second, third, fourth)]
        return sums, files, spilled, len(inodes(cluster.pids))

    sums, files, spilled, again = run()
    assert sums == [expected(LENGTH)] * 4
    assert files[0] == files[1]
    assert len(files[0]) == 1
    assert all(spilled.values())
    assert files[2:] == [set(), set()]
    assert again >= 1


def test_a_consumer_that_cannot_map_gets_the_bytes(cluster: Cluster) -> None:
    """One has lost its directory, for the other the file is gone."""

    def lose_directory() -> None:
        import glob
        import os
        import shutil

        for path in glob.glob(f"/dev/shm/penstock-{os.getpid()}-*"):
            shutil.rmtree(path)

    @flow(task_runner=cluster.runner)
    def run() -> Any:
        first, second, third, fourth = cluster.workers
        made = make.with_options(**on(first)).submit(LENGTH)
        sums = [look.with_options(**on(second)).submit(made).result()["sum"]]
        cluster.runner.client.run(lose_directory, workers=[third])
        sums += [look.with_options(**on(third)).submit(made).result()["sum"]]
        for path in names_of(cluster.pids):
            path.unlink()
        sums += [look.with_options(**on(fourth)).submit(made).result()["sum"]]
        return sums

    hand_over(cluster)  # each has a directory
    assert run() == [expected(LENGTH)] * 3
    cluster.runner.client.restart_workers(cluster.workers)


def test_without_room_for_a_file_it_is_said_once_and_the_bytes_go(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, wait_until: Callable[..., None]
) -> None:
    def limit(size: int) -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    first = cluster.workers[0]
    cluster.runner.client.run(limit, MIB, workers=[first])
    try:
        with caplog.at_level(logging.WARNING, "penstock.runners.dask"):
            found = [hand_over(cluster) for _ in range(2)]
            wait_until(lambda: "goes by TCP" in caplog.text)
    finally:
        cluster.runner.client.run(limit, resource.RLIM_INFINITY, workers=[first])
    assert {one["sum"] for each in found for one in each["seen"]} == {expected(LENGTH)}
    assert caplog.text.count("goes by TCP") == 1
    assert not names_of({cluster.pid_of(first)})


# ------------------------------------------------------------------------------------------------- deaths


def test_consumers_keep_what_they_have_mapped_when_the_producer_dies(
    cluster: Cluster, wait_until: Callable[..., None]
) -> None:
    @flow(task_runner=cluster.runner)
    def run() -> Any:
        first, second, third, _ = cluster.workers
        pid = cluster.pid_of(first)
        made = make.with_options(**on(first)).submit(LENGTH)
        sums = [look.with_options(**on(second)).submit(made).result()["sum"]]
        assert names_of({pid})
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not glob.glob(f"/dev/shm/penstock-{pid}-*"))  # swept while the runner is open
        sums += [look.with_options(**on(one)).submit(made).result()["sum"] for one in (second, third)]
        return sums, len(inodes(cluster.pids))

    sums, files = run()
    assert sums == [expected(LENGTH)] * 3
    assert files == 1
    wait_until(lambda: len(cluster.workers) == 4, seconds=30)


def test_a_producer_killed_in_the_middle_of_a_hand_over_leaves_nothing(
    cluster: Cluster, wait_until: Callable[..., None]
) -> None:
    length = 40 * MIB

    @flow(task_runner=cluster.runner)
    def run() -> Any:
        made = make.submit(length)  # anywhere: it is made again
        made.wait()
        first = made.where
        second = next(one for one in cluster.workers if one != first)
        pid = cluster.pid_of(first)
        late = look.with_options(**on(second)).submit(made)
        wait_until(lambda: bool(names_of({pid})))
        os.kill(pid, signal.SIGKILL)
        late.wait(timeout=60)
        return pid, late.state.is_final()

    pid, final = run()
    assert final
    wait_until(lambda: not glob.glob(f"/dev/shm/penstock-{pid}-*"))
    wait_until(lambda: len(cluster.workers) == 4, seconds=30)
    wait_until(lambda: not names_of(cluster.pids))


# ------------------------------------------------------------------------------------------------- arguments


@task
def part(array: Any, number: int) -> dict[str, Any]:
    return {**seen_in(array), "first": float(array[number])}


def test_a_large_argument_is_written_once_for_all_workers(
    cluster: Cluster, wait_until: Callable[..., None]
) -> None:
    own = {os.getpid()}

    @flow(task_runner=cluster.runner)
    def run(array: Any) -> Any:
        before = cluster.received()
        futures = part.map(unmapped(array), range(16))
        array[:] = 0.0  # the copy that was written is what tasks get
        files = inodes(own)
        seen = [one.result() for one in futures]
        after = cluster.received()
        return seen, files, inodes(cluster.pids), sum(after.values()) - sum(before.values())

    array = np.arange(LENGTH, dtype=float)
    seen, files, others, moved = run(array)
    assert [one["first"] for one in seen] == [float(number) for number in range(16)]
    assert {one["sum"] for one in seen} == {expected(LENGTH)}
    assert len({one["pid"] for one in seen}) > 1
    assert len(files) == 1
    assert not others
    assert moved < 2 * MIB
    assert {one["memory"]["Anonymous:"] for one in seen} == {0}
    del array
    gc.collect()
    wait_until(lambda: not names_of(own))
    wait_until(lambda: not any(one.get("Rss:") for one in cluster.runner.client.run(mapped_memory).values()))


def test_a_file_is_deleted_with_the_last_reference_and_fetched_without_a_worker(cluster: Cluster) -> None:
    array = np.arange(LENGTH, dtype=float)
    ref = cluster.runner.put([array])[0]
    (path,) = names_of({os.getpid()})
    assert path.stat().st_mode & 0o777 == 0o600
    (fetched,) = cluster.runner.fetch([ref])
    fetched[0] = 7.0
    assert (cluster.runner.fetch([ref])[0] == array).all()
    del ref
    assert not path.exists()
    small, other = cluster.runner.put([np.arange(10), list(range(500_000))])
    assert not names_of({os.getpid()})
    assert cluster.runner.fetch([small])[0].tolist() == list(range(10))
    assert len(cluster.runner.fetch([other])[0]) == 500_000


def test_an_argument_without_room_goes_the_ordinary_way(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    array = np.arange(LENGTH, dtype=float)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
    try:
        refs = cluster.runner.put([array]) + cluster.runner.put([array])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert not names_of({os.getpid()})
    assert all((one == array).all() for one in cluster.runner.fetch(refs))
    assert caplog.text.count("a large argument goes by TCP") == 1
    cluster.runner.release(refs)


# ------------------------------------------------------------------------------------------------- other clusters


@pytest.fixture
def foreign(tmp_path: Path, wait_until: Callable[..., None]) -> Iterator[Callable[..., str]]:
    """Start schedulers and workers as somebody else would, where penstock is not installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "sys.path[:] = [one for one in sys.path if not os.path.isdir(os.path.join(one, 'penstock'))]\n"
    )
    file = tmp_path / "scheduler.json"
    log = (tmp_path / "log.txt").open("w")
    shared: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}, "cwd": tmp_path}
    shared |= {"stdout": subprocess.DEVNULL, "stderr": log}
    processes: list[subprocess.Popen[bytes]] = []

    def start(name: str, *options: str, before: tuple[str, ...] = ()) -> str:
        command = [*before, sys.executable, "-m", f"distributed.cli.dask_{name}", *options]
        processes.append(subprocess.Popen(command, **shared))
        if name == "scheduler":
            wait_until(file.exists, seconds=30)
        return str(json.loads(file.read_text())["address"])

    yield start
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait()
    log.close()
    shared_memory.sweep_dead_owners()


SCHEDULER = ("--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0")


def test_an_attached_cluster_shares_and_is_left_as_it_was(foreign: Callable[..., str]) -> None:
    address = foreign("scheduler", *SCHEDULER, "--scheduler-file", "scheduler.json")
    foreign("worker", address, "--nthreads", "1", "--no-dashboard", "--nworkers", "3")
    from distributed import Client

    own = set(glob.glob(f"/dev/shm/penstock-{os.getpid()}-*"))  # of the runner of the other tests

    def handler(dask_worker: Any) -> tuple[str, list[str], list[str]]:
        names = [name for name in dask_worker.handlers if "penstock" in str(name)]
        return dask_worker.handlers["get_data"].__qualname__, names, list(dask_worker.plugins)

    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(3)
        before = client.run(handler)
        pids = set(client.run(os.getpid).values())
        with DaskTaskRunner(address=address) as runner:
            assert "Sharing" in next(iter(client.run(handler).values()))[0]
            found = hand_over(Cluster(runner))
            assert [one["sum"] for one in found["seen"]] == [expected(LENGTH)] * 3
            assert (found["inodes"], found["names"]) == (1, 3)
            assert max(found["received"]) < MIB
            array = np.arange(LENGTH, dtype=float)
            ref = runner.put([array])[0]
            assert names_of({os.getpid()})
            del ref
        deadline = time.monotonic() + 10
        while client.run(handler) != before:
            assert time.monotonic() < deadline, client.run(handler)
        assert not [one for one in glob.glob("/dev/shm/penstock-*") if int(one.split("-")[1]) in pids]
    assert set(glob.glob(f"/dev/shm/penstock-{os.getpid()}-*")) <= own


def test_a_worker_that_does_not_see_the_memory_gets_bytes(
    foreign: Callable[..., str], wait_until: Callable[..., None]
) -> None:
    """It stands for one of another host: the same address, but a memory of its own."""
    private = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh")
    if subprocess.run([*private, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    address = foreign("scheduler", *SCHEDULER, "--scheduler-file", "scheduler.json")
    foreign("worker", address, "--nthreads", "1", "--no-dashboard", "--name", "near")
    array = np.arange(LENGTH, dtype=float)

    def sum_of_placed(module: str, placed: Any) -> float:
        import importlib

        with importlib.import_module(module).resolved((placed,)) as (value,):
            return float(value.sum())

    with DaskTaskRunner(address=address) as runner:
        runner.client.wait_for_workers(1)
        cluster = Cluster(runner)

        @flow(task_runner=runner)
        def run() -> Any:
            first = part.submit(array, 1).result()
            (near,) = cluster.workers
            ref = runner.put([array])[0]
            assert names_of({os.getpid()})
            options = ("--nthreads", "1", "--no-dashboard", "--no-nanny", "--name", "far")
            foreign("worker", address, *options, before=private)
            wait_until(lambda: len(cluster.workers) == 2, seconds=30)
            (far,) = set(cluster.workers) - {near}

            # What was sent before the far one was known: it asks the near one.
            name = runner._runtime.memory.__name__  # type: ignore[union-attr]
            asked = runner.client.submit(sum_of_placed, name, ref.handle.key, workers=[far]).result()

            # What is sent from now on goes Dask's way.
            runner._placement._asked = 0.0  # type: ignore[union-attr]
            again = Submission(("again-00000000", 0), b"", b"", b"", refs=(ref,))
            runner._placement.scatter_unseen([again], runner._scatter_again)  # type: ignore[union-attr]
            assert not is_file(ref.handle)
            assert (runner.fetch([ref])[0] == array).all()

            made = make.with_options(**on(near)).submit(LENGTH)
            seen = look.with_options(**on(far)).submit(made).result()
            late = part.with_options(**on(far)).map(unmapped(array), [2, 3])
            return first["sum"], asked, seen, [one.result()["sum"] for one in late]

        first, asked, seen, late = run()
        assert [first, asked, seen["sum"], *late] == [expected(LENGTH)] * 5
        assert not seen["memory"]
        gc.collect()
        assert not names_of({os.getpid()})
