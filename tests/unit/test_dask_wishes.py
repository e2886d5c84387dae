"""Wishes of tasks in Dask's words."""

from penstock.runners.base import Options
from penstock.runners.dask_wishes import is_plain, translated, unmet

PLAIN = {
    "tcp://10.0.0.1:1": {"name": "small", "resources": {}, "memory_limit": 4e9},
    "tcp://10.0.0.2:1": {"name": "large", "resources": {"GPU": 1}, "memory_limit": 32e9},
}
DECLARED = {"tcp://10.0.0.1:1": {"name": 0, "resources": {"memory": 1e9, "threads": 8}, "memory_limit": 0}}


def asking(**resources: float) -> Options:
    return Options(tuple(sorted(resources.items())))


def test_what_any_worker_can_do() -> None:
    assert is_plain(Options())
    assert not is_plain(Options(threads=2))
    assert unmet(Options(), PLAIN) == ""


def test_memory_is_compared_with_limits_where_nobody_declares_it() -> None:
    assert translated(asking(memory=1e9), PLAIN) == Options()
    assert translated(asking(memory=20e9), PLAIN) == Options(workers=("tcp://10.0.0.2:1",))
    assert translated(asking(memory=99e9), PLAIN) == asking(memory=99e9)
    assert unmet(asking(memory=20e9), PLAIN) == ""
    assert "the most that workers offer is memory=3.2e+10" in unmet(asking(memory=99e9), PLAIN)


def test_what_workers_declare_is_asked_for() -> None:
    wish = Options((("memory", 5e8),), threads=4)
    assert translated(wish, DECLARED).resources == (("memory", 5e8), ("threads", 4))
    assert translated(Options(threads=4), PLAIN).resources == ()
    assert unmet(wish, DECLARED) == ""
    assert "threads=16" in unmet(Options(threads=16), DECLARED)


def test_one_worker_has_to_offer_all() -> None:
    assert unmet(asking(GPU=1, memory=20e9), PLAIN) == ""
    assert unmet(Options((("GPU", 1.0),), workers=("small",)), PLAIN) != ""
    assert unmet(Options(workers=("large",)), PLAIN) == ""
    assert unmet(Options(workers=("10.0.0.1",)), PLAIN) == ""
    assert unmet(Options(workers=("nobody", "noone")), PLAIN) == "no worker is called nobody or noone"
    assert unmet(asking(GPU=1), {}) == "the cluster has no workers"
