"""What a dump would weigh before it is written: pages by class, and what a sample of each class compresses to.

One scan of mem_map and a few hundred pages of each class, spread over all of memory; the rest is arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capture.copier import find_zero_pages
from capture.dumpfile import kdump
from capture.dumpfile.codec import Codec
from capture.kernel.pages import CLASS_NAMES, HWPOISON, OFFLINE, excluded_classes
from capture.memory.image import MemoryImage
from capture.pagefilter import WINDOW_PAGES, Census, PageFilter

SAMPLE_PAGES = 512
"""Pages of a class that are read and compressed."""
_LEAST_PER_WINDOW = 8
_NEVER_READ = (HWPOISON, OFFLINE)


class Sample(NamedTuple):
    """What pages of one class come to: the share of zero pages, and bytes a page with and without zero pages."""

    pages: int
    zero_share: float
    bytes_per_page: float
    bytes_per_other_page: float


class Survey(NamedTuple):
    """Pages by class and a sample of each; what dumps of every level would weigh."""

    census: Census
    samples: dict[int, Sample]
    page_size: int
    max_mapnr: int
    notes_size: int

    def pages(self, level: int) -> int:
        """Return how many pages a dump of this level would have."""
        return self.census.kept(level)

    def size(self, level: int) -> int:
        """Return about how many bytes a dump of this level would have."""
        left_out = excluded_classes(level)
        data = float(self.page_size if level & 1 else 0)
        for kind, pages in enumerate(map(int, self.census.classes)):
            sample = self.samples.get(kind)
            if left_out[kind] or not pages:
                continue
            if sample is None:
                data += pages * self.page_size
            elif level & 1:
                data += pages * (1 - sample.zero_share) * sample.bytes_per_other_page
            else:
                data += pages * sample.bytes_per_page
        layout = kdump.Layout(self.page_size, self.notes_size, self.max_mapnr, self.pages(level))
        return layout.data + int(data)


def take_survey(image: MemoryImage, page_filter: PageFilter, codec: Codec, notes_size: int) -> Survey:
    """Scan, and read a sample. Poisoned and offline pages are never read."""
    chosen: dict[int, list[NDArray[np.int64]]] = {kind: [] for kind in range(len(CLASS_NAMES))}
    count = sum(1 for _ in image.inhabited(WINDOW_PAGES))
    quota = max(_LEAST_PER_WINDOW, SAMPLE_PAGES // max(1, count))
    for window in page_filter.windows():
        for kind, some in chosen.items():
            if kind not in _NEVER_READ:
                found = np.flatnonzero((window.kinds == kind) & window.there)
                step = max(1, len(found) // quota)
                if len(found):
                    some.append(window.first_pfn + found[step // 2 :: step][:quota])
    samples = {kind: _sample(image, codec, np.concatenate(some)) for kind, some in chosen.items() if some}
    return Survey(page_filter.census, samples, image.page_size, image.max_pfn, notes_size)


def _sample(image: MemoryImage, codec: Codec, pfns: NDArray[np.int64]) -> Sample:
    if len(pfns) > SAMPLE_PAGES:
        pfns = pfns[:: -(-len(pfns) // SAMPLE_PAGES)]
    size = image.page_size
    total = zeros = 0
    with_zeros = without = 0
    for chunk in image.chunks(_single(pfns)):
        block = image.fetch(chunk)
        zero = find_zero_pages(block, size)
        if codec.pack is None:
            packed = np.full(len(zero), size, dtype=np.int64)
        else:
            packed = np.minimum(codec.pack(block.buffer, block.offsets, size)[1], size)
        total += len(zero)
        zeros += int(zero.sum())
        with_zeros += int(packed.sum())
        without += int(packed[~zero].sum())
    return Sample(total, zeros / max(1, total), with_zeros / max(1, total), without / max(1, total - zeros))


def _single(pfns: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    for pfn in pfns.tolist():
        yield pfn, 1
