"""The text of what runs on workers that need not have penstock: the folder `worker`, and files beside it.

`dask_runtime` sends it as a package in a zip file, `ray_tasks.entry` inside of the function that Ray exports.
"""

from __future__ import annotations

import functools
from pathlib import Path

_FOLDER = Path(__file__).parent


@functools.cache
def sources(*beside: str) -> dict[str, str]:
    """Return the text of each file that is shipped.

    Parameters
    ----------
    *beside : str
        Files of this folder that go along with `worker`.

    Returns
    -------
    dict of str to str
        Path below this folder → text.
    """
    paths = [*sorted((_FOLDER / "worker").glob("*.py")), *(_FOLDER / name for name in beside)]
    return {path.relative_to(_FOLDER).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def module_of(path: str) -> str:
    """Return the name of a shipped module, without the package around it."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


__all__ = ["module_of", "sources"]
