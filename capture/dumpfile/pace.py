"""Chooses the zstd level of ``zstd:auto`` while the dump is written: the one at which neither disk nor CPUs wait.

Two things are measured all along. What each level costs and gives, on a few pages of the dump itself: CPU seconds and
bytes a page. And what the target takes: bytes a second, from the steps that the writer syncs. A level is as fast as the
slower of the two makes it. Of those that are nearly as fast as the fastest, the one with the smallest file is taken.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from capture.dumpfile.writer import Step

LEVELS = (-20, -10, -5, -3, -1, 1, 3)
"""What is chosen from. Faster than -20 is hardly faster; above 3, 4 KiB pages become no smaller to speak of."""
FIRST_LEVEL = -1
"""Of the pages that other threads have at hand while the first sample is taken."""
SAMPLE_PAGES = 64
SAMPLE_EVERY = 1 << 15
"""Pages between two samples: they take less than 2 % of the time."""
NEARLY = 0.8
"""As good as the fastest: on a fast disk the next levels make files smaller by a quarter for a tenth of the time."""
PAGE_SECONDS = 2e-6
"""What a page takes besides its compression: to be mapped, looked at, written."""
_NEW_SHARE = 0.5
"""How much a new measurement counts against those before it; of the target's speed, in its logarithm."""
_BLOCKED = 0.3
"""From this share of the time spent on the disk on, the disk is what the dump waits for."""
ASSUMED_SPEED = 150e6
"""Bytes a second that a target is taken for before its first step tells: what it writes until then is not lost on a
slow disk, and hardly slower on a fast one."""
_PROBE = 1.25
"""How much faster than shown a target is taken to be from one step to the next, while nothing waits for it."""


@dataclass(slots=True)
class Cost:
    """What a page takes at one level: CPU ``seconds``, and ``size`` in bytes."""

    seconds: float
    size: float


class Pace:
    """The level to compress with now. Safe to call from threads."""

    def __init__(self) -> None:
        self.threads = 1
        """How many threads compress."""
        self.level = FIRST_LEVEL
        self.pages: Counter[int] = Counter()
        """Pages compressed, by level."""
        self.target_speed: float | None = None
        """Bytes a second that the target takes, None until a step has reached it."""
        self._bound_only = True
        """Whether that speed is one that was never reached: nothing waited for the target so far, or lately."""
        self._costs: dict[int, Cost] = {}
        self._until_sample = 0
        self._lock = threading.Lock()

    def begin(self, pages: int) -> tuple[int, bool]:
        """Return the level for the next pages, and whether a sample of them is wanted."""
        with self._lock:
            self.pages[self.level] += pages
            self._until_sample -= pages
            wanted = self._until_sample <= 0
            if wanted:
                self._until_sample = SAMPLE_EVERY
            return self.level, wanted

    def sampled(self, costs: Mapping[int, Cost]) -> None:
        """Take in what each level cost on the same pages."""
        with self._lock:
            for level, new in costs.items():
                cost = self._costs.setdefault(level, new)
                cost.seconds += (new.seconds - cost.seconds) * _NEW_SHARE
                cost.size += (new.size - cost.size) * _NEW_SHARE
            self._choose()

    def stepped(self, step: Step) -> None:
        """Take in how long the target took over a step.

        A step that nothing waited for shows only a bound: what was written back before its sync is not in that time.
        """
        shown = step.size / max(step.seconds, 1e-6)
        bound = step.size / max(step.sync, 1e-6)
        with self._lock:
            before = self.target_speed
            if step.blocked >= _BLOCKED * step.seconds:
                known = None if self._bound_only else before
                self.target_speed = shown if known is None else known ** (1 - _NEW_SHARE) * shown**_NEW_SHARE
                self._bound_only = False
            else:
                self.target_speed = max(shown, bound if before is None else min(before * _PROBE, bound))
                self._bound_only = True
            self._choose()

    def _choose(self) -> None:
        if not self._costs:
            return
        speeds = {level: self._speed(cost) for level, cost in self._costs.items()}
        enough = NEARLY * max(speeds.values())
        self.level = max(level for level, speed in speeds.items() if speed >= enough)

    def _speed(self, cost: Cost) -> float:
        """Return the pages a second that a level makes."""
        target = ASSUMED_SPEED if self.target_speed is None else self.target_speed
        return min(self.threads / (cost.seconds + PAGE_SECONDS), target / max(cost.size, 1.0))
