"""One element of a map: its id, which every process computes alike, and its work order."""

from __future__ import annotations

import functools
import hashlib
from typing import Any


class ElementOrder(dict[str, Any]):
    """The work order of one element, whose id and name are made when somebody asks."""

    def __missing__(self, name: str) -> Any:
        if name == "run":
            self[name] = element_id(self["map"], self["index"])
        elif name == "name":
            self[name] = f"{self['task']}-{self['index']}"
        else:
            raise KeyError(name)
        return self[name]


@functools.lru_cache(1024)
def _map_digest(map_id: str) -> tuple[str, int]:
    digest = hashlib.blake2b(map_id.encode(), digest_size=6).hexdigest()
    prefix = f"{map_id[:12]}8{digest[:3]}{'89ab'[int(digest[3], 16) & 3]}"
    return prefix, int(digest[4:], 16)


def element_id(map_id: str, index: int) -> str:
    """Return the id of one element of a map; every process computes the same one.

    Parameters
    ----------
    map_id : str
        Id of the map run.
    index : int
        Position of the element, below 2 ** 28.

    Returns
    -------
    str
        32 hexadecimal digits (a UUIDv8): the time of the map, 14 bits of a digest of its id, the index,
        and 32 bits in which index and digest are mixed, so that its last digits tell elements apart as
        those of any id do. The ids of a map stand together and in order wherever ids are sorted; a
        store that keeps its rows by id writes them one after the other.
    """
    prefix, salt = _map_digest(map_id)
    return f"{prefix}{index:07x}{(index * 0x9E3779B1 + salt) & 0xFFFFFFFF:08x}"
