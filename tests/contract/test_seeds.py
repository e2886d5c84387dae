"""Seeds: the same at every attempt, on every runner, in every run of the flow; different for every call."""

from pathlib import Path
from typing import Any

from penstock import flow, task
from penstock.runners.base import TaskRunner
from penstock.runners.worker.running import current
from penstock.runners.worker.seeds import seed_of
from tests.conftest import InFlow


def seed_here() -> int:
    return seed_of(current().order)


@task
def seed(x: Any = 0) -> int:
    return seed_here()


@task
def seeds_inside(n: int) -> list[int]:
    return [
        seed_here(),
        *(future.result() for future in [seed.submit(number) for number in range(n)]),
        seed(0),
    ]


@flow(name="inner")
def inner() -> Any:
    return [seed.submit(), seed()]


def all_seeds() -> Any:
    return [
        seed(1),
        seed.submit(2),
        seed.map(range(5)),
        seed.with_options(chunk_size=1).map(range(2)),
        seeds_inside.submit(2),
        inner(),
        inner(),
    ]


# What this flow gave on the day the rule was made: a seed must not change with a release.
EXPECTED = [
    1403651501118183841,
    16162831566589165729,
    16465724305726044620,
    17880330149204270677,
    6355598189407604261,
    14110337763202766225,
    16820670212415967861,
    1692747110160739222,
    978241060502391725,
    14683974248329185236,
    6317172353704065423,
    993274134491642314,
    5819802065813196047,
    379853751207067715,
    16950820518639196556,
    15203861835406682882,
    1350416923759757554,
]


def flat(value: Any) -> list[int]:
    return [one for item in value for one in flat(item)] if isinstance(value, list) else [value]


def test_seeds_are_the_same_in_every_run(runner: TaskRunner) -> None:
    made = flow(task_runner=runner, name="seeded")(all_seeds)
    first, second = flat(made()), flat(made())
    assert first == second
    assert len(set(first)) == len(first) == 17
    assert first == EXPECTED
    other = flow(task_runner=runner, name="other")(all_seeds)
    assert not set(flat(other())) & set(first)


def test_a_seed_is_the_same_at_every_attempt(in_flow: InFlow, tmp_path: Path) -> None:
    @task(retries=2)
    def fragile(name: str) -> list[str]:
        with (tmp_path / name).open("a") as file:
            file.write(f"{seed_here()}\n")
        lines = (tmp_path / name).read_text().split()
        if len(lines) < 3:
            raise ConnectionError
        return lines

    for lines in in_flow(lambda: [fragile.submit("a"), fragile("b"), *fragile.map(["c", "d"])]):
        assert len(set(lines)) == 1


def test_a_seed_makes_numpy_reproducible(in_flow: InFlow) -> None:
    @task
    def noise() -> float:
        import numpy as np

        return float(np.random.default_rng(seed_here()).normal())

    first, second = (in_flow(lambda: noise.submit()) for _ in range(2))
    assert first == second
