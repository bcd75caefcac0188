"""The page filter: dump level → which pages are kept, and whether the answer can be trusted.

A filter that is wrong destroys a dump without a sound. So it is held against what it can be held against: pages that
no dump may lack, the kernel's own count of free pages, pages that cannot be what they say. A class that fails is kept
whole: the dump gets a lower level, larger than asked for, and says so.

Memory: a window of classes (256 KiB), a block of struct pages, and the ranges of protected pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capture.kernel import protect, zones
from capture.kernel.address import KernelMemory
from capture.kernel.memmap import MemMap, NoMemMap, StructPages
from capture.kernel.pagerules import PageRules, RulesMissing, page_rules
from capture.kernel.pages import (
    CACHE,
    CACHE_BIT,
    CACHE_PRIVATE,
    CACHE_PRIVATE_BIT,
    CLASS_NAMES,
    FIRST,
    FREE,
    FREE_BIT,
    HWPOISON,
    KERNEL,
    LAST,
    OTHER,
    TABLES,
    TYPED,
    UNKNOWN,
    USER,
    USER_BIT,
    PageClassifier,
    excluded_classes,
)
from capture.memory.image import MemoryImage
from capture.notes import prstatus
from capture.vmcore import Vmcore

WINDOW_PAGES = 1 << 18
"""Pages whose classes are worked out together."""

ZERO_BIT = 1

_LOOKED_UP = 64
"""Segments of the direct map that are looked up, a large machine has a few; and tables of the kernel's text area."""
_TEXT_AREA = 1 << 31
"""The last bytes of the address space, where the kernel's text, its modules and the fixmap are on x86_64."""

_BITS = {FREE: FREE_BIT, CACHE: CACHE_BIT, CACHE_PRIVATE: CACHE_PRIVATE_BIT, USER: USER_BIT}
_FREE_SLACK, _FREE_SHARE = 2048, 0.01
"""How far the free pages found may be from the kernel's count: CPUs were stopped in the middle of something, and a
largest block is 1024 pages."""
_PROTECTED_SLACK, _PROTECTED_SHARE = 16, 0.001
_POISONED_SLACK, _POISONED_SHARE = 4096, 0.001
"""More poisoned pages than any machine goes on running with."""
_PER_CPU_PAGES = 16
"""Pages behind a CPU's own variables that have what was allocated while the kernel booted (8 KiB for modules and 28
KiB, include/linux/percpu.h), which drgn reads for stacks. Their turn only: what is behind was given back."""
MAX_POISONED_PROTECTED = 16
"""Pages of the kernel's own that are left out because they are marked poisoned: reading one may cost the whole dump;
believing a damaged mem_map would."""
_IMPOSSIBLE_SLACK, _IMPOSSIBLE_SHARE = 16, 0.01
"""A few damaged struct pages are what crashes are made of; more of them say that the rules are wrong."""


class Window(NamedTuple):
    """Classes of the pages from ``first_pfn`` on, which of them there are, and in which turn they are to be saved."""

    first_pfn: int
    kinds: NDArray[np.uint8]
    there: NDArray[np.bool_]
    turns: NDArray[np.uint8]


Note = Callable[[int, Iterable[NDArray[np.bool_]]], object]
"""Told, for pages from a first PFN on, which are to be saved in each turn but the last."""


@dataclass(slots=True)
class Census:
    """What one scan counted, in pages. ``classes`` counts pages that there are, ``protected`` what else they said."""

    classes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(CLASS_NAMES), dtype=np.int64))
    protected: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((len(protect.KINDS), len(CLASS_NAMES)), dtype=np.int64)
    )
    free_found: int = 0
    poisoned: int = 0
    """Pages marked poisoned, whether they are there or not."""
    free_counted: int | None = None
    looked_at: dict[int, int] = field(default_factory=dict)
    impossible: dict[int, int] = field(default_factory=dict)

    def by_name(self) -> dict[str, int]:
        """Return the pages of each class."""
        return dict(zip(CLASS_NAMES, map(int, self.classes), strict=True))

    def kept(self, level: int) -> int:
        """Return how many pages a dump of this level has."""
        return int(self.classes[~excluded_classes(level)].sum())

    def rescued(self, level: int) -> dict[str, int]:
        """Return, by class, pages that a dump of this level keeps although struct page says that they may go."""
        left_out = excluded_classes(level)
        return {CLASS_NAMES[kind]: int(self.protected[:, kind].sum()) for kind in _BITS if left_out[kind]}


class Verdict(NamedTuple):
    """``level`` is the highest that is trusted of the one asked for; ``reasons`` say, a line each, why not more.

    ``poison`` is whether pages that are marked poisoned are to be left out.
    """

    level: int
    reasons: tuple[str, ...] = ()
    poison: bool = True


