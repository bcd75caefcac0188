"""What drgn makes of a dump that a disturbed save has left."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import drgn

from tests.builders import PAGE
from tests.readers import drgn_reader


def wrong_for_drgn(path: Path, right: dict[int, bytes], bad: Collection[int]) -> Iterator[str]:
    """Say, a line each, what drgn does not read as it is in ``right``, or reads though it was not written."""
    try:
        read = drgn_reader(path)
    except Exception as error:  # (whatever it raises, it does not open)
        yield f"drgn does not open it: {error}"
        return
    for pfn, page in right.items():
        try:
            if read(pfn * PAGE, PAGE) != page:
                yield f"drgn reads PFN {pfn:#x} otherwise"
        except drgn.FaultError as error:
            yield f"drgn does not read PFN {pfn:#x}: {error}"
    for pfn in list(bad)[:3]:
        try:
            read(pfn * PAGE, PAGE)
            yield f"drgn reads PFN {pfn:#x}, which was not written"
        except drgn.FaultError:
            pass
