"""Values in files that processes map: what travels, who deletes what, where there is room."""

import fcntl
import gc
import os
import pickle
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock.runners import shared_memory
from penstock.runners.shared_memory import SharedMemory, cgroup_room

LARGE = 300_000  # numbers of eight bytes: more than a message takes


@pytest.fixture
def roots(tmp_path: Path) -> list[str]:
    found = [tmp_path / "memory", tmp_path / "disk"]
    for root in found:
        root.mkdir()
    return [str(root) for root in found]


@pytest.fixture
def memory(roots: list[str]) -> Iterator[SharedMemory]:
    made = SharedMemory.create(roots)
    yield made
    made.close()


def files(root: str) -> list[Path]:
    return [path for path in Path(root).rglob("*") if path.is_file()]


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"a": [1, 2]},
        b"x" * 3_000_000,
        np.arange(10.0),
        np.arange(100_000.0),
        np.arange(LARGE, dtype=float),
        [np.arange(LARGE, dtype=float), "text", np.ones(20)],
        np.arange(2.0 * LARGE)[::2],
        np.asfortranarray(np.ones((700, 700))),
        {"few": np.zeros((0, 3)), "many": np.ones(LARGE)},
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("private", [False, True])
def test_a_value_comes_back(memory: SharedMemory, value: Any, private: bool) -> None:
    packed, nbytes = memory.export(value)
    assert (packed[0] == "file") == (nbytes > shared_memory.SMALL)
    travelled = pickle.loads(pickle.dumps(packed))
    loaded = shared_memory.load(travelled, private=private)
    np.testing.assert_equal(loaded, value)
    assert pickle.dumps(packed).__sizeof__() < shared_memory.SMALL + 10_000


def test_what_the_standard_pickle_cannot_do_goes_by_cloudpickle(memory: SharedMemory) -> None:
    array = np.ones(LARGE)
    packed, _ = memory.export([array, lambda: 5])
    loaded = shared_memory.load(packed)
    assert loaded[1]() == 5
    assert loaded[0].sum() == LARGE


def test_a_value_that_cannot_be_pickled_leaves_no_file(memory: SharedMemory, roots: list[str]) -> None:
    with pytest.raises(TypeError):
        memory.export([np.ones(LARGE), (n for n in range(3))])
    assert files(roots[0]) == []


def test_readers_share_an_array_and_cannot_write_to_it(memory: SharedMemory) -> None:
    packed, _ = memory.export(np.zeros(LARGE))
    readers = [shared_memory.load(packed) for _ in range(2)]
    assert not any(reader.flags.writeable for reader in readers)
    assert not any(reader.flags.owndata for reader in readers)
    with pytest.raises(ValueError, match="read-only"):
        readers[0][0] = 1.0
    assert all(reader.ctypes.data % 64 == 0 for reader in readers)


def test_a_private_array_can_be_written_to_and_nobody_else_sees_it(memory: SharedMemory) -> None:
    packed, _ = memory.export(np.zeros(LARGE))
    mine = shared_memory.load(packed, private=True)
    mine[0] = 1.0
    assert shared_memory.load(packed)[0] == 0.0
    small, _ = memory.export(np.zeros(100_000))
    writable = shared_memory.load(small, private=True)
    writable[0] = 1.0
    assert shared_memory.load(small)[0] == 0.0


def test_an_array_that_was_read_only_stays_so(memory: SharedMemory) -> None:
    array = np.zeros(LARGE)
    array.setflags(write=False)
    packed, _ = memory.export(array)
    assert not shared_memory.load(packed, private=True).flags.writeable


def test_a_mapping_outlives_its_file_and_holds_no_descriptor(memory: SharedMemory) -> None:
    packed, _ = memory.export(np.arange(LARGE, dtype=float))
    before = len(os.listdir("/proc/self/fd"))
    readers = [shared_memory.load(packed) for _ in range(300)]
    assert len(os.listdir("/proc/self/fd")) == before
    shared_memory.remove(packed[1])
    assert {float(reader[-1]) for reader in readers} == {LARGE - 1.0}
    with pytest.raises(shared_memory.Vanished):
        shared_memory.load(packed)
    mapped = Path("/proc/self/maps").read_text().count(packed[1])
    assert mapped == 300
    del readers
    gc.collect()
    assert packed[1] not in Path("/proc/self/maps").read_text()