class PageFilter:
    """Classifies every page of a vmcore.

    ``unusable`` says why nothing can be told apart, None when the filter works.
    """

    def __init__(self, vmcore: Vmcore) -> None:
        self._image: MemoryImage = vmcore.image
        self.unusable: str | None = None
        self.census = Census()
        self._memory = KernelMemory(vmcore.image, vmcore.info, vmcore.core.machine)
        # A kernel that runs frees and takes pages meanwhile: there is nothing to hold against each other.
        self._free_counted = None if vmcore.live else zones.free_pages(self._memory, vmcore.info)
        self._rules: PageRules | None = None
        self._mem_map: MemMap | None = None
        self._protected: protect.ProtectedPages | None = None
        self._tables = np.zeros(0, dtype=np.int64)
        """PFNs of page tables that were walked."""
        try:
            self._rules = page_rules(vmcore.info)
            machine = vmcore.core.machine
            self._mem_map = MemMap(vmcore.image, self._memory, vmcore.info, machine, self._rules.size)
        except (RulesMissing, NoMemMap) as reason:
            self.unusable = str(reason)
            return
        self._walk_to_known_places(vmcore)
        cpus, _ = prstatus.parse(vmcore.notes.prstatus(), machine)
        pointers = [cpu.registers[prstatus.STACK_POINTER[machine]] for cpu in cpus]
        self._protected = protect.find_protected(
            vmcore.image, self._memory, vmcore.info, machine, self._mem_map, pointers
        )
        if self._memory.tables is not None:
            self._tables = np.array(sorted(self._memory.tables.walked), dtype=np.int64)

    def _walk_to_known_places(self, vmcore: Vmcore) -> None:
        """Walk the page tables as a reader of the dump does to understand it: of all that the kernel maps.

        Those of the text and of where segments begin come first, should there be more than are remembered. The direct
        map's are many where the kernel has split it, and nothing else tells them: no page type, no symbol.
        """
        tables = self._memory.tables
        if tables is None:
            return
        for linear in vmcore.image.linear_maps[:_LOOKED_UP]:
            tables.lookup(linear.virtual)
        if vmcore.core.machine == "x86_64":
            top = 1 << 64
            for _ in tables.mappings(top - _TEXT_AREA, top - 1, most_tables=_LOOKED_UP):
                pass
        tables.note_tables()

    @property
    def mem_map(self) -> MemMap | None:
        """Where the struct pages are."""
        return self._mem_map

    @property
    def protects(self) -> tuple[str, ...]:
        """The kinds of pages that were found and are kept whatever struct page says."""
        return self._protected.found if self._protected is not None else ()

    def windows(self, *, poison: bool = True) -> Iterator[Window]:
        """Classify all of memory, window by window; ``census`` is whole when the last one is taken."""
        census = self.census = Census(free_counted=self._free_counted)
        classifier = PageClassifier(self._rules, poison=poison) if self._rules is not None else None
        for first_pfn, blocks in self._blocks():
            count = min(WINDOW_PAGES, max(self._image.max_pfn - first_pfn, 0))
            kinds = np.full(count, UNKNOWN, dtype=np.uint8)
            turns = np.full(count, OTHER, dtype=np.uint8)
            for block in blocks:
                assert classifier is not None
                found = classifier.classify(block.pfn, block.rows)
                for start, end in block.unknown:
                    found[start:end] = UNKNOWN
                start = block.pfn - first_pfn
                kinds[start : start + len(found)] = found
                turns[start : start + len(found)] = classifier.turns
            window = Window(first_pfn, kinds, self._image.holds(first_pfn, count), turns)
            self._protect(window, census)
            census.classes += _count(kinds, window.there)
            yield window
        if classifier is not None:
            census.free_found = classifier.free_pages
            census.poisoned = classifier.poisoned_pages
            census.looked_at = classifier.oddities.looked_at
            census.impossible = classifier.oddities.impossible

    def _blocks(self) -> Iterator[tuple[int, Iterable[StructPages]]]:
        """Yield each window that has memory or struct pages: its first PFN, and its struct pages block by block."""
        blocks = self._mem_map.blocks() if self._mem_map is not None else iter(())
        groups = groupby(blocks, key=lambda block: block.pfn - block.pfn % WINDOW_PAGES)
        group = next(groups, None)
        for first_pfn in self._image.inhabited(WINDOW_PAGES):
            while group is not None and group[0] < first_pfn:  # memory that came after the crash kernel was loaded
                yield group
                group = next(groups, None)
            if group is not None and group[0] == first_pfn:
                yield group
                group = next(groups, None)
            else:
                yield first_pfn, ()
        while group is not None:
            yield group
            group = next(groups, None)

    def kept(
        self, level: int, *, poison: bool = True, note: Note | None = None
    ) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """Yield (first PFN, which pages are kept) of each window for a dump level.

        ``note`` is told in which turns they are to be saved.
        """
        left_out = excluded_classes(level)
        for window in self.windows(poison=poison):
            if note is not None:
                kernel = window.there & (window.kinds == KERNEL)
                note(window.first_pfn, (kernel & (window.turns == turn) for turn in range(LAST)))
            yield window.first_pfn, window.there & ~left_out[window.kinds]

    def verdict(self, level: int) -> Verdict:
        """Judge a dump level by the census of the scan before."""
        if self.unusable is not None:
            wanted = level & ~ZERO_BIT
            return Verdict(level & ZERO_BIT, (self.unusable,) if wanted else ())
        assert self._rules is not None
        reasons: list[str] = []
        refused = 0
        for bit, key in self._rules.missing.items():
            if level & bit:
                refused |= bit
                reasons.append(f"level bit {bit} needs {key}, which VMCOREINFO does not have")
        for bit, reason in self._doubts():
            if level & bit & ~refused:
                refused |= bit
                reasons.append(reason)
        if refused & CACHE_BIT:
            refused |= CACHE_PRIVATE_BIT  # which implies it
        described = int(self.census.classes.sum())
        poison = self.census.poisoned <= max(_POISONED_SLACK, _POISONED_SHARE * described)
        if not poison:
            reasons.append(f"{self.census.poisoned} pages are marked poisoned: mem_map is damaged; reading them too")
        return Verdict(level & ~refused, tuple(reasons), poison)

    def _doubts(self) -> Iterator[tuple[int, str]]:
        """Yield (level bit, why pages of its class cannot be trusted)."""
        census = self.census
        if census.free_counted is not None:
            off = abs(census.free_found - census.free_counted)
            if off > max(_FREE_SLACK, _FREE_SHARE * census.free_counted):
                yield FREE_BIT, f"{census.free_found} free pages found, the kernel counts {census.free_counted}"
        # The last kinds may hold what is not the kernel's own.
        own = census.protected[: protect.VMALLOC]
        total = int(own.sum())
        for kind, bit in _BITS.items():
            name = CLASS_NAMES[kind]
            said = int(own[:, kind].sum())
            if said > max(_PROTECTED_SLACK, _PROTECTED_SHARE * total):
                where = protect.KINDS[int(own[:, kind].argmax())]
                yield bit, f"{said} pages of the kernel's own ({where}) look like {name} pages"
            odd, looked_at = census.impossible.get(kind, 0), census.looked_at.get(kind, 0)
            if odd > max(_IMPOSSIBLE_SLACK, _IMPOSSIBLE_SHARE * looked_at):
                yield bit, f"{odd} of {looked_at} {name} pages cannot be what their struct page says"

    def _protect(self, window: Window, census: Census) -> None:
        """Keep what is protected, but for a few poisoned pages, which must not be read."""
        if self._protected is None:
            return
        for start, end, kind in self._protected.within(window.first_pfn, len(window.kinds)):
            part, there = window.kinds[start:end], window.there[start:end]
            turns = window.turns[start:end]
            turns[:] = np.minimum(turns, TYPED) if kind == protect.VMALLOC else FIRST  # (vmalloc has stacks, modules)
            if kind == protect.PER_CPU:
                after = window.turns[end : end + _PER_CPU_PAGES]
                after[:] = np.minimum(after, TYPED)
            if not part.any():  # all of them KERNEL, as it should be
                census.protected[kind, KERNEL] += end - start
                continue
            poisoned = np.flatnonzero(part == HWPOISON)
            believed = poisoned[: max(0, MAX_POISONED_PROTECTED - int(census.protected[:, HWPOISON].sum()))]
            census.protected[kind] += _count(part, there)
            part[:] = KERNEL
            part[believed] = HWPOISON
        tables = self._tables[
            slice(*np.searchsorted(self._tables, [window.first_pfn, window.first_pfn + len(window.kinds)]))
        ]
        window.turns[tables - window.first_pfn] = TABLES


def _count(kinds: NDArray[np.uint8], there: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the pages of each class; comparing bytes class by class is five times as fast as bincount."""
    chosen = kinds if there.all() else kinds[there]
    counts = np.zeros(len(CLASS_NAMES), dtype=np.int64)
    for kind in range(1, int(chosen.max(initial=0)) + 1):
        counts[kind] = np.count_nonzero(chosen == kind)
    counts[KERNEL] = len(chosen) - counts.sum()
    return counts
