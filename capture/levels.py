"""Dump levels as people write them: ``31``, or ``1,17,31`` to take the first one that fits.

The bits are makedumpfile's: 1 zero pages, 2 page cache, 4 page cache with private data (4 implies 2), 8 user pages,
16 free pages. Poisoned and offline pages are never saved.
"""

from __future__ import annotations

from capture.errors import UsageError

MAX_LEVEL = 31
MAX_LEVELS = 32


def parse_levels(text: str) -> tuple[int, ...]:
    """Return the dump levels of a list, in its order.

    Raises:
        UsageError: it is no list of numbers from 0 to 31.
    """
    words = text.split(",")
    if len(words) > MAX_LEVELS:
        raise UsageError(f"{len(words)} dump levels: at most {MAX_LEVELS}")
    for word in words:
        if not (word.isascii() and word.isdecimal() and len(word) <= 2 and int(word) <= MAX_LEVEL):
            raise UsageError(f"{text}: a dump level is a number from 0 to {MAX_LEVEL}, or several: 1,17,31")
    return tuple(int(word) for word in words)