def test_a_value_is_copied_if_it_cannot_be_mapped(
    memory: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, _ = memory.export(np.arange(LARGE, dtype=float))
    monkeypatch.setattr(shared_memory, "_mmap", lambda *_: shared_memory._FAILED)
    assert shared_memory.load(packed)[-1] == LARGE - 1
    mine = shared_memory.load(packed, private=True)
    mine[0] = 5.0


# ------------------------------------------------------------------------- what other owners hold, too


def test_only_what_is_little_more_than_buffers_is_exported_as_such(memory: SharedMemory) -> None:
    array = np.arange(LARGE, dtype=float)
    packed = memory.export_buffers({"numbers": array, "text": "x"}, 1_000_000)
    assert packed is not None
    assert (shared_memory.load(packed)["numbers"] == array).all()
    assert memory.export_buffers(array, array.nbytes + 1) is None
    assert memory.export_buffers(list(range(1_000_000)), 1) is None
    assert memory.export_buffers(b"x" * 3_000_000, 1) is None
    assert memory.export_buffers(array[::2], 1) is None
    assert memory.export_buffers([np.ones(10_000) for _ in range(shared_memory.PARTS + 1)], 1) is None
    assert memory.export_buffers([array, lambda: 1], 1, by_value=False) is not None  # cloudpickle can
    assert memory.export_buffers([array, iter(memory._locks)], 1) is not None
    assert memory.export_buffers([array, threading.Lock()], 1) is None  # nobody can


def test_a_file_lasts_until_both_owners_have_let_go(memory: SharedMemory, roots: list[str]) -> None:
    other = SharedMemory.create(roots)
    packed, _ = memory.export(np.arange(LARGE, dtype=float))
    own = other.adopt(packed)
    assert own[1] != packed[1]
    assert os.stat(own[1]).st_nlink == 2
    memory.close()
    assert shared_memory.load(own)[-1] == LARGE - 1
    with pytest.raises(shared_memory.Vanished):
        other.adopt(packed)
    other.close()
    assert files(roots[0]) == []
    with pytest.raises(OSError, match="No such file"):
        other.adopt(own)


def test_the_end_of_a_mapping_is_told(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = memory.export([np.arange(LARGE, dtype=float)])
    told: list[int] = []
    value = shared_memory.load(packed, private=True, ended=lambda: told.append(1))
    part = value[0][5:7]
    del value
    gc.collect()
    assert told == []
    del part
    gc.collect()
    assert told == [1]
    monkeypatch.setattr(shared_memory, "_mmap", lambda *_: shared_memory._FAILED)
    assert shared_memory.load(packed, ended=lambda: told.append(2))[0][1] == 1.0
    assert told == [1, 2]


def test_the_proof_of_an_owner_is_read_and_nothing_else(memory: SharedMemory, tmp_path: Path) -> None:
    path, text = memory.proof()
    assert memory.proof() == (path, text)
    assert shared_memory.read_proof(path) == text
    other = tmp_path / "secret"
    other.write_text("secret")
    assert shared_memory.read_proof(str(other)) == ""
    memory.close()
    assert shared_memory.read_proof(path) == ""


def test_a_fork_deletes_nothing(memory: SharedMemory) -> None:
    packed, _ = memory.export(np.ones(LARGE))
    shared_memory.remove(packed[1], by=os.getpid() + 1)
    assert os.path.exists(packed[1])
    shared_memory.remove(packed[1], by=os.getpid())
    assert not os.path.exists(packed[1])


# -------------------------------------------------------------------------------------------- room


def test_files_are_for_this_user_alone(memory: SharedMemory, roots: list[str]) -> None:
    memory.export(np.ones(LARGE))
    (file,) = files(roots[0])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert file.parent.name.startswith(f"penstock-{os.getpid()}-")


def test_what_does_not_fit_into_memory_goes_to_the_next_place(
    memory: SharedMemory, roots: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    room = {memory.directories[0]: 100_000, memory.directories[1]: 1 << 40}
    monkeypatch.setattr(shared_memory, "_room", room.__getitem__)
    packed, _ = memory.export(np.ones(LARGE))
    assert packed[1].startswith(roots[1])
    room[memory.directories[1]] = 0
    with pytest.raises(OSError, match=r"no room for 2,400,\d+ bytes") as caught:
        memory.export(np.ones(LARGE))
    assert roots[0] in str(caught.value)


def test_a_place_that_fills_up_while_we_write_is_left_clean(
    memory: SharedMemory, roots: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.pwrite

    def pwrite(descriptor: int, data: Any, position: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(roots[0]) and position > 10_000:
            raise OSError(28, "No space left on device")
        return original(descriptor, data[:10_000], position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    packed, _ = memory.export(np.arange(LARGE, dtype=float))
    assert packed[1].startswith(roots[1])
    assert files(roots[0]) == []
    np.testing.assert_array_equal(shared_memory.load(packed), np.arange(LARGE))


def test_room_is_what_the_file_system_and_the_memory_leave() -> None:
    assert 0 < shared_memory._room("/dev/shm") <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert shared_memory._room("/no/such/place") == 0


def test_one_usable_place_is_enough(tmp_path: Path) -> None:
    made = SharedMemory.create([str(tmp_path / "missing"), str(tmp_path)])
    assert [os.path.dirname(directory) for directory in made.directories] == [str(tmp_path)]
    made.close()
    with pytest.raises(OSError, match="missing"):
        SharedMemory.create([str(tmp_path / "missing")])


# ----------------------------------------------------------------------------------------- janitor


def test_closing_deletes_everything_twice(memory: SharedMemory, roots: list[str]) -> None:
    memory.export(np.ones(LARGE))
    memory.close()
    memory.close()
    assert [os.listdir(root) for root in roots] == [[], []]


def test_a_fork_of_the_owner_deletes_nothing(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = memory.export(np.ones(LARGE))
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        memory.close()
    assert shared_memory.load(packed)[0] == 1.0


def test_the_sweep_after_a_dead_writer_keeps_what_somebody_holds(
    memory: SharedMemory, roots: list[str]
) -> None:
    writers = {name: SharedMemory(memory.directories, name) for name in ("1", "11")}
    kept = writers["1"].export(np.ones(LARGE))[0]
    writers["1"].export(np.ones(LARGE))
    other = writers["11"].export(np.ones(LARGE))[0]
    (Path(memory.directories[1]) / "1-77").touch()
    memory.sweep("1", {kept[1]})
    assert {str(path) for root in roots for path in files(root)} == {kept[1], other[1]}


DEAD = 1 << 30  # more than any system counts up to


def test_dead_owners_are_swept_and_live_ones_are_not(memory: SharedMemory, roots: list[str]) -> None:
    dead = Path(roots[0]) / f"penstock-{DEAD}-123-abcdef01"
    reused = Path(roots[1]) / f"penstock-{os.getpid()}-1-abcdef02"  # the same pid, started another time
    starting = Path(roots[0]) / f"penstock-{os.getpid()}-{shared_memory._started(os.getpid())}-abcdef03"
    elsewhere = Path(roots[0]) / f"penstock-{DEAD}-123-abcdef04"  # alive in another container
    strangers = [Path(roots[0]) / name for name in ("penstock-notes", "other-1-2-3", "penstock-x-1-2")]
    for directory in (dead, reused, starting, elsewhere, *strangers):
        directory.mkdir()
        (directory / "1-0").write_bytes(b"data")
    lock = os.open(elsewhere, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        shared_memory.sweep_dead_owners(roots)
    finally:
        os.close(lock)
    assert not dead.exists()
    assert not reused.exists()
    for kept in (starting, elsewhere, *strangers, *map(Path, memory.directories)):
        assert kept.exists()


def test_the_time_of_a_start_tells_processes_apart() -> None:
    assert shared_memory._started(os.getpid()).isdecimal()
    assert shared_memory._started(DEAD) == ""


def group(folder: Path, limit: str, used: int, cache: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")


def test_room_is_what_the_tightest_container_leaves(tmp_path: Path) -> None:
    own, root = tmp_path / "own", tmp_path / "fs"
    own.write_text("0::/outer/inner\n")
    group(root / "outer", "1000", 700, 100)
    group(root / "outer" / "inner", "max", 10, 0)
    assert cgroup_room(5_000, str(root), str(own)) == 400
    group(root / "outer" / "inner", "50", 10, 0)
    assert cgroup_room(5_000, str(root), str(own)) == 40
    group(root / "outer" / "inner", "50", 90, 0)
    assert cgroup_room(5_000, str(root), str(own)) == 0
    assert cgroup_room(5_000, str(tmp_path / "nothing"), str(own)) == 5_000
    assert cgroup_room(5_000, str(root), str(tmp_path / "nobody")) == 5_000
    own.write_text("not what it should be\n")
    assert cgroup_room(5_000, str(root), str(own)) == 5_000


def test_room_by_the_older_kind_of_limits(tmp_path: Path) -> None:
    own, folder = tmp_path / "own", tmp_path / "fs" / "memory"
    own.write_text("9:cpu,cpuacct:/\n4:memory:/docker/1\n")
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("300")
    (folder / "memory.usage_in_bytes").write_text("200")
    (folder / "memory.stat").write_text("total_inactive_file 50")
    assert cgroup_room(5_000, str(tmp_path / "fs"), str(own)) == 150
