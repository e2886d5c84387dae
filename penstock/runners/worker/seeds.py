"""The random seed of a run, the same at every attempt."""

from __future__ import annotations

import hashlib
from typing import Any


def seed_from(around: int, task: str, ordinal: int, index: int) -> int:
    """Make the random seed of a task run, 64 bits.

    Parameters
    ----------
    around : int
        Seed of the run whose code calls the task.
    task : str
        Name of the task.
    ordinal : int
        The how-manieth call of that task it is there.
    index : int
        Of an element of a map; -1 for any other call.
    """
    text = f"{around}/{task}/{ordinal}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def seed_of(order: Any) -> int:
    """Return the random seed of the run that a work order belongs to, the same at every attempt.

    Good for ``random.Random(seed)`` and ``numpy.random.default_rng(seed)``.
    """
    around = order["context"].get("seed", 0)
    return seed_from(around, order["task"], order.get("ordinal", 0), order.get("index", -1))
