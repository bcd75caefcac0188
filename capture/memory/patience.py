"""An upper bound on the time that bad memory may cost.

A page that cannot be read fails at once on most machines. A failing disk below a vmcore takes seconds for each, and
memory behind a dying bus may too: at a second a page a gigabyte takes three days. So the source is cut into regions,
and one in which failed reads took too long is given up: what is left of it counts as unreadable, unread.

The bound: ``MOST_SECONDS``, and one failed read for each bad region.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

REGION = 64 << 20
"""Bytes of the source that are given up together."""
REGION_SECONDS, MOST_SECONDS = 10.0, 120.0
"""What failed reads may take in one region, and in all of them; after that, the first one of a region is the last."""
_MOST_REGIONS = 4096
"""Regions that are remembered; beyond that the oldest ones are tried again."""


class Patience:
    """Counts the time that failed reads take; for several threads at once."""

    def __init__(self) -> None:
        self._lost: dict[int, float] = {}
        """Seconds, by region, the one that failed first before the others."""
        self._all = 0.0
        self._lock = threading.Lock()
        self.not_tried = 0
        """Pages that nobody tried to read."""

    def given_up(self, offset: int) -> bool:
        """Whether the region that byte ``offset`` of the source lies in is worth no try any more."""
        if not self._lost:
            return False
        lost = self._lost.get(offset // REGION)
        return lost is not None and (lost >= REGION_SECONDS or self._all >= MOST_SECONDS)

    def count(self, offset: int) -> None:
        """Count a page at ``offset`` that could not be had, if that is because its region is given up."""
        if self.given_up(offset):
            with self._lock:
                self.not_tried += 1

    @contextmanager
    def reading(self, offset: int) -> Iterator[None]:
        """Around a read at ``offset``: where it raises OSError, its time is lost."""
        started = time.monotonic()
        try:
            yield
        except OSError:
            self._failed(offset // REGION, time.monotonic() - started)
            raise

    def _failed(self, region: int, seconds: float) -> None:
        with self._lock:
            self._all += seconds
            self._lost[region] = self._lost.get(region, 0.0) + seconds
            if len(self._lost) > _MOST_REGIONS:
                del self._lost[next(iter(self._lost))]
