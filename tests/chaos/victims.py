"""Processes that are killed and stopped at random; drivers now, servers may join them."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable

Start = Callable[[int], "subprocess.Popen[str]"]


class Victims:
    """Keeps some processes of each kind going while it kills and stops them.

    Parameters
    ----------
    kinds : dict
        How many of each kind live at a time, and what starts the n-th one of it.
    chance : Random
        Decides.
    """

    def __init__(self, kinds: dict[str, tuple[int, Start]], chance: random.Random) -> None:
        self._kinds = kinds
        self._chance = chance
        self._alive: list[tuple[str, subprocess.Popen[str]]] = []
        self._started = 0
        self.kills = self.stops = self.ends = 0

    def rage(self, seconds: float, pause: float) -> None:
        """Kill or stop one of them after each pause, for some seconds."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._fill()
            time.sleep(self._chance.uniform(0.2, 1.8) * pause)  # work:
            _, victim = self._chance.choice(self._alive)
            if self._chance.random() < 0.7:
                victim.send_signal(signal.SIGKILL)
                victim.wait(10)
                self.kills += 1
            elif victim.poll() is None:
                os.kill(victim.pid, signal.SIGSTOP)
                time.sleep(self._chance.uniform(0.05, 0.5))  # work:
                os.kill(victim.pid, signal.SIGCONT)
                self.stops += 1

    def _fill(self) -> None:
        self.ends += sum(one.poll() == 0 for _, one in self._alive)
        self._alive = [(kind, one) for kind, one in self._alive if one.poll() is None]
        for kind, (count, start) in self._kinds.items():
            for _ in range(count - sum(name == kind for name, _ in self._alive)):
                self._started += 1
                self._alive.append((kind, start(self._started)))

    def end(self) -> None:
        """Kill what is left."""
        for _, one in self._alive:
            one.kill()
            one.wait(10)
        self._alive.clear()
